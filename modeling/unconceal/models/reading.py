"""Read images as people see them, and masks by one rule.

It uses Pillow and NumPy only. Every image of this package passes `to_rgb`, every mask `mask_levels`: in data sets,
training, evaluation, pipeline and demo. The folder evaluation/ has a link to this file for the `evaluate` modules,
which are copied without this package.

**The rule for masks.** A file becomes one value a pixel (`mask_levels`). Then the value that means object, the white,
is found (`find_white`):

- One value beside 0, such as {0, 1}, {0, 38} or {0, 255}: that value is object.
- A few whole numbers, none above half: ids of classes. That is an error, because the file does not say which class is
  the object. So are any number of ids next to a border of 255, and several colors.
- All else are gray levels, with 255 as white, or 65535 if a value is larger.
- Floats in [0, 1] are gray levels with 1 as white. Fractions of an unknown white are an error.

Predictions may be dark, so the white of predictions is found for a whole set (`white_of_predictions`).
"""

import io
import logging
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps


MOST_CLASSES = 8  # in one mask without a border; more values are gray levels, such as a faint soft mask
LARGEST_ID = 63  # next to a border of 255, and of colors
SAME_COLOR = 2  # levels of 255 by which profiles of one color space differ, and files of one color
ROUNDING = 1e-3  # by which resized floats of a mask leave [0, 1]
OVERSHOOT = 0.1  # the same for images: bicubic resizing leaves [0, 1] at sharp edges
ONE_DARK_VALUE = (
    "%d predictions hold one value beside 0, not above half of white; if it is the object, store it as 255 in all"
)
Foreground = Literal["any"] | list[int]
logger = logging.getLogger(__name__)
_said: list[str] = []  # the file with several pages that the log has named


class UnclearMask(ValueError):
    """Mask whose values do not tell what is object."""


# Images.


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as people see it: upright, 8-bit RGB, in sRGB.

    - The EXIF orientation is applied. If it is damaged, the image stays as stored, as in a viewer.
    - An embedded color profile is applied, with the perceptual intent. A damaged one is ignored, and the log says so.
    - 16-bit gray is divided by 257, so white stays white; Pillow's own conversion clips at 255. Sensor counts of 12 or
      14 bits in a 16-bit file become dark: stretch them first.
    - 32-bit integer and float gray has no defined white: see `to_uint8`.
    - Transparent pixels become white, as in a viewer. The network never sees the colors that a file hides under them.
    - Of several pages or frames the first is taken, or the one that is open. The log says so once.

    Raises:
        ValueError: If the color mode cannot be converted, or if values are NaN or infinite.
    """
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        levels = np.asarray(image)
        gray = to_uint8(levels)
        if isinstance(image.info.get("transparency"), int):  # the gray of a PNG that is transparent
            gray = np.where(levels == image.info["transparency"], np.uint8(255), gray)
        return _to_srgb(Image.fromarray(gray), image.info.get("icc_profile"))
    if _has_alpha(image):
        alpha = _to_rgba(image).getchannel("A")
        colors = image.convert("L") if image.mode in ("L", "LA") else _to_rgba(image).convert("RGB")
        colors = _to_srgb(colors, image.info.get("icc_profile"))
        colors.putalpha(alpha)
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colors).convert("RGB")
    return _to_srgb(image, image.info.get("icc_profile"))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to sRGB, from the color space of a profile."""
    mode = image.mode if image.mode in ("L", "CMYK", "LAB") else "RGB"
    transform = _transform(profile, mode) if profile else None
    if transform is None:
        return image.convert("RGB")
    image = ImageCms.applyTransform(image.convert(mode), transform)
    image.info.pop("icc_profile", None)  # it names what the image was
    return image


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the way from a profile to sRGB, if it is needed."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.ImageCmsProfile(io.BytesIO(srgb_profile()))
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
    # Without littlecms Pillow raises ImportError, and for damaged profiles nearly any class.
    except Exception as error:
        logger.warning("an embedded color profile cannot be used (%s); colors are taken as sRGB", error)
        return None
    if mode in ("RGB", "L"):
        # Makers' profiles of sRGB itself differ in rounding. Such images keep every value.
        steps = np.arange(256) if mode == "L" else np.linspace(0, 255, 9)
        grid = np.stack(np.meshgrid(*[steps] * len(mode), indexing="ij"), -1).reshape(-1, 1, len(mode)).round()
        colors = Image.fromarray(grid.astype(np.uint8).squeeze(-1) if mode == "L" else grid.astype(np.uint8))
        if np.abs(np.asarray(ImageCms.applyTransform(colors, transform)) - grid).max() <= SAME_COLOR:
            return None
    return transform


