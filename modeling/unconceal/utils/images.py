"""Open image files under one limit on their size."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from .errors import UserError


MAX_PIXELS = 178_956_970  # Pillow's own limit; a camera of 200 megapixels needs more
# Suffixes that a folder is searched for. A file given by name is tried with any suffix.
IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)


@contextmanager
def open_image(source: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Yield an image whose header was read; decode it inside the block.

    Threads can use different limits: Pillow's own limit, one for all threads, stays untouched and unused.

    Args:
        source: A path, or a file open for reading bytes.
        max_pixels: Largest width times height.

    Raises:
        UserError: If the image is larger. The message does not name the file. Pillow's own errors pass.
    """
    with Path(source).open("rb") if isinstance(source, (str, Path)) else nullcontext(source) as file:
        file.seek(0)
        image = _read_header(file, str(source) if isinstance(source, (str, Path)) else "")
        if image.width * image.height > max_pixels:
            raise UserError(
                f"got {size_text(image.size)}, expected at most {max_pixels} pixels, a guard against decompression "
                "bombs; raise --max-pixels"
            )
        yield image


def _read_header(file: BinaryIO, name: str) -> Image.Image:
    """Do what `Image.open` does, without its check of the size."""
    prefix, tried = file.read(16), set()
    for import_plugins in (Image.preinit, Image.init):  # the common formats first, then all
        import_plugins()
        for kind in [kind for kind in Image.ID if kind not in tried]:
            tried.add(kind)
            factory, accept = Image.OPEN[kind]
            try:
                is_accepted = accept is None or accept(prefix)
                if is_accepted and not isinstance(is_accepted, str):  # a text says what the plugin lacks
                    file.seek(0)
                    return factory(file, name)
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue  # the next plugin may read it
    raise UnidentifiedImageError("cannot identify image file")


def size_text(size: tuple[int, int]) -> str:
    """Return (width, height) as messages show it, such as 640x480."""
    return f"{size[0]}x{size[1]}"
