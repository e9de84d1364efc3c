"""Model cards, made from what is on record: configuration, recipe, progress, results, and the data set's own card."""

import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from huggingface_hub import DatasetCard, EvalResult, EvalResultEntry, HfApi, ModelCardData
from huggingface_hub.errors import HTTPError
from transformers import PreTrainedConfig

from .. import __version__
from ..api import Segmenter
from ..evaluation.protocols import PROTOCOLS
from ..evaluation.tables import Result, load_papers, make_tables, to_markdown
from ..models import NETWORKS
from ..training.checkpoints import Progress
from ..training.recipe import PhaseRecipe, Recipe
from ..utils.errors import UserError, one_line
from ..utils.files import is_hub_id
from ..utils.markdown import markdown_table


TASK = "image-segmentation"
CODE_LICENSE = "apache-2.0"
UNSTATED_LICENSE = "unknown"

LOADING = """\
from transformers import pipeline

find_object = pipeline("soft-image-segmentation", model="{id}", trust_remote_code=True)
mask = find_object("photo.jpg")["mask"]  # a grey picture of the photo's size, white where the object is
"""
LOADING_PARTS = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageSegmentation

model = AutoModelForImageSegmentation.from_pretrained("{id}", trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained("{id}", trust_remote_code=True)

image = Image.open("photo.jpg")
with torch.no_grad():
    outputs = model(**processor(images=image))
(probs,) = processor.post_process_masks(outputs, [(image.height, image.width)])  # (height, width) in [0, 1]
"""


@dataclass(frozen=True)
class Paper:
    """A network's paper, and what its cards say of every model.

    Attributes:
        title: Of the paper.
        authors: As BibTeX has them.
        venue: Where it appeared.
        year: When.
        url: Where it can be read.
        bibtex: Kind of entry, and its fields beside title, authors, year and URL.
        finds: What the network is for, after "finds".
        how: How it works, in sentences.
        limits: What it cannot do, beyond what holds for all.
        tags: Of the Hub.
    """

    title: str
    authors: str
    venue: str
    year: int
    url: str
    bibtex: tuple[str, dict[str, str]]
    finds: str
    how: str
    limits: tuple[str, ...]
    tags: tuple[str, ...]

    def to_bibtex(self, key: str) -> str:
        """Return the entry."""
        kind, own = self.bibtex
        fields = {"title": f"{{{self.title}}}", "author": self.authors, **own, "year": str(self.year), "url": self.url}
        lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
        return f"@{kind}{{{key},\n{lines}}}"


PAPERS = {
    "run": Paper(
        title="RUN: Reversible Unfolding Network for Concealed Object Segmentation",
        authors="He, Chunming and Zhang, Rihan and Xiao, Fengyang and Fang, Chengyu and Tang, Longxiang and Zhang, Yulun "
        "and Kong, Linghe and Fan, Deng-Ping and Li, Kai and Farsiu, Sina",
        venue="ICML 2025",
        year=2025,
        url="https://arxiv.org/abs/2501.18783",
        bibtex=("inproceedings", {"booktitle": "International Conference on Machine Learning"}),
        finds="objects that look like what surrounds them, such as camouflaged animals or polyps",
        how="It unfolds an optimisation into stages: each takes the mask of the one before, solves for foreground and "
        "background in closed form, and corrects both by learned networks. The output holds every stage's mask, edge and "
        "background.",
        limits=(
            "It answers with the most probable region even where nothing hides; look at how sure it is.",
            "This is the network of the paper's text and figures. The authors' release differs from them, and its weights "
            "do not fit.",
        ),
        tags=("camouflaged-object-detection", "concealed-object-segmentation"),
    ),
    "srs": Paper(
        title="SRSNetwork: Siamese Reconstruction-Segmentation Networks based on Dynamic-Parameter Convolution",
        authors="Nian, Bingkun and Tang, Fenghe and Ding, Jianrui and Zhang, Pingping and Yang, Jie and Zhou, S. Kevin and "
        "Liu, Wei",
        venue="IEEE TIP 2025",
        year=2023,
        url="https://arxiv.org/abs/2312.01741",
        bibtex=("article", {"journal": "arXiv preprint arXiv:2312.01741", "note": "IEEE TIP 2025"}),
        finds="faint targets of weak contrast, such as breast lesions in ultrasound or small targets in infrared",
        how="A network that was trained to rebuild the image is frozen, and what it sees sets the parameters of a "
        "convolution inside a second network, which segments.",
        limits=(
            "It knows one kind of image, that of its training data: a network for ultrasound says nothing about infrared.",
            "It is no medical device: no diagnosis may rest on it.",
        ),
        tags=("small-target-detection", "medical-imaging", "infrared"),
    ),
    "opds": Paper(
        title="One-stage Progressive Dichotomous Segmentation",
        authors="Zhu, Jing and Ahmed, Karim and Li, Wenbo and Shen, Yilin and Jin, Hongxia",
        venue="BMVC 2023",
        year=2023,
        url="https://proceedings.bmvc2023.org/77/",
        bibtex=("inproceedings", {"booktitle": "British Machine Vision Conference"}),
        finds="the main object of a picture with its fine parts: wires, holes, hair, fences",
        how="An encoder of convolutional attention, MSCAN, sees the picture at once, without tiles; a decoder draws a coarse "
        "mask and refines it level by level.",
        limits=(
            "Which of several objects is the main one is its own choice.",
            "No code or weights of the authors are public. This network follows their poster, which leaves the losses, the "
            "schedule and the fusion of the features open.",
        ),
        tags=("dichotomous-image-segmentation", "background-removal"),
    ),
}


@dataclass(frozen=True)
class Training:
    """What is on record of a training.

    Attributes:
        recipe: Its recipe.
        task: The phase that the checkpoint is from.
        progress: How far it had come.
        data_card: The data set's card, where the data set is at hand.
    """

    recipe: Recipe
    task: str
    progress: Progress | None = None
    data_card: DatasetCard | None = None


def network_name(config: PreTrainedConfig) -> str:
    """Return the key of `NETWORKS` that a configuration belongs to.

    Raises:
        UserError: If it belongs to none of ours.
    """
    for name, network in NETWORKS.items():
        if network.config_class.model_type == config.model_type:
            return name
    raise UserError(f"got a model of type {config.model_type!r}, expected one of this project: {', '.join(NETWORKS)}")


def read_data_card(path: str | Path) -> DatasetCard | None:
    """Return the card of a data set's folder, None where there is none.

    Raises:
        UserError: If it is damaged.
    """
    file = Path(path) / "README.md"
    if not file.is_file():
        return None
    try:
        return DatasetCard.load(file)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the data set's card {file}: {one_line(error)}") from None


def split_counts(card: DatasetCard) -> dict[str, int]:
    """Return the pairs in each split as the card's header counts them, empty where it does not."""
    info = card.data.to_dict().get("dataset_info")
    splits = info.get("splits") if isinstance(info, dict) else None
    return {
        split["name"]: split["num_examples"]
        for split in splits or ()
        if isinstance(split, dict) and {"name", "num_examples"} <= set(split)
    }


@cache
def is_on_hub(name: str | None, repo_type: str) -> bool:
    """Whether a name of a recipe or result is of a repository on the Hub that anybody can see; a folder here is none.

    `data/mine` may be both, and only the Hub knows. Where it cannot be asked the answer is no.
    """
    if not name or not is_hub_id(name) or Path(name).exists():
        return False
    try:
        return HfApi(token=False).repo_exists(name, repo_type=repo_type)
    except (HTTPError, OSError, ValueError):
        return False


def without_folders(text: str) -> str:
    """Shorten the paths in a text to their names: where a person keeps files is nobody's business. URLs stay."""
    return re.sub(
        r"""(^|[\s='"(])(?:file://)?(?:~|\.\.?)?/(?:[^\s'"()]*/)?([^\s'"()/]+)/?""", r"\1.../\2", text, flags=re.M
    )


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
) -> tuple[str, list[EvalResultEntry]]:
    """Write the card of a segmentation network.

    Args:
        segmenter: The network and its processor.
        repo_id: Where it will be found.
        training: What is on record of its training; the card says so where nothing is.
        results: Its measured results.
        license: Of the weights, an identifier of the Hub's list. None says that nobody has chosen one.

    Returns:
        The text of `README.md`, and rows of the Hub's newer form for results, of those on data sets of the Hub.

    Raises:
        UserError: If the network is none of this project's.
    """
    name = network_name(segmenter.model.config)
    paper = PAPERS[name]
    # Here, and below other models' cards, it goes by one name.
    results = [
        replace(
            result,
            name=", ".join([repo_id.rpartition("/")[2], *(result.settings if len(results) > 1 else ())]),
            sources=tuple(map(without_folders, result.sources)),
        )
        for result in results
    ]
    sections = {
        "Use": _usage(repo_id),
        "Training data": _training_data(training),
        "Training": _training(training),
        "Results": _results(results, training),
        "The paper's figures": _paper_figures(name, paper),
        "Limits": _limits(segmenter, paper),
        "Licence": _licence(license, training),
        "Citation": f"Cite the paper of the network:\n\n```bibtex\n{paper.to_bibtex(name + str(paper.year))}\n```",
    }
    body = [
        f"# {repo_id.rpartition('/')[2]}",
        f"{name.upper()} ({paper.venue}, [{paper.title}]({paper.url})) finds {paper.finds}. {paper.how} "
        f"It was built and trained with Unconceal {__version__}; it is not the authors' own release.",
        f"{segmenter.model.num_parameters() / 1e6:.2f} M parameters; images are resized to {_size(segmenter)}.",
        *(f"## {title}\n\n{text}" for title, text in sections.items()),
    ]
    header = _header(segmenter, name, repo_id, paper, training, results, license)
    text = f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"
    return text, [row for result in results for row in _eval_rows(result)]


def _header(segmenter, name, repo_id, paper, training, results, license) -> ModelCardData:
    recipe = training.recipe if training else None
    started_from = [phase.init_from or phase.init_backbone_from for phase in recipe.phases.values()] if recipe else []
    bases = sorted({base for base in started_from if is_on_hub(base, "model")})
    data = [recipe.data.path] if recipe and is_on_hub(recipe.data.path, "dataset") else []
    return ModelCardData(
        license=license or UNSTATED_LICENSE,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["unconceal", name, *paper.tags],
        datasets=data or None,
        base_model=bases or None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=[row for result in results for row in _index_rows(result)] or None,
    )


def _usage(repo_id: str) -> str:
    return (
        f"With torch, transformers and Pillow alone:\n\n```python\n{LOADING.format(id=repo_id)}```\n\n"
        f"or, for tensors:\n\n```python\n{LOADING_PARTS.format(id=repo_id)}```\n\n"
        '`find_object("photo.jpg", cutout=True)["cutout"]` is the object cut out, in its own colours at soft edges '
        'where pymatting is installed. Edges in large pictures are looked at again, unless `refine="never"`. '
        '`pipeline("image-segmentation", ...)` gives hard masks with labels instead. `trust_remote_code` runs the Python files '
        "of this repository: pin them by `revision=`. Where the package `unconceal` is installed and imported it is not "
        "needed."
    )


def _training_data(training: Training | None) -> str:
    if training is None:
        return "Not on record."
    recipe, card = training.recipe, training.data_card
    where = recipe.data.path
    if is_on_hub(where, "dataset"):
        return f"Split `{recipe.data.train_split}` of [{where}](https://huggingface.co/datasets/{where}); its card has the terms."
    if card is None:
        return f"A data set by the name of `{Path(where).name}`; its card is not at hand, so neither are its terms."
    counts = ", ".join(f"{number} in `{split}`" for split, number in split_counts(card).items())
    lines = [
        f"{card.data.pretty_name or Path(where).name}: {counts or 'counts not on record'}. Trained on "
        f"`{recipe.data.train_split}`; the best checkpoint was chosen on `{recipe.data.eval_split}`."
    ]
    for title in ("Source", "Terms"):
        if text := section(card, title):
            lines.append(f"- {title}: {text}")
    lines.append(f"- Licence on its card: `{card.data.license or 'none'}`.")
    return "\n".join([lines[0], "", *lines[1:]])


def _training(training: Training | None) -> str:
    if training is None:
        return "Not on record."
    recipe, progress = training.recipe, training.progress
    rows = [
        (task, *_phase_facts(phase), _done(progress) if progress and task == training.task else str(phase.epochs))
        for task, phase in recipe.phases.items()
    ]
    header = ("phase", "optimizer", "schedule", "batch", "starts from", "epochs")
    seen = (
        f"Seed {recipe.seed}, {recipe.mixed_precision or 'no'} mixed precision; best checkpoint by `{recipe.best_metric}` of "
        f"the protocol `{recipe.protocol}`."
    )
    return f"{markdown_table(header, rows)}\n\n{seen}"


def _phase_facts(phase: PhaseRecipe) -> tuple[str, ...]:
    optimizer, schedule = phase.optimizer, phase.schedule
    batch = str(phase.batch_size * phase.gradient_accumulation_steps)
    start = phase.init_from or phase.init_backbone_from
    return (
        f"{optimizer.name}, {optimizer.learning_rate:g}, decay {optimizer.weight_decay:g}",
        f"{schedule.name}, {schedule.warmup_steps} steps of warm-up",
        batch,
        start if is_on_hub(start, "model") else Path(start).name if start else "–",
    )


def _done(progress: Progress) -> str:
    processes = f", {progress.num_processes} processes" if progress.num_processes > 1 else ""
    return f"{progress.epoch} ({progress.step} steps{processes})"


def _results(results: Sequence[Result], training: Training | None) -> str:
    if not results:
        return "None were measured."
    parts = ["Measured with this model.", to_markdown(make_tables(results, with_papers=False))]
    recipe = training.recipe if training else None
    if recipe and any(result.split == recipe.data.eval_split for result in results):
        parts.append(f"The best checkpoint was chosen on `{recipe.data.eval_split}`: expect less on other pictures.")
    commands = "\n".join(f"    {without_folders(result.command)}" for result in results if result.command)
    if commands:
        parts.append(f"By:\n\n{commands}")
    for name, protocol in {result.protocol.name: result.protocol for result in results}.items():
        statement = inspect.getdoc(sys.modules[protocol.score_image.__module__])
        parts.append(f"<details><summary>The protocol <code>{name}</code></summary>\n\n{statement}\n\n</details>")
    return "\n\n".join(parts)


def _paper_figures(name: str, paper: Paper) -> str:
    benchmarks, published = load_papers()
    rows = [row for row in published if row.method == name.upper() and row.source.startswith(name.upper())]
    tables, doubts = [], {}
    for protocol in dict.fromkeys(benchmarks[row.benchmark].protocol for row in rows):
        own = [row for row in rows if benchmarks[row.benchmark].protocol == protocol]
        columns = PROTOCOLS[protocol].columns
        metrics = list(dict.fromkeys(metric for row in own for metric in row.figures))
        lines = [
            (
                row.benchmark,
                row.backbone or "–",
                row.source.partition(", ")[2],
                *(columns[m].format(row.figures[m]) if m in row.figures else "–" for m in metrics),
            )
            for row in own
        ]
        tables.append(markdown_table(["test set", "encoder", "where", *(columns[m].title for m in metrics)], lines))
        doubts |= dict.fromkeys(text for row in own for text in (*row.doubts.values(), *row.remarks))
    notes = [f"- {text}" for text in doubts]
    head = f"Printed in the paper ({paper.venue}), of the authors' networks: **none of them was measured with this model**."
    return "\n\n".join([head, *tables, *(["\n".join(notes)] if notes else [])])


def _limits(segmenter: Segmenter, paper: Paper) -> str:
    smallest = segmenter.model.min_image_size
    common = (
        f"Every picture is resized to {_size(segmenter)} whatever its shape; what is smaller than a pixel there is lost. The "
        f"network itself takes any size from {smallest}x{smallest}.",
        "It tells one kind of object from background, not objects from each other.",
        "The values of the soft mask are no calibrated probabilities.",
    )
    return "\n".join(f"- {limit}" for limit in (*common, *paper.limits))


def _licence(license: str | None, training: Training | None) -> str:
    weights = (
        f"Of the weights: `{license}`, as whoever published them states."
        if license
        else "Of the weights: none was stated. They were made from the training data, whose makers' terms may bind them."
    )
    data = "" if training is None else " The training data keeps its makers' terms, see above."
    return f"Of the code in this repository: `{CODE_LICENSE}`. {weights}{data}"


def _size(segmenter: Segmenter) -> str:
    size = segmenter.processor.size
    return f"{size.height}x{size.width}"


def _index_rows(result: Result) -> list[EvalResult]:
    """A result in the form of `model-index`, one row for each number."""
    data = result.benchmark or ", ".join(result.sources) or "unknown"
    return [
        EvalResult(
            task_type=TASK,
            task_name="Image segmentation",
            dataset_type=result.data if is_on_hub(result.data, "dataset") else _slug(data),
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


def _eval_rows(result: Result) -> list[EvalResultEntry]:
    """A result in the Hub's newer form, which knows only data sets on the Hub."""
    if not is_on_hub(result.data, "dataset"):
        return []
    scored = ", ".join(filter(None, (f"split {result.split}", f"{result.num_images} images", *result.settings)))
    return [
        EvalResultEntry(
            dataset_id=result.data,
            task_id=f"{result.protocol.name}_{metric}",
            value=result.figures[metric],
            date=result.date,
            notes=f"{column.title}, Unconceal protocol {result.protocol.name}; {scored}",
        )
        for metric, column in result.protocol.columns.items()
        if metric in result.figures
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^\w-]+", "-", text).strip("-").lower()


__all__ = [
    "PAPERS",
    "Paper",
    "Training",
    "is_on_hub",
    "make_model_card",
    "network_name",
    "read_data_card",
    "section",
    "split_counts",
    "without_folders",
]
