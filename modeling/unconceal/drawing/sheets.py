"""Draw sheets of predictions and errors, and curves of data sets.

**The error map** shows pixels that are found, false (predicted, but not object) and missed (object, but not
predicted). A pixel is predicted if the prediction is above the threshold.

**Small errors stay visible.** A cell of the sheet is often much smaller than its image. A pixel of the cell has the
color of an error if any pixel under it is an error; of two kinds the more frequent one counts. Ground truth and
prediction are shown by their highest value. So outlines of large objects look thicker than they are, but a target of
four pixels stays visible. Small regions have a ring, unless there are many: white if a part was found, otherwise in
the color of the error.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import cycle
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage.measure import label, regionprops

from ..evaluation.base import THRESHOLDS, check_image, to_unit
from ..models.cutout import mask_to_image
from ..models.reading import to_rgb
from ..utils.errors import UserError
from .layout import GAP, INK, LINE_HEIGHT, PAPER, paste_framed, shortened, wrapped


if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 320  # pixels, the longer side of a cell
MIN_SIDE = 8  # of a cell; otherwise an image of 3000x2 would be a line
MIN_WIDTH = 110  # of a column, for its title
CELL_NAMES = ("image", "ground truth", "prediction", "errors")
FAINT = (105, 105, 105)

REST, FALSE, MISSED, FOUND = range(4)  # a ring over several kinds has the color of the last
# These colors also differ in lightness, by about 20 of CIE's 100: they are readable without color vision and in gray.
COLORS = np.array([[40, 40, 40], [255, 165, 0], [50, 125, 255], [240, 240, 240]], np.uint8)
MEANINGS = {FOUND: "found", FALSE: "false: predicted, but not object", MISSED: "missed: object, but not predicted"}
WHITE_BEHIND = 64  # gray value of the image's white behind the errors
SMALL = 14  # pixels of a cell; regions up to this size have a ring
MAX_RINGS = 30  # of a color in a cell; many rings would look like many errors, so more are not drawn

STYLES = ("-", "--", "-.", ":")
# Colors of Okabe and Ito without yellow, which is too light on white.
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


@dataclass(frozen=True)
class ScoredImage:
    """An image with its ground truth and its prediction."""

    id: str
    caption: str  # after the name, such as "IoU 0.812"
    image: Image.Image | None  # any image, shown at the size of `target`
    target: np.ndarray  # (height, width), boolean
    probs: np.ndarray  # (height, width), floating in [0, 1] or uint8
    threshold: float = 0.5  # a pixel counts as predicted if `probs` is above it


class _Row(NamedTuple):
    """Texts and cells of one image; all cells have one size."""

    id: str
    caption: str
    threshold: float
    cells: dict[str, Image.Image]  # by `CELL_NAMES`


def draw_sheet(images: Iterable[ScoredImage], title: str) -> Image.Image:
    """Draw a row for each image: image, ground truth, prediction, errors.

    Images are taken one by one; only their small cells are kept. The column of images is left out if all are None.

    Raises:
        ValueError: If there are no images.
        ValueError, TypeError: As `check_image`.
    """
    rows = list(map(_row, images))  # a loop variable would keep an image while the next one is loaded
    if not rows:
        raise ValueError("no image to draw")
    large, font, small = (ImageFont.load_default(size=size) for size in (20, 16, 13))
    columns = [name for name in CELL_NAMES if any(name in row.cells for row in rows)]
    width = max(MIN_WIDTH, *(row.cells["errors"].width for row in rows))
    lefts = [GAP + index * (width + GAP) for index in range(len(columns))]
    right = lefts[-1] + width

    def fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
        return shortened(text, lambda line: font.getlength(line) <= width)

    # 1. Lay out the head as lines (text, font, color, height, kind of error), then the rows.
    space = right - GAP
    thresholds = ", ".join(f"{value:g}" for value in sorted({row.threshold for row in rows}))
    note = (
        f"Predicted: above {thresholds}. A pixel here is an error if any pixel of the image under it is one. "
        "Rings mark small regions: white if a part was found."
    )
    head = [(fitting(line, large, space), large, INK, 28, None) for line in wrapped(title, large, space)]
    head += [(meaning, small, INK, LINE_HEIGHT, kind) for kind, meaning in MEANINGS.items()]
    head += [(line, small, FAINT, LINE_HEIGHT, None) for line in wrapped(note, small, space)]
    columns_top = 2 * GAP + sum(height for *_, height, _ in head)
    tops = [columns_top + LINE_HEIGHT + GAP]
    for row in rows:
        tops.append(tops[-1] + LINE_HEIGHT + row.cells["errors"].height + GAP)
    sheet = Image.new("RGB", (right + GAP, tops[-1]), PAPER)
    draw = ImageDraw.Draw(sheet)

    # 2. Draw the head and the names of the columns.
    top = GAP
    for text, line_font, color, height, kind in head:
        if kind is not None:
            paste_framed(sheet, Image.new("RGB", (12, 12), tuple(COLORS[kind].tolist())), GAP, top + 2)
        draw.text((GAP if kind is None else GAP + 18, top), text, color, line_font)
        top += height
    for left, name in zip(lefts, columns, strict=True):
        draw.text((left, columns_top), name, INK, font)

    # 3. Draw the rows.
    for top, row in zip(tops, rows, strict=False):
        caption = fitting(row.caption, small, (space - GAP) / 2)
        name = fitting(row.id, small, space - GAP - small.getlength(caption))
        draw.text((GAP, top), name, INK, small)
        draw.text((2 * GAP + small.getlength(name), top), caption, FAINT, small)
        for left, column in zip(lefts, columns, strict=True):
            if column in row.cells:
                paste_framed(sheet, row.cells[column], left, top + LINE_HEIGHT)
    return sheet


def _row(scored: ScoredImage) -> _Row:
    check_image(scored.probs, scored.target)
    scale = CELL / max(scored.target.shape)
    height, width = (max(MIN_SIDE, round(side * scale)) for side in scored.target.shape)
    cells = {
        "ground truth": mask_to_image(_resized(scored.target, (height, width), np.maximum)),
        "prediction": mask_to_image(to_unit(_resized(scored.probs, (height, width), np.maximum))),
    }
    behind = np.broadcast_to(COLORS[REST], (height, width, 3))
    if scored.image is not None:
        cells["image"] = to_rgb(scored.image).resize((width, height), Image.Resampling.BOX)
        gray = np.asarray(cells["image"].convert("L"))[..., None] / 255  # (height, width, 1)
        behind = np.broadcast_to(WHITE_BEHIND * gray, behind.shape)
    cells["errors"] = _error_map(scored, behind)
    return _Row(scored.id, scored.caption, scored.threshold, cells)


def _error_map(scored: ScoredImage, behind: np.ndarray) -> Image.Image:
    """Draw found, false and missed pixels on a dark image."""
    size = behind.shape[:2]
    predicted = _predicted(scored.probs, scored.threshold)
    found = _resized(predicted & scored.target, size, np.maximum)
    wrong = _resized(predicted != scored.target, size, np.maximum)
    surplus = np.subtract(predicted, scored.target, dtype=np.int8)  # 1 false, -1 missed
    surplus = _resized(surplus, size, np.add, np.int32)
    kinds = np.where(wrong, np.where(surplus > 0, FALSE, MISSED), np.where(found, FOUND, REST))
    rings = {FALSE: [], MISSED: [], FOUND: []}
    for region in regionprops(label(kinds > REST, connectivity=2), np.where(found, FOUND, kinds)):
        top, left, bottom, right = region.bbox
        extent = max(bottom - top, right - left)
        if extent <= SMALL:
            center = (left + right - 1) / 2, (top + bottom - 1) / 2
            rings[int(region.intensity_max)].append((center, 0.75 * extent + 5))
    cell = Image.fromarray(behind.astype(np.uint8))
    draw = ImageDraw.Draw(cell)
    for kind, circles in rings.items():
        for center, radius in circles if len(circles) <= MAX_RINGS else ():
            draw.circle(center, radius, outline=tuple(COLORS[kind].tolist()))
    # Errors go over the rings, so that rings hide nothing.
    return Image.fromarray(np.where(kinds[..., None] > REST, COLORS[kinds], np.asarray(cell)))


def _predicted(probs: np.ndarray, threshold: float) -> np.ndarray:
    """Return `to_unit(probs) > threshold` without a float64 copy."""
    if probs.dtype == np.uint8:
        return (to_unit(np.arange(256, dtype=np.uint8)) > threshold)[probs]
    return probs > np.float64(threshold)  # a Python number would be rounded to the type of `probs`


def _resized(values: np.ndarray, size: tuple[int, int], pool: np.ufunc, dtype: type | None = None) -> np.ndarray:
    """Resize (H, W) to `size`: shrink with `pool`, enlarge by nearest neighbor."""
    for axis, new in enumerate(size):
        old = values.shape[axis]
        if new < old:
            values = pool.reduceat(values, np.arange(new) * old // new, axis, dtype)
        else:
            values = values.take((2 * np.arange(new) + 1) * old // (2 * new), axis)
    return values


def check_plots():
    """Raise a `UserError` if matplotlib is not installed, before long work."""
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise UserError("curves need matplotlib, which is not installed; pip install 'unconceal[plots]'") from error


def highest_point(curve: Sequence[float]) -> tuple[int, float]:
    """Return threshold (0 to 255) and value of a curve's highest point.

    The curve is over the thresholds 255 to 0. Of equal values the one at the highest threshold counts.
    """
    index = int(np.argmax(curve))
    return THRESHOLDS[index], float(curve[index])


def draw_curves(
    curves: Mapping[str, Mapping[str, Sequence[float]]], titles: Mapping[str, str], title: str
) -> Image.Image:
    """Draw precision over recall, and F over the threshold.

    Each method has a line. A dot marks the threshold of its highest F, in both panels. The RGB image is 2400 pixels
    wide.

    Args:
        curves: Name of the method -> its mean curves over the thresholds 255 to 0, by the keys of `titles`.
        titles: The protocol's `curves`: `precision_curve`, `recall_curve`, and F, the first of the others.
        title: Title, such as the data set.

    Raises:
        UserError: If matplotlib is not installed.
        ValueError: If there are no methods.
    """
    check_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(_figure(curves, titles, title))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _figure(curves: Mapping[str, Mapping[str, Sequence[float]]], titles: Mapping[str, str], title: str) -> "Figure":
    from matplotlib.figure import Figure

    if not curves:
        raise ValueError("no curve to draw")
    precision, recall = "precision_curve", "recall_curve"
    f = next(name for name in titles if name not in (precision, recall))
    f_title = titles[f].replace("beta^2", "β²")
    labels = []
    for method, values in curves.items():
        threshold, highest = highest_point(values[f])
        labels.append(f"{shortened(method, lambda name: len(name) <= 40)}: {highest:.3f} at {threshold}")
    # 12 inches at 200 dots: text of 11 points is 15 pixels high when the image is shown at half its size.
    figure = Figure((12, 5.6 + 0.25 * len(labels)), 200, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1, wspace=0.04)
    left, right = figure.subplots(1, 2)
    dot = {"marker": "o", "markersize": 7, "markeredgecolor": "white"}
    for values, color, line in zip(curves.values(), cycle(LINE_COLORS), cycle(STYLES), strict=False):
        style = {"color": color, "linestyle": line, "linewidth": 1.8, **dot, "markevery": [np.argmax(values[f])]}
        left.plot(values[recall], values[precision], **style)
        right.plot(THRESHOLDS, values[f], **style)
    panels = (left, titles[recall], titles[precision], 1), (right, "threshold (of 255)", f_title, 255)
    for axes, x_title, y_title, end in panels:
        axes.set_xlabel(x_title, fontsize=12)
        axes.set_ylabel(y_title, fontsize=12)
        axes.set_xlim(0, end * 1.01)
        axes.set_ylim(0, 1.01)
        axes.tick_params(labelsize=11)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    right.set_xticks([0, 51, 102, 153, 204, 255])
    figure.suptitle(shortened(title, lambda line: len(line) <= 90), fontsize=14, parse_math=False)
    style = {"title_fontsize": 11, "fontsize": 11, "frameon": False, "handlelength": 3.5}
    about = f"highest {f_title} and its threshold (dot)"
    legend = figure.legend(right.lines, labels, loc="outside lower center", title=about, **style)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold dollars
    return figure
