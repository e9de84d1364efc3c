"""Score a network on a data set."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.loading import read_pair, readable
from ..data.masks import is_faint, is_object, report_faint
from ..models.image_processing_unconceal import NonFiniteLogits
from ..models.inference import make_inference_form
from ..models.predict import predict_masks
from ..utils.errors import UserError
from ..utils.images import size_text
from ..utils.processes import obey_parent_only
from . import protocol_segmentation
from .base import Protocol
from .workers import map_unordered


Job = tuple[dict[str, Any], np.ndarray, np.ndarray]  # facts, prediction and ground truth of one image


def evaluate_model(
    model: nn.Module,
    processor: Any,
    dataset: Dataset,
    *,
    accelerator: Accelerator | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    metric_workers: int = 0,
    protocol: Protocol = protocol_segmentation.PROTOCOL,
    refine: str = "never",
    resize_masks: bool = False,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """Segment and score every image of a data set.

    With several processes, each takes every n-th batch, and all receive all rows. A batch holds the same images for
    any number of processes. So the numbers are equal to the last digit, even if the network normalizes over the batch.

    Args:
        model: A network of this package, with or without a wrapper of Accelerate.
        processor: Its image processor.
        dataset: One split with the columns `image`, `mask`, `id` and `source`.
        accelerator: Says which of several processes this is.
        batch_size: Images in a forward pass. A processor that does not resize gets them one by one.
        num_workers: Processes that load and prepare images, for each process.
        metric_workers: Processes that score during the forward pass, for each process. 0 scores in this process.
        protocol: One of `PROTOCOLS`.
        refine: As for `Segmenter.segment`. Papers do not refine.
        resize_masks: Whether to resize masks of other sizes than their images, by the nearest pixel. Rows then hold
            `mask_resized`.
        dtype: Type of the arithmetic. None is that of `model`.
        progress: Whether the main process shows a progress bar, and names masks that are too dark to show an object.
        **options: Options of the protocol's `score_image`.

    Returns:
        One row for each image, in the order of `dataset`: `id`, `source`, `height`, `width` (pixels) and the keys of
        the protocol's `score_image`. The protocol's `summarize` takes these rows.

    Raises:
        UserError: If mask and image differ in size, or the output is not finite.
        ValueError: If `refine` is unknown, or the protocol has no such option.
    """
    options = protocol.options(**options)
    batch_size = batch_size if processor.do_resize else 1
    rank, world_size = 0, 1
    if accelerator is not None:
        rank, world_size = accelerator.process_index, accelerator.num_processes
        # The wrapper's forward pass would wait for other processes, which may have one batch less.
        model = accelerator.unwrap_model(model)
    # An exported network is fast already.
    network = make_inference_form(model, dtype) if isinstance(model, nn.Module) else model
    indices = range(len(dataset))
    batches = [indices[start : start + batch_size] for start in range(0, len(dataset), batch_size)][rank::world_size]
    collate = partial(_collate, dataset, processor, refine != "never", resize_masks)
    loader = DataLoader(
        indices,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=obey_parent_only,
    )

    def jobs() -> Iterator[Job]:
        read = readable(loader, "the data")
        read = tqdm(read, "evaluate", len(loader), unit="batch", disable=rank > 0 or not progress)
        for batch, (examples, images, pixel_values) in zip(batches, read, strict=True):
            pixel_values = pixel_values.to(network.device, network.dtype)
            masks = predict_masks(network, processor, images, pixel_values, refine, batch_size)
            for index, example in zip(batch, examples, strict=True):
                try:
                    probs = next(masks)
                except NonFiniteLogits as error:
                    raise UserError(f"{example['id']}: {error}") from error
                yield _checked({"index": index, **example}, probs)

    score = partial(score_job, protocol.score_image, options)
    with torch.inference_mode():
        rows = list(map_unordered(score, jobs(), min(metric_workers, len(dataset))))
    if world_size > 1:
        rows = gather_object(rows)
    rows = in_order(rows)
    report_vanished(rows, is_silent=rank > 0 or not progress)
    return rows


def _collate(
    dataset: Dataset, processor: Any, keep_images: bool, resize_masks: bool, indices: list[int]
) -> tuple[list[dict[str, Any]], list, torch.Tensor]:
    """Read rows as facts, images or their sizes, and pixel values."""
    examples, images = [], []
    for index in indices:
        row, image, mask = read_pair(dataset, index)
        facts = {"id": row["id"], "source": row["source"], "height": image.height, "width": image.width}
        facts["has_vanished"] = is_faint(mask)
        if resize_masks:
            facts["mask_resized"] = mask.size != image.size
            mask = mask.resize(image.size, Image.Resampling.NEAREST)
        examples.append({**facts, "target": is_object(mask)})
        images.append(image)
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    if not keep_images:  # slow to send from a loader's process
        images = [(image.height, image.width) for image in images]
    return examples, images, pixel_values


def score_job(score_image: Callable[..., dict[str, Any]], options: dict[str, Any], job: Job) -> dict[str, Any]:
    """Return the row of one image: its facts and its scores."""
    example, probs, target = job
    return {**example, **score_image(probs, target, **options)}


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort rows by their positions `index`, and drop these."""
    rows.sort(key=lambda row: row["index"])
    for row in rows:
        del row["index"]
    return rows


def report_vanished(rows: list[dict[str, Any]], is_silent: bool = False):
    """Drop `has_vanished` from rows, and name those where it is true."""
    vanished = [row["id"] for row in rows if row.pop("has_vanished")]
    if not is_silent:
        report_faint(vanished, "ground truth masks")


def _checked(example: dict[str, Any], probs: torch.Tensor) -> Job:
    # Not checked in the loader: its processes turn a one-line error into a traceback.
    target = example.pop("target")
    id, sizes = example["id"], [size_text(mask.shape[::-1]) for mask in (target, probs)]
    if sizes[0] != sizes[1]:
        advice = "build the data set again: unconceal prepare reports such pairs"
        raise UserError(f"{id}: got a mask of {sizes[0]} for an image of {sizes[1]}; {advice}")
    return example, probs.cpu().numpy(), target
