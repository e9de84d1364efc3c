"""One image with its mask: reading, judging, and splitting.

The mask rule, the same for every data set. A mask file becomes one grey value a pixel as the processor's `to_mask` has
it, but for the scale, which a builder finds for each file: 1, 255 or 65535, the smallest of these that the brightest
pixel does not pass. A pixel is foreground where its value is above 127/255 of the full scale, which for 8-bit masks means
> 127. Where a builder lets a mask be resized, its grey values are, linearly, before they are compared: no pixel becomes
foreground that is not between foreground pixels of the file.
"""

import hashlib
import io
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..utils.errors import UserError
from ..utils.files import IMAGE_SUFFIXES
from ..utils.images import MAX_PIXELS, open_image
from .masks import UnusablePair, encode_mask, have_one_aspect, open_upright, read_mask  # noqa: F401
from .splits import split_at_random  # noqa: F401


logger = logging.getLogger(__name__)

DIGEST_ROWS = 64


@dataclass(frozen=True)
class Pair:
    """What a builder found under one name.

    Attributes:
        id: Name, unique in the data set.
        source: Where it comes from, `set` or `set/class`; random splits keep its shares.
        image: Image file.
        masks: Mask files; the mask is their union.
        split: Split that an official list puts it in.
        problem: Why it cannot be used, where that shows without opening a file.
    """

    id: str
    source: str
    image: Path | None = None
    masks: tuple[Path, ...] = ()
    split: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class LoadedPair:
    """A pair that was opened and found usable.

    Attributes:
        pair: The files.
        image_bytes: The image file as it is.
        image: The decoded image, upright.
        mask: (H, W) booleans, True for the object, of the size of the upright image.
        mask_changed: Whether a mask file held other values than 0 and 255.
        mask_resized: Whether a mask file had another size than the upright image.
    """

    pair: Pair
    image_bytes: bytes
    image: Image.Image
    mask: np.ndarray
    mask_changed: bool
    mask_resized: bool


@dataclass
class Checked:
    """What `check_pairs` found.

    Attributes:
        usable: Pairs that can be used, in the order given.
        problems: (id, reason) of each of the others.
        digests: Picture digest of each usable pair, by id.
        num_changed_masks: Usable pairs with a mask that held other values than 0 and 255.
        num_resized_masks: Usable pairs with a mask that was resized to its image.
        num_empty_masks: Usable pairs without any foreground.
    """

    usable: list[Pair] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    num_changed_masks: int = 0
    num_resized_masks: int = 0
    num_empty_masks: int = 0


def digest(picture: Image.Image) -> str:
    """Digest of the size and the pixels; the same picture saved in two formats without loss has one digest."""
    state = hashlib.blake2b(digest_size=16, key=repr(picture.size).encode())
    for top in range(0, picture.height, DIGEST_ROWS):  # in strips, for whole copies of a large picture are larger yet
        strip = picture.crop((0, top, picture.width, min(top + DIGEST_ROWS, picture.height)))
        # Converting deep grey to RGB would clip it.
        state.update((strip if strip.mode.startswith(("I", "F")) else strip.convert("RGB")).tobytes())
    return state.hexdigest()


def load_pair(pair: Pair, max_pixels: int = MAX_PIXELS, resize_masks: bool = False) -> LoadedPair:
    """Open a pair.

    Args:
        pair: The files.
        max_pixels: Width times height above which a file is refused.
        resize_masks: Resize a mask of the image's aspect to the image.

    Raises:
        UnusablePair: If a file is missing, too large or cannot be read, or if a mask has another size, or where masks
            are resized another aspect, than the upright image.
    """
    if pair.problem:
        raise UnusablePair(pair.problem)
    try:
        image_bytes = pair.image.read_bytes()
    except OSError as error:
        raise UnusablePair(f"{pair.image.name} cannot be read: {error.strerror or error}") from None
    image = open_upright(io.BytesIO(image_bytes), pair.image.name, max_pixels)
    union = np.zeros((image.height, image.width), dtype=bool)
    any_changed = any_resized = False
    for path in pair.masks:
        mask, changed, resized = read_mask(path, image.size if resize_masks else None, max_pixels)
        if mask.shape != union.shape:
            with open_image(io.BytesIO(image_bytes), max_pixels) as stored:
                turned = "" if stored.size == image.size else " once turned by its EXIF orientation"
            other = ", of another aspect" if resize_masks else ""
            raise UnusablePair(
                f"mask {path.name} is {mask.shape[1]}x{mask.shape[0]} but image {pair.image.name} is "
                f"{image.width}x{image.height}{turned}{other}"
            )
        union |= mask
        any_changed |= changed
        any_resized |= resized
    return LoadedPair(pair, image_bytes, image, union, any_changed, any_resized)


