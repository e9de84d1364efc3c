"""A second look at large pictures, in tiles, so that a mask's edges are finer than the network's own size allows.

A network sees every picture at one size, say 1024x1024; what a photograph of 6000x4000 shows beyond that is lost. So:

1. The picture as a whole gives the coarse mask. It alone decides what is an object.
2. The picture, at twice the network's size and then at four times, is cut into overlapping tiles of that size. Those
   through which an edge of the mask runs are looked at, each as a picture of its own.
3. Their logits are blended by a window that falls towards a tile's border, so that no seam shows.
4. They replace the mask in a narrow band along its edges and nowhere else: a tile sees too little of the whole to add
   or remove objects. InSPyReNet (Kim et al. 2022) joins two scales of a picture along edges likewise.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from transformers.modeling_outputs import SemanticSegmenterOutput

from .image_processing_unconceal import UnconcealImageProcessor


REFINE = ("auto", "always", "never")
ZOOMS = (2, 4)  # a tile that shows less than a sixteenth of the picture lacks context
MIN_OVERLAP = 0.25  # of a tile's side, between neighbours
# How far from a coarse edge tiles decide, as a share of the network's size and, for small networks, in its pixels. With
# twice as much, tiles that took one thing for another cost more IoU than finer edges gain.
BAND_RATIO = 1 / 64
MIN_BAND = 4


def check_refine(refine: str):
    """Refuse what `choose_zooms` does not know.

    Raises:
        ValueError: If `refine` is none of `REFINE`.
    """
    if refine not in REFINE:
        raise ValueError(f"got refine={refine!r}, expected one of {', '.join(REFINE)}")


def choose_zooms(refine: str, picture_size: tuple[int, int], network_size: tuple[int, int]) -> tuple[int, ...]:
    """Return how many times larger than the network's size a picture is looked at again, in order.

    Args:
        refine: "auto": by each zoom that the picture itself reaches. "always": also by the first zoom for any picture
            larger than the network's size. "never".
        picture_size: (height, width).
        network_size: (height, width).

    Raises:
        ValueError: If `refine` is none of these.
    """
    check_refine(refine)
    factor = max(ours / theirs for ours, theirs in zip(picture_size, network_size, strict=True))
    if refine == "never" or factor <= 1:
        return ()
    zooms = tuple(zoom for zoom in ZOOMS if zoom <= factor)
    return zooms or (ZOOMS[:1] if refine == "always" else ())


def make_mask(
    logits: torch.Tensor,
    target_size: tuple[int, int],
    image: Image.Image | None,
    refine: str,
    processor: UnconcealImageProcessor,
    look: Callable[[list[Image.Image]], torch.Tensor],
    batch_size: int = 1,
) -> torch.Tensor:
    """Return a picture's soft mask: what the network made of the whole, with finer edges where `refine` asks for them.

    Args:
        logits: (1, 1, h, w), at the network's size.
        target_size: (height, width) of the picture.
        image: The picture, RGB; needed unless `refine` is "never".
        refine: As for `choose_zooms`.
        processor: As for `refine_mask`.
        look: As for `refine_mask`.
        batch_size: As for `refine_mask`.

    Returns:
        (height, width), float32 in [0, 1], on the device of the logits.

    Raises:
        ValueError: If `refine` is unknown.
    """
    (mask,) = processor.post_process_masks(SemanticSegmenterOutput(logits=logits), [target_size])
    zooms = choose_zooms(refine, target_size, logits.shape[-2:])
    if zooms:
        refine_mask(mask, logits, image, zooms, processor, look, batch_size)
    return mask


def refine_mask(
    mask: torch.Tensor,
    logits: torch.Tensor,
    image: Image.Image,
    zooms: tuple[int, ...],
    processor: UnconcealImageProcessor,
    look: Callable[[list[Image.Image]], torch.Tensor],
    batch_size: int = 1,
):
    """Make the edges of a mask finer, in place. Outside the bands along its edges not a bit of it changes.

    Args:
        mask: (H, W) in [0, 1], the coarse mask at the picture's size.
        logits: (1, 1, h, w), what the network made of the whole picture, at the network's size.
        image: RGB picture of (H, W).
        zooms: From `choose_zooms`.
        processor: The network's.
        look: Returns the network's logits (N, 1, h, w) of N pictures of (h, w).
        batch_size: Tiles at a time.
    """
    height, width = logits.shape[-2:]
    probs = logits.float().sigmoid()
    allowed = torch.ones_like(probs)
    for zoom in zooms:
        # Never beyond the picture's own size, but for a side that is shorter than a tile.
        size = max(height, min(image.height, zoom * height)), max(width, min(image.width, zoom * width))
        weight = edge_band(probs, max(MIN_BAND, round(BAND_RATIO * max(height, width))))
        # An edge that the first zoom has moved does not carry the band on.
        weight = torch.minimum(weight, _resized(allowed, weight.shape[-2:]))
        sheet = image.resize(size[::-1], processor.resample)
        fine_logits = _blended_tiles(sheet, _resized(_highest(weight, 1), size) > 0, (height, width), look, batch_size)
        if fine_logits is None:  # no edge, so nothing to refine
            break
        (fine_mask,) = processor.post_process_masks(SemanticSegmenterOutput(logits=fine_logits), [mask.shape])
        mask.lerp_(fine_mask, _resized(weight, mask.shape)[0, 0])
        allowed = weight
        probs = _resized(probs, size).lerp(fine_logits.sigmoid(), _resized(weight, size))


def edge_band(probs: torch.Tensor, reach: int) -> torch.Tensor:
    """Return where tiles decide: 1 near an edge, falling to 0 over the last half of `reach` on either side of its end.

    Near an edge means that the highest and the lowest probability within `reach` pixels differ by more than a half. A
    wide area of which the network is unsure is none: a tile would know even less.

    Args:
        probs: (1, 1, h, w) in [0, 1].
        reach: In pixels.

    Returns:
        (1, 1, h, w) in [0, 1].
    """
    near = (_highest(probs, reach) + _highest(-probs, reach) > 0.5).float()
    fade = reach // 2
    return F.avg_pool2d(near, 2 * fade + 1, stride=1, padding=fade, count_include_pad=False)


def _highest(values: torch.Tensor, reach: int) -> torch.Tensor:
    side = 2 * reach + 1
    # By rows and then by columns: the same, and far faster than a square window.
    return F.max_pool2d(
        F.max_pool2d(values, (side, 1), stride=1, padding=(reach, 0)), (1, side), stride=1, padding=(0, reach)
    )


def _blended_tiles(
    sheet: Image.Image,
    wanted: torch.Tensor,
    tile_size: tuple[int, int],
    look: Callable[[list[Image.Image]], torch.Tensor],
    batch_size: int,
) -> torch.Tensor | None:
    """Return logits (1, 1, H, W) of a sheet (H, W) from tiles, 0 where none is `wanted`; None if none is at all."""
    height, width = tile_size
    places = [
        (top, left)
        for top in tile_starts(sheet.height, height)
        for left in tile_starts(sheet.width, width)
        if wanted[..., top : top + height, left : left + width].any()
    ]
    if not places:
        return None
    window = _ramp(height, wanted.device)[:, None] * _ramp(width, wanted.device)
    total, weight = (torch.zeros(wanted.shape, device=wanted.device) for _ in range(2))
    for some in _groups(places, batch_size):
        tiles = [sheet.crop((left, top, left + width, top + height)) for top, left in some]
        for (top, left), logits in zip(some, look(tiles).float(), strict=True):
            total[..., top : top + height, left : left + width] += window * logits
            weight[..., top : top + height, left : left + width] += window
    return total.div_(weight.clamp_(min=window.min()))


def tile_starts(length: int, tile: int) -> list[int]:
    """Return where tiles begin that cover `length` evenly and overlap by `MIN_OVERLAP` or more."""
    count = math.ceil((length - tile) / (tile * (1 - MIN_OVERLAP))) + 1
    return [round(index * (length - tile) / max(1, count - 1)) for index in range(count)]


def _ramp(length: int, device: torch.device) -> torch.Tensor:
    """Return a triangle, highest in the middle, above 0 everywhere."""
    places = torch.arange(length, device=device, dtype=torch.float32) + 0.5
    return torch.minimum(places, length - places) / length


def _groups(places: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


def _resized(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(values, tuple(size), mode="bilinear", align_corners=False)


__all__ = ["REFINE", "check_refine", "choose_zooms", "edge_band", "make_mask", "refine_mask", "tile_starts"]
