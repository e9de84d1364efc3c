"""Change image and mask together at random for training.

The random numbers of a sample depend on seed, epoch and index only. A network therefore sees the same samples with any
number of loader processes, and after a resume.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image, ImageEnhance, ImageFilter, ImageStat

from .loading import UnreadableSample, check_pair, read_pair, row_name
from .masks import is_faint
from .mixing import Mixture
from .targets import find_target, paste_target


Rng = np.random.Generator
ImageAndMask = tuple[Image.Image, Image.Image]


@dataclass
class TransformRecipe:
    """Random changes of a training sample.

    A probability, ratio or strength of 0 switches a change off. The changes come in the order of the fields; only the
    crop to `crop_size` is last, after resizing. Images with an up and a down, such as those of camouflaged animals,
    need `rotate90_probability` and `flip_probability` at 0, and the fields from `horizontal_flip_probability` on.

    Strengths are those of a color jitter. For a strength s, the factor is drawn evenly from max(0, 1 - s) to 1 + s. A
    factor of 1 changes nothing. A factor of 0 leaves black, flat gray, no color or a blurred image.

    Args:
        rotate90_probability: Probability of a turn by 90, 180 or 270 degrees.
        flip_probability: Probability of a flip left-right, top-down or both.
        crop_size: Side in pixels of a square that is cut out after resizing; None trains on whole images. What lies
            outside a smaller image is background of the mean color.
        crop_object_probability: Probability that the square lies over a random object pixel, if there is one.
            Otherwise most squares would miss small targets.
        horizontal_flip_probability: Probability of a flip left-right.
        max_crop_ratio: Largest share of the width, and of the height, to cut off, half of it at either end.
        brightness: Strength.
        contrast: Strength.
        saturation: Strength.
        sharpness: Strength.
        rotate_probability: Probability of a rotation about the center; the size stays.
        max_rotation: Largest angle of that rotation to either side, in degrees.
        min_zoom: Smallest factor by which the image is enlarged before a window of its size is cut out. Below 1 the
            image shrinks, and the free border has its mean color.
        max_zoom: Largest such factor. A zoom is drawn between both on a logarithmic scale.
        max_stretch: Largest ratio by which one side is enlarged more than the other.
        hue: Largest turn of the hues to either side, as a share of the color circle.
        gray_probability: Probability of an image without color.
        blur_probability: Probability of a Gaussian blur.
        max_blur: Largest radius of that blur in pixels.
        noise: Largest standard deviation of Gaussian noise, as a share of the range from black to white.
        paste_probability: Probability that small targets of other images are pasted on.
        max_pastes: Largest number of them.
    """

    rotate90_probability: float = 0.5
    flip_probability: float = 0.5
    crop_size: int | None = None
    crop_object_probability: float = 0.5
    horizontal_flip_probability: float = 0.0
    max_crop_ratio: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    sharpness: float = 0.0
    rotate_probability: float = 0.0
    max_rotation: float = 15.0
    min_zoom: float = 1.0
    max_zoom: float = 1.0
    max_stretch: float = 1.0
    hue: float = 0.0
    gray_probability: float = 0.0
    blur_probability: float = 0.0
    max_blur: float = 2.0
    noise: float = 0.0
    paste_probability: float = 0.0
    max_pastes: int = 3


QUARTER_TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
FLIPS = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180)
ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
}


def turn_and_flip(image: Image.Image, mask: Image.Image, recipe: TransformRecipe, rng: Rng) -> ImageAndMask:
    """Turn and flip image and mask alike; pixel values stay."""
    for probability, choices in ((recipe.rotate90_probability, QUARTER_TURNS), (recipe.flip_probability, FLIPS)):
        chosen = choices[rng.integers(len(choices))]
        if rng.random() < probability:
            image, mask = image.transpose(chosen), mask.transpose(chosen)
    return image, mask


def flip_and_trim(image: Image.Image, mask: Image.Image, recipe: TransformRecipe, rng: Rng) -> ImageAndMask:
    """Flip image and mask left-right and trim their borders; pixel values stay."""
    if rng.random() < recipe.horizontal_flip_probability:
        image, mask = (one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for one in (image, mask))
    ratios = rng.uniform(0, recipe.max_crop_ratio, size=2)
    left, top = (int(side * ratio / 2) for side, ratio in zip(image.size, ratios, strict=True))
    box = (left, top, image.width - left, image.height - top)
    return image.crop(box), mask.crop(box)


def jitter_colors(image: Image.Image, recipe: TransformRecipe, rng: Rng) -> Image.Image:
    """Change brightness, contrast, saturation and sharpness of an RGB image at random."""
    for name, enhancer in ENHANCERS.items():
        strength = getattr(recipe, name)
        # Drawn for 0 too: the other changes keep their numbers.
        factor = rng.uniform(max(0, 1 - strength), 1 + strength)
        if strength:
            image = enhancer(image).enhance(factor)
    return image


def rotate(image: Image.Image, mask: Image.Image, recipe: TransformRecipe, rng: Rng) -> ImageAndMask:
    """Rotate an RGB image and its gray mask within their size.

    The free corners become background in the mask and the mean color in the image. This color does not reveal where
    the object is. Black corners would occur in training images only; mirrored pixels could repeat the object.
    """
    angle = rng.uniform(-recipe.max_rotation, recipe.max_rotation)
    if rng.random() < recipe.rotate_probability:
        image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=mean_color(image))
        mask = mask.rotate(angle, Image.Resampling.NEAREST, fillcolor=0)
    return image, mask


def mean_color(image: Image.Image) -> tuple[int, ...]:
    """Return the mean of each channel, in 0..255."""
    return tuple(round(mean) for mean in ImageStat.Stat(image).mean)


def zoom(image: Image.Image, mask: Image.Image, recipe: TransformRecipe, rng: Rng) -> ImageAndMask:
    """Cut the same random window out of image and mask.

    This is a random resized crop: the processor resizes the window. What lies outside the RGB image is background of
    the mean color.
    """
    factor = math.exp(rng.uniform(math.log(recipe.min_zoom), math.log(recipe.max_zoom)))
    stretch = math.exp(rng.uniform(-1, 1) * math.log(recipe.max_stretch) / 2)
    places = rng.random(2).tolist()
    if recipe.min_zoom == recipe.max_zoom == recipe.max_stretch == 1:
        return image, mask
    window = [max(1, round(side / factor * way)) for side, way in zip(image.size, (stretch, 1 / stretch), strict=True)]
    start = [round(place * (side - of)) for place, side, of in zip(places, window, image.size, strict=True)]
    windows = Image.new("RGB", window, mean_color(image)), Image.new("L", window)
    for one, given in zip(windows, (image, mask), strict=True):
        one.paste(given, start)
    return windows


def degrade(image: Image.Image, recipe: TransformRecipe, rng: Rng) -> Image.Image:
    """Change the hue of an image, remove color, blur, add noise."""
    turn, is_gray, is_blurred, radius, deviation = rng.random(5).tolist()  # drawn for 0 too
    if recipe.hue:
        hue, *others = image.convert("HSV").split()
        shift = round(256 * recipe.hue * (2 * turn - 1))
        image = Image.merge("HSV", (hue.point([(i + shift) % 256 for i in range(256)]), *others)).convert("RGB")
    if is_gray < recipe.gray_probability:
        image = image.convert("L").convert("RGB")
    if is_blurred < recipe.blur_probability:
        image = image.filter(ImageFilter.GaussianBlur(radius * recipe.max_blur))
    if recipe.noise:
        noise = rng.standard_normal((image.height, image.width, 3), dtype=np.float32)
        noise *= 255 * deviation * recipe.noise
        noise += np.asarray(image)  # in place: arrays of whole images are slow to make
        image = Image.fromarray(noise.round(out=noise).clip(0, 255, out=noise).astype(np.uint8))
    return image


def crop(
    pixel_values: torch.Tensor, labels: torch.Tensor, recipe: TransformRecipe, rng: Rng
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the same random square out of pixels and labels.

    Smaller images are padded on both sides: pixels (C, H, W) with their mean, labels (H, W) with 0.
    """
    if recipe.crop_size is None:
        return pixel_values, labels
    missing = [max(0, recipe.crop_size - length) for length in labels.shape]
    if any(missing):
        top, left = (int(rng.integers(one + 1)) for one in missing)
        padding = (left, missing[1] - left, top, missing[0] - top)
        mean = pixel_values.mean(dim=(1, 2), keepdim=True)
        pixel_values, labels = F.pad(pixel_values - mean, padding) + mean, F.pad(labels, padding)
    object_pixels = labels.nonzero()
    on_object = rng.random() < recipe.crop_object_probability and len(object_pixels) > 0
    aim = object_pixels[rng.integers(len(object_pixels))].tolist() if on_object else None
    window = []
    for axis, length in enumerate(labels.shape):
        low, high = 0, length - recipe.crop_size  # possible starts
        if aim:  # starts of squares that hold the chosen pixel
            low, high = max(low, aim[axis] - recipe.crop_size + 1), min(high, aim[axis])
        start = int(rng.integers(low, high + 1))
        window.append(slice(start, start + recipe.crop_size))
    rows, columns = window
    return pixel_values[:, rows, columns], labels[rows, columns]


