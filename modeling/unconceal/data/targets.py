"""Paste small targets of one image onto another.

An infrared data set has a few hundred targets of some pixels each. Pasting shows each on many backgrounds. A target
comes with its halo, the blur of the lens. Both are differences to the background, so that a pasted target has
no border.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt, find_objects, label


MAX_SIDE = 64  # of a target in pixels, with its halo
MIN_CONTRAST = 2.0  # between a pasted target and its surroundings, in their standard deviations
NUM_TRIES = 5


class Target(NamedTuple):
    """Target with its halo.

    Attributes:
        excess: Gray differences to the background, (h, w).
        mask: Pixels of the target, (h, w).
    """

    excess: np.ndarray
    mask: np.ndarray


def find_target(image: Image.Image, mask: Image.Image, rng: np.random.Generator) -> Target | None:
    """Cut a random small target out of an RGB image.

    Returns None if the mask has none, or if the one that was drawn is not small.
    """
    labels, _ = label(np.asarray(mask) > 127, np.ones((3, 3)))
    boxes = find_objects(labels)
    if not boxes:
        return None
    number = int(rng.integers(len(boxes)))
    sides = [part.stop - part.start for part in boxes[number]]
    halo = max(4, round(0.75 * max(sides)))
    if max(sides) + 2 * halo > MAX_SIDE:
        return None
    window = tuple(slice(max(0, part.start - halo), part.stop + halo) for part in boxes[number])
    pixels, found = np.asarray(image.convert("L"), np.float32)[window], labels[window] == number + 1
    distance = distance_transform_edt(~found)
    background = (distance >= min(halo - 1, 0.6 * distance.max())) & (labels[window] == 0)
    weight = (1 - (distance - 1) / (halo - 2)).clip(0, 1) * ((labels[window] == 0) | found)
    excess = (pixels - np.median(pixels[background])) * weight
    return Target(excess, found)


def paste_target(
    image: Image.Image, mask: Image.Image, target: Target, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """Add a target to an RGB image and its mask at random.

    It is turned, flipped, and made weaker or stronger. Where it would not stand out, and on other targets, it is not
    added; after a few tries image and mask stay as they are.
    """
    turns, is_flipped, gain = int(rng.integers(4)), rng.random() < 0.5, float(rng.uniform(0.6, 1.3))
    excess, found = (np.rot90(part, turns) for part in target)
    if is_flipped:
        excess, found = excess[:, ::-1], found[:, ::-1]
    height, width = found.shape
    if height > image.height or width > image.width:
        return image, mask
    pixels, marked = np.asarray(image, np.float32), np.asarray(mask)
    contrast = gain * abs(excess[found]).max()
    for _ in range(NUM_TRIES):
        top, left = int(rng.integers(image.height - height + 1)), int(rng.integers(image.width - width + 1))
        window = slice(top, top + height), slice(left, left + width)
        if marked[window].any() or contrast < MIN_CONTRAST * pixels[window].mean(axis=-1).std():
            continue
        pixels, marked = pixels.copy(), marked.copy()
        pixels[window] += gain * excess[..., None]
        marked[window][found] = 255
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)), Image.fromarray(marked)
    return image, mask
