"""Running a model over a data set and scoring every picture at its original size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from ..data.loading import readable
from ..models.image_processing_unconceal import to_mask, to_rgb
from ..models.refine import make_mask
from ..utils.errors import UserError
from . import protocol_segmentation
from .base import Protocol
from .workers import map_unordered


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
    progress: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """Segment every picture of `dataset` and score it by a protocol.

    Under several processes each takes every n-th batch and all receive all rows. Batches are cut before they are dealt
    out, so that each holds the same pictures for any number of processes and the numbers stay the same to the last digit,
    also where a switch makes the network look at the whole batch.

    Args:
        model: A network of this package; a wrapper that Accelerate put around it is taken off.
        processor: Its image processor.
        dataset: One split with columns `image`, `mask` (foreground above 127), `id` and `source`.
        accelerator: The one the program runs under, if any. Its mixed precision applies if it prepared `model`.
        batch_size: Pictures in one forward pass.
        num_workers: Processes that load and prepare pictures beside the forward pass, for each process.
        metric_workers: Processes that score beside the forward pass, for each process; with 0 it waits for the scores.
        protocol: How to score, one of `PROTOCOLS`.
        refine: Whether the edges of large pictures are looked at again, as for `Segmenter.segment`. Papers do not.
        progress: Whether the main process shows a progress bar.
        **options: Options of the protocol's `score_image`.

    Returns:
        One row a picture, in the order of `dataset`: `id`, `source`, `height`, `width` (pixels) and the keys of
        the protocol's `score_image`. Put them together by its `summarize`.

    Raises:
        UserError: If a mask has another size than its picture, the output is not finite, or the protocol has no such
            option.
        ValueError: If `refine` is unknown.
    """
    options = checked_options(protocol, **options)
    rank, world_size = 0, 1
    if accelerator is not None:
        rank, world_size = accelerator.process_index, accelerator.num_processes
        # Without the wrapper, whose forward pass waits for the other processes: they may have one batch less.
        model = accelerator.unwrap_model(model)
    parameter = next(model.parameters())

    def look(images: list[Image.Image]) -> torch.Tensor:
        pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
        return model(pixel_values=pixel_values.to(parameter.device, parameter.dtype)).logits

    indices = range(len(dataset))
    batches = [indices[start : start + batch_size] for start in range(0, len(dataset), batch_size)]
    loader = DataLoader(
        _Indexed(dataset),
        batch_sampler=batches[rank::world_size],
        num_workers=num_workers,
        collate_fn=_Collate(processor, keep_images=refine != "never"),
    )

    def predictions() -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
        read = readable(loader, "the data")
        batches = tqdm(read, "evaluate", len(loader), unit="batch", disable=rank > 0 or not progress)
        for examples, pixel_values in batches:
            outputs = model(pixel_values=pixel_values.to(parameter.device, parameter.dtype))
            for example, logits in zip(examples, outputs.logits.split(1), strict=True):
                size = (example["height"], example["width"])
                probs = make_mask(logits, size, example.pop("image", None), refine, processor, look, batch_size)
                yield _checked(example, probs)

    score = partial(score_job, protocol.score_image, options)
    with _eval_mode(model), torch.inference_mode():
        rows = list(map_unordered(score, predictions(), min(metric_workers, len(dataset))))
    if world_size > 1:
        rows = gather_object(rows)
    rows.sort(key=lambda row: row["index"])
    for row in rows:
        del row["index"]
    return rows


class _Indexed(torch.utils.data.Dataset):
    """The rows of a data set with their positions, by which gathered rows find their order again."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, **self.dataset[index]}

    def __len__(self) -> int:
        return len(self.dataset)


class _Collate:
    """A batch from rows: what a result row needs to know of each picture, if asked the picture, and their pixel values."""

    def __init__(self, processor: Any, keep_images: bool):
        self.processor = processor
        self.keep_images = keep_images

    def __call__(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], torch.Tensor]:
        images = [self.read(row) for row in rows]
        examples = [
            {
                "index": row["index"],
                "id": row["id"],
                "source": row["source"],
                "height": image.height,
                "width": image.width,
                "target": np.asarray(to_mask(row["mask"])) > 127,
                **({"image": image} if self.keep_images else {}),
            }
            for row, image in zip(rows, images, strict=True)
        ]
        return examples, self.processor(images=images, return_tensors="pt")["pixel_values"]

    @staticmethod
    def read(row: dict[str, Any]) -> Image.Image:
        try:
            return to_rgb(row["image"])
        except ValueError as error:
            raise ValueError(f"{row['id']}: {error}") from None


def checked_options(protocol: Protocol, **changed: Any) -> dict[str, Any]:
    """Return the protocol's options but for those `changed`.

    Raises:
        UserError: If the protocol has no such option.
    """
    try:
        return protocol.options(**changed)
    except ValueError as error:
        raise UserError(str(error)) from None


def score_job(
    score_image: Callable[..., dict[str, Any]],
    options: dict[str, Any],
    job: tuple[dict[str, Any], np.ndarray, np.ndarray],
) -> dict[str, Any]:
    """Return the row of one picture: what is known of it, and the scores of its prediction against its truth."""
    example, probs, target = job
    return {**example, **score_image(probs, target, **options)}


def _checked(example: dict[str, Any], probs: torch.Tensor) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """What there is to score of one picture; checked here because an error in a loader's process loses its one line."""
    target = example.pop("target")
    if target.shape != probs.shape:
        raise UserError(
            f"{example['id']}: the mask is {_size(target)}, its picture {_size(probs)} (width x height); "
            "make the data set again by scripts/prepare_data.py, which reports such pairs"
        )
    if not torch.isfinite(probs).all():
        raise UserError(
            f"{example['id']}: the model's output is not finite; check its weights, or evaluate in full precision"
        )
    return example, probs.cpu().numpy(), target


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every part is in the mode it was in, frozen parts too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _size(array) -> str:
    height, width = array.shape
    return f"{width}x{height}"
