"""Replace files completely or not at all; check names and Hub ids."""

import hashlib
import json
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
    """Yield a temporary path next to `path`; on success it replaces `path`.

    It can become a file or a folder. After any failure, also Ctrl-C, `path` is as before and the temporary path is
    gone. A file never replaces a folder. Of a link to a folder, the folder is replaced.

    Raises:
        UserError: If the folder that holds `path` cannot be made or written.
        OSError: If the temporary path cannot be renamed to `path`.
    """
    path = _real_folder(path)
    # Pillow and pandas choose the format by the suffix. With the stem the name could be too long.
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        make_folder(path.parent)
        restore(path)
        yield temporary
        if temporary.is_dir() and path.is_dir():  # a folder cannot be renamed over another, so move the old one aside
            aside = _aside(path)
            shutil.rmtree(aside, ignore_errors=True)
            try:
                os.rename(path, aside)
                os.rename(temporary, path)
            except BaseException:
                restore(path)
                raise
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):  # it was renamed, or its parent is a file
                temporary.unlink()


def restore(path: str | Path):
    """Restore the folder at `path` if a kill interrupted `replacing`."""
    path = _real_folder(path)
    if is_folder(_aside(path)) and not os.path.exists(path):
        with suppress(FileNotFoundError):  # another process was faster
            os.rename(_aside(path), path)


def _aside(path: Path) -> Path:
    # What is found there is taken for ours, so nobody else may choose this name.
    return path.with_name(f".{path.name}.unconceal-old")


def _real_folder(path: str | Path) -> Path:
    """Follow a link to a folder, also to one set aside."""
    real = Path(os.path.realpath(path))
    is_link = os.path.islink(path) and (is_folder(real) or is_folder(_aside(real)))
    return real if is_link else Path(path)


is_folder = os.path.isdir  # `Path.is_dir` raises an error for overlong names


def is_taken(path: str | Path) -> bool:
    """Return whether there is a file, folder or broken link at `path`.

    Raises:
        UserError: If the name is too long, or a part of the path is a file.
    """
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another name") from error
    return True


def has_keys(path: str | Path, *keys: str) -> bool:
    """Return whether a file is a JSON object with some keys."""
    path = Path(path)
    try:
        return path.is_file() and set(keys) <= json.loads(path.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        return False


def printable(text: str) -> str:
    """Replace undecodable bytes of file names by question marks."""
    return text.encode(errors="replace").decode()


def data_set_path(path: str | Path) -> str:
    """Return the absolute path of a data set, or its Hub id."""
    return str(refuse_pattern(path)) if Path(path).exists() else str(path)


def refuse_pattern(folder: str | Path) -> Path:
    """Return the absolute path of a folder for a data set.

    Raises:
        UserError: If the datasets library would read the path as a pattern, and so open other folders.
    """
    absolute = Path(folder).resolve()
    found = [text for text in ("*", "?", "[", "::") if text in str(absolute)]
    if found:
        raise UserError(
            f"got the folder {absolute}, whose path holds {' and '.join(found)}; the datasets library reads that as a "
            "pattern, so choose another name"
        )
    return absolute


def with_home(path: str) -> str:
    """Replace a leading ~ by the home folder."""
    return f"{Path.home()}{path[1:]}" if path == "~" or path.startswith("~/") else path


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_hub_id(name: str | Path) -> bool:
    """Return whether `name` has the form `owner/name`."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)) is not None


def make_folder(path: str | Path) -> Path:
    """Make a writable folder and its parents, or raise a `UserError`."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}; choose another output folder") from error
    return path
