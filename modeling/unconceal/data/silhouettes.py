"""Outlines of objects: from masks of any data set, or drawn.

A silhouette is a boolean array in its own box. `place` puts it into an image.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from skimage.measure import label, regionprops
from tqdm import tqdm

from ..utils.errors import UserError
from ..utils.images import MAX_PIXELS
from .masks import encode_mask, read_mask
from .names import find_images
from .synthetic import Rng


Problems = list[tuple[str, str]]  # name and reason of each unusable file

SHAPE_SIZE = 256  # longest side of a silhouette that is kept


def read_shapes(folder: Path, max_pixels: int = MAX_PIXELS) -> tuple[list[bytes], Problems]:
    """Return silhouettes as PNG files: the larger connected pieces of each mask."""
    shapes, problems = [], []
    for path in tqdm(find_images(folder), desc="checking shapes", unit="mask", disable=None):
        try:
            mask = read_mask(path, max_pixels=max_pixels).mask
        except UserError as error:
            problems.append((str(path), str(error)))
            continue
        image = Image.fromarray(mask).convert("L")
        image.thumbnail((4 * SHAPE_SIZE, 4 * SHAPE_SIZE), Image.Resampling.BOX)
        mask = np.asarray(image) > 127
        for piece in regionprops(label(mask, connectivity=2)):
            whole = np.pad(piece.image, 1)  # the piece alone, in its box
            top, left, bottom, right = piece.bbox
            frame = np.ones_like(mask)
            frame[1:-1, 1:-1] = False
            cut = (frame[top:bottom, left:right] & piece.image).sum() / sum(piece.image.shape)
            # Skip a piece that is too small, fills most of the frame, or is cut off by it along a fifth of its box.
            if piece.area < max(400, 0.2 * mask.sum()) or piece.area > 0.7 * mask.size or cut > 0.4:
                continue
            shape = Image.fromarray(whole).convert("L")
            shape.thumbnail((SHAPE_SIZE, SHAPE_SIZE), Image.Resampling.BOX)
            shapes.append(encode_mask(np.asarray(shape) > 127))
    return shapes, problems


def draw_animal(rng: Rng) -> np.ndarray:
    """Draw an animal's outline: body, head, tail; limbs, fins or wings."""
    canvas = Image.new("L", (2 * SHAPE_SIZE, 2 * SHAPE_SIZE))
    draw = ImageDraw.Draw(canvas)

    def stroke(points: np.ndarray, radii: np.ndarray):
        for (x, y), radius in zip(points, np.maximum(radii, 2), strict=True):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)

    def path(start: np.ndarray, headings: np.ndarray, length: float) -> np.ndarray:
        steps = np.stack([np.cos(headings), np.sin(headings)], axis=1) * length / len(headings)
        return start + np.cumsum(steps, axis=0)

    along = np.linspace(0, 1, 80)
    bends = np.cumsum(rng.normal(0, 1, 3) * [0.4, 0.6, 1])
    spine = path(np.array([0, 0]), np.interp(along, [0, 0.3, 0.6, 1], [0, *bends]), SHAPE_SIZE)
    spine += SHAPE_SIZE - spine.mean(0)
    thick = SHAPE_SIZE * rng.uniform(0.05, 0.26)
    low, high = [0.1, 0.5, 0.4, 0.8, 0.8, 0.3, 0.02], [0.5, 1.2, 1.0, 1.1, 1.2, 0.8, 0.35]
    stroke(spine, thick * np.interp(along, [0, 0.1, 0.22, 0.35, 0.55, 0.7, 1], rng.uniform(low, high)))
    for place in rng.uniform(0.2, 0.75, rng.choice([0, 1, 2, 2, 3, 4])):
        at = int(place * 80)
        heading = np.arctan2(*(spine[at + 1] - spine[at - 1])[::-1])
        lean, knee, length = rng.uniform(0.6, 2.4), rng.normal(0, 0.9), max(thick, 25) * rng.uniform(1.2, 3)
        wide = max(thick, 15) * (rng.uniform(0.1, 0.25) if rng.random() < 0.75 else rng.uniform(0.4, 0.9))
        taper = np.interp(np.linspace(0, 1, 40), [0, 0.5, 1], wide * rng.uniform([0.8, 0.5, 0.1], [1, 1, 0.6]))
        for side in (1, -1) if rng.random() < 0.8 else (1,):
            turns = side * (lean + rng.normal(0, 0.2) + knee * np.linspace(-0.5, 1, 40).round())
            stroke(path(spine[at], heading + turns, length), taper)
    return np.asarray(canvas.crop(canvas.getbbox())) > 0


def smooth_noise(rng: Rng, size: int, cells: int) -> np.ndarray:
    """Return a smooth random field (size, size), deviation about 1."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def place(rng: Rng, shape: np.ndarray, size: int, side: float) -> np.ndarray:
    """Turn, flip, shear and bend a silhouette into a mask (size, size)."""
    longest = max(shape.shape)
    new_size = [max(1, round(2 * side * length / longest)) for length in shape.shape[::-1]]
    shape = np.asarray(Image.fromarray(shape).convert("L").resize(new_size, Image.Resampling.BICUBIC)) > 127
    angle, margin = rng.uniform(0, 2 * np.pi), min(0.35 * side, size / 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    change = np.array([[rng.choice([-1, 1]), rng.uniform(-0.2, 0.2)], [0, rng.uniform(0.8, 1.25)]])
    matrix = 2 * change @ turn  # the silhouette has twice the resolution
    center = rng.uniform(margin, size - margin, 2)
    grid = np.mgrid[:size, :size] - center[:, None, None]
    grid += 0.03 * side * np.stack([smooth_noise(rng, size, 6) for _ in range(2)])
    rows, columns = (
        np.einsum("ij,jhw->ihw", matrix, grid).round().astype(int) + np.array(shape.shape)[:, None, None] // 2
    )
    inside = (rows >= 0) & (rows < shape.shape[0]) & (columns >= 0) & (columns < shape.shape[1])
    return inside & shape[rows.clip(0, shape.shape[0] - 1), columns.clip(0, shape.shape[1] - 1)]


def blurred(mask: np.ndarray, radius: float) -> np.ndarray:
    """Blur a mask; return (H, W, 1) in [0, 1]."""
    image = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(float(radius)))
    return np.asarray(image, dtype=np.float32)[..., None] / 255
