"""Read ground truth masks by one rule for all data sets.

A mask of any kind becomes 8-bit gray by `to_mask`. A pixel is object if its gray value is above 127 (`is_object`). If
a mask must be resized, its gray values are resized before the comparison. Linear resizing cannot put object pixels
outside the object of the file.
"""

import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..models.reading import Foreground, UnclearMask, distinct, gray_mask, mask_levels
from ..utils.errors import UserError
from ..utils.images import MAX_PIXELS
from .image_files import read_upright
from .names import first_names


logger = logging.getLogger(__name__)


class UnusablePair(UserError):
    """Error for an unusable image or mask; the message is the reason."""


class TrueMask(NamedTuple):
    """Object mask of a file, and how it came about."""

    mask: np.ndarray  # (H, W), boolean
    is_changed: bool  # the file held other values than 0 and 255
    is_resized: bool
    has_vanished: bool  # the file held gray levels, but none above half
    object_value: int | None  # the only value beside 0, if there is one


def is_object(gray: Image.Image | np.ndarray) -> np.ndarray:
    """Return where the gray values of `to_mask` are above half."""
    return np.asarray(gray) > 127


def is_faint(mask: Image.Image) -> bool:
    """Return whether a gray mask is not black, but shows no object."""
    brightest = mask.getextrema()[1]
    return bool(brightest > 0 and not is_object(brightest))


def report_faint(names: Sequence[str], what: str):
    """Name masks that are not black, but show no object.

    Args:
        names: Their ids.
        what: Which masks they are, such as "ground truth masks".
    """
    if names:
        logger.warning(
            "%d %s hold gray levels but none above half, so they show no object; if they are ids of classes, prepare "
            "them with --foreground (%s)",
            *(len(names), what, first_names(names)),
        )


def read_mask(
    source: Path | Image.Image,
    size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    foreground: Foreground | None = None,
) -> TrueMask:
    """Read the mask of a ground truth.

    Args:
        source: File of any mode (1-bit, gray, palette, color, with alpha, 16-bit), or such an image.
        size: Width and height. A mask of the same aspect is resized to it, any other keeps its size.
        max_pixels: Limit on width times height of a file.
        foreground: As for `to_mask`.

    Raises:
        UnusablePair: If the file cannot be read, or its values do not tell what is object.
    """
    name = source.name if isinstance(source, Path) else "the mask"
    try:
        image = read_upright(source, max_pixels) if isinstance(source, Path) else source
        levels, has_ids = mask_levels(image)
        gray = gray_mask(levels, has_ids, foreground)
    except UnclearMask as error:
        raise UnusablePair(f"{name}: {error}") from error
    except (UserError, ValueError, OSError) as error:
        raise UnusablePair(f"{name} cannot be read: {error}") from error
    values = distinct(levels)
    objects = values[values > 0]
    resized = size is not None and size != gray.size and have_one_aspect(size, gray.size)
    if resized:
        # Linear, not cubic: it cannot overshoot, and a mask of two values comes nearer to its true outline.
        gray = Image.fromarray(np.asarray(gray, np.float32)).resize(size, Image.Resampling.BILINEAR)
    mask = is_object(gray)
    return TrueMask(
        mask,
        is_changed=len(objects) > 1 if has_ids else not (levels.dtype == bool or np.isin(objects, 255).all()),
        is_resized=resized,
        has_vanished=foreground is None and not resized and len(objects) > 0 and not mask.any(),
        object_value=objects[0] if len(objects) == 1 and levels.dtype != bool else None,
    )


def one_value(masks: Iterable[np.ndarray]) -> str | None:
    """Return what is wrong if masks are all object or all background.

    No more masks are read than decide it.
    """
    has_object = has_background = False
    for mask in masks:
        has_object |= bool(mask.any())
        has_background |= not mask.all()
        if has_object and has_background:
            return None
    return "every pixel of every mask is object" if has_object else "no mask shows an object"


def encode_mask(mask: np.ndarray) -> bytes:
    """Encode a boolean mask (H, W) as PNG of 0 and 255."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, format="PNG")
    return buffer.getvalue()


def have_one_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two sizes differ only in scale and rounding."""
    return abs(size[0] * other[1] - size[1] * other[0]) < max(*size, *other)
