"""Paste objects of photos onto other scenes.

A few hundred photos with masks then show each object in many places. Objects have their own colors, without those of
the background that shine through at soft edges. Scenes are photos whose own object is painted over.

Each image depends on data sets, size, seed, split and number only.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from PIL import Image, ImageFilter

from ..models.cutout import object_colors
from ..models.painting import remove_object
from ..utils.errors import UserError
from .loading import read_pair
from .masks import is_object
from .sources import SYNTHETIC_SPLITS
from .synthetic import Rng


LARGEST_SIDE = 768  # photos are used at this side or below
PAINTED_SIDE = 384  # objects of scenes are painted over at this side, which is fast enough for thousands
SOFT_EDGE = 1 / 400  # deviation of the blur that makes edges soft, as a share of the longer side
MIN_AREA, MAX_AREA = 0.01, 0.6  # shares of the image
SECOND_OBJECT = 0.15  # share of images with two objects
NUM_TRIES = 20


@dataclass(frozen=True, eq=False)
class Piece:
    """Object cut out of a photo."""

    colors: Image.Image  # (h, w, 3)
    opacity: Image.Image  # (h, w)
    is_cut: tuple[bool, bool, bool, bool]  # whether the photo's left, top, right and bottom border cuts it off


class Composites:
    """Images out of the objects and scenes of data sets."""

    def __init__(
        self, objects: dict[str, Sequence[Dataset]], scenes: dict[str, Sequence[Dataset]], size: int, seed: int
    ):
        """Hold what images are made of.

        Args:
            objects: Split -> data sets whose objects are pasted. Each serves equally many images.
            scenes: Split -> data sets whose photos are scenes. Each serves equally many images.
            size: Side of the images in pixels.
            seed: Seed of the data set.
        """
        self.objects, self.scenes, self.size, self.seed = objects, scenes, size, seed

    def draw(self, split: str, number: int) -> tuple[bytes, np.ndarray]:
        """Make an image as JPEG and its mask (size, size)."""
        rng = np.random.default_rng([self.seed, SYNTHETIC_SPLITS.index(split), number])
        image = self._scene(rng, split)
        mask = np.zeros((self.size, self.size), dtype=bool)
        for _ in range(2 if rng.random() < SECOND_OBJECT else 1):
            piece = self._piece(rng, split)
            image, found = paste(rng, image, piece)
            mask |= found
        return _encode(rng, image), mask

    def _scene(self, rng: Rng, split: str) -> Image.Image:
        """Return a window of a photo without its object."""
        image, mask = next(_photos(rng, self.scenes[split]))
        marked = is_object(mask)
        if marked.any():
            painted = remove_object(image, marked.astype(np.float32), PAINTED_SIDE, patches=2)
            image = Image.fromarray((painted * 255).round().clip(0, 255).astype(np.uint8))
        side = min(image.size) * rng.uniform(0.6, 1)
        left, top = rng.uniform(0, np.array(image.size) - side)
        scene = image.resize(
            (self.size, self.size), Image.Resampling.BICUBIC, (left, top, left + side, top + side), reducing_gap=3.0
        )
        return scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else scene

    def _piece(self, rng: Rng, split: str) -> Piece:
        """Cut the object out of a photo.

        Raises:
            UserError: If none of the photos that were tried shows an object.
        """
        pairs = ((image, is_object(mask)) for image, mask in _photos(rng, self.objects[split]))
        photo, marked = next((pair for pair in pairs if pair[1].mean() > MIN_AREA), (None, None))
        if photo is None:
            raise UserError(f"none of {NUM_TRIES} photos of split {split} shows an object; give other --objects")
        blur = max(0.7, SOFT_EDGE * max(photo.size))
        soft = np.asarray(Image.fromarray(marked).convert("L").filter(ImageFilter.GaussianBlur(blur)), np.float32)
        # From the edge of the mask inwards: what lies at the edge is often background.
        opacity = ((soft / 255 - 0.4) / 0.55).clip(0, 1)
        opacity = (opacity * 255).round().astype(np.uint8)
        colors = Image.fromarray(object_colors(np.asarray(photo), opacity))
        opacity = Image.fromarray(opacity)
        box = opacity.getbbox() or (0, 0, *opacity.size)
        is_cut = box[0] == 0, box[1] == 0, box[2] == opacity.width, box[3] == opacity.height
        return Piece(colors.crop(box), opacity.crop(box), is_cut)


def _photos(rng: Rng, sets: Sequence[Dataset]) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Yield random photos and their masks, `NUM_TRIES` at most."""
    for _ in range(NUM_TRIES):
        dataset = sets[rng.integers(len(sets))]
        _, image, mask = read_pair(dataset, int(rng.integers(len(dataset))))
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        yield image, mask.resize(image.size, Image.Resampling.BOX)


def paste(rng: Rng, scene: Image.Image, piece: Piece) -> tuple[Image.Image, np.ndarray]:
    """Paste an object at random; return the image and the object's mask.

    The object is scaled, flipped and lit a little like the scene. Borders may cut a part of it off. Where the border
    of its photo cuts it off, the border of the image does, too.
    """
    size = scene.width
    for _ in range(NUM_TRIES):
        scale = size * rng.uniform(0.35, 1.15) / max(piece.colors.size)
        sides = [max(1, round(side * scale)) for side in piece.colors.size]
        left, top = (
            _place(rng, side, size, *cuts)
            for side, cuts in zip(sides, (piece.is_cut[::2], piece.is_cut[1::2]), strict=True)
        )
        opacity = Image.new("L", scene.size)
        opacity.paste(piece.opacity.resize(sides, Image.Resampling.BICUBIC, reducing_gap=3.0), (left, top))
        mask = np.asarray(opacity) > 127
        if MIN_AREA < mask.mean() < MAX_AREA:
            break
    colors = Image.new("RGB", scene.size)
    colors.paste(piece.colors.resize(sides, Image.Resampling.BICUBIC, reducing_gap=3.0), (left, top))
    if rng.random() < 0.5:
        colors, opacity = (one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for one in (colors, opacity))
        mask = mask[:, ::-1]
    lit = _light_like(rng, np.asarray(colors, np.float32), mask, np.asarray(scene, np.float32))
    return Image.composite(Image.fromarray(lit), scene, opacity), mask


def _place(rng: Rng, side: int, size: int, cut_low: bool, cut_high: bool) -> int:
    """Return where a side of an object starts; its center lies inside."""
    start = rng.uniform(0.15, 0.85) * size - side / 2
    beyond = rng.uniform(0, 0.2) * side
    if cut_high:  # before the low border: people are cut off at the bottom rather than at the top
        start = size - side + beyond
    elif cut_low:
        start = -beyond
    return round(start)


def _light_like(rng: Rng, colors: np.ndarray, mask: np.ndarray, scene: np.ndarray) -> np.ndarray:
    """Shift the colors of an object towards those of the scene."""
    if not mask.any():
        return colors.astype(np.uint8)
    likeness = rng.uniform(0, 0.5)
    shift = likeness * (scene.mean((0, 1)) - colors[mask].mean(0))
    return (colors + shift).round().clip(0, 255).astype(np.uint8)


def _encode(rng: Rng, image: Image.Image) -> bytes:
    """Blur a little, add noise, and compress, as one camera would."""
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1))))
    noise = rng.uniform(0, 5) * rng.standard_normal((image.height, image.width, 3), dtype=np.float32)
    noisy = (np.asarray(image, np.float32) + noise * (rng.random() < 0.4)).round().clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=int(rng.integers(80, 96)))
    return buffer.getvalue()
