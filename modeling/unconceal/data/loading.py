"""Open prepared data sets, with errors that say what is missing."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from PIL.Image import DecompressionBombError, Image

from .. import __version__
from ..models.reading import to_mask, to_rgb
from ..utils.errors import UserError, explained, one_line
from ..utils.files import data_set_path, is_folder, is_hub_id
from ..utils.images import size_text
from .finders import find_folder
from .masks import is_object, one_value
from .names import sort_files
from .write import FEATURES


logger = logging.getLogger(__name__)

ADVICE = "make it by unconceal prepare, or give the id of a data set on the Hub"


def load_splits(path: str, splits: list[str], optional: Sequence[str] = ()) -> dict[str, Dataset]:
    """Open splits of a folder or a Hub data set.

    Those in `optional` may be absent. A folder of `images` and `masks` is prepared first. Rows without `id` are named
    by split and number, and without `source` by the data set. Both become text.

    Raises:
        UserError: If the data set, a split, or the column `image` or `mask` is missing.
    """
    with opening(path):
        folder = prepare_raw(Path(path)) if is_raw(Path(path)) else data_set_path(path)
        # The library's own cache does not notice changed files of a folder with a card.
        held = sorted(path for path in Path(folder).rglob("[!.]*") if path.is_file()) if Path(folder).is_dir() else []
        available = load_dataset(folder, cache_dir=cache_path(Path(folder), held) if held else None)
    absent = [split for split in splits if split not in available and split not in optional]
    if absent:
        raise UserError(f"data set {path} has no split {', '.join(absent)}; it has {', '.join(available)}")
    opened = {split: available[split] for split in splits if split in available}
    for split, dataset in opened.items():
        check_columns(dataset, split, path)
        if len(dataset) == 0:
            raise UserError(f"split {split} of data set {path} is empty, expected at least one pair; {ADVICE}")
    return {split: with_names(dataset, split, path) for split, dataset in opened.items()}


@contextmanager
def opening(path: str) -> Iterator[None]:
    """Explain why a data set cannot be opened.

    Raises:
        UserError: If it does not exist or cannot be read.
    """
    if not Path(path).exists() and not is_hub_id(path):
        raise UserError(f"data set {path} does not exist; {ADVICE}")
    try:
        yield
    except DatasetNotFoundError as error:
        raise UserError(f"data set {path} does not exist or is private; {ADVICE}") from error
    except (OSError, ValueError, DatasetsError) as error:
        if error.__cause__ is not None and (reason := explained(error.__cause__)):
            raise UserError(f"cannot open data set {path}: {reason}") from error
        raise UserError(f"cannot open data set {path}: {one_line(error)}; {ADVICE}") from error


def check_columns(dataset: Dataset | IterableDataset, split: str, path: str):
    """Raise `UserError` if a split has no images and masks."""
    missing = [column for column in ("image", "mask") if column not in dataset.column_names]
    if missing:
        held = ", ".join(dataset.column_names)
        raise UserError(
            f"split {split} of data set {path} has no column {', '.join(missing)}, but {held}; rename its columns"
        )
    for column in ("image", "mask"):
        if not isinstance(dataset.features[column], datasets.Image):
            got = f"the column {column} of split {split} of data set {path} is {dataset.features[column]}"
            raise UserError(f"{got}, expected images; {ADVICE}")


def with_names(dataset: Dataset, split: str, path: str) -> Dataset:
    """Make `id` and `source` texts; fill in what is missing."""
    names = {"id": [f"{split}-{row}" for row in range(len(dataset))], "source": [Path(path).name] * len(dataset)}
    for column, defaults in names.items():
        if column in dataset.column_names:
            held, feature = dataset[column][:], dataset.features[column]
            if not isinstance(feature, Value | ClassLabel) or all(isinstance(cell, str) and cell for cell in held):
                continue
            as_text = getattr(feature, "int2str", str)
            cells = zip(held, defaults, strict=True)
            defaults = [default if cell in (None, "") else as_text(cell) for cell, default in cells]
            dataset = dataset.remove_columns(column)
        dataset = dataset.add_column(column, defaults)  # unlike a cast, it does not copy the images
    return dataset


def is_raw(folder: Path) -> bool:
    """Return whether a folder holds images and masks, not a data set."""
    return is_folder(folder / "images") and is_folder(folder / "masks") and not is_folder(folder / "data")


LIST_OF_SPLIT = re.compile(r"(train|val|valid|validation|test)\.(txt|lst|csv)$|idx_", re.IGNORECASE)


def prepare_raw(folder: Path) -> str:
    """Prepare a folder of images and masks; return the data set.

    A fifth of the pairs, chosen at random, is `val`. The data set lies in the cache of the datasets library. If files
    change, it is made again.

    Raises:
        UserError: If a pair is unusable, or if the folder holds lists of splits.
    """
    from .builders import build  # slow to import

    if lists := sorted(path.name for path in folder.iterdir() if LIST_OF_SPLIT.match(path.name)):
        raise UserError(
            f"{folder} holds {', '.join(lists)}, which a random split would ignore; run unconceal prepare with the "
            "name of the data set and give the result, or move the lists away"
        )
    out = prepared_folder(folder)
    if not out.exists():
        try:
            build("folder", folder, out, fractions={"train": 0.8, "val": 0.2})
        except UserError as error:
            raise UserError(f"{error} (options belong to unconceal prepare folder --source {folder})") from error
    logger.warning(
        "%s holds images and masks: a fifth, chosen at random, is val (prepared in %s); "
        "`unconceal prepare folder` makes other splits",
        folder,
        out,
    )
    return str(out)


def prepared_folder(folder: Path) -> Path:
    """Return where `prepare_raw` puts a data set; changed files change it."""
    parts = (folder / "images", folder / "masks")
    files = [path for part in parts for path in sort_files(part.iterdir(), part)[0]]
    return cache_path(folder, files)


def cache_path(folder: Path, files: Iterable[Path]) -> Path:
    """Return a folder in the datasets library's cache; changed files change it."""
    facts = [f"{path} {(state := path.stat()).st_size} {state.st_mtime_ns}" for path in files]
    name = hashlib.sha256("\n".join([__version__, str(folder.resolve()), *facts]).encode(errors="replace")).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE) / "unconceal" / name[:16]