class TrainingSet(torch.utils.data.Dataset):
    """One split with `image` and `mask`, changed at random for training.

    A mixture chooses the rows of an epoch; without one an epoch has each row once. Up to a share of `max_unreadable`
    rows may be unreadable. The next readable row takes their place, and `unreadable` marks them. `faint` marks rows
    whose mask has gray levels, but shows no object.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: Any,
        recipe: TransformRecipe,
        seed: int,
        mixture: Mixture | None = None,
        max_unreadable: float = 0.0,
    ):
        self.dataset = dataset.select_columns([name for name in ("image", "mask", "id") if name in dataset.features])
        self.processor, self.recipe, self.seed, self.mixture = processor, recipe, seed, mixture
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # loader processes outlive an epoch
        self.unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self.faint = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self.limit = int(max_unreadable * len(dataset))

    def set_epoch(self, epoch: int):
        """Select the random numbers of an epoch; call it before iterating."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> int:
        """Return the row of a sample."""
        return index if self.mixture is None else self.mixture.row(index, self.epoch.item())

    def name(self, index: int) -> str:
        """Return the id of a sample, for messages."""
        return row_name(self.dataset, self.row(index))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return `pixel_values` (3, H, W) and `labels` (H, W) in [0, 1].

        Raises:
            UnreadableSample: If too many rows cannot be decoded, or have masks of another size than their images.
        """
        return self.change(*self.read(self.row(index)), index)

    def change(self, image: Image.Image, mask: Image.Image, index: int) -> dict[str, torch.Tensor]:
        """Return a changed sample; its index decides the random numbers."""
        rng = np.random.default_rng([self.seed, self.epoch.item(), index])
        image, mask = turn_and_flip(image, mask, self.recipe, rng)
        # Separate numbers for the later changes: older recipes keep theirs.
        child, later, rng_paste = rng.spawn(3)
        image, mask = flip_and_trim(image, mask, self.recipe, child)
        image = jitter_colors(image, self.recipe, child)
        image, mask = rotate(image, mask, self.recipe, child)
        if rng_paste.random() < self.recipe.paste_probability:
            image, mask = self.paste(image, mask, rng_paste)
        size = image.size
        image, mask = zoom(image, mask, self.recipe, later)
        if not self.processor.do_resize and image.size != size:
            image = image.resize(size, self.processor.resample)
            mask = mask.resize(size, self.processor.mask_resample)
        image = degrade(image, self.recipe, later)
        if any(mask.histogram()[1:255]):
            # As floats: the part that is left may have few gray levels, which are no ids of classes.
            mask = np.asarray(mask, np.float32) / np.float32(255)
        sample = self.processor(images=image, segmentation_maps=mask, return_tensors="pt")
        pixel_values, labels = crop(sample["pixel_values"][0], sample["labels"][0], self.recipe, rng)
        return {"pixel_values": pixel_values, "labels": labels}

    def paste(self, image: Image.Image, mask: Image.Image, rng: Rng) -> ImageAndMask:
        """Paste targets of other rows onto an image."""
        for _ in range(rng.integers(self.recipe.max_pastes) + 1):
            target = find_target(*self.read(int(rng.integers(len(self.dataset)))), rng)
            if target:
                image, mask = paste_target(image, mask, target, rng)
        return image, mask

    def read(self, row: int) -> ImageAndMask:
        """Return image and mask of a row or the next readable one.

        Raises:
            UnreadableSample: If more rows than allowed cannot be read.
        """
        for chosen in (*range(row, len(self.dataset)), *range(row)):
            try:
                image, mask = self.read_row(chosen)
            except UnreadableSample as error:
                self.count_unreadable(chosen, error)
                continue
            self.mark_faint(chosen, mask)
            return image, mask
        raise AssertionError("the limit is below the number of rows")

    def count_unreadable(self, place: int, error: UnreadableSample):
        """Mark a row; raise its error if there are too many."""
        self.unreadable[place] = True
        number = int(self.unreadable.sum())
        if number > self.limit:
            counted = f" ({number} of {len(self)} images, more than data.max_unreadable allows)"
            raise UnreadableSample(f"{error}{counted * (self.limit > 0)}") from error

    def mark_faint(self, place: int, mask: Image.Image):
        """Mark a row whose gray mask shows no object."""
        if is_faint(mask):
            self.faint[place] = True

    def batch_names(self, batches: Iterable, number: int) -> list[str]:
        """Return the ids of a batch of this epoch, counted from 0."""
        return [self.name(index) for index in next(islice(batches, number, None))]

    def unreadable_names(self) -> list[str]:
        """Return the ids of the rows that were unreadable."""
        return self._names(self.unreadable)

    def faint_names(self) -> list[str]:
        """Return the ids of the rows whose masks show no object."""
        return self._names(self.faint)

    def _names(self, marked: torch.Tensor) -> list[str]:
        return [row_name(self.dataset, row) for row in marked.nonzero().flatten().tolist()]

    def read_row(self, row: int) -> ImageAndMask:
        """Return image and mask of a row.

        Raises:
            UnreadableSample: If they cannot be decoded, or differ in size.
        """
        _, image, mask = read_pair(self.dataset, row)
        check_pair(image, mask, lambda: row_name(self.dataset, row))
        return image, mask
