"""Keep a replaced run until the new one has a checkpoint."""

import dataclasses
import getpass
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..models.networks import NETWORKS
from ..utils.errors import UserError
from ..utils.files import is_folder
from .checkpoints import (
    LOG_FILE,
    PLOT_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    is_log,
    is_report,
    written_files,
)
from .recipe import Recipe


ASIDE = ".earlier_run"
COMPLETE = "complete"  # in that folder: everything of the run was moved into it
CHECKPOINT = re.compile(r"best|last(?:-(\d+))?|\.(?:best|last)\.next")
# What a kill can leave of a save, and what TensorBoard writes.
OTHERS = re.compile(
    r"\.+(best|last)\..+|\.[0-9a-f]{8}(\.\w+)?(/.+)?|([0-9.]+/)?(events\.out\.tfevents\..+|hparams\.yml)"
)


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
    """Return what a run has written: recipe, report, and folders of phases.

    Other files in the folder, and folders of the same names without a checkpoint or a log, belong to somebody else.
    """
    held = [phase for phase in _phases(output_dir) if own_files(phase)]
    recipe, report = output_dir / RECIPE_FILE, output_dir / REPORT_FILE
    has_recipe = is_recipe_of_run(recipe, bool(held))
    return [*[recipe] * has_recipe, *[report] * (has_recipe and is_report(report)), *held]


def _phases(output_dir: Path) -> list[Path]:
    tasks = sorted({task for network in NETWORKS.values() for task in network.tasks})
    return [output_dir / task for task in tasks]


def is_recipe_of_run(file: Path, has_phases: bool) -> bool:
    """Return whether a run wrote a recipe file.

    Such a file has no comments and holds all settings. Beside phases, some settings may be missing, because older runs
    had fewer.
    """
    if not file.is_file():
        return False
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    keys = {line.partition(":")[0] for line in lines}
    is_whole = keys >= {field.name for field in dataclasses.fields(Recipe)}
    return (has_phases or is_whole) and not any(line.lstrip().startswith("#") for line in lines)


def own_files(phase: Path) -> set[str]:
    """List what a training has certainly written into a phase's folder.

    A name such as samples.png counts only beside a checkpoint or a log.
    """
    names = set()
    for path in phase.iterdir() if is_folder(phase) else ():
        if found := CHECKPOINT.fullmatch(path.name):
            names |= {f"{path.name}/{name}" for name in written_files(path, int(found[1] or 0))}
    return names | {LOG_FILE, SAMPLES_FILE, PLOT_FILE} if names or is_log(phase / LOG_FILE) else names


def check_own(output_dir: Path, tasks: Container[str], resume: bool):
    """Check that a run neither replaces nor removes what others wrote.

    A phase that goes on keeps other files, so these may be there.

    Raises:
        UserError: If there is such a file.
    """
    goes_on = resume and not is_folder(output_dir / ASIDE)
    parts, recipe = parts_of_run(output_dir), output_dir / RECIPE_FILE
    found = [recipe] if os.path.lexists(recipe) and recipe not in parts and not goes_on else []
    for phase in _phases(output_dir):
        if not goes_on if phase in parts else phase.name in tasks:
            paths = sorted(path for path in phase.rglob("*") if path.is_symlink() or not path.is_dir())
            names = {path.relative_to(phase).as_posix(): path for path in paths}
            own = own_files(phase)
            found += [path for name, path in names.items() if name not in own and not OTHERS.fullmatch(name)]
    if found:
        raise UserError(
            f"{found[0]} was not written by a training and would be in the way of this one; move it elsewhere, or "
            "choose output_dir=ANOTHER"
        )


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
