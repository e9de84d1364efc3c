"""Read mask files by one rule for all data sets.

A pixel is object if its value is above half of the full scale: above 127 in an 8-bit mask. `is_object` is this rule.

A mask file of any mode becomes one gray value a pixel, as the processor's `to_mask` does it. Only the scale is found
for each file: the smallest of 1, 255 and 65535 that no pixel exceeds. If a mask must be resized, its gray values are
resized before the comparison. Linear resizing cannot put object pixels outside the object of the file.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ..models.image_processing_unconceal import to_mask
from ..utils.errors import UserError
from ..utils.images import MAX_PIXELS
from .image_files import read_upright


FULL_SCALES = (1, 255, 65535)


class UnusablePair(UserError):
    """Error for an unusable image or mask; the message is the reason."""


def is_object(gray: np.ndarray, full_scale: int = 255) -> np.ndarray:
    """Return where gray values are above half of full scale."""
    return gray > full_scale * 127 / 255


def is_black_and_white(gray: np.ndarray) -> bool:
    """Return whether all gray values are 0 or 255."""
    return bool(((gray == 0) | (gray == 255)).all())


def read_mask(
    path: Path, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, bool, bool]:
    """Read a mask file.

    Args:
        path: Mask file of any mode: 1-bit, gray, palette, color, with alpha, 16-bit.
        size: Width and height. A mask of the same aspect is resized to it, any other keeps its size.
        max_pixels: Limit on width times height.

    Returns:
        Object mask (H, W), boolean; whether the file held other values than 0 and 255; whether it was resized.

    Raises:
        UnusablePair: If the file cannot be read or its values exceed 65535.
    """
    try:
        image = read_upright(path, max_pixels)
    except UserError as error:
        raise UnusablePair(f"{path.name} cannot be read: {error}") from error
    # Deep gray keeps its own scale.
    gray = np.asarray(image if image.mode.startswith(("I", "F")) else to_mask(image))
    full_scale = next((scale for scale in FULL_SCALES if gray.max() <= scale), None)
    if full_scale is None or gray.min() < 0:
        raise UnusablePair(
            f"{path.name} holds values from {gray.min()} to {gray.max()}, expected 0 to 65535; save it as 8-bit gray"
        )
    changed = not is_black_and_white(gray)
    stored = gray.shape[::-1]
    resized = size is not None and size != stored and have_one_aspect(size, stored)
    if resized:
        # Linear, not cubic: it cannot overshoot, and a mask of two values comes nearer to its true outline.
        gray = np.asarray(Image.fromarray(gray.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    return is_object(gray, full_scale), changed, resized


def encode_mask(mask: np.ndarray) -> bytes:
    """Encode a boolean mask (H, W) as PNG of 0 and 255."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, format="PNG")
    return buffer.getvalue()


def have_one_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two sizes differ only in scale and rounding."""
    return abs(size[0] * other[1] - size[1] * other[0]) < max(*size, *other)
