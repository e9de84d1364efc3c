"""Write model cards from records and results."""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedConfig

from .. import __version__
from ..api import Segmenter
from ..evaluation.protocols import PROTOCOLS
from ..evaluation.tables import Result, load_papers, make_tables, to_markdown
from ..models.networks import NETWORKS
from ..training.checkpoints import Conversion, Progress, is_one_of
from ..training.recipe import Recipe, restore_recipe
from ..utils.errors import UserError, one_line
from ..utils.files import is_hub_id
from ..utils.images import size_text
from ..utils.markdown import markdown_table
from .shipped import HEADER


TASK = "image-segmentation"
MISSING = "–"


@dataclass(frozen=True)
class Training:
    """Record of a training, and of what it began with."""

    recipe: Recipe
    progress: Progress
    whole: Progress | None = None  # of the last checkpoint, which may be later
    before: "Training | Conversion | None" = None

    @property
    def run(self) -> Progress:
        """Return the record of the whole run, or that of the checkpoint."""
        return self.whole or self.progress

    def chain(self) -> "list[Training]":
        """Return this training and those before it, the first one last."""
        return [self, *(self.before.chain() if isinstance(self.before, Training) else [])]

    def data(self) -> list[dict[str, Any]]:
        """Return the data sets of this training, then those of earlier ones."""
        own = {_set_key(one) for one in self.progress.data}
        earlier = {_set_key(one): one for training in reversed(self.chain()[1:]) for one in training.progress.data}
        return [*self.progress.data, *(one for key, one in earlier.items() if key not in own)]

    def conversion(self) -> Conversion | None:
        """Return the conversion of the weights that the first training began with."""
        return self.chain()[-1].before

    def starts(self) -> list[dict[str, Any]]:
        """Return the weights that the trainings of the chain began with."""
        return [one.progress.start for one in self.chain() if one.progress.start]


def _set_key(recorded: Mapping[str, Any]) -> tuple:
    """Return what tells a data set from others, wherever its folder lies."""
    return recorded.get("title"), Path(recorded["path"]).name, *sorted(recorded["images"].items())


@contextmanager
def _damage_explained() -> Iterator[None]:
    """Turn errors while a record is read into a `UserError`."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, OmegaConfBaseException) as error:
        what = f"the record of the weights (progress.json or conversion.json) is damaged: {type(error).__name__}"
        raise UserError(f"{what} {one_line(error)}; restore it, or remove it") from error


def from_record(record: Mapping[str, Any] | None, whole: Progress | None = None) -> Training | Conversion | None:
    """Return a training or conversion from the record beside its weights.

    Raises:
        UserError: If the record is damaged.
    """
    if record is None:
        return None
    with _damage_explained():
        if "files" in record:
            return Conversion(**record)
        progress = Progress(**record)
        if progress.recipe is None:
            return None
        before = from_record(progress.start["before"]) if progress.start and progress.start.get("before") else None
        return Training(restore_recipe(progress.recipe), progress, whole, before)


@dataclass(frozen=True)
class Shipment:
    """What the card of a network that ships says beyond the records.

    Attributes:
        name: Of the network.
        text: Its entry in `shipped.yaml`.
        facts: The header's facts, with the names of `shipped.Shipped`.
        false_alarms: Images without an object where something was found, and all without an object.
        figure: File name of a picture of failures.
        figure_text: What the picture shows.
    """

    name: str
    text: Mapping[str, Any]
    facts: Mapping[str, Any]
    false_alarms: tuple[int, int] | None
    figure: str
    figure_text: str


def network_name(config: PreTrainedConfig) -> str:
    """Return a network's key in `NETWORKS`, or raise a `UserError`."""
    for name, network in NETWORKS.items():
        if network.config_class.model_type == config.model_type:
            return name
    got = f"got a model of type {config.model_type!r}"
    raise UserError(f"{got}, expected one of this project; choose {' or '.join(NETWORKS)}")


@cache
def is_on_hub(name: str | None, repo_type: str) -> bool:
    """Return whether a name is a public repository on the Hub.

    `data/mine` can be a repository or a local folder; only the Hub knows. Without an answer: False.
    """
    if not name or not is_hub_id(name) or Path(name).exists():
        return False
    try:
        return HfApi(token=False).repo_exists(name, repo_type=repo_type)
    except (HTTPError, OSError, HFValidationError):
        return False


def without_folders(text: str) -> str:
    """Shorten local paths in a text to their names. URLs stay."""
    path = r"""(^|[\s='"(])(?:file://)?(?:~|\.\.?)?/(?:[^\s'"()]*/)?([^\s'"()/]+)/?"""
    return re.sub(path, r"\1.../\2", text, flags=re.MULTILINE)


