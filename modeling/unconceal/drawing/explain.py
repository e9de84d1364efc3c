"""Draw the stages of a network such as RUN."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from ..models.reading import tag_srgb
from ..models.unfolding import GRAY, HEAT, Stage, Unfolding, draw_colors, draw_scale
from ..utils.images import size_text
from .layout import GAP, INK, LINE_HEIGHT, PAPER, overlay, paste_framed, wrapped


MAP_SIDE = 220  # longer side of a map on the sheet, in pixels
LABEL_WIDTH = 100
MARK = (0, 230, 255)  # a hue that skin, leaves and sand do not have, visible with every kind of color vision


class SheetColumn(NamedTuple):
    """Column of the sheet; `scale` and `top` as for `draw_scale`."""

    title: str
    meaning: str
    scale: np.ndarray | None = None
    top: float = 1


SHEET_COLUMNS = {
    "mask": SheetColumn("mask M", "probability of object", GRAY),
    "outline": SheetColumn("outline", "where M passes 0.5, if it does"),
    "edge": SheetColumn("edge E", "probability of the object's edge", GRAY),
    "opinion": SheetColumn("1 - B/C", "the mask as the background sees it: the next stage weighs both", GRAY),
    "background": SheetColumn("without it", "the image with the object painted over"),
    "uncertainty": SheetColumn("uncertainty", "1 - |2M - 1|, so 1 where M is 0.5", HEAT),
    "reconstruction": SheetColumn("rebuilt C^", "the image rebuilt by the network from M and B"),
    "error": SheetColumn(
        "error of C^",
        "|C^ - C|, mean over the colors, C at the resolution of the stage; larger errors get the last color",
        HEAT,
        0.25,
    ),
}


def map_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """Return the size of the maps on the sheet, (width, height)."""
    scale = MAP_SIDE / max(image_size)
    return tuple(max(1, round(side * scale)) for side in image_size)


def draw_unfolding(image: Image.Image, unfolding: Unfolding) -> Image.Image:
    """Draw a sheet with the maps of every stage of an image.

    The image and the final mask are at the top. Below is a row for each stage, from the coarse start, k = 0, to the
    last. `SHEET_COLUMNS` lists the kinds of maps. Maps that the network does not have are left blank.

    Args:
        image: RGB image, upright.
        unfolding: Its maps, at `map_size`.
    """
    image_size, image = image.size, image.resize(map_size(image.size), Image.Resampling.BOX)
    rows = [_cells(stage, image) for stage in unfolding.stages]
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=13)
    width, height = (max(side, least) for side, least in zip(image.size, (100, 3 * LINE_HEIGHT), strict=True))
    lefts = [LABEL_WIDTH + GAP + index * (width + GAP) for index in range(len(SHEET_COLUMNS))]
    right = lefts[-1] + width + GAP

    # 1. Measure the text next to the image, then the rows.
    text_left = lefts[2]
    start, input_size = unfolding.stages[0], unfolding.input_size
    padded_size = tuple(side * start.stride for side in start.map_size)
    padded = "" if padded_size == input_size else f", padded to {size_text(padded_size)}"
    text = [
        f"{size_text(image_size)} pixels, seen by the network at {size_text(input_size)}{padded}",
        f"k = 0 is the coarse start, k = {len(rows) - 1} the last stage; blank: the network has no such map",
        "Maps are enlarged without smoothing: a block of one color is one position of the map",
    ]
    text += [f"{column.title}: {column.meaning}" for column in SHEET_COLUMNS.values()]
    lines = [line for paragraph in text for line in wrapped(paragraph, small, right - GAP - text_left)]
    header = GAP + LINE_HEIGHT
    titles_top = header + max(height, len(lines) * LINE_HEIGHT) + 2 * GAP
    tops = [titles_top + 2 * LINE_HEIGHT + index * (height + GAP) for index in range(len(rows))]
    sheet = Image.new("RGB", (right, tops[-1] + height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)

    # 2. The image, the result, and the meaning of the columns.
    result = _outlined(overlay(image, unfolding.mask, MARK, alpha=0.4), unfolding.mask)
    for left, title, cell in zip(lefts, ("image", "final mask"), (image, result), strict=False):
        draw.text((left, GAP // 2), title, INK, font)
        paste_framed(sheet, cell, left, header)
    for index, line in enumerate(lines):
        draw.text((text_left, header + index * LINE_HEIGHT), line, INK, small)

    # 3. Titles with their scales.
    for left, column in zip(lefts, SHEET_COLUMNS.values(), strict=True):
        draw.text((left, titles_top), column.title, INK, font)
        if column.scale is not None:
            bar = draw_scale(np.tile(np.linspace(0, column.top, 60), (10, 1)), column.scale, column.top)
            top = titles_top + LINE_HEIGHT
            draw.text((left, top), "0", INK, small)
            sheet.paste(bar, (left + 12, top + 3))
            draw.text((left + 76, top), f"{column.top:g}", INK, small)

    # 4. The stages.
    for k, (top, stage, row) in enumerate(zip(tops, unfolding.stages, rows, strict=True)):
        label = f"k = {k}", f"stride {stage.stride}", f"map {size_text(stage.map_size)}"
        for index, line in enumerate(label):
            draw.text((GAP, top + index * LINE_HEIGHT), line, INK, small if index else font)
        for left, name in zip(lefts, SHEET_COLUMNS, strict=True):
            if name in row:
                paste_framed(sheet, row[name], left, top)
    return tag_srgb(sheet)


def _cells(stage: Stage, image: Image.Image) -> dict[str, Image.Image]:
    """Draw the maps of a stage, by their names in `SHEET_COLUMNS`."""
    cells = {"outline": _outlined(image, stage.mask), **stage.images()}
    if stage.opinion is not None:
        cells["opinion"] = draw_scale(stage.opinion, GRAY)
    if stage.reconstruction is not None:
        cells["reconstruction"] = draw_colors(stage.reconstruction)
    if stage.error is not None:
        cells["error"] = draw_scale(stage.error, HEAT, SHEET_COLUMNS["error"].top)
    return cells


def _outlined(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Draw the outline of a mask, where it passes 0.5."""
    image = image.copy()
    inside = Image.fromarray(np.where(mask > 0.5, np.uint8(255), np.uint8(0)))
    for line_width, color in ((4, INK), (2, MARK)):
        size = line_width + 1
        highest, lowest = inside.filter(ImageFilter.MaxFilter(size)), inside.filter(ImageFilter.MinFilter(size))
        image.paste(color, mask=ImageChops.difference(highest, lowest))
    return image
