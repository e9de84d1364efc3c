"""Draw masks, and cut objects out in their own colors."""

import logging
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image

from .reading import MOST_CLASSES, needs_white, prediction_levels, scaled, tag_srgb, white_of_predictions


# Large images are processed in blocks: side and margin in pixels. The estimate takes about 60 bytes a pixel: 24
# megapixels need 1.7 GB at once, and 0.6 GB in blocks.
BLOCK_SIZE = 2048
BLOCK_MARGIN = 256
CLEAR_UP_TO, OPAQUE_FROM = 0.3, 0.9
logger = logging.getLogger(__name__)
_one_at_a_time = Lock()  # numba's own threads, where it has no OpenMP, end the program if two threads call them


def soft_mask(mask: Any) -> np.ndarray:
    """Return any mask as uint8, or as float32 up to 1.

    A soft mask may be dark, so this is the rule for predictions.

    Args:
        mask: A PIL image, or an array or tensor (H, W).

    Raises:
        ValueError: If it is of another kind or shape, or if its values do not tell what is object.
    """
    if isinstance(mask, torch.Tensor):
        mask = mask.detach().cpu()
        mask = (mask.float() if mask.is_floating_point() else mask).numpy()  # NumPy has no bfloat16
    if not isinstance(mask, (Image.Image, np.ndarray)):
        raise ValueError(f"got a mask of {type(mask).__name__}, expected a PIL image, an array or a tensor")
    if isinstance(mask, np.ndarray) and (mask.ndim != 2 or not mask.size):
        raise ValueError(f"got a mask of shape {mask.shape}, expected (height, width)")
    levels = prediction_levels(mask)
    return scaled(levels, white_of_predictions([levels]) if needs_white(levels) else 1)


def mask_to_image(mask: np.ndarray) -> Image.Image:
    """Return a mask (H, W) as 8-bit gray.

    It is in [0, 1], or uint8 with 255 for 1. A mask in [0, 1] that stays below 3.3 percent is black: it shows no
    object, and its few gray levels could be read as ids of classes (see reading.py).

    Raises:
        ValueError: If values are outside [0, 1] or NaN.
    """
    mask = np.asarray(mask)
    if mask.dtype == np.uint8:
        return Image.fromarray(mask)
    values = np.asarray(mask, np.float32) * 255
    values = np.rint(values, out=values)
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 255:
        raise ValueError(f"got a mask with values from {low / 255:g} to {high / 255:g}, expected [0, 1]; scale it")
    return Image.fromarray(values.astype(np.uint8) if high > MOST_CLASSES else np.zeros(values.shape, np.uint8))


def make_cutout(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Cut the object out as RGBA, with its own colors.

    `mask` is 8-bit gray, of the same size. It says how likely a pixel is object. That is not its opacity: used as
    such, the doubt of the network surrounds the object like fog. So opacity rises from 0 to 1 between `CLEAR_UP_TO`
    and `OPAQUE_FROM`. With the network `cut-out`, this removes a third of the background that was left in cut-outs of
    people. It removes no more of the people.
    """
    opacity = mask.point([round(255 * _opacity(level / 255)) for level in range(256)])
    colors = Image.fromarray(object_colors(np.asarray(image), np.asarray(opacity)))
    colors.putalpha(opacity)
    return tag_srgb(colors)


def _opacity(probability: float) -> float:
    return min(1.0, max(0.0, (probability - CLEAR_UP_TO) / (OPAQUE_FROM - CLEAR_UP_TO)))


def object_colors(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return the colors of the object without those of the background.

    At soft edges, a photograph mixes both. Opaque and fully transparent pixels keep their colors. Without pymatting
    all colors stay, and a line in the log says so once.

    Args:
        pixels: (H, W, 3) uint8, the image.
        alpha: (H, W) uint8, the opacity of the object.
    """
    soft = (alpha > 0) & (alpha < 255)
    # For one pixel pymatting divides by zero.
    if alpha.size == 1 or not soft.any() or (estimate := estimator()) is None:
        return pixels
    colors = pixels.copy()
    height, width = alpha.shape
    for top in range(0, height, BLOCK_SIZE):
        for left in range(0, width, BLOCK_SIZE):
            block = _window(soft[top : top + BLOCK_SIZE, left : left + BLOCK_SIZE], top, left)
            if block is None:
                continue
            rows, columns = block
            seen = (_widened(rows, height), _widened(columns, width))
            with _one_at_a_time:
                estimated = estimate(pixels[seen] / np.float32(255), alpha[seen] / np.float32(255))
            inside = estimated[
                rows.start - seen[0].start : rows.stop - seen[0].start,
                columns.start - seen[1].start : columns.stop - seen[1].start,
            ]
            colors[block][soft[block]] = np.rint(inside[soft[block]] * 255).astype(np.uint8)
    return colors


def _window(soft: np.ndarray, top: int, left: int) -> tuple[slice, slice] | None:
    """Return the rows and columns around soft pixels, or None without any."""
    (rows,), (columns,) = soft.any(1).nonzero(), soft.any(0).nonzero()
    if not rows.size:
        return None
    return slice(top + rows[0], top + rows[-1] + 1), slice(left + columns[0], left + columns[-1] + 1)


def _widened(span: slice, limit: int) -> slice:
    return slice(max(0, span.start - BLOCK_MARGIN), min(limit, span.stop + BLOCK_MARGIN))


@cache
def estimator() -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """Return pymatting's multi-level estimate (Germer et al. 2020), if usable.

    Otherwise log the reason and return None. The first call after installation compiles pymatting for up to a minute;
    numba keeps the result on disk.
    """
    num_threads = torch.get_num_threads()
    try:
        from pymatting import estimate_foreground_ml
    # numba raises RuntimeError if it finds no folder for compiled code.
    except (ImportError, RuntimeError) as error:
        logger.warning(
            "cut-outs keep the tint of the background at soft edges, because pymatting is unusable (%s); "
            "pip install pymatting",
            error,
        )
        return None
    finally:
        # numba gives torch every core, and then torch's sums round differently.
        torch.set_num_threads(num_threads)
    return estimate_foreground_ml
