"""Open, check and compare images with their masks."""

import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import SplitInfo
from PIL import Image
from tqdm import tqdm

from ..models.reading import Foreground
from ..utils.errors import UserError
from ..utils.images import MAX_PIXELS, open_image, size_text
from .image_files import read_upright
from .masks import TrueMask, UnusablePair, read_mask
from .splits import difference_hash, has_near_copies


DIGEST_ROWS = 64


@dataclass(frozen=True)
class Pair:
    """Image file and mask files of one name."""

    id: str  # unique in the data set
    source: str  # `set` or `set/class`; random splits keep the share of each
    image: Path | None = None
    masks: tuple[Path, ...] = ()  # the mask is their union
    split: str | None = None  # in the official lists
    problem: str | None = None  # why it is unusable, if that shows without opening a file


@dataclass(frozen=True)
class LoadedPair:
    """Opened and usable pair."""

    pair: Pair
    image_bytes: bytes  # the unchanged file
    image: Image.Image  # upright
    mask: np.ndarray  # (H, W), boolean, of the size of the upright image
    masks: tuple[TrueMask, ...]  # of each file


@dataclass
class Report:
    """What `check_pairs` found, and what `build` made of it."""

    usable: list[Pair] = field(default_factory=list)  # in the given order
    problems: list[tuple[str, str]] = field(default_factory=list)  # (id, reason) of each unusable pair
    digests: dict[str, str] = field(default_factory=dict)  # image digest of each usable pair, by id
    hashes: dict[str, np.ndarray] = field(default_factory=dict)  # of images with near copies, by id
    num_changed_masks: int = 0  # usable pairs with a mask of other values than 0 and 255
    num_resized_masks: int = 0  # usable pairs with a mask that was resized to its image
    num_empty_masks: int = 0  # usable pairs without an object
    num_full_masks: int = 0  # usable pairs without background
    vanished: list[str] = field(default_factory=list)  # ids of empty masks whose file has gray levels, all dark
    object_values: set[int] = field(default_factory=set)  # in files with one value beside 0
    unlisted: list[str] = field(default_factory=list)  # names in none of the official lists, left out
    split_rule: str = ""  # how the splits were made
    splits: dict[str, SplitInfo] = field(default_factory=dict)  # split name -> pairs and bytes written
    repeats: list[tuple[str, ...]] = field(default_factory=list)  # names of equal images in different splits


def digest(image: Image.Image) -> str:
    """Return a digest of size and pixels, whatever the file format."""
    state = hashlib.blake2b(digest_size=16, key=repr(image.size).encode())
    for top in range(0, image.height, DIGEST_ROWS):  # in strips: a whole copy of a large image costs memory
        strip = image.crop((0, top, image.width, min(top + DIGEST_ROWS, image.height)))
        # Converting deep gray to RGB would clip it.
        state.update((strip if strip.mode.startswith(("I", "F")) else strip.convert("RGB")).tobytes())
    return state.hexdigest()


def load_pair(
    pair: Pair, max_pixels: int = MAX_PIXELS, resize_masks: bool = False, foreground: Foreground | None = None
) -> LoadedPair:
    """Open a pair.

    `max_pixels` limits width times height of each file. `resize_masks` resizes masks of the image's aspect to it.
    `foreground` is that of `to_mask`.

    Raises:
        UnusablePair: If a file is missing, too large or damaged, or if the sizes of image and mask do not fit.
    """
    if pair.problem:
        raise UnusablePair(pair.problem)
    try:
        image_bytes = pair.image.read_bytes()
        image = read_upright(io.BytesIO(image_bytes), max_pixels)
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnusablePair(f"{pair.image.name} cannot be read: {reason}") from error
    union = np.zeros((image.height, image.width), dtype=bool)
    masks = []
    for path in pair.masks:
        masks.append(read_mask(path, image.size if resize_masks else None, max_pixels, foreground))
        mask = masks[-1].mask
        if mask.shape != union.shape:
            with open_image(io.BytesIO(image_bytes), max_pixels) as stored:
                turned = "" if stored.size == image.size else " after its EXIF orientation"
            other = ", of another aspect" if resize_masks else ""
            raise UnusablePair(
                f"mask {path.name} is {size_text(mask.shape[::-1])} but image {pair.image.name} is "
                f"{size_text(image.size)}{turned}{other}"
            )
        union |= mask
    return LoadedPair(pair, image_bytes, image, union, tuple(masks))


def check_pairs(pairs: Iterable[Pair], load: Callable[[Pair], LoadedPair]) -> Report:
    """Open every pair with `load` and separate the unusable ones.

    If a name occurs twice, all its pairs are unusable: nothing says which is meant.
    """
    by_id = defaultdict(list)
    for pair in pairs:
        by_id[pair.id].append(pair)
    report = Report()
    for id, same in by_id.items():
        if len(same) > 1:
            files = [pair.image.name if pair.image else "no image" for pair in same]
            named = zip(files, same, strict=True)
            places = [f"{file} in {pair.split}" if pair.split else file for file, pair in named]
            report.problems.append((id, f"the name occurs {len(same)} times: {', '.join(places)}"))
    single = [same[0] for same in by_id.values() if len(same) == 1]
    for pair in tqdm(single, desc="checking", unit="pair", disable=None):
        try:
            loaded = load(pair)
        except UnusablePair as error:
            report.problems.append((pair.id, str(error)))
            continue
        report.usable.append(pair)
        report.digests[pair.id] = digest(loaded.image)
        if has_near_copies(pair.source):
            report.hashes[pair.id] = difference_hash(loaded.image)
        report.num_changed_masks += any(mask.is_changed for mask in loaded.masks)
        report.num_resized_masks += any(mask.is_resized for mask in loaded.masks)
        report.num_empty_masks += not loaded.mask.any()
        report.num_full_masks += bool(loaded.mask.all())
        report.vanished += [pair.id] * any(mask.has_vanished for mask in loaded.masks)
        report.object_values |= {mask.object_value for mask in loaded.masks} - {None}
        del loaded  # otherwise it stays in memory while the next is opened
    return report


def find_repeats(pairs: Iterable[Pair], digests: dict[str, str]) -> list[tuple[str, ...]]:
    """Return the names of equal images in different splits."""
    by_digest = defaultdict(list)
    for pair in pairs:
        by_digest[digests[pair.id]].append(pair)
    repeats = [same for same in by_digest.values() if len({pair.split for pair in same}) > 1]
    return [tuple(f"{pair.split}/{pair.id}" for pair in same) for same in repeats]
