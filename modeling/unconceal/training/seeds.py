"""Runs of one recipe over several random splits: mean and standard deviation."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from statistics import mean, stdev

import torch
from accelerate import PartialState

from ..utils.errors import UserError
from ..utils.markdown import markdown_table
from .checkpoints import read_progress, read_record
from .earlier_run import alone_in
from .loop import train
from .recipe import Recipe
from .start import check_folder


def train_seeds(
    recipe: Recipe, seeds: Sequence[int], resume: bool = False, overwrite: bool = False, command: str | None = None
) -> list[Path]:
    """Run a recipe once for each seed; return the best checkpoints.

    Each run gets the seed as `seed` and `data.split_seed`, and its own folder `output_dir/seed-N`. Finished runs are
    kept.

    Raises:
        UserError: If seeds are equal or too large, a folder holds another run, another process trains there, or a run
            fails.
    """
    if (highest := max(seeds)) >= 2**32:
        raise UserError(f"got seed {highest}, expected one below 2^32")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"got seeds {', '.join(map(str, seeds))}, expected different ones")
    runs = []
    for seed in seeds:
        run = deepcopy(recipe)
        run.seed = run.data.split_seed = seed
        run.output_dir = str(Path(recipe.output_dir) / f"seed-{seed}")
        runs.append((run, resume or not overwrite and is_finished(run)))
    if PartialState(cpu=not torch.accelerator.is_available()).is_main_process:
        for run, continues in runs:  # all of them, before the first one runs for hours
            with alone_in(run.output_dir):
                check_folder(Path(run.output_dir), run, continues, overwrite)
    return [train(run, continues, overwrite, command) for run, continues in runs]


def is_finished(recipe: Recipe) -> bool:
    """Return whether the last phase of a run is finished."""
    task, phase = list(recipe.phases.items())[-1]
    # Unlike `read_progress`, this moves nothing in a folder where another process may train.
    record = read_record(Path(recipe.output_dir) / task / "last")
    return record is not None and record.get("epoch", 0) >= phase.epochs


def summarize_seeds(checkpoints: Sequence[Path]) -> str:
    """Return mean and sample standard deviation of the checkpoints' metrics, as text."""
    rows = [read_progress(folder).history[-1] for folder in checkpoints]
    names = [name for name in rows[0] if name.startswith("eval_") and name != "eval_num_images"]
    cells = []
    for name in names:
        values = [row[name] for row in rows]
        deviation = f"{stdev(values):.4g}" if len(values) > 1 else ""
        cells.append((name.removeprefix("eval_"), f"{mean(values):.4g}", deviation))
    seeds = "1 seed" if len(rows) == 1 else f"{len(rows)} seeds"
    table = markdown_table(("best checkpoint", f"mean of {seeds}", "standard deviation"), cells)
    warning = "Each checkpoint was chosen on the split it is scored on. Expect lower scores on new images."
    return f"{table}\n\n{warning}"
