"""Write model cards from recorded facts: configuration, recipe, progress, results, data."""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, EvalResult, EvalResultEntry, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError
from transformers import PreTrainedConfig

from .. import __version__
from ..api import Segmenter
from ..evaluation.protocols import PROTOCOLS
from ..evaluation.tables import Result, load_papers, make_tables, to_markdown
from ..models.networks import NETWORKS
from ..training.checkpoints import Progress
from ..training.recipe import Recipe
from ..utils.errors import UserError, one_line
from ..utils.files import is_hub_id
from ..utils.images import size_text
from ..utils.markdown import markdown_table
from .shipped import HEADER


TASK = "image-segmentation"
MISSING = "–"


@dataclass(frozen=True)
class Training:
    """Record of a training."""

    recipe: Recipe
    task: str  # phase that the checkpoint is from
    progress: Progress | None = None
    whole: Progress | None = None  # of the last checkpoint, which may be later
    data_cards: Mapping[str, DatasetCard | None] = field(default_factory=dict)  # of data sets on this machine
    before: "Training | None" = None  # of the checkpoint that it began with

    @property
    def run(self) -> Progress | None:
        """Return the record of the whole run, or that of the checkpoint."""
        return self.whole or self.progress

    def chain(self) -> list["Training"]:
        """Return this training and those before it, the first one last."""
        return [self, *(self.before.chain() if self.before else [])]


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


def read_data_card(path: str | Path) -> DatasetCard | None:
    """Return the card in a data set's folder, or None without one."""
    file = Path(path) / "README.md"
    if not file.is_file():
        return None
    try:
        return DatasetCard.load(file)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the data set's card {file}: {one_line(error)}; correct it") from error


def split_counts(card: DatasetCard) -> dict[str, int]:
    """Return split -> number of pairs from the card's header."""
    info = card.data.to_dict().get("dataset_info")
    splits = info.get("splits") if isinstance(info, dict) else None
    splits = [split for split in splits if isinstance(split, dict)] if isinstance(splits, list) else []
    return {each["name"]: each["num_examples"] for each in splits if {"name", "num_examples"} <= each.keys()}


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


def section(card: DatasetCard, title: str) -> str | None:
    """Return the text under a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}\n+(.*?)(?=^## |\Z)", card.text, re.MULTILINE | re.DOTALL)
    return found.group(1).strip() if found else None


def make_model_card(
    segmenter: Segmenter,
    repo_id: str,
    training: Training | None = None,
    results: Sequence[Result] = (),
    license: str | None = None,
    shipment: Shipment | None = None,
) -> tuple[str, list[EvalResultEntry]]:
    """Fill the template `card_model.md` for a segmentation network.

    `license` is that of the weights, an identifier of the Hub's list. Without one the card says so, as for `training`.
    `shipment` is for a network that ships with the package.

    Returns:
        The text of `README.md`, and rows for the Hub's newer form of results, which only data sets of the Hub have.
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
    recipe = training.recipe if training else None
    phases = list(recipe.phases.values()) if recipe else []
    bases = {phase.init_from or phase.init_backbone_from for phase in phases}
    rows = [_result_rows(result) for result in results]
    if shipment and shipment.false_alarms:
        found, empty = shipment.false_alarms
        named = {"metric_type": "false_alarm_share", "metric_name": "false alarms, share of images without an object"}
        first = rows[0][0][0]
        rows.append(([replace(first, **named, metric_value=found / empty, metric_config=None, metric_args=None)], []))
    header = ModelCardData(
        license=license or "unknown",
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["unconceal", network, *paper["tags"]],
        datasets=[path for path in recipe.data.paths if is_on_hub(path, "dataset")] or None if recipe else None,
        base_model=sorted(base for base in bases if is_on_hub(base, "model")) or None,
        model_name=name,
        eval_results=[row for index_rows, _ in rows for row in index_rows] or None,
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
        smallest=size_text((segmenter.model.min_image_size,) * 2),
        data=_data_facts(training) if training else None,
        recipe=recipe,
        **(_training_facts(training) if training else {}),
        earlier=[_training_facts(one) for one in training.chain()[1:]] if training else [],
        shipment=shipment,
        use=use_on_hub(repo_id),
        model_class=type(segmenter.model).__name__,
        is_start_optional=any(phase.init_backbone_from and not phase.init_backbone_required for phase in phases),
        results=_result_facts(results, recipe) if results else None,
        figures=_paper_figures(network),
        weights_license=license,
    )
    return f"{card}\n", [row for _, hub_rows in rows for row in hub_rows]


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
    sets = [_set_facts(path, training.data_cards.get(path)) for path in data.paths]
    shares = []
    if data.weights:
        shares = [f"{one['name']} {w / sum(data.weights):.0%}" for one, w in zip(sets, data.weights, strict=True)]
    return facts | {"sets": sets, "shares": ", ".join(shares)}


