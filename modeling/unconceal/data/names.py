"""Match the files of images and masks by their names."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import printable
from ..utils.images import IMAGE_SUFFIXES


logger = logging.getLogger(__name__)

LIST_SUFFIXES = (".txt", ".lst")
NOT_NEEDED = ("edge", "trainval.txt")  # edges follow from masks, and this list from two others


def list_images(folder: Path, ending: str = "") -> dict[str, list[Path]]:
    """List the image files of a folder by their names without suffix.

    What else it holds, also images in its subfolders, is left out and logged.

    Args:
        folder: Folder.
        ending: Regular expression for what a mask has after the name of its image. Case does not matter.

    Raises:
        UserError: If the folder is missing, cannot be listed, or holds no image.
    """
    try:
        files, left_out = sort_files(folder.iterdir(), folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; expected a folder of images") from error
    nested = sorted(path for path in folder.glob("[!.]*/**/*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        inside = f" of its own, but {len(nested)} in subfolders" if nested else ""
        raise UserError(f"{folder} holds no images{inside}; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
    say_left_out(folder, left_out | {"images in its subfolders": nested})
    images = defaultdict(list)
    for path in files:
        images[re.sub(f"(?:{ending})$", "", path.stem, flags=re.IGNORECASE)].append(path)
    return dict(images)


def find_images(folder: Path) -> list[Path]:
    """List the images of a folder tree; log the others.

    Raises:
        UserError: If the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected a folder of images")
    files, left_out = sort_files(folder.rglob("*"), folder)
    if not files:
        raise UserError(f"{folder} holds no images; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
    say_left_out(folder, left_out)
    return files


def sort_files(paths: Iterable[Path], folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """Return the images, and what else there is by its kind, sorted.

    Folders count only if they are links, hidden files only if they have the suffix of an image.
    """
    images, others = [], defaultdict(list)
    for path in sorted(paths):
        suffix = path.suffix.lower()
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            if suffix in IMAGE_SUFFIXES:
                others["hidden images"].append(path)
        elif path.is_file():
            kind = f"{suffix} files" if suffix else "files without suffix"
            (images if suffix in IMAGE_SUFFIXES else others[kind]).append(path)
        elif path.is_symlink():
            others["linked folders" if path.is_dir() else "broken links"].append(path)
    return images, dict(others)


def say_unused(folder: Path, used: Sequence[Path]):
    """Log subfolders and lists of a raw folder that nothing uses."""
    left_out = defaultdict(list)
    with suppress(OSError):  # what is used may be readable although the folder cannot be listed
        there = [path for path in used if path.exists()]
        for path in sorted(folder.glob("[!.]*")):
            is_list = path.suffix.lower() in LIST_SUFFIXES and path.is_file()
            if not (is_list or path.is_dir()) or path.name.lower() in NOT_NEEDED:
                continue
            if not any(path.samefile(one) for one in there):  # some disks ignore case
                left_out["text files" if is_list else "folders"].append(path)
    say_left_out(folder, left_out, [path.name for path in used])


def say_left_out(folder: Path, left_out: Mapping[str, Sequence[Path]], expected: Sequence[str] = ()):
    """Log how many paths of each kind are left out."""
    hint = f"; expected only {', '.join(expected)}" if expected else ""
    for kind, paths in sorted(left_out.items()):
        if paths:
            names = first_names([printable(str(path.relative_to(folder))) for path in paths])
            logger.warning("%s: %d %s are left out (%s)%s", folder, len(paths), kind, names, hint)


def first_names(names: Sequence[str]) -> str:
    """Return the first three names, for messages."""
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def by_name(images: dict[str, list[Path]], masks: dict[str, list[Path]]) -> dict[str, tuple[list[Path], list[Path]]]:
    """Join the images and masks of `list_images`, sorted by name.

    Names that differ only in case are one name, spelled as the image is. If each of them has an image and a mask, they
    are different names. Surplus files of a name stay together; the caller reports them.
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
            both = ([file for name in group for file in there.get(name, [])] for there in (images, masks))
            files[next((name for name in group if images.get(name)), group[0])] = tuple(both)
    return dict(sorted(files.items()))


def spell(lines: Iterable[str], names: Iterable[str]) -> list[str]:
    """Correct the case of lines that match exactly one name."""
    known, spellings = set(names), defaultdict(list)
    for name in known:
        spellings[name.casefold()].append(name)
    alike = [(line, spellings[line.casefold()]) for line in lines]
    return [names[0] if line not in known and len(names) == 1 else line for line, names in alike]


def read_list(path: Path) -> list[str]:
    """Return the stripped lines of a list file without empty ones.

    Raises:
        UserError: If the file is empty or cannot be read as text.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: {reason}; expected a text file with one name a line") from error
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path} is empty; expected one name a line")
    return lines