@cache
def srgb_profile() -> bytes:
    """Return a profile of sRGB, the same at any time."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)  # the time of its making
    return bytes(profile)


def tag_srgb(image: Image.Image) -> Image.Image:
    """Let files of this image say that its colors are sRGB."""
    try:
        image.info["icc_profile"] = srgb_profile()
    except ImportError:  # Pillow without littlecms; viewers take untagged images as sRGB
        return image
    return image


def _upright(image: Image.Image) -> Image.Image:
    say_first_page(image)
    try:
        return ImageOps.exif_transpose(image)
    # Pillow raises nearly any class for damaged EXIF: SyntaxError, struct.error, TypeError, ...
    except Exception:
        return image


def say_first_page(image: Image.Image):
    """Log once that an image has more pages than the one used."""
    # The second picture of an MPO is a preview, or the view of the other eye.
    if image.format == "MPO":
        return
    try:
        has_pages = getattr(image, "is_animated", False)
    except Exception:  # a closed or damaged file, which decoding reports
        return
    if has_pages and not _said:
        _said.append(Path(getattr(image, "filename", "")).name or "an image")
        logger.warning("%s has several pages or frames; only the first is used, here and in all such files", _said[0])


def _has_alpha(image: Image.Image) -> bool:
    # Not `"A" in image.getbands()`: LAB has a band of that name.
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _to_rgba(image: Image.Image) -> Image.Image:
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # Pillow has no direct La -> RGBA


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Scale pixel values of an image, of any real type, to uint8.

    White is 1 for bool, 255 for uint8, 65535 for uint16, and 1 for floats of `is_unit`, which are clipped. Other types
    do not define it: white is the first of 255 and 65535 that no value exceeds. Values below 0 or above 65535 are
    stretched from minimum to maximum.

    Raises:
        ValueError: If values are NaN or infinite.
    """
    kind, size = values.dtype.kind, values.dtype.itemsize
    if (kind, size) == ("u", 1):
        return values
    if kind == "b":
        return values.astype(np.uint8) * 255
    if (kind, size) == ("u", 2):
        return np.rint(values * np.float32(1 / 257)).astype(np.uint8)
    values = values.astype(np.float64)
    _check_finite(values)
    if kind == "f" and is_unit(values):
        return np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    low, high = values.min(), values.max()
    if low >= 0 and high <= 65535:
        low, high = 0, 255 if high <= 255 else 65535
    return np.rint((values - low) * (255 / (high - low or 1))).astype(np.uint8)


def is_unit(values: np.ndarray) -> bool:
    """Return whether floats are in [0, 1], but for overshoot of resizing."""
    return bool(values.min() >= -OVERSHOOT and values.max() <= 1 + OVERSHOOT)


def _check_finite(values: np.ndarray):
    if num_bad := values.size - np.isfinite(values).sum():
        raise ValueError(
            f"got {num_bad} of {values.size} pixel values that are NaN or infinite, expected finite numbers; "
            "fill them in, or leave the image out"
        )


# Masks.


def to_mask(mask: Image.Image | np.ndarray, foreground: Foreground | None = None) -> Image.Image:
    """Return a mask as 8-bit gray, 0 background to 255 object.

    Args:
        mask: An image of any mode, or an array (H, W) of any real type.
        foreground: Ids of the classes that are object, or "any" for all but 0. None finds the white.

    Raises:
        UnclearMask: If the values are ids of classes, negative or above 65535.
        ValueError: If the color mode cannot be converted, or if values are NaN or infinite.
    """
    return gray_mask(*mask_levels(mask), foreground)


def gray_mask(levels: np.ndarray, has_ids: bool, foreground: Foreground | None = None) -> Image.Image:
    """Return what `to_mask` does, from the result of `mask_levels`."""
    if foreground is not None:
        chosen = levels != 0 if foreground == "any" else np.isin(levels, foreground)
        return Image.fromarray(chosen.astype(np.uint8) * 255)
    probs = scaled(levels, find_white(distinct(levels), has_ids) if needs_white(levels) else 1)
    return Image.fromarray(probs if probs.dtype == np.uint8 else np.rint(probs * 255).astype(np.uint8))


