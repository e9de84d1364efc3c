"""Draw outlines of masks on white, without the image."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .layout import GAP, INK, LINE_HEIGHT, PAPER, paste_framed


CELL, COLUMNS = 200, 4  # pixels of the longer side of a cell, and cells in a row
TRUTH, FOUND = (0, 114, 178), (213, 94, 0)  # blue and orange of Okabe and Ito


class Outlined(NamedTuple):
    """Caption; the object and what was found, (H, W), boolean."""

    caption: str
    truth: np.ndarray
    found: np.ndarray


def draw_outlines(cases: Iterable[Outlined]) -> Image.Image:
    """Draw the outlines of truth and prediction of each case."""
    cells = [(case.caption, _draw(case)) for case in cases]
    columns, rows = min(COLUMNS, len(cells)), -(-len(cells) // COLUMNS)
    size = CELL + GAP, CELL + LINE_HEIGHT + GAP
    sheet = Image.new("RGB", (GAP + columns * size[0], GAP + LINE_HEIGHT + rows * size[1]), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    pen.text((GAP, GAP // 2), "truth", TRUTH, font)
    pen.text((GAP + CELL // 3, GAP // 2), "found", FOUND, font)
    for index, (caption, cell) in enumerate(cells):
        left, top = GAP + size[0] * (index % COLUMNS), GAP + LINE_HEIGHT + size[1] * (index // COLUMNS)
        pen.text((left, top), caption, INK, font)
        paste_framed(sheet, cell, left, top + LINE_HEIGHT)
    return sheet


def _draw(case: Outlined) -> Image.Image:
    height, width = case.truth.shape
    scale = CELL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    cell = Image.new("RGB", size, PAPER)
    for mask, color in ((case.truth, TRUTH), (case.found, FOUND)):
        # The highest value under a pixel, so that small objects stay.
        small = Image.fromarray(mask).convert("F").resize(size, Image.Resampling.BOX).point(lambda value: value * 1e6)
        small = small.convert("L")
        inside = np.asarray(small) > 0
        border = inside & (np.asarray(small.filter(ImageFilter.MinFilter(3))) == 0)
        cell.paste(color, mask=Image.fromarray(border))
    return cell
