"""Predict soft masks: the one way from images to masks."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from .image_processing_unconceal import UnconcealImageProcessor
from .refine import Box, blend_tiles, choose_zooms, refine_mask


MIN_SIDE = 32  # of an image in pixels, for every network


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

    The network sees the whole images first, in tiles if the processor does not resize and they are larger than its
    size. `refine` decides whether tiles along the edges are predicted again.

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
    if processor.do_resize:
        logits = model(pixel_values=pixel_values).logits
    else:
        logits = own_size_logits(model, pixel_values, (processor.size["height"], processor.size["width"]), batch_size)
    for image, image_logits in zip(images, logits.split(1), strict=True):
        size = image if isinstance(image, tuple) else (image.height, image.width)
        (mask,) = processor.post_process_masks(SemanticSegmenterOutput(logits=image_logits), [size])
        zooms = choose_zooms(refine, size, logits.shape[-2:])
        if zooms:
            refine_mask(mask, image_logits, image, zooms, processor, predict_tiles, batch_size)
        yield mask


def own_size_logits(
    model: PreTrainedModel, pixel_values: torch.Tensor, tile_size: tuple[int, int], batch_size: int = 1
) -> torch.Tensor:
    """Return the logits (B, 1, H, W) of images of any size.

    Images larger than `tile_size`, (height, width), are predicted in overlapping tiles, so memory stays bounded.
    Images smaller than `MIN_SIDE` are padded.
    """
    height, width = pixel_values.shape[-2:]
    missing = (0, max(0, MIN_SIDE - width), 0, max(0, MIN_SIDE - height))
    if any(missing):
        pixel_values = F.pad(pixel_values, missing, mode="replicate")
    sides = pixel_values.shape[-2:]
    tile = min(sides[0], tile_size[0]), min(sides[1], tile_size[1])
    if tile == sides:
        return model(pixel_values=pixel_values).logits[..., :height, :width]

    def in_tiles(image: torch.Tensor) -> torch.Tensor:
        def predict(boxes: list[Box]) -> torch.Tensor:
            tiles = [image[:, top:bottom, left:right] for left, top, right, bottom in boxes]
            return model(pixel_values=torch.stack(tiles)).logits

        everywhere = torch.ones((1, 1, *sides), dtype=torch.bool, device=image.device)
        return blend_tiles(everywhere, tile, predict, batch_size)

    return torch.cat([in_tiles(image) for image in pixel_values])[..., :height, :width]