def mask_levels(mask: Image.Image | np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the values of a mask, and whether they are ids.

    The values are (H, W).

    - An image is turned upright, like its photo. Color profiles do not apply.
    - Of colors the brightest of red, green and blue counts: a mask may be drawn in pure red. Up to 63 different ones
      beside black and transparency, other than shades of one, are classes. They are numbered from 1 in the order of
      (red, green, blue).
    - A palette of colors holds ids of classes: index 0 is background, unless all others are black or transparent. With
      transparency and more than 64 colors in the mask, it is a cut-out.
    - Transparency is the mask of a cut-out. If the visible part is drawn in black and white, transparency counts as
      black.

    Raises:
        UnclearMask: If values are negative or above 65535.
        ValueError: If the color mode cannot be converted, or if values are NaN or infinite.
    """
    if isinstance(mask, Image.Image):
        mask = _upright(mask)
        if mask.mode == "P" and _holds_ids(mask):
            return np.asarray(mask), True
        if not _is_gray(mask) and (ids := _ids_of_colors(mask)) is not None:
            return ids, True
        if _has_alpha(mask):
            mask = _without_alpha(mask)
        if not _is_gray(mask):
            red, green, blue = mask.convert("RGB").split()  # Pillow compares them in a tenth of NumPy's time
            mask = ImageChops.lighter(ImageChops.lighter(red, green), blue)
        mask = np.asarray(mask)
    if mask.dtype.kind == "b" or mask.dtype == np.uint8:
        return mask, False
    _check_finite(mask)
    low, high = mask.min(), mask.max()
    if mask.dtype.kind == "f" and low >= -ROUNDING and high <= 1 + ROUNDING:
        mask = mask.clip(0, 1)
    elif not 0 <= low <= high <= 65535:
        raise UnclearMask(f"a mask holds values from {low:g} to {high:g}, expected 0 to 65535; save it as 8-bit gray")
    return mask.astype(np.float32 if mask.dtype.kind == "f" else np.int32), False


def prediction_levels(mask: Image.Image | np.ndarray) -> np.ndarray:
    """Return the values of a prediction, as `mask_levels` does.

    More than 64 colors of a palette are a scale of colors, with its indices as levels.

    Raises:
        UnclearMask: As `mask_levels`, or if several colors are classes.
    """
    levels, has_ids = mask_levels(mask)
    if has_ids and len(values := distinct(levels)) <= LARGEST_ID + 1:
        find_white(values, has_ids)
    return levels


def _is_gray(image: Image.Image) -> bool:
    return image.mode in ("1", "L") or image.mode.startswith(("I", "F"))


def _holds_ids(mask: Image.Image) -> bool:
    """Return whether the palette of a mask is one of classes."""
    levels, table = np.asarray(mask), np.zeros((256, 4), np.uint8)
    table[levels] = _to_rgba(mask)
    used = distinct(levels)
    colors = table[used]
    # A cut-out with a palette has the many colors of a photo.
    is_cutout = _has_alpha(mask) and len(used) > LARGEST_ID + 1
    # Pillow and other programs number the colors of a picture by how often they occur.
    is_shown = colors[:, :3].any(axis=1) & (colors[:, 3] > 0)
    is_picture = len(used) > 1 and used[0] == 0 and is_shown[0] and not is_shown[1:].any()
    return not (is_cutout or is_picture) and bool((colors[:, :3] != colors[:, :1]).any())


def _ids_of_colors(mask: Image.Image) -> np.ndarray | None:
    """Return the ids of a mask in a few colors, or None."""
    has_alpha = _has_alpha(mask)
    mask = _to_rgba(mask) if has_alpha else mask
    rgb = mask.convert("RGB")
    if rgb.getcolors(LARGEST_ID + 1) is None:  # counts what is transparent, too: a photo has many colors
        return None
    if has_alpha:
        alpha = mask.getchannel("A")
        half = alpha.getextrema()[1] / 2
        rgb.paste("black", mask=alpha.point([255 * (level <= half) for level in range(256)]))
    colors = np.array([color for _, color in rgb.getcolors(LARGEST_ID + 2)])
    peaks = colors.max(axis=1, keepdims=True)
    brightest = colors[peaks.argmax()]
    shades = peaks / max(1, brightest.max()) * brightest
    if (np.abs(colors - shades) <= peaks / 16 + SAME_COLOR).all():  # soft edges, or the rounding of JPEG
        return None
    red, green, blue = (np.asarray(channel, np.int32) for channel in rgb.split())
    codes = (red << 16) + (green << 8) + blue
    return np.searchsorted(np.union1d(0, codes), codes).astype(np.uint8)  # black is 0


def _without_alpha(mask: Image.Image) -> Image.Image:
    """Return the opaque colors, or else what transparency makes of the mask."""
    mask = _to_rgba(mask)
    if mask.getextrema()[3][0] == 255:
        return mask.convert("RGB")
    rgba = np.asarray(mask)
    brightest, alpha = rgba[..., :3].max(axis=-1), rgba[..., 3]
    visible = brightest[alpha > 0]
    is_black, is_white = visible == 0, visible == 255
    is_drawn = is_black.any() and is_white.any() and (is_black | is_white).mean() > 0.9
    return Image.fromarray(np.rint(brightest * (alpha / np.float32(255))).astype(np.uint8) if is_drawn else alpha)


def needs_white(levels: np.ndarray) -> bool:
    """Return whether values are other than bool or floats in [0, 1]."""
    return levels.dtype.kind in "ui" or (levels.dtype.kind == "f" and levels.max() > 1)


def distinct(levels: np.ndarray) -> np.ndarray:
    """Return the values that occur, in rising order."""
    if levels.dtype.kind == "f":
        return np.unique(levels)
    if levels.dtype.itemsize == 1:
        # A tenth of NumPy's time.
        return np.array(Image.fromarray(levels.astype(np.uint8, copy=False)).histogram()).nonzero()[0]
    return np.bincount(levels.ravel()).nonzero()[0]  # no sorting


def find_white(values: np.ndarray, has_ids: bool = False) -> int:
    """Return the value that means object.

    Args:
        values: What `distinct` returns for one mask.
        has_ids: What `mask_levels` says.

    Raises:
        UnclearMask: If they are ids of several classes, or fractions of an unknown white.
    """
    objects = values[values > 0]
    if len(objects) < 2:
        return objects[0] if len(objects) else 255
    white = 255 if objects[-1] <= 255 else 65535
    others = objects[objects != white]
    is_dark = objects[-1] <= white / 2
    if (objects % 1).any():
        if is_dark:
            raise _unknown_white(objects[-1])
    elif has_ids or (len(others) <= MOST_CLASSES if is_dark else others[-1] <= LARGEST_ID):
        raise UnclearMask(
            f"a mask holds the values {_listed(values)}, a map of classes, expected one object; choose its classes by "
            "unconceal prepare --foreground 1,2 (or any, for all but 0), or store object as 255 and the rest as 0"
        )
    return white


def _unknown_white(highest: float) -> UnclearMask:
    return UnclearMask(
        f"a mask holds fractions up to {highest:g}, so its white is neither 1 nor 255, expected [0, 1]; scale it"
    )


def white_of_predictions(masks: Iterable[np.ndarray]) -> int:
    """Return the value that means object in a whole set of predictions.

    One value beside 0 in the whole set is object. Otherwise white is 255, or 65535 if a value is larger. No more masks
    are read than decide it. If none is above half, the log says so.

    Args:
        masks: Values of `mask_levels`, all of one depth: uint8 or more.

    Raises:
        UnclearMask: If they are fractions of an unknown white.
    """
    found = np.zeros(0, int)
    for levels in masks:
        found = np.union1d(found, distinct(levels))
        objects = found[found > 0]
        white = 255 if levels.dtype == np.uint8 else 65535
        if len(objects) and (objects[-1] == white or len(objects) > 1 and objects[-1] > white / 2):
            return white
    objects = found[found > 0]
    if len(objects) < 2:
        return objects[0] if len(objects) else 255
    white = 255 if objects[-1] <= 255 else 65535
    if objects[-1] <= white / 2:
        if (objects % 1).any():
            raise _unknown_white(objects[-1])
        logger.warning(
            "no prediction has a value above %d of %d; if the values %s are ids of classes, store object as 255; if "
            "they are gray levels, stretch them",
            *(objects[-1], white, _listed(found)),
        )
    return white


def has_one_dark_value(levels: np.ndarray, white: int) -> bool:
    """Return whether a prediction holds one value beside 0, not above half."""
    highest = levels.max()
    return bool(0 < highest <= white / 2 and levels[levels > 0].min() == highest)


def scaled(levels: np.ndarray, white: int) -> np.ndarray:
    """Return a mask as uint8, or as float32 up to 1."""
    if levels.dtype.kind == "b":
        return levels.astype(np.uint8) * 255
    if white == 255 and levels.dtype.kind in "ui":
        return levels.astype(np.uint8, copy=False)
    return levels.astype(np.float32) / np.float32(white)


def _listed(values: np.ndarray) -> str:
    shown = [f"{value:g}" for value in values[: MOST_CLASSES + 2]]
    return ", ".join(shown) + (", ..." if len(values) > len(shown) else "")
