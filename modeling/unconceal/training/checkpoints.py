"""Write checkpoints, and read what is on record beside weights.

`AutoModel.from_pretrained` opens a checkpoint, and training resumes from it. A run is OUTPUT_DIR/recipe.yaml and
OUTPUT_DIR/PHASE/{best,last}. This module is light, so that other packages can read those folders without importing the
training loop.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from safetensors import SafetensorError

from ..utils.errors import UserError, one_line, tells_lost_process
from ..utils.files import file_sha256, is_folder, replacing, restore


if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
REPORT_FILE, REPORT_TITLE = "report.md", "# Training of "
LOG_FILE, LOG_START = "log.jsonl", '{"kind": "'
SAMPLES_FILE, PLOT_FILE = "samples.png", "curves.png"
PROGRESS_FILE = "progress.json"  # the record of a training
CONVERSION_FILE = "conversion.json"  # the record of a conversion
STATE_FOLDER = "training_state"
MOST_CHECKPOINTS = 100  # that a run keeps
# What the file system, safetensors and `torch.save` raise.
WRITING_ERRORS = (OSError, SafetensorError, RuntimeError)


@dataclass
class Progress:
    """Progress of a phase."""

    task: str  # the phase
    num_processes: int = 1  # training processes; the order of the samples depends on it
    epoch: int = 0  # finished epochs
    step: int = 0  # finished optimizer steps
    best: float | None = None  # best value of the phase's metric; None before the first evaluation
    history: list[dict[str, Any]] = field(default_factory=list)  # losses, metrics, seconds of each finished epoch
    start: dict[str, Any] | None = None  # loaded weights, as `load_start` describes them; None: random
    sessions: list[dict[str, Any]] = field(default_factory=list)  # command, commit, date and machine of each start
    recipe: dict[str, Any] | None = None  # all settings
    data: list[dict[str, Any]] = field(default_factory=list)  # the data sets, as `describe_set` describes them
    weights: str | None = None  # SHA-256 of the weights beside this record
    digests: dict[str, str] = field(default_factory=dict)  # SHA-256 of each file beside this record
    unreadable: list[str] = field(default_factory=list)  # training images that could not be read
    batches: int = 0  # batches of the next epoch that are done, in each process
    epoch_rate: float | None = None  # learning rate at the start of that epoch
    batch_losses: list[list[float]] = field(default_factory=list)  # their losses, a list for each process
    batch_terms: list[dict[str, float]] = field(default_factory=list)  # sums of the terms of these losses, likewise
    batch_seconds: tuple[float, float] = (0.0, 0.0)  # time that they took, and time that they waited for data

    def __post_init__(self):
        for name, kind in get_type_hints(Progress).items():
            if not _fits(value := getattr(self, name), kind):
                raise TypeError(f"{name}: got {repr(value)[:100]}, expected {Progress.__annotations__[name]}")


@dataclass
class Conversion:
    """Record of a conversion of published weights."""

    network: str  # class of the network or encoder
    files: list[dict[str, str]]  # name and SHA-256 of each published file
    weights: str  # SHA-256 of the weights beside this record
    command: str | None = None
    git_commit: str | None = None
    date: str | None = None


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value from JSON has a type."""
    inner = get_args(kind)
    if kind is Any:
        return True
    if get_origin(kind) is UnionType:
        return any(_fits(value, one) for one in inner)
    if get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(inner) and all(map(_fits, value, inner))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(one, inner[1]) for one in value.values())
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def save_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: Any,
    progress: Progress,
    with_state: bool,
    total_limit: int = 1,
):
    """Write model, processor and progress; all processes call it.

    With `with_state` it also holds what resuming needs. An older checkpoint at `folder` stays until the new one is
    whole. With a `total_limit` above 1 it then stays as `FOLDER-1`, the one before as `FOLDER-2`, and so on.

    Raises:
        UserError: If it cannot be written, for example on a full disk.
    """
    from ..utils.digests import weights_digest  # imports torch, which is slow

    state = folder.with_name(f".{folder.name}.{STATE_FOLDER}")
    try:
        if with_state:
            if accelerator.is_main_process:
                shutil.rmtree(state, ignore_errors=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(state))
            accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with replacing(next_of(folder)) as beside:
                model.save_pretrained(beside)
                processor.save_pretrained(beside)
                if with_state:
                    state.rename(beside / STATE_FOLDER)
                progress.weights = weights_digest(model)
                progress.digests = {name: file_sha256(beside / name) for name in files_of(beside)}
                (beside / PROGRESS_FILE).write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")
            rotate(folder, total_limit)
    except WRITING_ERRORS as error:
        shutil.rmtree(state, ignore_errors=True)
        if tells_lost_process(error):
            raise
        kept = "the checkpoint before it is kept" if folder.exists() else "there is none before it"
        raise UserError(f"cannot write {folder}: {one_line(error)}; {kept}; free space and start again") from error
    accelerator.wait_for_everyone()


def next_of(folder: Path) -> Path:
    """Return where a whole checkpoint lies before it becomes `folder`."""
    return folder.with_name(f".{folder.name}.next")


def numbered(folder: Path, number: int) -> Path:
    """Return where the checkpoint before, or before that one, lies."""
    return folder.with_name(f"{folder.name}-{number}") if number else folder


