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
        hint = "; for HEIC pip install unconceal[heic]" if _is_heic(source) else ""
        raise UserError(f"not an image file that Pillow can read{hint}") from error
    except OSError as error:
        raise UserError(error.strerror or one_line(error)) from error
    # Pillow's decoders raise nearly any class for damaged files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise UserError(f"damaged or unsupported image ({one_line(error)})") from error


def _is_heic(source: str | Path | BinaryIO) -> bool:
    """Return whether a file is an HEIC photo."""
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            return _is_heic(file)
    source.seek(0)
    return source.read(12)[4:] in (b"ftypheic", b"ftypheix", b"ftypmif1")


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
