"""Write checkpoints, and read what is on record beside weights.

`AutoModel.from_pretrained` opens a checkpoint, and training resumes from it. A run is OUTPUT_DIR/recipe.yaml and
OUTPUT_DIR/PHASE/{best,last}. This module is light, so that other packages can read those folders without importing the
training loop.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from ..utils.errors import UserError, one_line
from ..utils.files import replacing, restore


if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

RECIPE_FILE = "recipe.yaml"
PROGRESS_FILE = "progress.json"  # the record of a training
CONVERSION_FILE = "conversion.json"  # the record of a conversion
STATE_FOLDER = "training_state"
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


@dataclass
class Conversion:
    """Record of a conversion of published weights."""

    network: str  # class of the network or encoder
    files: list[dict[str, str]]  # name and SHA-256 of each published file
    weights: str  # SHA-256 of the weights beside this record
    command: str | None = None
    git_commit: str | None = None
    date: str | None = None


def save_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: Any,
    progress: Progress,
    with_state: bool,
):
    """Write model, processor and progress; all processes call it.

    With `with_state` it also holds what resuming needs. An older checkpoint at `folder` stays until the new one is
    whole.

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
            with replacing(folder) as beside:
                model.save_pretrained(beside)
                processor.save_pretrained(beside)
                if with_state:
                    state.rename(beside / STATE_FOLDER)
                progress.weights = weights_digest(model)
                (beside / PROGRESS_FILE).write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")
    except WRITING_ERRORS as error:
        shutil.rmtree(state, ignore_errors=True)
        kept = "the checkpoint before it is kept" if folder.exists() else "there is none before it"
        raise UserError(f"cannot write {folder}: {one_line(error)}; {kept}; free space and start again") from error
    accelerator.wait_for_everyone()


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """Return the record beside weights, of a training or a conversion.

    Raises:
        UserError: If it cannot be read.
    """
    for path in (Path(folder) / PROGRESS_FILE, Path(folder) / CONVERSION_FILE):
        if path.is_file():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{path} is damaged ({one_line(error)}); restore it, or remove it") from error
    return None


def read_progress(folder: Path) -> Progress | None:
    """Return a checkpoint's progress, or None without a checkpoint.

    If the program was killed while it replaced this checkpoint or the best one, the old one is restored.

    Raises:
        UserError: If it cannot be read.
    """
    for name in (folder, folder.with_name("best")):
        restore(name)
    path = folder / PROGRESS_FILE
    if not path.exists():
        return None
    try:
        return Progress(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        advice = f"remove {folder} to train from scratch"
        raise UserError(f"cannot resume: {path} is damaged ({error}); {advice}") from error
