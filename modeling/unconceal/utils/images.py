"""Open image files under one limit on their size."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from .errors import UserError


MAX_PIXELS = 178_956_970  # Pillow's own limit; a camera of 200 megapixels needs more
# Suffixes that a folder is searched for. A file given by name is tried with any suffix.
IMAGE_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
)
try:
    from pillow_heif import register_heif_opener
except ImportError:  # the extra `heic`
    pass
else:
    register_heif_opener()
    IMAGE_SUFFIXES = (*IMAGE_SUFFIXES, ".heic", ".heif")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
# Limit of the `open_image` block that this thread is in.
_max_pixels: ContextVar[int | None] = ContextVar("max_pixels", default=None)
# Pillow's own check, also if this module is imported again.
_check_of_pillow = getattr(Image, "_decompression_bomb_check", None)
_check_of_pillow = getattr(_check_of_pillow, "replaced", _check_of_pillow)


@contextmanager
def open_image(source: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image; decode it inside the block.

    Threads can use different limits at once.

    Args:
        source: A path, or a file open for reading bytes.
        max_pixels: Largest width times height. Pillow's own limit does not apply.

    Raises:
        UserError: If the image is larger. The message does not name the file. Pillow's own errors pass.
    """
    token = _max_pixels.set(max_pixels)
    try:
        with Image.open(source) as image:
            _check_size(image.size)
            yield image
    finally:
        _max_pixels.reset(token)


def _check_size(size: tuple[int, int]):
    """Check the limit of this thread, or Pillow's outside `open_image`."""
    max_pixels = _max_pixels.get()
    if max_pixels is None:
        _check_of_pillow(size)
    elif size[0] * size[1] > max_pixels:
        raise UserError(
            f"got {size_text(size)}, expected at most {max_pixels} pixels, a guard against decompression bombs; "
            "raise --max-pixels"
        )


# Pillow's limit is one global for all threads. Its decoders call this check, some of them also while they decode.
_check_size.replaced = _check_of_pillow
Image._decompression_bomb_check = _check_size


def size_text(size: tuple[int, int]) -> str:
    """Return (width, height) as messages show it, such as 640x480."""
    return f"{size[0]}x{size[1]}"


def is_video(path: str | Path) -> bool:
    """Return whether a path has the suffix of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES
