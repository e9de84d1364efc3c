"""What drawn sheets have in common: colours, distances, and text that fits."""

from bisect import bisect_left
from collections.abc import Callable

from PIL import Image, ImageFont, ImageOps

from ..utils.files import printable


GAP = 12
LINE_HEIGHT = 18
INK, FRAME, PAPER = (20, 20, 20), (150, 150, 150), (255, 255, 255)


def paste_framed(sheet: Image.Image, cell: Image.Image, left: int, top: int):
    """Paste a cell with a line around it, for without one a map of ones looks blank."""
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
    """Return a text as one line that fits; from a longer one the middle is cut, as names differ at their ends.

    Half characters, which stand in for bytes of file names that are no text, become question marks.
    """
    text = " ".join(printable(text).split())

    def with_kept(number: int) -> str:
        return f"{text[: number - number // 2]}…{text[len(text) - number // 2 :]}"

    if fits(text):
        return text
    too_many = bisect_left(range(len(text)), True, lo=1, key=lambda number: not fits(with_kept(number)))
    return with_kept(too_many - 1)
