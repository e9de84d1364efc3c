"""Read image files as people see them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from ..models.reading import say_first_page, to_rgb
from ..utils.errors import UserError, one_line
from ..utils.images import MAX_PIXELS, open_image


@contextmanager
def decoding(source: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image file as `open_image` does; report any damage as `UserError`.

    Raises:
        UserError: The message is the reason alone, without the name of the file.
    """
    try:
        with open_image(source, max_pixels) as image:
            yield image
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError("not an image file that Pillow can read") from error
    except OSError as error:
        raise UserError(error.strerror or one_line(error)) from error
    # Pillow's decoders raise nearly any class for damaged files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise UserError(f"damaged or unsupported image ({one_line(error)})") from error


def read_image(source: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as RGB, with the errors of `decoding`."""
    with decoding(source, max_pixels) as image:
        return to_rgb(image)


def read_upright(source: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file upright, with the errors of `decoding`."""
    with decoding(source, max_pixels) as image:
        say_first_page(image)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # not in place, it would copy every image
        return image
