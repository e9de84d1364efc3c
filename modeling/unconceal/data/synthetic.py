"""Generate scenes in which objects hide, one kind for each task.

They serve training and tests without any download. Each image depends on (kind, size, seed, index) only. Brightness
does not reveal the object: it has the gray values of the background. Texture, shape, context or scale reveal it.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from ..utils.errors import UserError


Rng = np.random.Generator
Shape = tuple[int, int]  # height and width

MIN_SIZE = 32


def generate(
    kind: str, size: int | Shape, seed: int, index: int, empty_ratio: float = 0.0
) -> tuple[Image.Image, Image.Image]:
    """Generate one image and its mask.

    Args:
        kind: A key of `KINDS`.
        size: Side in pixels, or (height, width); 32 or more.
        seed: Seed of the data set.
        index: Number of the image.
        empty_ratio: Share of images without an object, in [0, 1].

    Returns:
        RGB image; mask of mode L with 0 and 255.

    Raises:
        UserError: If the kind is unknown or a number is out of range.
    """
    if kind not in KINDS:
        raise UserError(f"got {kind!r} as kind of scene, expected one of {', '.join(KINDS)}")
    shape = (size, size) if isinstance(size, int) else tuple(size)
    if min(shape) < MIN_SIZE:
        raise UserError(f"got image size {shape[1]}x{shape[0]}, expected sides of {MIN_SIZE} or more")
    if seed < 0 or index < 0:
        raise UserError(f"got seed {seed} and index {index}, expected 0 or more")
    if not 0 <= empty_ratio <= 1:
        raise UserError(f"got {empty_ratio} as share of empty masks, expected 0 to 1")
    rng = np.random.default_rng([seed, list(KINDS).index(kind), index])
    empty = rng.random() < empty_ratio
    colors, mask = KINDS[kind](rng, shape, empty)
    image = Image.fromarray((np.clip(colors, 0, 1) * 255).round().astype(np.uint8))
    return image.convert("RGB"), Image.fromarray(mask.astype(np.uint8) * 255)


# Building blocks. `unit` is a length in pixels that grows with the image.


def _unit(shape: Shape) -> float:
    """Return the length of 1 pixel in an image of 128 pixels."""
    return min(shape) / 128


def _grid(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return row (H, 1) and column (1, W) of each pixel."""
    return np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]


def _turn(rows: np.ndarray, columns: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates along and across a direction; both broadcast to (H, W)."""
    return columns * np.cos(angle) + rows * np.sin(angle), rows * np.cos(angle) - columns * np.sin(angle)


def _frequencies(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return cycles per pixel down and across, for `rfft2`."""
    return np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :]


def _gaussian(shape: Shape, along: float, across: float | None = None, angle: float = 0.0) -> np.ndarray:
    """Return the spectrum of a Gaussian with deviations in pixels."""
    f_along, f_across = _turn(*_frequencies(shape), angle)
    across = along if across is None else across
    return np.exp(-2 * np.pi**2 * ((along * f_along) ** 2 + (across * f_across) ** 2))


def _filter(field: np.ndarray, spectrum: np.ndarray) -> np.ndarray:
    return np.fft.irfft2(np.fft.rfft2(field) * spectrum, s=field.shape)


def _noise(rng: Rng, shape: Shape, spectrum: np.ndarray) -> np.ndarray:
    """Return Gaussian noise of that spectrum, mean 0, deviation 1."""
    field = _filter(rng.standard_normal(shape), spectrum)
    return (field - field.mean()) / (field.std() + 1e-9)


def _fractal(shape: Shape, slope: float) -> np.ndarray:
    """Return the spectrum `f ** -slope`: equal structure at all scales."""
    f_down, f_across = _frequencies(shape)
    return np.maximum(np.hypot(f_down, f_across), 1 / max(shape)) ** -slope


def _blob(rng: Rng, shape: Shape, center, radii, angle: float, roughness: float) -> np.ndarray:
    """Return an irregular ellipse: 1 in the center, negative outside."""
    rows, columns = _grid(shape)
    along, across = _turn(rows - center[0], columns - center[1], angle)
    along, across = along / radii[0], across / radii[1]
    direction = np.arctan2(across, along)
    outline = 1.0
    for wave in range(2, 7):
        outline = outline + roughness * rng.normal() / wave * np.cos(wave * direction + rng.uniform(0, 2 * np.pi))
    return 1 - np.hypot(along, across) / np.maximum(outline, 0.3)


def _place(rng: Rng, shape: Shape, margin: float = 0.25) -> tuple[float, float]:
    return rng.uniform(margin, 1 - margin) * shape[0], rng.uniform(margin, 1 - margin) * shape[1]


# Camouflage: an animal with the texture of its surroundings.


PALETTES = (  # dark, middle and bright tone as red, green, blue
    ((38, 46, 24), (86, 101, 52), (158, 165, 104)),  # leaves
    ((44, 32, 24), (104, 82, 61), (172, 148, 118)),  # bark
    ((120, 96, 66), (176, 150, 110), (222, 204, 168)),  # sand
    ((48, 50, 52), (112, 112, 108), (182, 180, 172)),  # rock
    ((24, 50, 58), (62, 110, 112), (150, 184, 170)),  # sea bed
    ((60, 30, 18), (140, 84, 38), (206, 160, 88)),  # fallen leaves
    ((86, 46, 52), (168, 104, 100), (226, 182, 164)),  # coral
    ((140, 148, 156), (194, 200, 206), (238, 240, 242)),  # snow
)


