"""Find the trained networks that ship with the package.

Each is a folder of `pretrained/`: configuration, image processor, weights and card. The header of the card holds the
facts. This module is light, because most commands use it.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.errors import UserError, one_line
from ..utils.files import file_sha256, is_folder
from ..utils.markdown import markdown_table


FOLDER = Path(__file__).parents[1] / "pretrained"
CONFIG, PROCESSOR, WEIGHTS, CARD = "config.json", "preprocessor_config.json", "model.safetensors", "README.md"
FILES = (CONFIG, PROCESSOR, WEIGHTS, CARD)
HEADER = "unconceal"  # our part of a card's header
COLUMNS = ("name", "finds", "network", "parameters", "MB", "input", "trained on", "terms", "on its validation split")


@dataclass(frozen=True)
class Shipped:
    """Facts about a network that ships."""

    name: str
    task: str  # what it finds
    network: str  # such as RUN
    parameters: int
    megabytes: float  # of the weights' file
    input_size: str  # to which images are resized, such as 352x352, or "as it is"
    data: str  # that it was trained on
    terms: str  # under which it may be used
    numbers: dict[str, float]  # title -> value on the validation split, the most telling ones
    sha256: str  # of the weights' file


def shipped_names() -> list[str]:
    """Return the names of the networks of this installation."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{WEIGHTS}"))


def pretrained(name: str) -> Path:
    """Return the folder of a shipped network, for `from_pretrained`.

    Raises:
        UserError: If there is none of that name, or its weights are damaged.
    """
    names = shipped_names()
    if not names:
        raise UserError(
            f"got the model {name!r}, but no trained networks are in this installation of unconceal; install it from "
            "a whole copy of its repository (pip install .), or give a folder or owner/name on the Hub"
        )
    if name not in names:
        raise UserError(
            f"got the model {name!r}, which is no folder and none of those that ship: {', '.join(names)}; choose one, "
            "or give a folder or owner/name on the Hub"
        )
    if weights_sha256(FOLDER / name) != describe(name).sha256:
        raise UserError(f"the weights of the shipped network {name} are damaged; install unconceal again")
    return FOLDER / name


def resolve(model: str | Path) -> str | Path:
    """Return the folder that a model's name stands for.

    A name without a slash means a shipped network, unless the working folder has a folder of that name. Everything
    else is returned as it is.

    Raises:
        UserError: If no such network ships.
    """
    name = str(model)
    return model if "/" in name or os.sep in name or is_folder(name) else pretrained(name)


def describe(name: str) -> Shipped:
    """Read the facts about a shipped network from its card.

    Raises:
        UserError: If the card is missing or incomplete.
    """
    data = read_header(FOLDER / name)
    try:
        facts = dict(data[HEADER])
        shown = facts.pop("headline")
        rows = {row.metric_type: row for row in reversed(data.eval_results)}  # the first of each kind counts
        numbers = {rows[metric].metric_name.partition(",")[0]: rows[metric].metric_value for metric in shown}
        facts = {field: facts[field] for field in Shipped.__dataclass_fields__ if field != "numbers"}
        return Shipped(**facts, numbers=numbers)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the card of the shipped network {name} lacks {one_line(error)}; install again") from error


def shipped_table() -> str:
    """Return all shipped networks as a Markdown table."""
    rows = []
    for each in map(describe, shipped_names()):
        numbers = ", ".join(f"{title} {value:.3f}" for title, value in each.numbers.items())
        size = (f"{each.parameters / 1e6:.2f} M", f"{each.megabytes:.1f}", each.input_size)
        rows.append((f"`{each.name}`", each.task, each.network, *size, each.data, each.terms, numbers))
    return markdown_table(COLUMNS, rows)


def read_header(folder: Path) -> Any:
    """Return the header of a card, a `ModelCardData`."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(folder / CARD).data
    except Exception as error:  # of the file, of YAML, or of the library
        raise UserError(f"cannot read the card {folder / CARD}: {one_line(error)}; install unconceal again") from error


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of the file of weights."""
    return file_sha256(folder / WEIGHTS)
