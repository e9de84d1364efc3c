"""Share colors, distances, overlays and text between drawn sheets."""

from bisect import bisect_left
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFont, ImageOps

from ..models.cutout import soft_mask
from ..models.reading import tag_srgb, to_rgb
from ..utils.errors import UserError
from ..utils.files import printable
from ..utils.images import size_text


GAP, LINE_HEIGHT = 12, 18
BAND_ROWS = 32
INK, FRAME, PAPER = (20, 20, 20), (150, 150, 150), (255, 255, 255)


def overlay(
    image: Image.Image, mask: np.ndarray, color: tuple[int, int, int] = (255, 0, 80), alpha: float = 0.6
) -> Image.Image:
    """Tint the masked part of an image as it is displayed.

    Args:
        image: Any image.
        mask: (H, W) of the displayed image, as for `checked_mask`.
        color: RGB, 0 to 255.
        alpha: Share of `color` where the mask is 1, in [0, 1].

    Raises:
        UserError: If the mask has another size, or values that do not tell what is object.
    """
    image = to_rgb(image)
    mask = checked_mask(mask, image)
    alpha = alpha / 255 if mask.dtype == np.uint8 else alpha
    pixels, color = np.array(image), np.asarray(color, np.float32)
    for top in range(0, image.height, BAND_ROWS):  # floats of a whole photograph would leave the cache
        band = pixels[top : top + BAND_ROWS]
        weight = np.float32(alpha) * mask[top : top + BAND_ROWS, :, None]  # (rows, W, 1)
        band[:] = np.rint(band + weight * (color - band))
    return tag_srgb(Image.fromarray(pixels))


def checked_mask(mask: np.ndarray, image: Image.Image) -> np.ndarray:
    """Return the mask of an image as `soft_mask` does.

    Floats up to 1 are soft, with 1 for object. If a mask of another kind holds a single value beside 0, that value is
    object. Otherwise 255 is white.

    Raises:
        UserError: If the mask has another size than the image, or values that do not tell what is object.
    """
    if mask.shape != (image.height, image.width):
        got, expected = size_text(mask.shape[::-1]), size_text(image.size)
        raise UserError(f"got a mask of {got}, expected {expected}, the size of the image")
    try:
        return soft_mask(mask)
    except ValueError as error:
        raise UserError(str(error)) from error


def paste_framed(sheet: Image.Image, cell: Image.Image, left: int, top: int):
    """Paste a cell with a frame, so that white maps show."""
    sheet.paste(ImageOps.expand(cell.convert("RGB"), 1, FRAME), (left - 1, top - 1))


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def shortened(text: str, fits: Callable[[str], bool]) -> str:
    """Shorten a text to one line.

    The middle of a long text is cut, because names differ at their ends.
    """
    text = " ".join(printable(text).split())

    def with_kept(number: int) -> str:
        return f"{text[: number - number // 2]}…{text[len(text) - number // 2 :]}"

    if fits(text):
        return text
    too_many = bisect_left(range(len(text)), True, lo=1, key=lambda number: not fits(with_kept(number)))
    return with_kept(too_many - 1)
