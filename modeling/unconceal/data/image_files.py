"""Read image files as people see them."""

from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from ..models.image_processing_unconceal import to_rgb
from ..utils.errors import UserError
from ..utils.images import MAX_PIXELS, open_image


def read_image(source: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file of any kind as it is displayed (see `to_rgb`).

    Args:
        source: A path, or a file open for reading bytes.
        max_pixels: Largest width times height; a larger file is refused before it is decoded.

    Returns:
        RGB image. The file is closed.

    Raises:
        UserError: The message is the reason alone, without the name of the file.
    """
    try:
        with open_image(source, max_pixels) as image:
            return to_rgb(image)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError("not an image file that Pillow can read") from error
    except OSError as error:
        raise UserError(error.strerror or str(error)) from error
    # Pillow's decoders raise nearly any class for damaged files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise UserError(f"damaged or unsupported image ({error})") from error
