"""Write the report of a run, `report.md`, with its plots."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.errors import UserError, one_line
from ..utils.files import replacing
from ..utils.markdown import markdown_table
from .checkpoints import (
    PLOT_FILE,
    REPORT_FILE,
    REPORT_TITLE,
    SAMPLES_FILE,
    Progress,
    is_report,
    read_progress,
)
from .logs import read_log
from .recipe import Recipe


logger = logging.getLogger(__name__)


def write_report(recipe: Recipe):
    """Write `report.md` into a run's folder, and `curves.png` into each phase's.

    All numbers come from the records beside the weights, as those of the model card do. What cannot be written is
    named in the log.
    """
    folder = Path(recipe.output_dir)
    found = {task: read_progress(folder / task / "last") for task in recipe.phases}
    phases = {task: progress for task, progress in found.items() if progress and progress.history}
    file = folder / REPORT_FILE
    try:
        if os.path.lexists(file) and not is_report(file):
            logger.warning("%s was not written by a training and stays; this run has no report", file)
            return
        text = make_report(recipe, phases)
        with replacing(file) as beside:
            beside.write_text(text, encoding="utf-8")
    except (OSError, UserError) as error:
        logger.warning("cannot write %s: %s", file, one_line(error))


def make_report(recipe: Recipe, phases: Mapping[str, Progress]) -> str:
    """Return the report as Markdown, and draw the plots that it shows."""
    folder, last = Path(recipe.output_dir), list(phases.values())[-1]
    parts = [f"{REPORT_TITLE}{recipe.network.upper()}: {folder.name}"]
    columns = ("phase", "epochs", "steps", "minutes", "images/s", "waiting for data", "best", "its epoch")
    parts.append(markdown_table(columns, [_phase_row(recipe, *item) for item in phases.items()]))
    unread = {name for progress in phases.values() for name in progress.unreadable}
    sets = [
        f"- {one['path']}: " + ", ".join(f"{n} in `{split}`" for split, n in one["images"].items())
        for one in last.data
    ]
    parts.append("\n".join(["## Data", "", *sets]))
    if unread:
        names = ", ".join(sorted(unread))
        parts.append(f"{len(unread)} training images could not be read; others took their places: {names}.")
    for task, progress in phases.items():
        parts.append(f"## {task.capitalize()}")
        parts.append(_draw(folder / task, progress, _metric(recipe, task)))
        scores = {key: value for key, value in _best_row(recipe, task, progress).items() if key.startswith("eval_")}
        rows = [(key.removeprefix("eval_"), str(round(value, 4))) for key, value in scores.items()]
        parts.append(f"The best checkpoint, on `{recipe.data.eval_split}`:")
        parts.append(markdown_table(("number", "value"), rows))
        losses = progress.history[-1].get("losses")
        if losses:
            parts.append("The terms of the loss in the last epoch:")
            parts.append(markdown_table(("term", "mean"), [(name, f"{value:.4f}") for name, value in losses.items()]))
        if (folder / task / SAMPLES_FILE).exists():
            parts.append(f"![predictions after the last evaluation]({task}/{SAMPLES_FILE})")
    starts = [
        (task, one["date"], one["git_commit"] or "", f"`{one['command'] or ''}`")
        for task, progress in phases.items()
        for one in progress.sessions
    ]
    parts += ["## Starts", markdown_table(("phase", "date", "commit", "command"), starts)]
    machine = last.sessions[-1]
    parts.append(
        f"{machine['accelerator'] or machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"precision {machine['mixed_precision']}. All settings are in `recipe.yaml`."
    )
    return "\n\n".join(parts) + "\n"


def _metric(recipe: Recipe, task: str) -> str:
    return recipe.best_metric if task == "segmentation" else "loss"


def _best_row(recipe: Recipe, task: str, progress: Progress) -> dict[str, Any]:
    """Return the first row with the best value."""
    key = f"eval_{_metric(recipe, task)}"
    return next(row for row in progress.history if row.get(key) == progress.best)


def _phase_row(recipe: Recipe, task: str, progress: Progress) -> tuple[str, ...]:
    rows = progress.history
    seconds = sum(row["seconds"] for row in rows)
    waited = sum(row["seconds"] * row["data_wait_share"] for row in rows)
    return (
        task,
        f"{progress.epoch} of {recipe.phases[task].epochs}",
        str(progress.step),
        f"{sum(row['total_seconds'] for row in rows) / 60:.1f}",
        f"{sum(row['samples_per_second'] for row in rows) / len(rows):.3g}",
        f"{waited / seconds:.0%}",
        f"{_metric(recipe, task)} {progress.best:.4f}",
        str(_best_row(recipe, task, progress)["epoch"]),
    )


def _draw(folder: Path, progress: Progress, metric: str) -> str:
    """Draw the curves of a phase; return the line that shows them."""
    from ..drawing.training import draw_training  # slow to import

    steps = [row for row in read_log(folder) if row.get("kind") == "steps"]
    try:
        image = draw_training(progress.history, steps, metric)
    except UserError as error:  # without matplotlib
        return f"No curves: {error}."
    with replacing(folder / PLOT_FILE) as beside:
        image.save(beside)
    return f"![training loss, and {metric} of the validation split]({folder.name}/{PLOT_FILE})"


__all__ = ["write_report"]
