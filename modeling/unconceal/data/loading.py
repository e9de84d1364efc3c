"""Opening prepared data sets, with an error that says what is missing."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from PIL.Image import DecompressionBombError

from ..utils.errors import UserError, one_line
from ..utils.files import is_hub_id
from .write import COLUMNS


def load_splits(path: str, splits: list[str]) -> dict[str, Dataset]:
    """Open splits of a folder that scripts/prepare_data.py wrote, or of a data set on the Hub by its id.

    Raises:
        UserError: If there is no such data set or split, or a column is missing.
    """
    how = "make it by scripts/prepare_data.py, or give the id of a data set on the Hub"
    if not Path(path).exists() and not is_hub_id(path):
        raise UserError(f"data set {path} does not exist; {how}")
    try:
        there = load_dataset(path)
    except DatasetNotFoundError:
        raise UserError(f"data set {path} does not exist or is private; {how}") from None
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"cannot open data set {path}: {one_line(error)}; {how}") from None
    absent = [split for split in splits if split not in there]
    if absent:
        raise UserError(f"data set {path} has no split {', '.join(absent)}; it has {', '.join(there)}")
    opened = {split: there[split] for split in splits}
    for split, dataset in opened.items():
        missing = [column for column in COLUMNS if column not in dataset.column_names]
        if missing:
            raise UserError(f"split {split} of data set {path} has no column {', '.join(missing)}; {how}")
        if len(dataset) == 0:
            raise UserError(f"split {split} of data set {path} is empty")
    return opened


def readable(batches: Iterable, what: str) -> Iterator[Any]:
    """Yield the batches; a sample that cannot be used is a user's error, in one line also from a loader's process.

    Raises:
        UserError: That `what` cannot be read, with the reason.
    """
    try:
        yield from batches
    except (ValueError, OSError, DecompressionBombError) as error:
        raise UserError(f"cannot read {what}: {str(error).strip().splitlines()[-1]}") from None
