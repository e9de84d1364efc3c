"""Measure how fast a recipe trains."""

import io
import time
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device, set_seed
from datasets import Dataset
from torch.utils.data import DataLoader

from ..data.masks import encode_mask
from ..data.synthetic import generate
from ..data.transforms import TrainingSet
from ..data.write import FEATURES, make_row
from .checkpoints import Progress
from .loop import make_accelerator, prepare_phase, train_epoch, train_step
from .recipe import Recipe
from .saving import SaveSchedule, StopRequest
from .start import build_model, build_processor, choose_precision


NUM_SCENES = 16  # generated once and repeated: large ones take a second each


def measure_recipe(
    recipe: Recipe, task: str | None = None, steps: int = 10, rounds: int = 3, rows: Dataset | None = None
) -> dict[str, Any]:
    """Measure training with and without the loading of samples, in this process.

    The network starts from random weights. Each round trains `steps` steps on one batch. Then the training loop runs
    an epoch of `steps` steps on samples from the loader. A short epoch waits longer for its first batch, by share.

    Args:
        recipe: The recipe. Its data set is not opened.
        task: Phase of the recipe, the last one by default.
        steps: Steps of a round.
        rounds: Rounds after one that warms up. Medians count.
        rows: Samples with `image` and `mask`; generated in the size of the network by default.

    Returns:
        `task`, `batch_size`, `image_size` (width, height), `mixed_precision`, `model_images_per_second` (forward,
        backward, optimizer step), `loop_images_per_second`, their ratio `loop_share`, and `data_wait_share`, the share
        of the loop's time that waits for samples. With several processes, the numbers of this process.
    """
    task = task or list(recipe.phases)[-1]
    phase = recipe.phases[task]
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    recipe = replace(recipe, mixed_precision=choose_precision(recipe, False, device), trackers=[])
    accelerator = make_accelerator(recipe, phase)
    set_seed(recipe.seed)
    processor = build_processor(recipe, None)
    size = processor.size
    rows = _generated(size.height, size.width) if rows is None else rows
    samples = TrainingSet(
        rows.select(np.arange(steps * phase.batch_size) % len(rows)), processor, recipe.data.transforms, recipe.seed
    )
    parts = prepare_phase(recipe, phase, accelerator, build_model(recipe, task, None), samples)
    batch = send_to_device(next(iter(DataLoader(samples, phase.batch_size))), device)
    if recipe.channels_last:
        batch["pixel_values"] = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
    model_rates, epochs, never = [], [], SaveSchedule(None, StopRequest(), accelerator)
    for epoch in range(rounds + 1):
        _wait(device)
        started = time.perf_counter()
        for _ in range(steps):
            train_step(phase, accelerator, parts, batch)
        _wait(device)
        model_rates.append(steps * phase.batch_size / (time.perf_counter() - started))
        samples.set_epoch(epoch)
        progress = Progress(task, epoch=epoch)
        epochs.append(train_epoch(recipe, phase, accelerator, parts, progress, never, None, lambda: None))
    model_rate = median(model_rates[1:])
    loop_rate, waiting = (median(row[key] for row in epochs[1:]) for key in ("samples_per_second", "data_wait_share"))
    return {
        "task": task,
        "batch_size": phase.batch_size,
        "image_size": list(batch["pixel_values"].shape[:1:-1]),
        "mixed_precision": accelerator.mixed_precision,
        "model_images_per_second": model_rate,
        "loop_images_per_second": loop_rate / accelerator.num_processes,
        "loop_share": loop_rate / accelerator.num_processes / model_rate,
        "data_wait_share": waiting,
    }


def _generated(height: int, width: int) -> Dataset:
    rows = []
    for index in range(NUM_SCENES):
        image, mask = generate("camouflage", (height, width), 0, index)
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=90)
        rows.append(make_row(buffer.getvalue(), f"{index}.jpg", encode_mask(np.asarray(mask) > 0), str(index), ""))
    return Dataset.from_list(rows, features=FEATURES)


def _wait(device: torch.device):
    """Wait for an accelerator, which computes while Python goes on."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
