"""Predict soft masks: the one way from images to masks."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from .image_processing_unconceal import UnconcealImageProcessor
from .refine import choose_zooms, refine_mask


@torch.no_grad()
def predict_masks(
    model: PreTrainedModel,
    processor: UnconcealImageProcessor,
    images: Iterable[Image.Image | tuple[int, int]],
    refine: str = "auto",
    batch_size: int = 1,
    pixel_values: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the soft mask of each image, at its own size.

    The network sees the whole image first. `refine` decides whether tiles along the edges are predicted again. Images
    are read as masks are taken, `batch_size` at a time.

    Args:
        model: A network that segments, in evaluation mode.
        processor: Its image processor.
        images: RGB images, upright. With `pixel_values` and "never", (height, width) can stand for an image.
        refine: As for `choose_zooms`.
        batch_size: Images, or tiles of one image, in a forward pass.
        pixel_values: (B, 3, H, W) of all images, on the model's device and in its dtype, for one forward pass.

    Yields:
        (height, width), float32 in [0, 1], on the model's device.

    Raises:
        ValueError: If `refine` is unknown.
    """
    place = model if pixel_values is None else pixel_values
    device, dtype = place.device, place.dtype

    def predict_logits(images: list[Image.Image]) -> torch.Tensor:
        return model(pixel_values=processor(images).pixel_values.to(device, dtype)).logits

    def predict_batch(images: list, logits: torch.Tensor) -> Iterator[torch.Tensor]:
        for image, image_logits in zip(images, logits.split(1), strict=True):
            size = image if isinstance(image, tuple) else (image.height, image.width)
            (mask,) = processor.post_process_masks(SemanticSegmenterOutput(logits=image_logits), [size])
            zooms = choose_zooms(refine, size, logits.shape[-2:])
            if zooms:
                refine_mask(mask, image_logits, image, zooms, processor, predict_logits, batch_size)
            yield mask

    if pixel_values is not None:
        # Keep only `logits`: no caller needs the other outputs.
        yield from predict_batch(list(images), model(pixel_values=pixel_values).logits)
        return
    images = iter(images)
    while batch := list(islice(images, batch_size)):
        yield from predict_batch(batch, predict_logits(batch))