def make_model_card(
    segmenter: Segmenter,
    repo_id: str,
    origin: Training | Conversion | None = None,
    results: Sequence[Result] = (),
    license: str | None = None,
    shipment: Shipment | None = None,
) -> str:
    """Fill the template `card_model.md` for a segmentation network.

    `origin` is the record of its weights. `license` is theirs, an identifier of the Hub's list. Without one the card
    says so. `shipment` is for a network that ships with the package.
    """
    network = network_name(segmenter.model.config)
    folder = resources.files(__package__)
    paper = yaml.safe_load(folder.joinpath("networks.yaml").read_text(encoding="utf-8"))[network]
    # In its own tables the model has one name.
    name = repo_id.rpartition("/")[2]
    named = [", ".join((name, *result.settings)) if len(results) > 1 else name for result in results]
    results = [
        replace(result, name=shown, sources=tuple(map(without_folders, result.sources)))
        for result, shown in zip(results, named, strict=True)
    ]
    training = origin if isinstance(origin, Training) else None
    recipe, facts, sets, bases = None, {"data": None}, [], set()
    if training:
        with _damage_explained():
            recipe, sets = training.recipe, training.data()
            bases = {start["source"] for start in training.starts() if start.get("from_hub", True)}
            facts = {"data": _data_facts(training), **_training_facts(training)}
            facts["earlier"] = [_training_facts(one) for one in training.chain()[1:]]
    rows = [row for result in results for row in _result_rows(result)]
    if shipment and shipment.false_alarms:
        found, empty = shipment.false_alarms
        named = {"metric_type": "false_alarm_share", "metric_name": "false alarms, share of images without an object"}
        rows.append(replace(rows[0], **named, metric_value=found / empty, metric_config=None, metric_args=None))
    header = ModelCardData(
        license=license or "unknown",
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["unconceal", network, *paper["tags"]],
        datasets=[one["path"] for one in sets if one["from_hub"] and is_on_hub(one["path"], "dataset")] or None,
        base_model=sorted(base for base in bases if is_on_hub(base, "model")) or None,
        model_name=name,
        eval_results=rows or None,
        **({"license_name": shipment.text.get("license_name"), HEADER: dict(shipment.facts)} if shipment else {}),
    )
    card = ModelCard.from_template(
        header,
        template_str=folder.joinpath("card_model.md").read_text(encoding="utf-8"),
        name=name,
        repo_id=repo_id,
        network=network,
        paper=paper,
        bibtex=_bibtex(f"{network}{paper['year']}", paper),
        version=__version__,
        parameters=f"{segmenter.model.num_parameters() / 1e6:.2f}",
        size=size_text((segmenter.processor.size.width, segmenter.processor.size.height)),
        resizes=segmenter.processor.do_resize,
        smallest=size_text((segmenter.model.min_image_size,) * 2),
        recipe=recipe,
        **facts,
        conversion=training.conversion() if training else origin,
        origin=origin,
        shipment=shipment,
        use=use_on_hub(repo_id),
        model_class=type(segmenter.model).__name__,
        results=_result_facts(results, recipe) if results else None,
        figures=_paper_figures(network),
        weights_license=license,
    )
    return f"{card}\n"


def _bibtex(key: str, paper: dict[str, Any]) -> str:
    fields = {"title": f"{{{paper['title']}}}", "author": paper["authors"], **paper["published_in"]}
    fields |= {"year": paper["year"], "url": paper["url"]}
    lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
    return f"@{paper['entry']}{{{key},\n{lines}}}"


def use_on_hub(repo_id: str) -> str:
    """Return the section of a card about a network on the Hub."""
    text = resources.files(__package__).joinpath("card_use.md").read_text(encoding="utf-8")
    return text.replace("OWNER/NAME", repo_id).strip()


def _data_facts(training: Training) -> dict[str, Any]:
    data = training.recipe.data
    facts = {name: getattr(data, name) for name in ("train_split", "eval_split", "split_seed")}
    own, sets = len(training.progress.data), training.data()
    titles = [one.get("title") for one in sets]
    sets = [{**_set_facts(one, titles), "is_earlier": number >= own} for number, one in enumerate(sets)]
    shares = ""
    if data.weights:
        names = {each["path"]: each["name"] for each in sets[:own]}
        weighted = zip(data.paths, data.weights, strict=True)
        shares = ", ".join(f"{names[path]} {weight / sum(data.weights):.0%}" for path, weight in weighted)
    return facts | {"sets": sets, "shares": shares}


def _set_facts(recorded: Mapping[str, Any], titles: list[str | None]) -> dict[str, Any]:
    is_linked = recorded["from_hub"] and is_on_hub(recorded["path"], "dataset")
    title, folder = recorded.get("title"), Path(recorded["path"]).name
    name = f"{title} ({folder})" if title and titles.count(title) > 1 else title or folder
    facts = {**recorded, "name": name, "is_linked": is_linked}
    counts = (f"{number} in `{split}`" for split, number in recorded["images"].items())
    return facts | {"has_card": "sections" in recorded, "counts": ", ".join(counts)}


def _training_facts(training: Training) -> dict[str, Any]:
    recipe = yaml.safe_dump(training.progress.recipe, sort_keys=False)
    return {
        "phases": _phase_table(training),
        "run": _run_facts(training),
        "recipe_yaml": without_folders(recipe).strip(),
    }


