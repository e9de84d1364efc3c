"""Predict soft masks: the one way from images to masks."""

from collections.abc import Iterable, Iterator

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
    pixel_values: torch.Tensor,
    refine: str = "auto",
    batch_size: int = 1,
) -> Iterator[torch.Tensor]:
    """Yield the soft mask of each image, at its own size.

    The network sees the whole images first. `refine` decides whether tiles along the edges are predicted again.

    Args:
        model: A network that segments, in evaluation mode.
        processor: Its image processor.
        images: RGB images, upright. With "never", (height, width) can stand for an image.
        pixel_values: (B, 3, H, W) of these images, on the model's device and in its dtype, for one forward pass.
        refine: As for `choose_zooms`.
        batch_size: Tiles of one image in a forward pass.

    Yields:
        (height, width), float32 in [0, 1], on the model's device.

    Raises:
        ValueError: If `refine` is unknown.
    """
    device, dtype = pixel_values.device, pixel_values.dtype

    def predict_tiles(tiles: list[Image.Image]) -> torch.Tensor:
        return model(pixel_values=processor(tiles).pixel_values.to(device, dtype)).logits

    # Keep only `logits`: no caller needs the other outputs.
    logits = model(pixel_values=pixel_values).logits
    for image, image_logits in zip(images, logits.split(1), strict=True):
        size = image if isinstance(image, tuple) else (image.height, image.width)
        (mask,) = processor.post_process_masks(SemanticSegmenterOutput(logits=image_logits), [size])
        zooms = choose_zooms(refine, size, logits.shape[-2:])
        if zooms:
            refine_mask(mask, image_logits, image, zooms, processor, predict_tiles, batch_size)
        yield mask
