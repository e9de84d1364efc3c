"""Names of files, and writing that never leaves half a file: write beside the target, then rename."""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a fresh name beside `path`; on success what was written there, file or folder, takes the place of `path`.

    On any failure, Ctrl-C included, `path` is as it was before and nothing is left beside it.

    A file never takes the place of a folder.

    Raises:
        UserError: If the folder that holds `path` cannot be made or written.
        OSError: If what was written cannot be renamed to `path`.
    """
    path = Path(path)
    # The suffix stays: Pillow and pandas choose the format by it. The stem goes: with it the name could be too long.
    beside = path.with_name(f".{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        make_folder(path.parent)
        restore(path)
        yield beside
        if beside.is_dir() and path.is_dir():  # neither can be renamed over the other, so the old one steps aside
            aside = _aside(path)
            shutil.rmtree(aside, ignore_errors=True)
            try:
                os.rename(path, aside)
                os.rename(beside, path)
            except BaseException:
                restore(path)
                raise
            shutil.rmtree(aside)
        else:
            os.replace(beside, path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            with suppress(OSError):  # such as a parent that is a file; the error that matters is on its way
                beside.unlink()


def restore(path: str | Path):
    """Bring back the folder at `path` if the program was killed between the two renames of `replacing`."""
    path = Path(path)
    # Not Path's own methods, which raise an error where a name is too long to exist.
    if os.path.isdir(_aside(path)) and not os.path.exists(path):
        with suppress(FileNotFoundError):  # another process was faster
            os.rename(_aside(path), path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def is_folder(path: str | Path) -> bool:
    """Whether `path` is a folder; of a name that is too long to exist too, where Path's own method raises an error."""
    return os.path.isdir(path)


def printable(text: str) -> str:
    """Return a text without the half characters that stand in for bytes of file names that are no text."""
    return text.encode(errors="replace").decode()


def is_hub_id(name: str | Path) -> bool:
    """Whether `name` has the form `owner/name`, so that asking the Hub for it can make sense."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)) is not None


def make_folder(path: str | Path) -> Path:
    """Make `path` and its parents, and check that files can be written there.

    Raises:
        UserError: If that is not possible; the message names the folder and the reason.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}; choose another output folder") from None
    return path
