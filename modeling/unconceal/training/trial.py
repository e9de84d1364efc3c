"""Try a recipe for a few steps, and estimate its cost."""

from typing import Any

import torch
from accelerate import PartialState

from ..data.mixing import join_sets
from ..evaluation.cost import peak_bytes, reset_peak
from .recipe import Recipe
from .speed import measure_recipe
from .start import check_batch_norms, check_masks, check_start, first_rows, open_sets


STEPS = 2


def try_recipe(recipe: Recipe) -> list[dict[str, Any]]:
    """Train each phase for a few steps; estimate its cost.

    Nothing is written. Phases start from random weights. Evaluations are not counted, nor the reading of a stream.

    Returns:
        For each phase `task`, `images`, `epochs`, `batch_size`, `image_size` (width, height), `images_per_second`,
        `hours` of the whole phase and `peak_gib`, the memory of this process, or of the tensors on an accelerator.

    Raises:
        UserError: If data or recipe cannot be used, or a loss is not finite.
    """
    splits = join_sets(open_sets(recipe.data))
    tasks = list(recipe.phases)
    check_masks(splits, recipe.data, tasks)
    for task in tasks:
        check_start(recipe, task, False, splits)
    check_batch_norms(recipe, PartialState(cpu=not torch.accelerator.is_available()))
    rows, found = splits[recipe.data.train_split], []
    device = PartialState(cpu=not torch.accelerator.is_available()).device.type
    for task in tasks:
        reset_peak(device)
        measured = measure_recipe(recipe, task, steps=STEPS, rounds=1, rows=first_rows(rows))
        rate = measured["loop_images_per_second"] * PartialState().num_processes
        found.append(
            {
                "task": task,
                "images": len(rows),
                "epochs": recipe.phases[task].epochs,
                "batch_size": measured["batch_size"],
                "image_size": measured["image_size"],
                "images_per_second": rate,
                "hours": recipe.phases[task].epochs * len(rows) / rate / 3600,
                "peak_gib": peak_bytes(device) / 2**30,
            }
        )
    return found
