"""Opening picture files under one limit on their size."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from .errors import UserError


MAX_PIXELS = 178_956_970  # where Pillow itself stops; a 200-megapixel phone needs more


@contextmanager
def open_image(source: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Yield a picture that is opened but not decoded: decode it inside, where the limit of this call is in force.

    Args:
        source: A path, or a file open for reading bytes.
        max_pixels: Width times height above which the file is refused.

    Raises:
        UserError: If it is larger, without the file's name. Pillow's own errors pass.
    """
    too_large = f"over the limit of {max_pixels} pixels that guards against decompression bombs; raise --max-pixels"
    pillow_limit = Image.MAX_IMAGE_PIXELS
    try:
        # Pillow warns above its limit and stops above twice that; here one limit stops.
        Image.MAX_IMAGE_PIXELS = max_pixels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                if image.width * image.height > max_pixels:
                    raise UserError(f"{image.width}x{image.height} is {too_large}")
                yield image
    except Image.DecompressionBombError:
        raise UserError(f"it is {too_large}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = pillow_limit
