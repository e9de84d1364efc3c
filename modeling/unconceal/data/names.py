"""Match the files of images and masks by their names."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from ..utils.errors import UserError
from ..utils.images import IMAGE_SUFFIXES


logger = logging.getLogger(__name__)


def list_images(folder: Path, ending: str = "") -> dict[str, list[Path]]:
    """List the image files of a folder by their names without suffix.

    Args:
        folder: Folder; a line in the log counts the images in its subfolders, which are left out.
        ending: Regular expression for what a mask has after the name of its image. Case does not matter.

    Raises:
        UserError: If the folder is missing, cannot be listed, or holds no image.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; expected a folder of images") from error
    images = defaultdict(list)
    for path in files:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            images[re.sub(f"(?:{ending})$", "", path.stem, flags=re.IGNORECASE)].append(path)
    nested = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.glob("[!.]*/**/*"))
    if not images:
        inside = f" of its own, but {nested} in subfolders" if nested else ""
        raise UserError(f"{folder} holds no images{inside}; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
    if nested:
        logger.warning("%s: %d images in its subfolders are left out", folder, nested)
    return dict(images)


def find_images(folder: Path) -> list[Path]:
    """List the image files of a folder and its subfolders.

    Raises:
        UserError: If the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected a folder of images")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise UserError(f"{folder} holds no images; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
    return files


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