def _run_facts(training: Training) -> dict[str, Any]:
    """Return how the run went."""
    run = training.run

    def each(values: Sequence[str | None]) -> str:
        return ", then ".join(dict.fromkeys(filter(None, values)))

    commits = [session["git_commit"] for session in run.sessions]
    start = run.start and {**run.start, "source": _path_name(run.start)}
    return {
        "command": each([without_folders(session["command"] or "") for session in run.sessions]),
        "commit": each([commit and commit.replace("-dirty", " with uncommitted changes") for commit in commits]),
        "hardware": each([_machine(session) for session in run.sessions]),
        # A recipe may leave it to `accelerate launch`.
        "precision": each([one.get("mixed_precision") for one in run.sessions]) or training.recipe.mixed_precision,
        "minutes": round(sum(row.get("total_seconds", row["seconds"]) for row in run.history) / 60),
        "epochs": run.epoch,
        "best_epoch": training.progress.epoch,
        "start": start,
    }


def _machine(session: Mapping[str, Any]) -> str:
    cpu = f"{session['threads']} of {session['cpus']} cores ({session['processor']})"
    return f"{session['accelerator'] or cpu}, torch {session['torch']}"


def _phase_table(training: Training) -> str:
    header, done = ("phase", "optimizer", "schedule", "batch", "epochs"), training.progress
    phase = training.recipe.phases[done.task]
    optimizer, schedule = phase.optimizer, phase.schedule
    processes = f", {done.num_processes} processes" if done.num_processes > 1 else ""
    updates = f"{optimizer.name}, {optimizer.learning_rate:g}, decay {optimizer.weight_decay:g}"
    rates = f"{schedule.name}, {schedule.warmup_steps} warm-up steps"
    batch = str(phase.batch_size * phase.gradient_accumulation_steps)
    epochs = f"{done.epoch} of {phase.epochs} ({done.step} steps{processes})"
    return markdown_table(header, [(done.task, updates, rates, batch, epochs)])


def _path_name(start: Mapping[str, Any]) -> str:
    """Return a Hub id, a path's last part, or RUN/TASK/best."""
    path = Path(start["source"])
    if start.get("from_hub"):
        return start["source"]
    return "/".join(path.parts[-3:]) if path.name in ("best", "last") else path.name


def _result_facts(results: Sequence[Result], recipe: Recipe | None) -> dict[str, Any]:
    def is_chosen_on(result: Result) -> bool:
        data = recipe.data
        is_same = result.data is None or is_one_of(result.data, data.paths)
        return is_same and (result.split, result.split_seed) == (data.eval_split, data.split_seed)

    protocols = {result.protocol.name: sys.modules[result.protocol.score_image.__module__] for result in results}
    return {
        "tables": to_markdown(make_tables(results, with_papers=False)),
        "has_chosen": recipe and any(map(is_chosen_on, results)),
        "commands": [without_folders(result.command) for result in results if result.command],
        "protocols": {name: inspect.getdoc(module) for name, module in protocols.items()},
    }


def _paper_figures(network: str) -> dict[str, list[str]]:
    """Return tables of the paper's own figures, and notes on them."""
    benchmarks, published = load_papers()
    rows = [row for row in published if row.method == network.upper() and row.source.startswith(network.upper())]
    tables = []
    for protocol in dict.fromkeys(benchmarks[row.benchmark].protocol for row in rows):
        own = [row for row in rows if benchmarks[row.benchmark].protocol == protocol]
        columns = PROTOCOLS[protocol].columns
        metrics = list(dict.fromkeys(metric for row in own for metric in row.figures))
        lines = []
        for row in own:
            figures = [columns[m].format(row.figures[m]) if m in row.figures else MISSING for m in metrics]
            lines.append((row.benchmark, row.backbone or MISSING, row.source.partition(", ")[2], *figures))
        tables.append(markdown_table(["test set", "encoder", "where", *(columns[m].title for m in metrics)], lines))
    return {"tables": tables, "notes": list(dict.fromkeys(note for row in rows for note in row.notes))}


def _result_rows(result: Result) -> list[EvalResult]:
    """Return rows of `model-index`."""
    data = result.benchmark or ", ".join(result.sources) or "unknown"
    slug = re.sub(r"[^\w-]+", "-", data).strip("-").lower()
    return [
        EvalResult(
            task_type=TASK,
            task_name="Image segmentation",
            dataset_type=result.data if is_on_hub(result.data, "dataset") else slug,
            dataset_name=data,
            dataset_split=result.split,
            dataset_args={"num_images": result.num_images},
            metric_type=metric,
            metric_name=f"{column.title}, protocol {result.protocol.name}",
            metric_value=result.figures[metric],
            metric_config=result.protocol.name,
            metric_args=list(result.settings) or None,
        )
        for metric, column in result.protocol.columns.items()
        if metric in result.figures
    ]
