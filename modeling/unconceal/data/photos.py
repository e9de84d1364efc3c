"""Hide objects in photos: another patch of the photo fills a silhouette.

Each image depends on photos, shapes, size, seed, split and number only. Brightness and color follow the surroundings
more or less, so that objects are easy or hard to find. Blur, noise and compression come last, over the whole image.
Decoys have the seams of an object but are none.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from ..models.reading import to_rgb
from ..utils.errors import UserError
from ..utils.images import MAX_PIXELS, size_text
from .image_files import decoding, read_image
from .masks import read_mask
from .names import find_images
from .silhouettes import Problems, blurred, draw_animal, place, smooth_noise
from .sources import SYNTHETIC_SPLITS
from .synthetic import Rng, generate


Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the whole photo

GRID = 24  # cells a side in which a photo's colors are remembered
VAL_SHARE = 0.1  # of photos and of shapes
DRAWN_PHOTOS, DRAWN_SHAPES = 0.1, 0.4  # shares of images with a drawn texture, and of silhouettes that are drawn
NUM_TRIES = 12
MAX_AVOIDED = 10  # of 255
MIN_CONTRAST, MIN_DIFFERENCE, MIN_CUE = 0.03, 0.03, 0.4  # less is a blank scene, or an object that nobody can see


@dataclass(frozen=True, eq=False)
class Photo:
    """What is known of a photo without opening it again."""

    path: Path
    size: tuple[int, int]  # width and height, upright
    colors: np.ndarray  # (GRID, GRID, 3)
    avoided: np.ndarray  # (GRID, GRID), 255 where a labelled object is


def read_photos(
    folder: Path, masks: dict[str, Path], size: int, max_pixels: int = MAX_PIXELS
) -> tuple[list[Photo], Problems]:
    """Open each photo of a folder once.

    Args:
        folder: Folder of photos; its subfolders count too.
        masks: Photo name without suffix -> mask of objects that crops avoid.
        size: Side of the images to make. A photo's sides are at least half of it.
        max_pixels: Limit on width times height.
    """
    photos, problems = [], []
    for path in tqdm(find_images(folder), desc="checking photos", unit="photo", disable=None):
        try:
            image = read_image(path, max_pixels)
            if min(image.size) < size / 2:
                raise UserError(f"it is {size_text(image.size)}, expected sides of {(size + 1) // 2} or more")
            avoided = np.zeros((GRID, GRID), dtype=np.uint8)
            if path.stem in masks:
                mask = read_mask(masks[path.stem], max_pixels=max_pixels).mask
                avoided = _on_grid(Image.fromarray(mask).convert("L"))
            photos.append(Photo(path, image.size, _on_grid(image), avoided))
        except UserError as error:
            problems.append((str(path), str(error)))
    return photos, problems


def _on_grid(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX))


def share_out(items: list, splits: list[str], seed: int) -> dict[str, list]:
    """Give each item to one split at random; the first gets most."""
    order = np.random.default_rng([seed, len(items)]).permutation(len(items))
    num_others = max(1, round(VAL_SHARE * len(items)))
    parts, rest = {}, order.tolist()
    for split in splits[1:]:
        parts[split], rest = [items[i] for i in rest[:num_others]], rest[num_others:]
    return {splits[0]: [items[i] for i in rest], **parts}


# Colors are (size, size, 3) in [0, 1].


class PhotoScenes:
    """Images with hidden objects out of photos and silhouettes."""

    def __init__(self, photos: dict[str, list[list[Photo]]], shapes: dict[str, list[bytes]], size: int, seed: int):
        """Hold what images are made of.

        Args:
            photos: Split -> photos of each folder. Each folder serves equally many images.
            shapes: Split -> silhouettes as PNG; without any, all are drawn.
            size: Side of the images in pixels.
            seed: Seed of the data set.
        """
        self.photos, self.shapes, self.size, self.seed = photos, shapes, size, seed

    def draw(self, split: str, number: int) -> tuple[bytes, bytes, np.ndarray]:
        """Make image and background as JPEG, and the object's mask (H, W)."""
        rng = np.random.default_rng([self.seed, SYNTHETIC_SPLITS.index(split), number])
        folder = self.photos[split][rng.integers(len(self.photos[split]))]
        for _ in range(NUM_TRIES):
            textures = self._textures(rng, folder)
            scene = next(textures)
            if scene.mean(2).std() > MIN_CONTRAST:
                break
        if rng.random() < 0.5:
            scene = _add_decoy(rng, scene, next(textures), self._mask(rng, split))
        image, mask = scene, np.zeros((self.size, self.size), dtype=bool)
        for _ in range(2 if rng.random() < 0.12 else 1):
            for _ in range(NUM_TRIES):
                found = self._mask(rng, split)
                changed = _hide(rng, image, next(textures), found)
                if np.abs(changed - image)[found].mean() > MIN_DIFFERENCE and _cue(changed, found) > MIN_CUE:
                    break
            image, mask = changed, mask | found
        return *_finish(rng, image, scene), mask

    def _mask(self, rng: Rng, split: str) -> np.ndarray:
        """Place a silhouette, 4 to 100 percent of the side, at random."""
        shapes = self.shapes[split]
        while True:
            if shapes and rng.random() > DRAWN_SHAPES:
                with Image.open(io.BytesIO(shapes[rng.integers(len(shapes))])) as image:
                    shape = np.asarray(image) > 0
            elif rng.random() < 0.7:
                shape = draw_animal(rng)
            else:
                drawn = generate("camouflage", 128, self.seed, int(rng.integers(2**31)))[1]
                shape = np.asarray(drawn.crop(drawn.getbbox())) > 0
            mask = place(rng, shape, self.size, self.size * rng.triangular(0.04, 0.5, 1))
            if 0.002 < mask.mean() < 0.5:
                return mask

    def _textures(self, rng: Rng, folder: list[Photo]) -> Iterator[np.ndarray]:
        """Yield a background, then patches for objects in it."""
        image = None
        if rng.random() < DRAWN_PHOTOS:
            image = generate("camouflage", round(1.5 * self.size), self.seed, int(rng.integers(2**31)), 1.0)[0]
            photo = Photo(Path(), image.size, _on_grid(image), np.zeros((GRID, GRID)))
            folder = []
        for _ in range(NUM_TRIES):
            photo = folder[rng.integers(len(folder))] if folder else photo
            least = min(0.6 * self.size, *photo.size)
            sides = np.exp(rng.uniform(np.log(least), np.log(min(photo.size)), NUM_TRIES))
            box, look, avoided = _choose(rng, photo, sides)
            if avoided < MAX_AVOIDED:
                break
        side = box[2] - box[0]
        image = image or _open(photo, self.size / max(0.6 * side, least))
        yield self._cut(image, photo, box)
        while True:
            its_photo, its_image = photo, image
            if folder and rng.random() < 0.2:
                some = [folder[i] for i in rng.integers(len(folder), size=16)]
                its_photo = min(some, key=lambda one: np.abs(one.colors.mean((0, 1)) - look[:3]).sum())
                its_image = _open(its_photo, self.size / least)
            its_sides = np.clip(side * np.exp(rng.uniform(-0.5, 0.4, NUM_TRIES)), least, min(its_photo.size))
            box, _, _ = _choose(rng, its_photo, its_sides, look if rng.random() < 0.7 else None)
            patch = self._cut(its_image, its_photo, box)
            yield np.rot90(patch, rng.integers(4))[:: rng.choice([-1, 1])]

    def _cut(self, image: Image.Image, photo: Photo, box: Box) -> np.ndarray:
        box = tuple(edge * image.width / photo.size[0] for edge in box)
        box = tuple(min(edge, limit) for edge, limit in zip(box, 2 * image.size, strict=True))
        cut = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box)
        return np.asarray(cut, dtype=np.float32) / 255


