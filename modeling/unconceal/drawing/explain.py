"""Show how a network that unfolds in stages, such as RUN, comes to its mask: each stage's maps, and a sheet."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from ..api import Segmenter, overlay
from ..models.backbones import STRIDE
from ..models.image_processing_unconceal import to_rgb
from ..models.modeling_unconceal import padding_to
from ..utils.errors import UserError
from .layout import GAP, INK, LINE_HEIGHT, PAPER, paste_framed, wrapped


CELL = 220  # pixels, the longer side of a map on the sheet
LABEL_WIDTH = 100
MARK = (0, 230, 255)  # a hue that skin, leaves and sand have not, and that all kinds of colour vision tell from them

GREY = np.array([[0, 0, 0], [255, 255, 255]])
# Black, violet, orange, pale yellow. Lightness rises all the way, so it reads without colour vision and in grey.
HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])


@dataclass(frozen=True)
class Column:
    """A column of the sheet.

    Attributes:
        title: One or two words.
        meaning: What it shows.
        ramp: (n, 3), 0 to 255, the colours from the value 0 to `top`; None for pictures.
        top: The value from which on the colour is the last.
    """

    title: str
    meaning: str
    ramp: np.ndarray | None = None
    top: float = 1


COLUMNS = {
    "mask": Column("mask M", "probability of object", GREY),
    "outline": Column("outline", "where M passes 0.5, if it does"),
    "edge": Column("edge E", "probability of the object's edge", GREY),
    "background": Column(
        "background B", "the picture without the object; B of k = 0 is made at the stride of stage 1"
    ),
    "uncertainty": Column("uncertainty", "1 - |2M - 1|, so 1 where M is 0.5", HEAT),
    "reconstruction": Column("rebuilt C^", "the picture rebuilt from mask and background"),
    "error": Column(
        "error of C^",
        "|C^ - C|, mean over the colours, C at the stage's resolution; larger errors look like the scale's end",
        HEAT,
        0.25,
    ),
}


@dataclass(frozen=True)
class Stage:
    """Maps of one stage k of the unfolding, float32, at a picture's size; None is what the network does not make there.

    Attributes:
        stride: Pixels of the network's input that a position of `mask` stands for.
        map_size: (width, height) of the mask before it was enlarged, with the network's padding.
        mask: M_k, (H, W), in [0, 1].
        edge: E_k, (H, W), in [0, 1].
        background: B_k, (H, W, 3), RGB, [0, 1] is black to white.
        reconstruction: C^_k, like `background`.
        error: |C^_k - C|, the mean over the channels, (H, W), where C is the input at the resolution of the stage.
    """

    stride: int
    map_size: tuple[int, int]
    mask: np.ndarray
    edge: np.ndarray | None
    background: np.ndarray | None
    reconstruction: np.ndarray | None
    error: np.ndarray | None

    @property
    def uncertainty(self) -> np.ndarray:
        """1 - |2 M_k - 1|, (H, W): 0 where the mask is decided, 1 where it is 0.5."""
        return 1 - np.abs(2 * self.mask - 1)


@dataclass(frozen=True)
class Unfolding:
    """What a network makes of one picture on the way to its mask.

    Attributes:
        mask: The final soft mask, (H, W), float32 in [0, 1].
        input_size: (width, height) at which the network sees the picture.
        stages: From the coarse start, k = 0, to the last stage, k = K.
    """

    mask: np.ndarray
    input_size: tuple[int, int]
    stages: tuple[Stage, ...]


@torch.inference_mode()
def unfold(segmenter: Segmenter, image: Image.Image, size: tuple[int, int] | None = None) -> Unfolding:
    """Return the maps of every stage for one picture.

    Maps are enlarged by nearest neighbour, to show their true resolution, and shrunk by averaging.

    Args:
        segmenter: A network with stages.
        image: Any picture.
        size: (width, height) of the maps; by default of the displayed picture, which takes much memory for a large one.

    Raises:
        UserError: If the network has no stages, or memory runs out.
    """
    image = to_rgb(image)
    width, height = size or image.size
    if not hasattr(segmenter.model.config, "num_stages"):
        raise UserError(
            f"got {type(segmenter.model).__name__}, which has no stages to show; expected a network that unfolds, "
            "such as RUN"
        )
    with segmenter.memory_explained([image]):
        pixel_values, outputs = segmenter.run([image], output_stages=True)
        (mask,) = segmenter.processor.post_process_masks(outputs, [(height, width)])
    input_height, input_width = pixel_values.shape[-2:]
    full_image = segmenter.model.denormalize(pixel_values)  # C
    full_image = F.pad(full_image, padding_to(STRIDE, input_height, input_width), mode="replicate")

    def stride_of(maps: torch.Tensor) -> int:
        return full_image.shape[-1] // maps.shape[-1]

    def shown(maps: torch.Tensor | None) -> np.ndarray | None:
        if maps is None:
            return None
        # The part that covers the picture; where that ends inside a position, so does the box.
        box = (0, 0, input_width / stride_of(maps), input_height / stride_of(maps))
        channels = [
            np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BOX, box))
            for channel in maps[0].float().cpu().numpy()
        ]
        if len(channels) == 1:
            return channels[0]
        # The network sees colours in the processor's order.
        return np.stack(channels if segmenter.processor.channel_order == "rgb" else channels[::-1], axis=-1)

    num_stages = len(outputs.edge_logits)
    # Edges and reconstructions begin at stage 1; whole groups are missing where the configuration switches them off.
    edges = (None, *(logits.float().sigmoid() for logits in outputs.edge_logits))
    backgrounds = outputs.backgrounds or (None,) * (num_stages + 1)
    reconstructions = (None, *(outputs.reconstructions or (None,) * num_stages))
    errors = [
        None if maps is None else (maps - F.avg_pool2d(full_image, stride_of(maps))).abs().mean(1, keepdim=True)
        for maps in reconstructions
    ]
    stages = tuple(
        Stage(stride_of(logits), tuple(logits.shape[:1:-1]), shown(logits.float().sigmoid()), *map(shown, others))
        for logits, *others in zip(outputs.mask_logits, edges, backgrounds, reconstructions, errors, strict=True)
    )
    return Unfolding(mask.cpu().numpy(), (input_width, input_height), stages)


def explain(segmenter: Segmenter, image: Image.Image) -> Image.Image:
    """Draw a sheet that shows how a network unfolds one picture.

    At the top stand the picture and the final mask on it; then a row for each stage, from the coarse start, k = 0, to
    the last, and a column for each kind of map (see `COLUMNS`). What the network does not make is left blank.

    Args:
        segmenter: A network with stages.
        image: Any picture.

    Returns:
        An RGB picture.

    Raises:
        UserError: If the network has no stages, or memory runs out.
    """
    image = to_rgb(image)
    scale = CELL / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    unfolding = unfold(segmenter, image, size)
    picture = image.resize(size, Image.Resampling.BOX)
    rows = [_cells(stage, picture) for stage in unfolding.stages]
    columns = {name: column for name, column in COLUMNS.items() if any(name in row for row in rows)}
    return _sheet(image.size, picture, unfolding, columns, rows)


def _cells(stage: Stage, picture: Image.Image) -> dict[str, Image.Image]:
    """Draw the maps that a stage has, by their names in `COLUMNS`."""
    cells = {"outline": _outlined(picture, stage.mask)}
    for name, column in COLUMNS.items():
        values = getattr(stage, name, None)
        if values is not None:
            cells[name] = _colored(values, column)
    return cells


def _colored(values: np.ndarray, column: Column) -> Image.Image:
    if column.ramp is None:
        colors = values.clip(0, 1) * 255
    else:
        positions = np.linspace(0, column.top, len(column.ramp))
        colors = np.stack([np.interp(values, positions, channel) for channel in column.ramp.T], axis=-1)
    return Image.fromarray(np.rint(colors).astype(np.uint8))


def _outlined(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """Draw a line, dark at its sides, where the mask passes 0.5."""
    picture = picture.copy()
    inside = Image.fromarray(np.where(mask > 0.5, np.uint8(255), np.uint8(0)))
    for line_width, color in ((4, INK), (2, MARK)):
        size = line_width + 1
        line = ImageChops.difference(
            inside.filter(ImageFilter.MaxFilter(size)), inside.filter(ImageFilter.MinFilter(size))
        )
        picture.paste(color, mask=line)
    return picture


def _sheet(
    picture_size: tuple[int, int],
    picture: Image.Image,
    unfolding: Unfolding,
    columns: dict[str, Column],
    rows: list[dict[str, Image.Image]],
) -> Image.Image:
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=13)
    width, height = (max(side, least) for side, least in zip(picture.size, (100, 3 * LINE_HEIGHT), strict=True))
    lefts = [LABEL_WIDTH + GAP + index * (width + GAP) for index in range(len(columns))]
    right = lefts[-1] + width + GAP

    # 1. Measure the text beside the picture, then the rows.
    text_left = lefts[2]
    start = unfolding.stages[0]
    input_size, padded_size = unfolding.input_size, tuple(side * start.stride for side in start.map_size)
    padded = "" if padded_size == input_size else ", padded to {} x {}".format(*padded_size)
    text = [
        "{} x {} pixels, seen by the network at {} x {}{}".format(*picture_size, *input_size, padded),
        f"k = 0 is the coarse start, k = {len(rows) - 1} the last stage; blank: no such map is made there",
        "Maps are enlarged without smoothing: a block of one colour is one position of the map",
    ]
    text += [f"{column.title}: {column.meaning}" for column in columns.values()]
    lines = [line for paragraph in text for line in wrapped(paragraph, small, right - GAP - text_left)]
    header = GAP + LINE_HEIGHT
    titles_top = header + max(height, len(lines) * LINE_HEIGHT) + 2 * GAP
    tops = [titles_top + 2 * LINE_HEIGHT + index * (height + GAP) for index in range(len(rows))]
    sheet = Image.new("RGB", (right, tops[-1] + height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)

    # 2. The picture, the result, and what the columns mean.
    result = _outlined(overlay(picture, unfolding.mask, MARK, alpha=0.4), unfolding.mask)
    for left, title, cell in zip(lefts, ("picture", "final mask"), (picture, result), strict=False):
        draw.text((left, GAP // 2), title, INK, font)
        paste_framed(sheet, cell, left, header)
    for index, line in enumerate(lines):
        draw.text((text_left, header + index * LINE_HEIGHT), line, INK, small)

    # 3. Titles with their scales.
    for left, column in zip(lefts, columns.values(), strict=True):
        draw.text((left, titles_top), column.title, INK, font)
        if column.ramp is not None:
            bar = _colored(np.tile(np.linspace(0, column.top, 60), (10, 1)), column)
            top = titles_top + LINE_HEIGHT
            draw.text((left, top), "0", INK, small)
            sheet.paste(bar, (left + 12, top + 3))
            draw.text((left + 76, top), f"{column.top:g}", INK, small)

    # 4. The stages.
    for k, (top, stage, row) in enumerate(zip(tops, unfolding.stages, rows, strict=True)):
        label = f"k = {k}", f"stride {stage.stride}", "map {} x {}".format(*stage.map_size)
        for index, line in enumerate(label):
            draw.text((GAP, top + index * LINE_HEIGHT), line, INK, small if index else font)
        for left, name in zip(lefts, columns, strict=True):
            if name in row:
                paste_framed(sheet, row[name], left, top)
    return sheet
