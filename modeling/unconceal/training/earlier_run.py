"""Keep a replaced run until the new one has a checkpoint."""

import getpass
import hashlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..models.networks import NETWORKS
from ..utils.errors import UserError
from ..utils.files import is_folder
from .checkpoints import RECIPE_FILE, REPORT_FILE, is_report


ASIDE = ".earlier_run"
COMPLETE = "complete"  # in that folder: everything of the run was moved into it


@contextmanager
def alone_in(output_dir: str | Path) -> Iterator[None]:
    """Keep other processes of this machine from training in a folder.

    The lock lies with the temporary files and ends with the process.

    Raises:
        UserError: If another process trains there.
    """
    name = hashlib.sha256(f"{getpass.getuser()} {Path(output_dir).resolve()}".encode(errors="replace")).hexdigest()
    lock = FileLock(Path(tempfile.gettempdir()) / f"unconceal-{name[:16]}.lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise UserError(
            f"another process trains in {output_dir}; wait for its end, stop it, or choose output_dir=ANOTHER"
        ) from None


def parts_of_run(output_dir: Path) -> list[Path]:
    """Return what a run has written: recipe and folders with checkpoints.

    Other files in the folder, and folders of the same names without a checkpoint, belong to somebody else.
    """
    tasks = sorted({task for network in NETWORKS.values() for task in network.tasks})
    phases = [output_dir / task for task in tasks]
    held = [phase for phase in phases if any(is_folder(phase / name) for name in ("best", "last"))]
    recipe, report = output_dir / RECIPE_FILE, output_dir / REPORT_FILE
    has_recipe = recipe.exists()
    return [*[recipe] * has_recipe, *[report] * (has_recipe and is_report(report)), *held]


def holds_run(output_dir: Path) -> bool:
    """Return whether there is a run, in place or set aside."""
    return bool(parts_of_run(output_dir)) or is_folder(output_dir / ASIDE)


def check_apart(output_dir: Path, sources: list[tuple[str, str | None]]):
    """Check that a new run needs nothing of the run it replaces.

    `sources` are keys of the recipe with paths or Hub ids.

    Raises:
        UserError: If one lies in a folder that would be removed.
    """
    for part in parts_of_run(output_dir):
        for key, source in sources:
            if source and Path(source).exists() and Path(source).resolve().is_relative_to(part.resolve()):
                raise UserError(
                    f"{key} is {source}, a part of the run that --overwrite replaces; copy it elsewhere, or keep the "
                    "run with output_dir=ANOTHER"
                )


def set_aside(output_dir: Path):
    """Move a run out of the way of a new one."""
    parts, aside = parts_of_run(output_dir), output_dir / ASIDE
    if parts:
        aside.mkdir()
        for part in parts:
            part.rename(aside / part.name)
        (aside / COMPLETE).touch()


def bring_back(output_dir: Path):
    """Restore a run that was set aside, if there is one.

    The run after it has no whole checkpoint yet; what it has written goes.
    """
    aside = output_dir / ASIDE
    if not is_folder(aside):
        return
    if (aside / COMPLETE).exists():  # otherwise a kill came first, and what is left belongs to the earlier run
        for part in parts_of_run(output_dir):
            remove(part)
        (aside / COMPLETE).unlink()
    for part in aside.iterdir():
        target = output_dir / part.name
        remove(target)  # logs of a run without a checkpoint
        part.rename(target)
    aside.rmdir()


def remove(part: Path):
    """Remove a file or a folder, if there is one."""
    if is_folder(part):
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)


def forget(output_dir: Path):
    """Remove a run that was set aside, if there is one."""
    aside = output_dir / ASIDE
    if is_folder(aside):
        # Renamed first: half of a run must not come back.
        removed = aside.with_name(f"{ASIDE}.{uuid.uuid4().hex[:8]}")
        aside.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