def rotate(folder: Path, total_limit: int):
    """Put a new checkpoint, if there is one, in its place.

    The others move on to make room. After a kill at any moment, the next call goes on.
    """
    removed = folder.with_name(f".{folder.name}.removed")
    if not is_folder(next_of(folder)):
        return
    places = [numbered(folder, number) for number in range(total_limit)]
    discard(removed, next_of(folder))
    free = next((number for number, place in enumerate(places) if not is_folder(place)), None)
    if free is None:
        places[-1].rename(removed)
        free = total_limit - 1
    for number in range(free, 0, -1):
        places[number - 1].rename(places[number])
    next_of(folder).rename(folder)
    discard(removed, folder)
    while written_files(numbered(folder, total_limit), total_limit):  # of an earlier, higher limit
        discard(numbered(folder, total_limit), folder)
        total_limit += 1


def discard(checkpoint: Path, heir: Path):
    """Remove a checkpoint; what others put into it moves to `heir`."""
    if written := written_files(checkpoint):
        for name in set(files_of(checkpoint)) - set(written):
            if not (heir / name).exists():
                (heir / name).parent.mkdir(parents=True, exist_ok=True)
                (checkpoint / name).rename(heir / name)
    shutil.rmtree(checkpoint, ignore_errors=True)


def written_files(checkpoint: Path, number: int = 0) -> list[str]:
    """List the files that a training wrote into a checkpoint.

    A folder without a record has none. Nor has `last-NUMBER` beyond the limit of its run: it is a copy made by hand.
    """
    try:
        record = json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
        if number and number >= record["recipe"]["total_limit"]:
            return []
        return [PROGRESS_FILE, *record["digests"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def is_report(file: Path) -> bool:
    """Return whether a file is the report of a training."""
    return _starts_with(file, REPORT_TITLE)


def is_log(file: Path) -> bool:
    """Return whether a file is a training's log, or an empty one."""
    return _starts_with(file, LOG_START) or (file.is_file() and not file.stat().st_size)


def _starts_with(file: Path, start: str) -> bool:
    if not file.is_file():
        return False
    with file.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(len(start)) == start


def files_of(folder: Path) -> list[str]:
    """List the files of a checkpoint but its record."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name != PROGRESS_FILE]


def find_checkpoint(folder: Path, total_limit: int = 1) -> tuple[Path, Progress] | None:
    """Return the newest whole checkpoint at `folder`, or before it.

    A damaged one is named in the log. Returns None if there is none at all.

    Raises:
        UserError: If there are checkpoints, but none is whole.
    """
    rotate(folder, total_limit)
    places = (numbered(folder, number) for number in range(MOST_CHECKPOINTS))
    found = [place for place in places if is_folder(place)]
    problems = []
    for path in found:
        try:
            progress = read_progress(path)
            damaged = [name for name, digest in progress.digests.items() if not is_whole(path / name, digest)]
            if not damaged:
                return path, progress
            problems.append(f"{path / damaged[0]} is damaged or missing")
        except UserError as error:
            problems.append(str(error))
        if path != found[-1]:
            logger.warning("%s; the checkpoint before it is tried", problems[-1])
    if problems:
        raise UserError(f"cannot resume: {problems[-1]}; remove {folder} to train from scratch")
    return None


def is_whole(path: Path, digest: str) -> bool:
    """Return whether a file has a digest."""
    try:
        return file_sha256(path) == digest
    except OSError:
        return False


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """Return the record beside weights, of a training or a conversion.

    Raises:
        UserError: If it cannot be read.
    """
    for path in (Path(folder) / PROGRESS_FILE, Path(folder) / CONVERSION_FILE):
        if path.is_file():
            return _parse(path, dict, "restore it, or remove it")
    return None


def is_one_of(data: str, paths: Sequence[str]) -> bool:
    """Return whether a data set is one of these, by its name.

    Only the last part of a path counts: folders move.
    """
    return Path(data).name in [Path(path).name for path in paths]


def trained_on(record: Mapping[str, Any] | None, data: str, split: str, split_seed: int | None) -> str | None:
    """Say if training has seen images of a split, or None.

    Args:
        record: What `read_record` returned.
        data: Folder or Hub id of the data set to score.
        split: The split to score.
        split_seed: Seed of its random split, or None for the split as stored.
    """
    recipe = ((record or {}).get("recipe") or {}).get("data") or {}
    paths = recipe.get("path") or []
    if not is_one_of(data, [paths] if isinstance(paths, str) else paths):
        return None
    train, seed = recipe.get("train_split"), recipe.get("split_seed")
    if (split, split_seed) == (train, seed):
        return f"the network was trained on {split} of {data}"
    if split_seed is None and seed is not None and split in (train, recipe.get("eval_split")):
        return f"the network was trained on a random part of {data}; --split-seed {seed} scores the other part"
    return None


def _parse(path: Path, kind: Callable[..., Any], advice: str) -> Any:
    """Make something from the JSON object in a file."""
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); {advice}") from error


def read_progress(folder: Path) -> Progress | None:
    """Return a checkpoint's progress, or None without a checkpoint.

    If the program was killed while it replaced this checkpoint or the best one, they are put in place.

    Raises:
        UserError: If it cannot be read.
    """
    for place in (folder, folder.with_name("best")):
        restore(place)
        if is_folder(next_of(place)) and not place.exists():
            next_of(place).rename(place)
    path = folder / PROGRESS_FILE
    return _parse(path, Progress, f"remove {folder} to train from scratch") if path.exists() else None
