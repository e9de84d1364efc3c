"""Writing that never leaves half a file: write beside the target, then rename."""

import os
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

    Raises:
        UserError: If the folder that holds `path` cannot be made or written.
    """
    path = Path(path)
    # The suffix stays: Pillow and pandas choose the format by it.
    beside = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        make_folder(path.parent)
        yield beside
        if path.is_dir():  # a folder cannot be renamed over another, so the old one steps aside first
            aside = _aside(path)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            try:
                os.rename(beside, path)
            except BaseException:
                os.rename(aside, path)
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
    if _aside(path).is_dir() and not path.exists():
        os.rename(_aside(path), path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def is_hub_id(name: str | Path) -> bool:
    """Whether `name` has the form `owner/name`, so that asking the Hub for it can make sense."""
    parts = str(name).split("/")
    return len(parts) == 2 and all(parts) and not str(name).startswith(".")


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
