"""Runs of one recipe over several random splits: mean and standard deviation."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from statistics import mean, stdev

from ..utils.errors import UserError
from ..utils.markdown import markdown_table
from .checkpoints import read_progress
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
        UserError: If a folder holds another run, or a run fails.
    """
    if len(set(seeds)) < len(seeds):
        raise UserError(f"got seeds {', '.join(map(str, seeds))}, expected different ones")
    runs = []
    for seed in seeds:
        run = deepcopy(recipe)
        run.seed = run.data.split_seed = seed
        run.output_dir = str(Path(recipe.output_dir) / f"seed-{seed}")
        runs.append((run, resume or not overwrite and is_finished(run)))
    for run, continues in runs:  # all of them, before the first one runs for hours
        check_folder(Path(run.output_dir), run, continues, overwrite)
    return [train(run, continues, overwrite, command) for run, continues in runs]


def is_finished(recipe: Recipe) -> bool:
    """Return whether the last phase of a run is finished."""
    task, phase = list(recipe.phases.items())[-1]
    progress = read_progress(Path(recipe.output_dir) / task / "last")
    return progress is not None and progress.epoch >= phase.epochs


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