def _camouflage(rng: Rng, shape: Shape, empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw an animal in the background's texture, turned, with a faint relief."""
    unit = _unit(shape)
    fine, stretch = rng.uniform(0.7, 1.6) * unit, rng.uniform(2, 5)
    steps = rng.choice([0, 3, 4])  # flat patches as on bark and leaves, or smooth grain as on sand
    angle = rng.uniform(0, np.pi)
    coarse_weight = rng.uniform(0.2, 0.6)

    def texture(angle: float) -> np.ndarray:
        field = _noise(rng, shape, _gaussian(shape, fine * stretch, fine, angle) - _gaussian(shape, 8 * unit))
        field += coarse_weight * _noise(rng, shape, _gaussian(shape, 3 * fine * stretch, 3 * fine, angle))
        field /= field.std()
        return np.round(field * steps / 2) / steps * 2 if steps else field

    background = texture(angle)
    body = np.full(shape, -1.0)
    if not empty:
        center, heading = np.array(_place(rng, shape, 0.3)), rng.uniform(0, 2 * np.pi)
        length = rng.uniform(18, 34) * unit
        body = _blob(rng, shape, center, (length, length * rng.uniform(0.4, 0.7)), heading, 0.25)
        for side in (1, -1):  # head and tail
            offset = side * length * rng.uniform(0.8, 1.1) * np.array([np.sin(heading), np.cos(heading)])
            radii = length * rng.uniform(0.25, 0.5), length * rng.uniform(0.12, 0.3)
            bent = heading + rng.uniform(-0.7, 0.7)
            body = np.maximum(body, _blob(rng, shape, center + offset, radii, bent, 0.15))
    mask = body > 0
    soft = np.clip(_filter(mask.astype(float), _gaussian(shape, 0.6 * unit)), 0, 1)
    field = background * (1 - soft) + texture(angle + rng.uniform(0.25, 0.75) * np.pi) * soft

    light = rng.uniform(0, 2 * np.pi)
    height = _filter(mask.astype(float), _gaussian(shape, 2.5 * unit))
    slope = np.cos(light) * np.gradient(height, axis=1) + np.sin(light) * np.gradient(height, axis=0)
    relief = slope * 2.5 * unit * rng.uniform(0.25, 0.5)
    shade = 0.05 * _noise(rng, shape, _gaussian(shape, 25 * unit))
    value = np.clip(0.5 + 0.17 * field, 0, 1)[..., None]
    palette = np.array(PALETTES[rng.integers(len(PALETTES))]) / 255
    dark, middle, bright = np.clip(palette * rng.uniform(0.94, 1.06, size=3) + rng.normal(0, 0.02, size=(3, 3)), 0, 1)
    colors = np.where(value < 0.5, dark + (middle - dark) * 2 * value, middle + (bright - middle) * (2 * value - 1))
    colors = colors * (1 + shade + relief)[..., None] + 0.02 * rng.standard_normal((*shape, 1))
    return colors, mask


# Ultrasound: a dark lesion among dark fat and shadows.


def _ultrasound(rng: Rng, shape: Shape, empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw a lesion in layered tissue; it changes the echo below it."""
    unit = _unit(shape)
    rows, columns = _grid(shape)
    depth = rows / shape[0] + np.zeros(shape)
    echo = np.zeros(shape)  # in decibels
    warp = 0.03 * _noise(rng, shape, _gaussian(shape, 12 * unit, 30 * unit, np.pi / 2))
    borders = np.cumsum(rng.uniform([0.03, 0.1, 0.2, 0.15], [0.07, 0.25, 0.4, 0.3]))
    for border, level in zip(borders, rng.uniform([-12, 0, -8, -14], [-4, 6, 4, -4]), strict=True):
        echo = np.where(depth + warp * border / 0.3 > border, level, echo)
    fibers = _noise(rng, shape, _gaussian(shape, 14 * unit, 1.2 * unit, rng.uniform(-0.15, 0.15)))
    echo = _filter(echo, _gaussian(shape, 0.8 * unit)) + 3 * fibers
    echo += 3 * _noise(rng, shape, _gaussian(shape, 9 * unit))

    for _ in range(rng.integers(2, 5)):  # lobules of fat: dark like a lesion, but flat, with a bright lower border
        center = rng.uniform(0.15, 0.9) * shape[0], rng.uniform(0, 1) * shape[1]
        radii = rng.uniform(14, 26) * unit, rng.uniform(3, 6) * unit
        lobule = _blob(rng, shape, center, radii, rng.uniform(-0.2, 0.2), 0.1)
        echo -= rng.uniform(7, 12) * np.clip(lobule * 4, 0, 1)
        echo += 6 * np.exp(-((lobule / 0.08) ** 2)) * (rows > center[0])
    for _ in range(rng.integers(0, 3)):  # shadows of ribs and poor contact, dark to the bottom
        left, width = rng.uniform(0, shape[1]), rng.uniform(4, 10) * unit
        column = np.exp(-(((columns + 0.1 * rows - left) / width) ** 2))
        echo -= rng.uniform(5, 10) * column * np.clip((depth - rng.uniform(0.05, 0.6)) * 8, 0, 1)

    mask = np.zeros(shape, dtype=bool)
    if not empty:
        center = rng.uniform(0.3, 0.65) * shape[0], rng.uniform(0.2, 0.8) * shape[1]
        radii = np.array([rng.uniform(11, 24), rng.uniform(9, 17)]) * unit
        lesion = _blob(rng, shape, center, radii, rng.uniform(-0.5, 0.5), rng.uniform(0.1, 0.35))
        mask = lesion > 0
        fuzzy = np.clip(_filter(mask.astype(float), _gaussian(shape, rng.uniform(0.8, 2) * unit)), 0, 1)
        # Darker than the tissue it grew in, however dark that is.
        inside = min(echo[mask].mean() - 9, 0.2 * echo[mask].mean() - 11) - rng.uniform(0, 4)
        echo += 0.8 * fuzzy * (inside - echo)
        echo += 3 * fuzzy * _noise(rng, shape, _gaussian(shape, 3 * unit))
        below = np.cumsum(mask, axis=0) / (2 * radii[1]) * ~mask * (rows > center[0])
        below = _filter(np.clip(below, 0, 1), _gaussian(shape, 1.5 * unit))
        fading = np.exp(-np.maximum(rows - center[0], 0) / (45 * unit))
        echo += rng.choice([-1, 1]) * rng.uniform(5, 9) * below * fading

    echo -= rng.uniform(8, 18) * depth**1.5
    grain = _gaussian(shape, rng.uniform(0.8, 1.2) * unit**0.5, rng.uniform(0.5, 0.7) * unit**0.5)
    speckle = np.hypot(_noise(rng, shape, grain), _noise(rng, shape, grain))  # Rayleigh: many echoes in one cell
    decibels = echo + 20 * np.log10(speckle + 0.02)
    return np.clip((decibels + 38) / 55, 0, 1), mask


# Infrared: dim points before clouds and hills.


def _infrared(rng: Rng, shape: Shape, empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw targets of a few pixels near larger and brighter things."""
    unit = _unit(shape)
    rows, columns = _grid(shape)
    scene = 0.3 + 0.08 * _noise(rng, shape, _fractal(shape, rng.uniform(1.4, 2)))
    clouds = _noise(rng, shape, _fractal(shape, rng.uniform(1.6, 2.2)))
    scene += rng.uniform(0.1, 0.35) * np.clip((clouds - rng.uniform(-0.5, 0.8)) * rng.uniform(0.5, 1.2), 0, 1)
    if rng.random() < 0.5:
        outline = np.cumsum(rng.standard_normal(shape[1] + 1))
        outline -= np.linspace(outline[0], outline[-1], shape[1] + 1)
        horizon = rng.uniform(0.45, 0.85) * shape[0] + outline[:-1] * rng.uniform(0.1, 0.6) * unit
        ground = rows > horizon
        land = rng.uniform(0.2, 0.6) + 0.08 * _noise(rng, shape, _fractal(shape, rng.uniform(1.2, 1.7)))
        scene = np.where(ground, land, scene * (0.7 + 0.3 * rows / shape[0]))
        for _ in range(rng.integers(0, 5)):  # houses and masts: bright, with sharp edges
            left, width = rng.uniform(0, shape[1]), rng.uniform(1, 10) * unit
            top = horizon.mean() - rng.uniform(-6, 14) * unit
            inside = (rows > top) & (rows < horizon.mean() + 8 * unit) & (abs(columns - left) < width)
            scene[inside] += rng.uniform(-0.1, 0.3)
    for _ in range(rng.integers(0, 3)):  # streaks of bright cloud edges
        angle, offset = rng.uniform(-0.6, 0.6), rng.uniform(0, 1) * shape[0]
        along, across = _turn(rows - offset, columns - shape[1] / 2, angle)
        across = across + 5 * unit * np.sin(along / rng.uniform(15, 40) / unit)
        streak = np.exp(-((across / rng.uniform(1.5, 4) / unit) ** 2)) * np.exp(-((along / (40 * unit)) ** 2))
        scene += rng.uniform(0.1, 0.25) * streak

    scene = _filter(scene, _gaussian(shape, rng.uniform(0.5, 0.9)))  # the lens blurs everything
    mask = np.zeros(shape, dtype=bool)
    for _ in range(0 if empty else rng.integers(1, 4)):
        spread = rng.uniform(0.7, 2.6)  # pixels, whatever the size of the image
        center = rng.uniform(0.06, 0.94, size=2) * (np.array(shape) - 1)
        distance = (rows - center[0]) ** 2 + (columns - center[1]) ** 2
        profile = np.exp(-distance / (2 * spread**2))
        near = scene[distance < (4 * spread + 4) ** 2]
        scene = scene + (rng.uniform(0.12, 0.3) + 1.5 * near.std()) * profile
        mask |= (profile > 0.25) | (distance <= distance.min())
    scene += rng.uniform(0.008, 0.02) * rng.standard_normal(shape)
    scene += rng.uniform(0, 0.012) * rng.standard_normal((1, shape[1]))  # columns of the sensor differ
    return scene, mask


# Dichotomous: thin and pierced things to cut out exactly.

Stroke = tuple[np.ndarray, float]  # points (N, 2) as x, y in a box of side 2, and width in pixels of 128; 0 fills


def _line(*points) -> np.ndarray:
    return np.array(points, dtype=float)


def _polar(radius: float | np.ndarray, angle: float | np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def _upward(angle: float) -> np.ndarray:
    """Return the upright direction, turned clockwise by an angle."""
    return np.array([np.sin(angle), -np.cos(angle)])


def _circle(radius: float, sides: int = 48) -> np.ndarray:
    return _polar(radius, np.linspace(0, 2 * np.pi, sides + 1))


def _wheel(rng: Rng) -> list[Stroke]:
    spokes = rng.integers(8, 20)
    strokes = [(_circle(0.95), rng.uniform(2.5, 5)), (_circle(0.8), 1.2), (_circle(rng.uniform(0.12, 0.25)), 0)]
    twist = rng.uniform(-0.5, 0.5)
    for angle in 2 * np.pi * np.arange(spokes) / spokes:
        strokes.append((_line(_polar(0.15, angle + twist), _polar(0.9, angle)), rng.uniform(0.8, 1.3)))
    return strokes


def _web(rng: Rng) -> list[Stroke]:
    sides = rng.integers(6, 11)
    strokes = [(_circle(radius, sides), 1.0) for radius in np.linspace(0.2, 0.9, rng.integers(4, 7))]
    strokes += [(_line((0, 0), 1.05 * point), 1.4) for point in _circle(1, sides)]
    return [*strokes, (_circle(0.16), 0)]


def _fence(rng: Rng) -> list[Stroke]:
    height, lines = rng.uniform(0.5, 0.9), rng.integers(4, 8)
    frame = _line((-1, -height), (1, -height), (1, height), (-1, height), (-1, -height))
    strokes: list[Stroke] = [(frame, rng.uniform(3, 5))]
    for x in np.linspace(-1, 1, lines + 2)[1:-1]:
        if rng.random() < 0.8:
            strokes.append((_line((x, -height), (x, height * rng.uniform(0.6, 1))), rng.uniform(1, 2.5)))
    strokes += [(_line((-1, y), (1, y)), 1.2) for y in np.linspace(-height, height, lines)[1:-1]]
    return strokes + [(_line((x, height), (x, 1.2)), 4.0) for x in (-0.9, 0.9)]


def _tree(rng: Rng) -> list[Stroke]:
    strokes: list[Stroke] = []

    def grow(start: np.ndarray, angle: float, length: float, width: float):
        end = start + length * _upward(angle)
        strokes.append((_line(start, end), width))
        if length < 0.12:
            if rng.random() < 0.5:
                strokes.append((end + _circle(rng.uniform(0.02, 0.07), 8), 0))
            return
        for turn in rng.uniform([-0.8, 0.15], [-0.15, 0.8]):
            grow(end, angle + turn, length * rng.uniform(0.66, 0.82), max(width * 0.68, 0.8))

    grow(np.array([0.0, 1.0]), rng.uniform(-0.15, 0.15), 0.55, 7.0)
    return strokes


def _cog(rng: Rng) -> list[Stroke]:
    teeth = rng.integers(9, 18)
    angles = np.linspace(0, 2 * np.pi, 4 * teeth + 1)
    radius = np.where(np.arange(4 * teeth + 1) % 4 < 2, 0.95, 0.78)
    holes = rng.integers(4, 8)
    strokes = [(_polar(radius, angles), 0), (_circle(rng.uniform(0.12, 0.2)), -1)]
    return strokes + [(0.48 * point + _circle(rng.uniform(0.1, 0.2)), -1) for point in _circle(1, holes)[:-1]]


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _draw(rng: Rng, shape: Shape, strokes: list[Stroke], radius: float) -> np.ndarray:
    """Return the coverage (H, W) of strokes in a random pose."""
    finer = 3
    canvas = Image.new("L", (shape[1] * finer, shape[0] * finer))
    draw = ImageDraw.Draw(canvas)
    angle, tilt = rng.uniform(-0.5, 0.5), rng.uniform(0.6, 1)
    turn = _rotation(angle) @ np.diag([tilt, 1])
    center = np.array(_place(rng, shape, 0.35))[::-1]
    for points, width in strokes:
        path = [tuple(point) for point in (center + radius * points @ turn.T) * finer]
        if width > 0:
            draw.line(path, fill=255, width=max(round(width * radius / 50 * finer), finer + 1), joint="curve")
        else:
            draw.polygon(path, fill=255 if width == 0 else 0)
    return np.asarray(canvas.reduce(finer)) / 255


def _dichotomous(rng: Rng, shape: Shape, empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw a sharp, pierced thing before a blurred scene."""
    unit = _unit(shape)
    shapes = (_wheel, _web, _fence, _tree, _cog)

    def surface(spectrum: np.ndarray, contrast: float) -> np.ndarray:
        tint = rng.uniform(-0.18, 0.18, size=3)
        tint -= tint @ (0.299, 0.587, 0.114)  # color without brightness
        light = 0.5 + contrast * _noise(rng, shape, spectrum)
        drift = _noise(rng, shape, _gaussian(shape, 20 * unit))[..., None] * rng.normal(0, 0.06, size=3)
        return light[..., None] + tint + drift

    colors = surface(_fractal(shape, rng.uniform(1.2, 1.7)), rng.uniform(0.12, 0.2))
    for _ in range(rng.integers(1, 4)):  # things out of focus
        strokes = shapes[rng.integers(len(shapes))](rng)
        ghost = _filter(_draw(rng, shape, strokes, rng.uniform(25, 60) * unit), _gaussian(shape, 2.2 * unit))
        colors = colors + ghost[..., None] * rng.uniform(-0.3, 0.3)
    cover = np.zeros(shape)
    for _ in range(0 if empty else rng.integers(1, 3)):
        strokes = shapes[rng.integers(len(shapes))](rng)
        cover = np.maximum(cover, _draw(rng, shape, strokes, rng.uniform(32, 50) * unit))
    thing = surface(_fractal(shape, 1.6), rng.uniform(0.12, 0.2))
    edge = np.gradient(_filter(cover, _gaussian(shape, 0.8 * unit)), axis=0) * unit
    thing = thing + 0.35 * edge[..., None]
    colors = colors + cover[..., None] * (thing - colors)
    return colors + 0.015 * rng.standard_normal((*shape, 3)), cover > 0.5


# Intricate: one thing of many fine parts, for dichotomous segmentation at high resolution.


def _moved(strokes: list[Stroke], scale: float, x: float, y: float, thinner: float = 1.0) -> list[Stroke]:
    """Scale and move strokes; widths above 0 are multiplied by `thinner`."""
    return [(scale * points + (x, y), width * (thinner if width > 0 else 1)) for points, width in strokes]


def _spiral(turns: float, radius: float) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi * turns, int(16 * abs(turns)) + 8)
    return _polar(radius * np.linspace(1, 0.15, len(angles)), angles)


def _bicycle(rng: Rng) -> list[Stroke]:
    size, tube = rng.uniform(0.42, 0.5), rng.uniform(1.5, 3.5)
    strokes = _moved(_wheel(rng), size, -0.55, 0.35, 0.55) + _moved(_wheel(rng), size, 0.55, 0.35, 0.55)
    hub, crank, seat, head, fork = (-0.55, 0.35), (-0.08, 0.38), (-0.22, -0.3), (0.36, -0.28), (0.55, 0.35)
    frame = _line(hub, crank, seat, hub), _line(seat, head, crank), _line(fork, head, (0.32, -0.42))
    strokes += [(path, tube) for path in frame]
    strokes += _moved(_cog(rng), 0.13, *crank)
    saddle = _line((-0.36, -0.4), (-0.1, -0.42), (-0.12, -0.34), (-0.34, -0.33))
    bars = _line((0.2, -0.5), (0.32, -0.46), (0.48, -0.5), (0.52, -0.4), (0.44, -0.36))
    cable = _line((0.48, -0.5), (0.55, -0.25), (0.4, -0.1), (-0.1, -0.2), (-0.3, 0.1))
    return [*strokes, (saddle, 0), (_line(seat, (-0.23, -0.4)), 2), (bars, 2.2), (cable, 0.5)]


def _branches(rng: Rng, leaves: float, levels: int, spread: float, width: float) -> list[Stroke]:
    strokes: list[Stroke] = []

    def grow(start: np.ndarray, angle: float, length: float, width: float, level: int):
        bend = angle + rng.uniform(-0.3, 0.3)
        middle = start + 0.5 * length * _upward(angle)
        end = middle + 0.5 * length * _upward(bend)
        strokes.append((_line(start, middle, end), width))
        if level < 3 and rng.random() < leaves:
            along = rng.uniform(0.03, 0.07) * _upward(bend)
            across = rng.uniform(0.2, 0.5) * along[::-1] * (1, -1)
            strokes.append((_line(end, end + along + across, end + 2 * along, end + along - across), 0))
        if level:
            for turn in spread * rng.uniform([-1, 0.3], [-0.3, 1]):
                grow(end, bend + turn, length * rng.uniform(0.65, 0.85), max(width * 0.68, 0.5), level - 1)

    grow(np.array([0.0, 1.0]), rng.uniform(-0.15, 0.15), 0.5, width, levels)
    return strokes


def _bush(rng: Rng) -> list[Stroke]:
    return _branches(rng, rng.choice([0.0, 0.3, 0.9]), 6, rng.uniform(0.5, 0.9), rng.uniform(4, 9))


def _antlers(rng: Rng) -> list[Stroke]:
    half = _moved(_branches(rng, 0, 4, rng.uniform(0.5, 0.9), 5), 0.8, 0.25, -0.4)
    half = [(points @ np.array([[1, 0.1], [-0.25, 1]]), width) for points, width in half]
    skull = _line((-0.2, 0.3), (0.2, 0.3), (0.24, 0.5), (0.12, 0.95), (0, 1), (-0.12, 0.95), (-0.24, 0.5))
    strokes = half + [(points * (-1, 1), width) for points, width in half] + [(skull, 0)]
    return [*strokes, ((0.11, 0.5) + _circle(0.05, 12), -1), ((-0.11, 0.5) + _circle(0.05, 12), -1)]


def _gate(rng: Rng) -> list[Stroke]:
    tall, bars, bar = rng.uniform(0.6, 0.95), rng.integers(7, 16), rng.uniform(0.5, 1.5)
    strokes: list[Stroke] = [(_line((-1, y), (1, y)), 2.2) for y in (-0.4 * tall, 0.45 * tall, tall)]
    strokes += [(_line((x, -tall), (x, 1.1 * tall)), rng.uniform(4, 7)) for x in (-1, 1)]
    places = np.linspace(-1, 1, bars + 2)
    for x in places[1:-1]:
        top = -tall + 0.35 * tall * abs(x)  # the top is an arch
        strokes += [(_line((x, top), (x, tall)), bar), (_line((x - 0.03, top), (x, top - 0.12), (x + 0.03, top)), 0)]
    turns = rng.uniform(1.2, 2.2)
    for x in (places[1:] + places[:-1]) / 2:
        for y, flip in ((0.72 * tall, 1), (0.02, -1)):
            strokes.append(((x, y) + _spiral(turns, 0.9 / bars) * (flip, 1.6), 0.6))
    return strokes


def _chair(rng: Rng) -> list[Stroke]:
    leg, slats = rng.uniform(1.5, 3.5), rng.integers(3, 9)
    seat = _line((-0.55, 0.2), (0.35, 0.2), (0.6, 0.05), (-0.3, 0.05))
    strokes: list[Stroke] = [(seat, 0), (np.vstack([seat, seat[:1]]), 3)]
    for (x, y), splay in zip(seat, (-0.08, 0.08, 0.05, 0.02), strict=True):
        strokes.append((_line((x, y), (x + splay, y + 0.8)), leg))
    strokes += [(_line((-0.6, 0.6), (0.4, 0.6), (0.63, 0.45)), 0.9), (_line((-0.6, 0.75), (0.4, 0.75)), 0.7)]
    top = -0.9 + rng.uniform(0, 0.2)
    strokes += [(_line((x, 0.1), (x - 0.04, top)), leg) for x in (-0.32, 0.58)]
    strokes += [(_line((-0.4, y), (0.58, y)), width) for y, width in ((top, 5), (top + 0.2, 1), (-0.1, 1.5))]
    for share in np.linspace(0, 1, slats + 2)[1:-1]:
        strokes.append((_line((-0.36 + 0.92 * share, top + 0.2), (-0.34 + 0.9 * share, -0.1)), rng.uniform(0.5, 1.5)))
    if rng.random() < 0.5:  # woven cane: the seat is a sieve
        for row in np.linspace(0.15, 0.85, 4):
            for share in np.linspace(0.06, 0.94, 14):
                front, back = seat[0] + share * (seat[1] - seat[0]), seat[3] + share * (seat[2] - seat[3])
                strokes.append(((1 - row) * front + row * back + 0.018 * _circle(1, 4), -1))
    return strokes


def _net(rng: Rng) -> list[Stroke]:
    meshes, rows, narrow = rng.integers(7, 15), rng.integers(5, 9), rng.uniform(0.45, 0.9)
    strokes: list[Stroke] = [((0, -0.55) + _circle(1) * (0.9, 0.2), rng.uniform(2, 4))]
    depths = np.linspace(0, 1, rows + 1)
    for lean in (-1, 1):
        for i in range(meshes):
            turn = 2 * np.pi * (i / meshes + lean * depths * rows / meshes / 2)
            wide = 0.88 * (1 - (1 - narrow) * depths**0.6)
            path = np.stack([wide * np.cos(turn), -0.55 + 1.4 * depths + 0.2 * wide * np.sin(turn)], axis=1)
            strokes.append((path, rng.uniform(0.5, 0.9)))
    board = _line((-0.5, -1), (0.5, -1), (0.5, -0.62), (-0.5, -0.62))
    return [*strokes, (board, 0), (0.8 * (board - (0, -0.81)) + (0, -0.81), -1), (_line((0, -1), (0, -0.7)), 2)]


def _feather(rng: Rng) -> list[Stroke]:
    barbs, curve, slant = rng.integers(45, 80), rng.uniform(-0.5, 0.5), rng.uniform(0.3, 0.7)
    along = np.linspace(-1, 1, 30)
    strokes: list[Stroke] = [(np.stack([curve * (along**2 - 0.5), along], axis=1), 1.6)]
    for side in (-1, 1):
        gap = 0
        for y in np.linspace(-0.95, 0.6, barbs):
            gap = gap - 1 if gap > 0 else rng.integers(2, 6) * (rng.random() < 0.08)
            if gap:
                continue  # a split between barbs
            reach = side * 0.42 * np.sqrt(max(1 - ((y + 0.2) / 0.95) ** 2, 0.02)) * rng.uniform(0.85, 1.05)
            x = curve * (y**2 - 0.5)
            path = _line((x, y), (x + 0.6 * reach, y - 0.4 * slant * abs(reach)), (x + reach, y - slant * abs(reach)))
            strokes.append((path, rng.uniform(0.5, 1.1)))
    return strokes


def _rosette(rng: Rng) -> list[Stroke]:
    turns, petals = rng.integers(3, 6), rng.integers(7, 13)
    angles = np.linspace(0, 2 * np.pi * turns, 60 * turns)
    radius = 0.62 + 0.22 * np.cos(angles * petals / turns)
    strokes: list[Stroke] = [(_polar(radius, angles), rng.uniform(0.5, 1.3))]
    strokes += [(_circle(ring), rng.uniform(1, 4)) for ring in (0.92, 0.34)]
    for point in _circle(1, petals)[:-1]:
        strokes += [(0.62 * point + _circle(0.07, 12), 0.7), (1.0 * point + _circle(0.06, 10), 0)]
        strokes += [(_line(0.34 * point, 0.1 * point), 0.8)]
    return [*strokes, (_circle(0.16), 0), (_circle(0.07), -1)]


def _pylon(rng: Rng) -> list[Stroke]:
    floors, beam = rng.integers(6, 11), rng.uniform(1.2, 2.5)
    heights = 1 - 2 * np.linspace(0, 1, floors + 1) ** 0.8
    half = np.interp(heights, [-1, -0.2, 1], [0.08, 0.14, 0.5])
    left, right = np.stack([-half, heights], axis=1), np.stack([half, heights], axis=1)
    strokes: list[Stroke] = [(left, beam), (right, beam)]
    for i in range(floors):
        strokes += [(_line(left[i], right[i + 1]), 0.6), (_line(right[i], left[i + 1]), 0.6)]
        strokes += [(_line(left[i + 1], right[i + 1]), 0.8)]
    for y, reach in zip((-0.85, -0.55, -0.25), rng.uniform(0.5, 0.95, 3), strict=True):
        strokes += [(_line((-reach, y), (0, y - 0.1), (reach, y)), 0.9), (_line((-reach, y), (reach, y)), 0.9)]
        places = np.linspace(-reach, reach, 9)
        strokes += [(_line((x, y), (x, y - 0.1 * (1 - abs(x) / reach))), 0.5) for x in places]
        strokes += [((x, y + 0.02 + 0.035 * i) + _circle(0.022, 8), 0) for x in (-reach, reach) for i in range(4)]
    return strokes


def _ship(rng: Rng) -> list[Stroke]:
    hull = _line((-0.9, 0.45), (-0.6, 0.55), (0.6, 0.55), (1, 0.35), (0.7, 0.9), (-0.65, 0.9))
    strokes: list[Stroke] = [(hull, 0), (_line((0.9, 0.4), (1.25, 0.15)), 1.5)]
    strokes += [((x, 0.7) + _circle(0.035, 8), -1) for x in np.linspace(-0.5, 0.6, rng.integers(4, 9))]
    masts = np.linspace(-0.5, 0.5, rng.integers(2, 4))
    for x, top in zip(masts, rng.uniform(-1, -0.7, len(masts)), strict=True):
        strokes.append((_line((x, 0.6), (x, top)), 1.8))
        for side in (-1, 1):  # shrouds with ratlines
            feet = x + side * np.linspace(0.08, 0.24, 4)
            strokes += [(_line((foot, 0.55), (x, top + 0.35)), 0.5) for foot in feet]
            for share in np.linspace(0.1, 0.8, 10):
                y = 0.55 + share * (top - 0.2)
                strokes.append((_line((x + side * 0.08 * (1 - share), y), (x + side * 0.24 * (1 - share), y)), 0.5))
        for y, reach in ((top + 0.15, 0.2), (top + 0.45, 0.28), (top + 0.8, 0.34)):
            strokes.append((_line((x - reach, y), (x + reach, y)), 1.0))
            if rng.random() < 0.4:
                sail = _line((x - reach, y), (x + reach, y), (x + 0.95 * reach, y + 0.26), (x, y + 0.2))
                strokes.append((np.vstack([sail, (x - 0.95 * reach, y + 0.26)]), 0))
        strokes += [(_line((x, top), (1.25, 0.15)), 0.5), (_line((x, top + 0.3), (-0.85, 0.47)), 0.5)]
    return strokes


_INTRICATE = (_bicycle, _bush, _antlers, _gate, _chair, _net, _feather, _rosette, _pylon, _ship)


def _silhouette(rng: Rng, shape: Shape, radius: float) -> Image.Image:
    """Draw an intricate thing: 0 outside, 1 on lines, 2 inside."""
    strokes = _INTRICATE[rng.integers(len(_INTRICATE))](rng)
    ends = np.cumsum([len(points) for points, _ in strokes])
    points = np.concatenate([points for points, _ in strokes])
    bend, phase = rng.choice([0, 0.03]), rng.uniform(0, 2 * np.pi, 2)
    points = points + bend * np.sin(3 * points[:, ::-1] + phase)
    angle, flip = rng.normal(0, 0.3), rng.choice([-1, 1])
    points = points @ (_rotation(angle) @ np.diag([flip * rng.uniform(0.75, 1.1), 1])).T
    points = points / (1 + points @ rng.uniform(-0.2, 0.2, 2))[:, None]  # perspective
    points = np.array(_place(rng, shape, 0.42))[::-1] + radius * points
    weight = rng.uniform(0.8, 1.5) * radius / 50

    canvas = Image.new("L", shape[::-1])
    draw = ImageDraw.Draw(canvas)
    for path, (_, width) in zip(np.split(points, ends[:-1]), strokes, strict=True):
        path = [tuple(point) for point in path.tolist()]
        if width > 0:
            pixels = max(round(width * weight), min(2, round(_unit(shape)) or 1))
            draw.line(path, fill=1, width=pixels, joint="curve" if pixels > 3 else None)
            for x, y in (path[0], path[-1]) if pixels > 4 else ():  # round ends, so that branches have no cracks
                draw.ellipse((x - pixels / 2, y - pixels / 2, x + pixels / 2, y + pixels / 2), fill=1)
        else:
            draw.polygon(path, fill=2 if width == 0 else 0)
    return canvas


def _tint(rng: Rng, others: np.ndarray | None = None) -> np.ndarray:
    """Return a color without brightness, (3,), far from `others`, (N, 3)."""
    tints = rng.uniform(-0.16, 0.16, size=(1 if others is None else 4, 3)).astype(np.float32)
    tints -= (tints @ np.float32((0.299, 0.587, 0.114)))[:, None]
    return tints[0 if others is None else np.linalg.norm(tints[:, None] - others, axis=2).min(1).argmax()]


def _blurred(image: Image.Image, radius: float) -> np.ndarray:
    """Blur an image of mode L; return (H, W) in [0, 1]."""
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def _clutter(rng: Rng, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return a cluttered scene (H, W, 3) and its tints (3, 3)."""
    unit = _unit(shape)
    zones = np.digitize(_noise(rng, shape, _gaussian(shape, rng.uniform(5, 20) * unit)), sorted(rng.normal(0, 0.7, 2)))
    tints = np.stack([_tint(rng) for _ in range(3)])
    tones, contrasts = rng.uniform([[0.3], [0.07]], [[0.7], [0.2]], size=(2, 3)).astype(np.float32)
    smooth = _noise(rng, shape, _fractal(shape, rng.uniform(0.8, 1.5))).astype(np.float32)
    long, wide = rng.uniform(2, 7) * unit, rng.uniform(0.3, 0.8) * unit
    streaks = _noise(rng, shape, _gaussian(shape, long, wide, rng.uniform(0, np.pi))).astype(np.float32)
    texture = np.where(zones == rng.integers(3), streaks, smooth)
    colors = (tones[zones] + contrasts[zones] * texture)[..., None] + tints[zones]
    for _ in range(rng.integers(3, 8)):
        if rng.random() < 0.5:  # the shapes of the thing, but out of focus
            ghost = _silhouette(rng, shape, rng.uniform(20, 50) * unit).point(lambda label: 255 * (label > 0))
            cover = _blurred(ghost, rng.uniform(0.6, 2.5) * unit)
        else:  # sharp, but plain
            ghost = Image.new("L", shape[::-1])
            corners = np.array(_place(rng, shape, 0))[::-1] + rng.uniform(5, 35) * unit * rng.normal(0, 0.7, (4, 2))
            ImageDraw.Draw(ghost).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
            cover = np.asarray(ghost, dtype=np.float32) / 255
        cover *= rng.uniform(0.5, 1)
        paint = (rng.uniform(0.25, 0.75) + 0.1 * smooth)[..., None] + _tint(rng)
        colors += cover[..., None] * (paint - colors)
    return colors, tints


def _intricate(rng: Rng, shape: Shape, empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw a thing of fine parts before similar clutter."""
    # The background is out of focus: half the resolution is enough. float32 keeps large images fast too.
    half, tints = _clutter(rng, ((shape[0] + 1) // 2, (shape[1] + 1) // 2))
    channels = [Image.fromarray(channel) for channel in np.moveaxis(half, 2, 0)]
    colors = np.stack([channel.resize(shape[::-1], Image.Resampling.BICUBIC) for channel in channels], axis=2)

    unit = _unit(shape)
    parts = Image.new("L", shape[::-1])
    for _ in range(0 if empty else 1 + (rng.random() < 0.2)):
        parts = ImageChops.lighter(parts, _silhouette(rng, shape, rng.uniform(38, 60) * unit))
    outline = parts.point(lambda label: 255 * (label > 0))
    wide = _blurred(outline, 2 * unit)
    drop = rng.integers(-4, 5, 2) * max(round(unit), 1)
    colors *= (1 - rng.uniform(0, 0.5) * np.roll(wide, drop, axis=(0, 1)))[..., None]  # the shadow

    # At most two materials, of lines and of solid parts, with about the tone of the scene.
    grain = _noise(rng, shape, _gaussian(shape, rng.uniform(0.5, 4), 0.5, rng.uniform(0, np.pi))).astype(np.float32)
    light = rng.uniform(0, 2 * np.pi)
    height = _blurred(outline, 0.35 * unit) + 2 * wide
    down, across = np.gradient(height)
    relief = math.cos(light) * across + math.sin(light) * down
    value = rng.uniform(0.03, 0.12) * grain + rng.uniform(0.1, 0.3) * unit * relief
    two = rng.random() < 0.5
    paints = np.stack([colors.mean() + rng.uniform(-0.12, 0.12) + _tint(rng, tints) for _ in range(1 + two)])
    # Paint one pixel beyond the outline too: the blur of the lens fades it.
    runs_on = np.asarray(parts.filter(ImageFilter.MaxFilter(3)))
    thing = paints[(runs_on == 2) * int(two)] + value[..., None]
    colors += _blurred(outline, 0.5)[..., None] * (thing - colors)
    colors += 0.02 * rng.standard_normal((*shape, 3), dtype=np.float32)
    return colors, np.asarray(parts) > 0


# Polyp: a bump in the color of the wall it grows on.


def _polyp(rng: Rng, shape: Shape, empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw the wall of a bowel, lit by the endoscope, with polyps."""
    unit = _unit(shape)
    rows, columns = _grid(shape)
    # Folds are rings around the dark lumen, the way ahead, which may be out of sight.
    lumen = rng.uniform(-0.3, 1.3, size=2) * shape
    warp = _noise(rng, shape, _gaussian(shape, 22 * unit))
    away = np.hypot(rows - lumen[0], columns - lumen[1]) / (min(shape) * rng.uniform(0.15, 0.3)) * np.exp(0.18 * warp)
    ring = rng.uniform(1, 2.2) * np.log(away + 0.05) + 0.12 * _noise(rng, shape, _gaussian(shape, 9 * unit))
    depth = np.clip(rng.uniform(0.4, 0.9) * _noise(rng, shape, _gaussian(shape, 26 * unit)) + 0.45, 0, 1)
    behind = _filter((ring % 1) ** 2 * depth, _gaussian(shape, 1.1 * unit))  # darkest just behind the next fold
    height = unit * (3 * _noise(rng, shape, _gaussian(shape, 13 * unit)) - 3 * behind)

    shadow, tint, mask = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=bool)
    near = np.zeros(shape)  # 1 on polyps, which hide the wall
    for _ in range(0 if empty else 1 + (rng.random() < 0.15)):
        center, radius = np.array(_place(rng, shape, 0.25)), rng.uniform(10, 30) * unit
        heading, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1)
        body = _blob(rng, shape, center, (radius, stretch * radius), heading, 0.08)
        if rng.random() < 0.3:  # it hangs on a stalk
            way = np.array([np.sin(heading), np.cos(heading)])
            stalk = _blob(rng, shape, center + 1.2 * radius * way, (0.8 * radius, 0.25 * radius), heading, 0.1)
            body = np.maximum(body, 0.5 * stalk)
        body = body + 0.03 * _noise(rng, shape, _gaussian(shape, 3 * unit))
        dome = 1 - (1 - np.clip(body, 0, 1)) ** 2
        lumps = rng.uniform(0.02, 0.07) * _noise(rng, shape, _gaussian(shape, 0.25 * radius))
        cover = np.clip(20 * body, 0, 1)
        near = np.maximum(near, cover)
        height = height * (1 - 0.8 * np.clip(5 * body, 0, 1)) + radius * dome * (rng.uniform(0.35, 0.7) + lumps)
        mask |= body > 0
        tint += rng.uniform(-0.5, 0.6) * cover
        fall = _filter((body > 0).astype(float), _gaussian(shape, rng.uniform(0.12, 0.3) * radius))
        shadow = np.maximum(shadow, np.roll(fall, rng.integers(-2, 3, 2) * round(0.6 * unit), axis=(0, 1)) * ~mask)
    height = _filter(height, _gaussian(shape, 0.5 * unit))
    lamp, far = _place(rng, shape, 0.35), rng.uniform(0.7, 1.1) * min(shape)

    def shine(height: np.ndarray) -> np.ndarray:
        """Return the cosine between the surface and the way to the lamp."""
        down, across = np.gradient(height)
        to_lamp = lamp[0] - rows, lamp[1] - columns
        cosine = far - down * to_lamp[0] - across * to_lamp[1]
        return cosine / np.sqrt((1 + down**2 + across**2) * (far**2 + to_lamp[0] ** 2 + to_lamp[1] ** 2))

    wall = np.clip(shine(height), 0, 1) * (1 - 0.65 * behind * (1 - near)) * (1 - 0.4 * shadow)
    reach = np.maximum(np.clip(away * rng.uniform(0.5, 1.3), 0.1, 1) ** 0.8, 0.75 * near)
    light = rng.uniform(0.8, 1.05) * wall**1.3 * reach
    vessels = np.exp(-((_noise(rng, shape, _gaussian(shape, 4 * unit)) / 0.15) ** 2))
    vessels *= np.clip(_noise(rng, shape, _gaussian(shape, 15 * unit)), 0, 1) * ~mask * rng.uniform(0, 1)
    light += 0.03 * _noise(rng, shape, _fractal(shape, 1.1))
    dark, middle, bright = (0.1, 0.03, 0.02), rng.uniform((0.68, 0.27, 0.19), (0.78, 0.4, 0.3)), (1.0, 0.8, 0.64)
    colors = np.stack([np.interp(light, (0, 0.6, 1.1), tones) for tones in zip(dark, middle, bright, strict=True)], -1)
    redness = tint + 0.5 * _noise(rng, shape, _gaussian(shape, 18 * unit))
    redness += 2.5 * _filter(vessels, _gaussian(shape, 0.5 * unit))
    colors *= 1 - redness[..., None] * np.array((0.02, 0.12, 0.1))
    # The wet surface mirrors the lamp where ripples face it.
    ripples = _noise(rng, shape, _gaussian(shape, 1.8 * unit)) + 2 * _noise(rng, shape, _gaussian(shape, 5 * unit))
    mirror = shine(_filter(height, _gaussian(shape, unit)) + rng.uniform(0.4, 0.6) * unit * ripples)
    wet = _noise(rng, shape, _gaussian(shape, 7 * unit)) + mask - rng.uniform(0.5, 1.3)
    glint = np.clip((mirror - 0.98) * 120, 0, 1) * np.clip(3 * wet, 0, 1)
    colors += _filter(glint, _gaussian(shape, 0.35 * unit))[..., None] * (1 - colors)
    colors += 0.012 * rng.standard_normal((*shape, 1))
    # The view is round or an octagon.
    x, y = abs(columns / shape[1] * 2 - 1), abs(rows / shape[0] * 2 - 1)
    edge = rng.choice((1.5, 1.6, 3)) - (x + y if rng.random() < 0.5 else x**2 + y**2)
    colors *= np.clip(edge * min(shape) / 4, 0, 1)[..., None]
    return colors, mask & (edge > 0)


# Defect: a crack, a hole or a frayed border among scratches.


def _wander(rng: Rng, points: int, roughness: float) -> np.ndarray:
    """Return a line (points, 2) from left to right that trembles."""
    steps = roughness * rng.standard_normal(points)
    down = np.cumsum(steps) / np.sqrt(points)
    return np.stack([np.linspace(-1, 1, points), down - down.mean()], axis=1)


def _defect(rng: Rng, shape: Shape, empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw a ground tile with defects, and with marks that are none."""
    unit = _unit(shape)
    rows, columns = _grid(shape)
    angle = np.pi / 2 + rng.normal(0, 0.02)  # of the lines that grinding leaves
    fine = _noise(rng, shape, _gaussian(shape, 40 * unit, 0.15 * unit, angle))
    wide = _noise(rng, shape, _gaussian(shape, 90 * unit, 2 * unit, angle))
    grain = _noise(rng, shape, _gaussian(shape, 0.7 * unit, 0.2 * unit, angle))
    lines = np.exp(0.4 * (fine + 0.7 * wide)) / 1.3
    stains = _noise(rng, shape, _gaussian(shape, 16 * unit))
    light = 1 + rng.uniform(0.1, 0.3) * _noise(rng, shape, _gaussian(shape, 50 * unit)) - 0.1 * np.clip(stains, 0, 3)
    matt = np.clip(0.7 + 0.25 * _noise(rng, shape, _gaussian(shape, 20 * unit)), 0.1, 1)
    surface = light * (1 + matt * (0.35 * (lines - 1) + 0.12 * grain * lines))
    for _ in range(rng.integers(1, 5)):  # scratches
        scratch = _draw(rng, shape, [(_wander(rng, 9, 0.3), 0.1)], rng.uniform(4, 35) * unit)
        surface += rng.uniform(-0.2, 0.25) * _filter(scratch, _gaussian(shape, 0.4 * unit))
    # The tile may end in the image; its ends are arched. Often only dark corners show that.
    margins = np.where(rng.random(4) < 0.5, rng.uniform(-4, 1, size=4), rng.uniform(-9, 7, size=4)) * unit
    arch = rng.uniform(0, 5) * unit * (2 * columns / shape[1] - 1) ** 2
    sides = rows - margins[0] - arch, shape[0] - rows - margins[1] - arch
    sides += columns - margins[2], shape[1] - columns - margins[3]
    inside = functools.reduce(np.minimum, sides) + 0.25 * unit * _noise(rng, shape, _gaussian(shape, unit))
    # A bright line or a dark band goes along the border.
    reach = rng.uniform(2, 8)
    surface *= 1 + rng.uniform(-0.6, 0.5) * np.exp(-(((inside - 3 * unit) / (reach * unit)) ** 2))

    mask = np.zeros(shape, dtype=bool)
    for defect in () if empty else rng.choice(("crack", "hole", "fray"), size=1 + (rng.random() < 0.25)):
        if defect == "crack":
            path = _wander(rng, 24, 0.12)[:, ::-1]
            widths = rng.uniform(0.5, 1.6) * np.linspace(1, 0.4, 23) * rng.uniform(0.7, 1.3, 23)
            strokes = [(path[i : i + 2], width) for i, width in enumerate(widths)]
            cover = _draw(rng, shape, strokes, rng.uniform(12, 55) * unit)
            surface *= 1 - rng.uniform(0.55, 0.8) * _filter(cover, _gaussian(shape, 0.3 * unit))
            part = cover > 0.4
        elif defect == "hole":
            radius = rng.uniform(1.5, 4.5) * unit
            hole = _blob(rng, shape, _place(rng, shape, 0.15), (radius, radius * rng.uniform(0.4, 1)), angle, 0.25)
            part = hole >= min(hole.max(), 0)  # one pixel at least
            soft = _filter(part.astype(float), _gaussian(shape, 0.5 * unit))
            surface *= 1 - soft * (rng.uniform(0.5, 0.75) + 0.1 * _noise(rng, shape, _gaussian(shape, 0.6 * unit)))
            surface += 0.8 * np.clip(-np.gradient(soft, axis=0) * unit, 0, 1)  # the lit rim
        else:
            corner = np.where(rng.random(2) < 0.5, margins[::2], shape - margins[1::2])
            center, side = np.clip(corner, 0, np.array(shape) - 1), rng.integers(2)
            center[side] = rng.uniform(0, shape[side])  # somewhere along that side
            radii = rng.uniform(7, 20) * unit, rng.uniform(3, 8) * unit
            rough = _blob(rng, shape, center, radii, (1 - side) * np.pi / 2, 0.3)
            rough += 0.12 * _noise(rng, shape, _gaussian(shape, 1.5 * unit))
            rough[inside <= 0] = -9
            part = rough >= min(rough.max(), 0)
            broken = rng.uniform(0.5, 0.9) * light * (1 + 0.2 * _noise(rng, shape, _gaussian(shape, 0.8 * unit)))
            broken += 0.9 * (_noise(rng, shape, _gaussian(shape, 0.5 * unit)) > 2.2)  # bright grains
            broken *= 1 - 0.4 * np.exp(-((rough / 0.12) ** 2))
            surface += _filter(part.astype(float), _gaussian(shape, 0.3 * unit)) * (broken - surface)
        mask |= part & (inside > 0)
    tile = np.clip(inside / unit + 0.5, 0.05, 1)
    gray = rng.uniform(0.25, 0.5) * surface * tile + 0.01 * rng.standard_normal(shape)
    return gray, mask


# The place of a kind is part of the seed: add new kinds at the end.
KINDS: dict[str, Callable[[Rng, Shape, bool], tuple[np.ndarray, np.ndarray]]] = {
    "camouflage": _camouflage,
    "ultrasound": _ultrasound,
    "infrared": _infrared,
    "dichotomous": _dichotomous,
    "intricate": _intricate,
    "polyp": _polyp,
    "defect": _defect,
}