def _set_facts(path: str, card: DatasetCard | None) -> dict[str, Any]:
    facts = {"name": Path(path).name, "has_card": card is not None}
    facts["on_hub"] = path if is_on_hub(path, "dataset") else None
    if card is not None:
        sections = {title: section(card, title) for title in ("Source", "Terms")}
        counts = split_counts(card)
        facts |= {
            "name": card.data.pretty_name or facts["name"],
            "splits": list(counts),
            "counts": ", ".join(f"{number} in `{split}`" for split, number in counts.items()),
            "facts": {title: text for title, text in sections.items() if text},
            "license": card.data.license,
        }
    return facts


def _training_facts(training: Training) -> dict[str, Any]:
    recipe = yaml.safe_dump(asdict(training.recipe), sort_keys=False)
    return {
        "phases": _phase_table(training),
        "run": _run_facts(training),
        "recipe_yaml": without_folders(recipe).strip(),
    }


def _run_facts(training: Training) -> dict[str, Any] | None:
    """Return how the run went, or None without a record."""
    run = training.run
    if not run or not run.sessions:
        return None

    def each(values: Sequence[str | None]) -> str:
        return ", then ".join(dict.fromkeys(filter(None, values)))

    commits = [session["git_commit"] for session in run.sessions]
    start = run.start and {**run.start, "source": _path_name(run.start["source"])}
    return {
        "command": each([without_folders(session["command"] or "") for session in run.sessions]),
        "commit": each([commit and commit.replace("-dirty", " with uncommitted changes") for commit in commits]),
        "hardware": each([_machine(session) for session in run.sessions]),
        "minutes": round(sum(row.get("total_seconds", row["seconds"]) for row in run.history) / 60),
        "epochs": run.epoch,
        "best_epoch": training.progress.epoch if training.progress else None,
        "start": start,
    }


def _machine(session: Mapping[str, Any]) -> str:
    cpu = f"{session['threads']} of {session['cpus']} cores ({session['processor']})"
    return f"{session['accelerator'] or cpu}, torch {session['torch']}"


def _phase_table(training: Training) -> str:
    header = ("phase", "optimizer", "schedule", "batch", "starts from", "epochs")
    rows = []
    for task, phase in training.recipe.phases.items():
        optimizer, schedule, epochs = phase.optimizer, phase.schedule, str(phase.epochs)
        start = phase.init_from or phase.init_backbone_from
        if task == training.task and (done := training.progress):
            processes = f", {done.num_processes} processes" if done.num_processes > 1 else ""
            epochs = f"{done.epoch} ({done.step} steps{processes})"
        updates = f"{optimizer.name}, {optimizer.learning_rate:g}, decay {optimizer.weight_decay:g}"
        rates = f"{schedule.name}, {schedule.warmup_steps} warm-up steps"
        batch = str(phase.batch_size * phase.gradient_accumulation_steps)
        start = start if is_on_hub(start, "model") else _path_name(start) if start else MISSING
        rows.append((task, updates, rates, batch, start, epochs))
    return markdown_table(header, rows)


def _path_name(start: str) -> str:
    """Return the last part of a path, or all of RUN/TASK/best."""
    path = Path(start)
    return "/".join(path.parts[-3:]) if path.name in ("best", "last") else path.name


def _result_facts(results: Sequence[Result], recipe: Recipe | None) -> dict[str, Any]:
    chosen_on = (recipe.data.eval_split, recipe.data.split_seed) if recipe else None
    protocols = {result.protocol.name: sys.modules[result.protocol.score_image.__module__] for result in results}
    return {
        "tables": to_markdown(make_tables(results, with_papers=False)),
        "has_chosen": recipe and any((result.split, result.split_seed) == chosen_on for result in results),
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


def _result_rows(result: Result) -> tuple[list[EvalResult], list[EvalResultEntry]]:
    """Return rows of `model-index`, and of `.eval_results` if on the Hub."""
    data = result.benchmark or ", ".join(result.sources) or "unknown"
    slug = re.sub(r"[^\w-]+", "-", data).strip("-").lower()
    is_public = is_on_hub(result.data, "dataset")
    protocol = result.protocol.name
    scored = ", ".join(filter(None, (f"split {result.split}", f"{result.num_images} images", *result.settings)))
    index_rows, hub_rows = [], []
    for metric, column in result.protocol.columns.items():
        if metric not in result.figures:
            continue
        index_rows.append(
            EvalResult(
                task_type=TASK,
                task_name="Image segmentation",
                dataset_type=result.data if is_public else slug,
                dataset_name=data,
                dataset_split=result.split,
                dataset_args={"num_images": result.num_images},
                metric_type=metric,
                metric_name=f"{column.title}, protocol {protocol}",
                metric_value=result.figures[metric],
                metric_config=protocol,
                metric_args=list(result.settings) or None,
            )
        )
        if is_public:
            notes = f"{column.title}, Unconceal protocol {protocol}; {scored}"
            value, task_id = result.figures[metric], f"{protocol}_{metric}"
            hub_rows.append(EvalResultEntry(result.data, task_id, value, date=result.date, notes=notes))
    return index_rows, hub_rows