def _open(photo: Photo, scale: float) -> Image.Image:
    """Open a photo; it may come smaller, down to `scale`."""
    with decoding(photo.path, max_pixels=photo.size[0] * photo.size[1]) as image:
        image.draft("RGB", tuple(int(side * min(scale, 1)) for side in image.size))
        return to_rgb(image)


def _choose(
    rng: Rng, photo: Photo, sides: np.ndarray, look: np.ndarray | None = None
) -> tuple[Box, np.ndarray, float]:
    """Choose a square; prefer no avoided objects and the given look.

    Returns:
        The square; its look: mean color and, three times, the deviation of colors; mean of `avoided`.
    """
    best = None
    for side in sides:
        left, top = rng.uniform(0, np.maximum(np.array(photo.size) - side, 0))
        box = left, top, left + side, top + side
        first = (np.array(box[:2]) / photo.size * GRID).astype(int)
        last = np.ceil(np.array(box[2:]) / photo.size * GRID).astype(int)
        cells = np.s_[first[1] : last[1], first[0] : last[0]]
        colors = photo.colors[cells].reshape(-1, 3).astype(np.float32)
        its_look = np.append(colors.mean(0), np.repeat(colors.std(0).mean(), 3))
        unlike = 0 if look is None else np.abs(its_look - look).mean()
        avoided = photo.avoided[cells].mean()
        if best is None or 2 * avoided + unlike < best[0]:
            best = 2 * avoided + unlike, box, its_look, avoided
    return best[1:]


