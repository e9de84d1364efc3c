"""Read the cards of data sets."""

import re
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from huggingface_hub import DatasetCard

from ..utils.errors import UserError, one_line


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


def section(card: DatasetCard, title: str) -> str | None:
    """Return the text under a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}\n+(.*?)(?=^## |^<!-- |\Z)", card.text, re.MULTILINE | re.DOTALL)
    return found.group(1).strip() if found else None


def describe_set(path: str, splits: Mapping[str, Sized]) -> dict[str, Any]:
    """Return what a training records about a data set.

    Of a folder of images and masks, it is what was prepared from it.

    Args:
        path: Folder or Hub id, as in the recipe.
        splits: The splits that are read.
    """
    from .loading import contents_digest, is_raw, prepared_folder  # which need this module

    facts = {"path": path, "from_hub": not Path(path).exists()}
    facts["images"] = {split: len(rows) for split, rows in splits.items()}
    # A stream is not read as a whole.
    facts["sha256"] = {split: contents_digest(rows) for split, rows in splits.items() if isinstance(rows, Dataset)}
    folder = prepared_folder(Path(path)) if is_raw(Path(path)) else path
    card = None if facts["from_hub"] else read_data_card(folder)
    if card is not None:
        facts |= {"title": card.data.pretty_name, "license": card.data.license}
        facts["sections"] = {title: text for title in ("Source", "Terms") if (text := section(card, title))}
        if split_rule := re.search(r"^- Splits: (.+)$", section(card, "How it was built") or "", re.MULTILINE):
            facts["sections"]["Splits"] = split_rule[1]
    return facts