def load_folders(
    images: str | Path, masks: str | Path, mask_suffix: str = "", only_matched: bool = False
) -> tuple[Dataset, list[str]]:
    """Open a folder of images and one of masks.

    Files are read when they are used.

    Arguments are those of `find_folder`. With `only_matched` images without a mask, and the reverse, are left out.

    Returns:
        The data set and the names left out.

    Raises:
        UserError: If a folder cannot be read, or an image has no mask or several.
    """
    pairs = find_folder(images=Path(images), masks=Path(masks), mask_suffix=mask_suffix)
    usable, rest = [pair for pair in pairs if not pair.problem], [pair for pair in pairs if pair.problem]
    for pair in rest:
        logger.warning("%s: %s", pair.id, pair.problem)
    if rest and not (only_matched and usable):
        raise UserError(
            f"{len(rest)} of {len(pairs)} images or masks have no counterpart, see above; rename them"
            + f", or pass --only-matched to score the {len(usable)} pairs" * bool(usable)
        )
    columns = {
        "image": [str(pair.image) for pair in usable],
        "mask": [str(pair.masks[0]) for pair in usable],
        "id": [pair.id for pair in usable],
        "source": [pair.source for pair in usable],
    }
    return Dataset.from_dict(columns, Features({**FEATURES, "mask": ImageFeature()})), [pair.id for pair in rest]


def encoded(dataset: Dataset, *columns: str) -> Dataset:
    """Return columns of images as their files."""
    dataset = dataset.select_columns(list(columns))
    for column in columns:
        dataset = dataset.cast_column(column, ImageFeature(decode=False))
    return dataset


