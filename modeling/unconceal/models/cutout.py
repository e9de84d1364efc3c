"""Masks as pictures, and cut-outs: the object in its own colours, which photographs mix with others at soft edges."""

import logging
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from PIL import Image


# Side of the blocks in which large pictures are worked off, and what each sees around it, in pixels. The estimate takes
# about 60 bytes a pixel: 24 megapixels at once need 1.7 GB, and 0.6 GB in blocks.
BLOCK_SIZE = 2048
BLOCK_MARGIN = 256
logger = logging.getLogger(__name__)


def mask_to_image(mask: np.ndarray) -> Image.Image:
    """Return a mask (H, W) in [0, 1] as 8-bit grey."""
    return Image.fromarray(np.rint(np.asarray(mask, np.float32) * 255).astype(np.uint8))


def make_cutout(image: Image.Image, opacity: Image.Image) -> Image.Image:
    """Return a picture as RGBA, at soft edges in the colours of the object alone (see `object_colors`).

    Args:
        image: RGB.
        opacity: 8-bit grey, of the same size.
    """
    colors = Image.fromarray(object_colors(np.asarray(image), np.asarray(opacity)))
    colors.putalpha(opacity)
    return colors


def object_colors(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return the colours of the object alone, as far as they can be told.

    Without pymatting they are the picture's own; a line in the log says so, once.

    Args:
        pixels: (H, W, 3) uint8, the picture.
        alpha: (H, W) uint8, the object's opacity.

    Returns:
        (H, W, 3) uint8. Colours of opaque and of fully transparent pixels are the picture's.
    """
    soft = (alpha > 0) & (alpha < 255)
    # One pixel tells nothing, and pymatting divides by zero.
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
            estimated = estimate(pixels[seen] / np.float32(255), alpha[seen] / np.float32(255))
            inside = estimated[
                rows.start - seen[0].start : rows.stop - seen[0].start,
                columns.start - seen[1].start : columns.stop - seen[1].start,
            ]
            colors[block][soft[block]] = np.rint(inside[soft[block]] * 255).astype(np.uint8)
    return colors


def _window(soft: np.ndarray, top: int, left: int) -> tuple[slice, slice] | None:
    """Return rows and columns, counted from `top` and `left`, of the rectangle around what is set; None if nothing is."""
    (rows,), (columns,) = soft.any(1).nonzero(), soft.any(0).nonzero()
    if not rows.size:
        return None
    return slice(top + rows[0], top + rows[-1] + 1), slice(left + columns[0], left + columns[-1] + 1)


def _widened(span: slice, limit: int) -> slice:
    return slice(max(0, span.start - BLOCK_MARGIN), min(limit, span.stop + BLOCK_MARGIN))


@cache
def estimator() -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """Return pymatting's multi-level estimate (Germer et al. 2020), or None and log why it cannot be used.

    The first call ever compiles pymatting, which takes up to a minute; numba keeps the result on disk.
    """
    num_threads = torch.get_num_threads()
    try:
        from pymatting import estimate_foreground_ml
    # numba raises RuntimeError where it finds no folder to keep what it compiled.
    except (ImportError, RuntimeError) as error:
        logger.warning(
            "cut-outs keep the background's tint at soft edges, for pymatting cannot be used (%s); "
            "pip install pymatting",
            error,
        )
        return None
    finally:
        # numba takes every core, for torch as well, whose sums then round differently.
        torch.set_num_threads(num_threads)
    return estimate_foreground_ml


__all__ = ["estimator", "object_colors", "make_cutout", "mask_to_image"]