def check_pairs(pairs: Iterable[Pair], load: Callable[[Pair], LoadedPair] = load_pair) -> Checked:
    """Open every pair by `load`, one at a time, and sort the usable from the unusable.

    A name that occurs twice makes all its pairs unusable: nothing says which is meant.
    """
    pairs = list(pairs)
    by_id = defaultdict(list)
    for pair in pairs:
        by_id[pair.id].append(pair)
    checked = Checked()
    for pair in tqdm(pairs, desc="checking", unit="pair", disable=None):
        same = by_id[pair.id]
        if len(same) > 1:
            if pair is same[0]:
                places = ", ".join(
                    f"{p.image.name if p.image else 'no image'}{f' in {p.split}' if p.split else ''}" for p in same
                )
                checked.problems.append((pair.id, f"the name occurs {len(same)} times: {places}"))
            continue
        try:
            loaded = load(pair)
        except UnusablePair as error:
            checked.problems.append((pair.id, str(error)))
            continue
        checked.usable.append(pair)
        checked.digests[pair.id] = digest(loaded.image)
        checked.num_changed_masks += loaded.mask_changed
        checked.num_resized_masks += loaded.mask_resized
        checked.num_empty_masks += not loaded.mask.any()
        del loaded  # else it stays while the next is opened
    return checked


def find_repeats(pairs: Iterable[Pair], digests: dict[str, str]) -> list[tuple[str, ...]]:
    """Names of pairs that hold one picture and lie in more than one split: a leak from training to test."""
    by_digest = defaultdict(list)
    for pair in pairs:
        by_digest[digests[pair.id]].append(pair)
    return [
        tuple(f"{pair.split}/{pair.id}" for pair in same)
        for same in by_digest.values()
        if len({pair.split for pair in same}) > 1
    ]


def match(id: str, source: str, images: list[Path], masks: list[Path], split: str | None = None, **where: str) -> Pair:
    """Make a pair of the one image and the one mask of a name, or say what is missing or double.

    Args:
        id: Name.
        source: As in `Pair`.
        images: Image files of that name.
        masks: Mask files of that name.
        split: As in `Pair`.
        where: `image` and `mask`: where they were looked for, for the message.
    """
    for kind, files in (("image", images), ("mask", masks)):
        if not files:
            return Pair(id, source, split=split, problem=f"no {kind} {where[kind]}")
        if len(files) > 1:
            return Pair(id, source, split=split, problem=f"{len(files)} {kind}s: {', '.join(f.name for f in files)}")
    return Pair(id, source, images[0], tuple(masks), split)


def list_images(folder: Path, ending: str = "") -> dict[str, list[Path]]:
    """Picture files of a folder, not of its subfolders, by their names without suffix.

    Args:
        folder: Where they are.
        ending: Regular expression of what a mask has after the name of its image, in upper or lower case.

    Raises:
        UserError: If the folder is missing, cannot be listed, or holds no picture.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; expected a folder of pictures") from None
    pictures = defaultdict(list)
    for path in files:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            pictures[re.sub(f"(?:{ending})$", "", path.stem, flags=re.IGNORECASE)].append(path)
    if not pictures:
        raise UserError(f"{folder} holds no pictures; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
    return dict(pictures)


def by_name(images: dict[str, list[Path]], masks: dict[str, list[Path]]) -> dict[str, tuple[list[Path], list[Path]]]:
    """Bring the images and the masks of `list_images` together, sorted by name.

    Names that differ in upper and lower case alone are one name, as the image has it; but where each of them has an image
    and a mask they are several. Files of one name that are too many stay together, for `match` to report.
    """
    spellings = defaultdict(list)
    for name in sorted(images.keys() | masks.keys()):
        spellings[name.casefold()].append(name)
    files = {}
    for names in spellings.values():
        groups = [names]
        if all(images.get(name) and masks.get(name) for name in names):
            groups = [[name] for name in names]
        for group in groups:
            of_images, of_masks = (
                [file for name in group for file in there.get(name, [])] for there in (images, masks)
            )
            files[next((name for name in group if images.get(name)), group[0])] = (of_images, of_masks)
    return dict(sorted(files.items()))


def spell(lines: Iterable[str], names: Iterable[str]) -> list[str]:
    """Replace each line by the one name that differs from it in upper and lower case alone, if it is no name itself."""
    known, spellings = set(names), defaultdict(list)
    for name in known:
        spellings[name.casefold()].append(name)
    alike = [(line, spellings[line.casefold()]) for line in lines]
    return [names[0] if line not in known and len(names) == 1 else line for line, names in alike]


def read_list(path: Path) -> list[str]:
    """Lines of a list file, without blanks at their ends and without empty lines.

    Raises:
        UserError: If it cannot be read as text or is empty.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: {reason}; expected a text file with one name a line") from None
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path} is empty; expected one name a line")
    return lines