def contents_digest(dataset: Dataset) -> str:
    """Return the SHA-256 of the ids and files of a split."""
    digest = hashlib.sha256()
    for id, files in zip(dataset["id"], encoded(dataset, "image", "mask"), strict=True):
        digest.update(f"{len(id)} {id}".encode(errors="replace"))
        for file in files.values():
            held = (file or {}).get("bytes") or b""
            if file and not held:
                with suppress(OSError):  # a row that cannot be read is found where it is used
                    held = Path(file["path"]).read_bytes()
            digest.update(f" {len(held)} ".encode())
            digest.update(held)
    return digest.hexdigest()


class UnreadableSample(ValueError):
    """Unusable row of a data set, explained in one line."""


def read_pair(dataset: Dataset, index: int) -> tuple[dict[str, Any], Image, Image]:
    """Return a row, its RGB image and its gray mask.

    Raises:
        UnreadableSample: If image or mask is missing or cannot be decoded.
    """
    try:
        row = dataset[index]
    except (ValueError, OSError, DecompressionBombError) as error:
        raise UnreadableSample(f"{row_name(dataset, index)}: {one_line(error)}") from error
    return row, *open_pair(row, lambda: row_name(dataset, index))


def open_pair(row: dict[str, Any], name: Callable[[], str]) -> tuple[Image, Image]:
    """Return RGB image and gray mask of a decoded row.

    Raises:
        UnreadableSample: If one is missing or cannot be read.
    """
    try:
        return to_rgb(_held(row, "image")), to_mask(_held(row, "mask"))
    except (ValueError, OSError, DecompressionBombError) as error:
        raise UnreadableSample(f"{name()}: {one_line(error)}") from error


def check_pair(image: Image, mask: Image, name: Callable[[], str]):
    """Raise `UnreadableSample` if image and mask differ in size."""
    if image.size != mask.size:
        raise UnreadableSample(
            f"the mask of {name()} is {size_text(mask.size)}, its image {size_text(image.size)}; "
            "build the data set again by unconceal prepare, which reports such pairs"
        )


def only_value(dataset: Dataset, max_unreadable: float = 0.0) -> str | None:
    """Return what `one_value` says of the masks of a split.

    Up to a share of `max_unreadable` masks are left out if they cannot be read.

    Raises:
        UserError: If one of the masks that decide it cannot be read.
    """
    masks = dataset.select_columns(["mask"])  # otherwise the images are decoded, too

    def read() -> Iterator[np.ndarray]:
        left = int(max_unreadable * len(masks))
        for index in range(len(masks)):
            try:
                yield is_object(to_mask(_held(masks[index], "mask")))
            except (ValueError, OSError, DecompressionBombError) as error:
                left -= 1
                if left >= 0:
                    continue
                raise UserError(f"cannot read the data: {row_name(dataset, index)}: {one_line(error)}") from error

    return one_value(read())


def _held(row: dict[str, Any], column: str) -> Image:
    """Return a cell, or raise `ValueError` if it is empty."""
    if row[column] is None:
        raise ValueError(f"its {column} is empty; leave out such rows")
    return row[column]


def row_name(dataset: Dataset, index: int) -> str:
    """Return the id of a row, or else its number, for messages."""
    return dataset.select_columns(["id"])[index]["id"] if "id" in dataset.column_names else f"row {index}"


def readable(batches: Iterable, what: str) -> Iterator[Any]:
    """Yield a loader's batches; `what` is what messages call the data.

    Raises:
        UserError: For an `UnreadableSample`, with its message.
    """
    try:
        yield from batches
    except UnreadableSample as error:
        # A loader's process puts its traceback in front of the message.
        reason = str(error).strip().splitlines()[-1].rpartition(f"{UnreadableSample.__name__}: ")[2]
        raise UserError(f"cannot read {what}: {reason}") from error