def _reach(mask: np.ndarray) -> float:
    return max(2.0, 0.25 * np.sqrt(mask.sum()))


def _around(mask: np.ndarray) -> np.ndarray:
    return (blurred(mask, _reach(mask))[..., 0] > 0.02) & ~mask


def _cue(image: np.ndarray, mask: np.ndarray) -> float:
    """Return how much an object differs, as a share of the contrast."""
    inside, outside = image[mask], image[_around(mask)]
    differences = (np.abs(measure(inside, 0) - measure(outside, 0)).max() for measure in (np.mean, np.std))
    return sum(differences) / (outside.std() + 0.03)


def _hide(rng: Rng, scene: np.ndarray, patch: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the scene with a lit patch under the mask."""
    size, reach = len(mask), _reach(mask)
    inside, outside = patch[mask], scene[_around(mask)]
    likeness = rng.uniform(0.4, 1)
    stretch = ((outside.std(0) + 0.02) / (inside.std(0) + 0.02)) ** likeness
    center = inside.mean(0) + likeness * (outside.mean(0) - inside.mean(0))
    body = (patch - inside.mean(0)) * stretch.clip(0.5, 2) * rng.uniform(0.8, 1.25) + center

    tint = 1 + 0.1 * (1 - likeness) * rng.standard_normal(3) + 0.06 * rng.standard_normal()
    height = 0.6 * blurred(mask, 0.5 * reach) + 0.4 * blurred(mask, 0.2 * reach)
    light = rng.uniform(0, 2 * np.pi)
    down, across = np.gradient(height[..., 0])
    slope = (np.cos(light) * across + np.sin(light) * down)[..., None] * reach
    spots = smooth_noise(rng, size, rng.integers(3, 12))[..., None]
    shade = 0.6 * rng.random() ** 2 * slope + rng.uniform(0, 0.35) * (height - 0.7) + rng.uniform(0, 0.06) * spots
    alpha = blurred(mask, rng.uniform(0.5, 1.2) * size / 288)
    edge = 4 * alpha * (1 - alpha) * rng.choice([0, rng.uniform(-0.2, 0.2)])
    body = body * tint * (1 + shade + edge)
    if rng.random() < 0.5:
        drop = np.round(-rng.uniform(0, 0.2) * reach * np.array([np.sin(light), np.cos(light)])).astype(int)
        shadow = np.roll(blurred(mask, rng.uniform(0.1, 0.3) * reach), drop, axis=(0, 1))
        scene = scene * (1 - rng.uniform(0.1, 0.5) * shadow)
    return (scene + alpha * (body - scene)).clip(0, 1)


def _add_decoy(rng: Rng, scene: np.ndarray, patch: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Add a faint patch, another texture, or light or shadow."""
    kind = rng.integers(3)
    if kind == 0:
        return scene + rng.uniform(0.05, 0.25) * blurred(mask, rng.uniform(0.5, 2)) * (patch - scene)
    if kind == 1:  # a border between two textures is no object
        field = smooth_noise(rng, len(mask), 3) + rng.normal(0, 0.5)
        return scene + blurred(field > 0, rng.uniform(0.5, 4)) * (patch - scene)
    return scene * (1 + rng.uniform(-0.4, 0.3) * blurred(mask, rng.uniform(2, 12)))


def _finish(rng: Rng, *images: np.ndarray) -> Iterator[bytes]:
    """Change all images as one camera would; encode them as JPEG."""
    gamma, gains = np.exp(rng.normal(0, 0.15)), 1 + 0.06 * rng.standard_normal(3)
    noise = rng.choice([0, rng.uniform(0, 0.03)]) * rng.standard_normal(images[0].shape, dtype=np.float32)
    blur, quality = rng.choice([0, rng.uniform(0.3, 0.9)]), int(rng.integers(75, 96))
    for colors in images:
        values = (colors.clip(0, 1) ** gamma * gains).clip(0, 1)
        image = Image.fromarray((values * 255).round().astype(np.uint8)).filter(ImageFilter.GaussianBlur(float(blur)))
        values = np.asarray(image, dtype=np.float32) / 255 + noise
        buffer = io.BytesIO()
        Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8)).save(buffer, "JPEG", quality=quality)
        yield buffer.getvalue()
