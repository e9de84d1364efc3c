"""Share colors, distances, overlays and text between drawn sheets."""

from bisect import bisect_left
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFont, ImageOps

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
        mask: (H, W) of the displayed image, in [0, 1].
        color: RGB, 0 to 255.
        alpha: Share of `color` where the mask is 1, in [0, 1].

    Raises:
        UserError: If the mask has another size.
    """
    image = to_rgb(image)
    check_mask_size(mask, image)
    pixels, mask, color = np.array(image), np.asarray(mask, np.float32), np.asarray(color, np.float32)
    for top in range(0, image.height, BAND_ROWS):  # floats of a whole photograph would leave the cache
        band = pixels[top : top + BAND_ROWS]
        weight = alpha * mask[top : top + BAND_ROWS, :, None]  # (rows, W, 1)
        band[:] = np.rint(band + weight * (color - band))
    return tag_srgb(Image.fromarray(pixels))


def check_mask_size(mask: np.ndarray, image: Image.Image):
    """Raise a `UserError` unless mask and image have one size."""
    if mask.shape != (image.height, image.width):
        got, expected = size_text(mask.shape[::-1]), size_text(image.size)
        raise UserError(f"got a mask of {got}, expected {expected}, the size of the image")


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
