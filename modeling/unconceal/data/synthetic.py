"""Generated scenes in which objects hide, one kind for each task, for training and tests without any download.

Every picture follows from (kind, size, seed, index) alone. Brightness does not give the object away: in each kind the
object shares its grey values with the background, and what shows it is texture, shape, context or scale.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from ..errors import UserError


MIN_SIZE = 32


def generate(
    kind: str, size: int | tuple[int, int], seed: int, index: int, empty_ratio: float = 0.0
) -> tuple[Image.Image, Image.Image]:
    """Make one picture and its mask.

    Args:
        kind: A key of `KINDS`.
        size: Side in pixels, or (height, width); 32 or more.
        seed: Seed of the data set.
        index: Number of the picture; any order of calls gives the same pictures.
        empty_ratio: Share of pictures without an object, in [0, 1].

    Returns:
        RGB picture, and mask of mode L with 0 and 255.

    Raises:
        UserError: If the kind is unknown or a number is out of its range.
    """
    if kind not in KINDS:
        raise UserError(f"no kind of picture named {kind!r}; there are {', '.join(KINDS)}")
    shape = (size, size) if isinstance(size, int) else tuple(size)
    if min(shape) < MIN_SIZE:
        raise UserError(f"pictures of {shape[1]}x{shape[0]} are too small; expected sides of {MIN_SIZE} or more")
    if seed < 0 or index < 0:
        raise UserError(f"seed {seed} and index {index}; expected 0 or more")
    if not 0 <= empty_ratio <= 1:
        raise UserError(f"share of empty masks {empty_ratio}; expected 0 to 1")
    rng = np.random.default_rng([seed, list(KINDS).index(kind), index])
    empty = rng.random() < empty_ratio
    colours, mask = KINDS[kind](rng, shape, empty)
    picture = Image.fromarray((np.clip(colours, 0, 1) * 255).round().astype(np.uint8))
    return picture.convert("RGB"), Image.fromarray(mask.astype(np.uint8) * 255)


# Building blocks. `shape` is (H, W); lengths called `unit` are in pixels and grow with the picture.


def _unit(shape: tuple[int, int]) -> float:
    """Length that is 1 pixel in a picture of 128 pixels."""
    return min(shape) / 128


def _grid(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each pixel, (H, 1) and (1, W)."""
    return np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]


def _turn(rows: np.ndarray, columns: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across a direction; both broadcast to (H, W)."""
    return columns * np.cos(angle) + rows * np.sin(angle), rows * np.cos(angle) - columns * np.sin(angle)


def _frequencies(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cycles a pixel down and across, for `rfft2`."""
    return np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :]


def _gaussian(shape: tuple[int, int], along: float, across: float | None = None, angle: float = 0.0) -> np.ndarray:
    """Spectrum of a Gaussian with these standard deviations, in pixels, along and across `angle`."""
    f_along, f_across = _turn(*_frequencies(shape), angle)
    across = along if across is None else across
    return np.exp(-2 * np.pi**2 * ((along * f_along) ** 2 + (across * f_across) ** 2))


def _filter(field: np.ndarray, spectrum: np.ndarray) -> np.ndarray:
    return np.fft.irfft2(np.fft.rfft2(field) * spectrum, s=field.shape)


def _noise(rng: np.random.Generator, shape: tuple[int, int], spectrum: np.ndarray) -> np.ndarray:
    """Gaussian noise of that spectrum, mean 0, deviation 1."""
    field = _filter(rng.standard_normal(shape), spectrum)
    return (field - field.mean()) / (field.std() + 1e-9)


def _fractal(shape: tuple[int, int], slope: float) -> np.ndarray:
    """Spectrum that falls with the frequency as `f ** -slope`: equal structure at all scales."""
    f_down, f_across = _frequencies(shape)
    return np.maximum(np.hypot(f_down, f_across), 1 / max(shape)) ** -slope


def _blob(
    rng: np.random.Generator,
    shape: tuple[int, int],
    centre: tuple[float, float],
    radii: tuple[float, float],
    angle: float,
    roughness: float,
) -> np.ndarray:
    """Signed closeness to an irregular ellipse, (H, W): 1 at the centre, 0 on the outline, negative outside."""
    rows, columns = _grid(shape)
    along, across = _turn(rows - centre[0], columns - centre[1], angle)
    along, across = along / radii[0], across / radii[1]
    direction = np.arctan2(across, along)
    outline = 1.0
    for wave in range(2, 7):
        outline = outline + roughness * rng.normal() / wave * np.cos(wave * direction + rng.uniform(0, 2 * np.pi))
    return 1 - np.hypot(along, across) / np.maximum(outline, 0.3)


def _place(rng: np.random.Generator, shape: tuple[int, int], margin: float = 0.25) -> tuple[float, float]:
    return rng.uniform(margin, 1 - margin) * shape[0], rng.uniform(margin, 1 - margin) * shape[1]


# Camouflage: an animal of the texture of its surroundings.


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


def _camouflage(rng: np.random.Generator, shape: tuple[int, int], empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """The object has the background's texture at another place and angle, a faint relief and a faint rim."""
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
        centre, heading = np.array(_place(rng, shape, 0.3)), rng.uniform(0, 2 * np.pi)
        length = rng.uniform(18, 34) * unit
        body = _blob(rng, shape, tuple(centre), (length, length * rng.uniform(0.4, 0.7)), heading, 0.25)
        for side in (1, -1):  # head and tail
            offset = side * length * rng.uniform(0.8, 1.1) * np.array([np.sin(heading), np.cos(heading)])
            radii = length * rng.uniform(0.25, 0.5), length * rng.uniform(0.12, 0.3)
            bent = heading + rng.uniform(-0.7, 0.7)
            body = np.maximum(body, _blob(rng, shape, tuple(centre + offset), radii, bent, 0.15))
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
    colours = np.where(value < 0.5, dark + (middle - dark) * 2 * value, middle + (bright - middle) * (2 * value - 1))
    colours = colours * (1 + shade + relief)[..., None] + 0.02 * rng.standard_normal((*shape, 1))
    return colours, mask


# Ultrasound: a dark lesion among dark fat and shadows.


def _ultrasound(rng: np.random.Generator, shape: tuple[int, int], empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """Speckle over layered tissue, fading with depth; the lesion changes the echo of all that lies below it."""
    unit = _unit(shape)
    rows, columns = _grid(shape)
    depth = rows / shape[0] + np.zeros(shape)
    echo = np.zeros(shape)  # in decibels
    warp = 0.03 * _noise(rng, shape, _gaussian(shape, 12 * unit, 30 * unit, np.pi / 2))
    borders = np.cumsum(rng.uniform([0.03, 0.1, 0.2, 0.15], [0.07, 0.25, 0.4, 0.3]))
    for border, level in zip(borders, rng.uniform([-12, 0, -8, -14], [-4, 6, 4, -4]), strict=True):
        echo = np.where(depth + warp * border / 0.3 > border, level, echo)
    fibres = _noise(rng, shape, _gaussian(shape, 14 * unit, 1.2 * unit, rng.uniform(-0.15, 0.15)))
    echo = _filter(echo, _gaussian(shape, 0.8 * unit)) + 3 * fibres
    echo += 3 * _noise(rng, shape, _gaussian(shape, 9 * unit))

    for _ in range(rng.integers(2, 5)):  # lobules of fat: dark as a lesion, but flat, with a bright lower border
        centre = rng.uniform(0.15, 0.9) * shape[0], rng.uniform(0, 1) * shape[1]
        radii = rng.uniform(14, 26) * unit, rng.uniform(3, 6) * unit
        lobule = _blob(rng, shape, centre, radii, rng.uniform(-0.2, 0.2), 0.1)
        echo -= rng.uniform(7, 12) * np.clip(lobule * 4, 0, 1)
        echo += 6 * np.exp(-((lobule / 0.08) ** 2)) * (rows > centre[0])
    for _ in range(rng.integers(0, 3)):  # shadows of ribs and poor contact: dark to the bottom, from no lesion
        left, width = rng.uniform(0, shape[1]), rng.uniform(4, 10) * unit
        column = np.exp(-(((columns + 0.1 * rows - left) / width) ** 2))
        echo -= rng.uniform(5, 10) * column * np.clip((depth - rng.uniform(0.05, 0.6)) * 8, 0, 1)

    mask = np.zeros(shape, dtype=bool)
    if not empty:
        centre = rng.uniform(0.3, 0.65) * shape[0], rng.uniform(0.2, 0.8) * shape[1]
        radii = np.array([rng.uniform(11, 24), rng.uniform(9, 17)]) * unit
        lesion = _blob(rng, shape, centre, tuple(radii), rng.uniform(-0.5, 0.5), rng.uniform(0.1, 0.35))
        mask = lesion > 0
        fuzzy = np.clip(_filter(mask.astype(float), _gaussian(shape, rng.uniform(0.8, 2) * unit)), 0, 1)
        # Darker than the tissue it grew in, however dark that is.
        inside = min(echo[mask].mean() - 9, 0.2 * echo[mask].mean() - 11) - rng.uniform(0, 4)
        echo += 0.8 * fuzzy * (inside - echo)
        echo += 3 * fuzzy * _noise(rng, shape, _gaussian(shape, 3 * unit))
        below = np.cumsum(mask, axis=0) / (2 * radii[1]) * ~mask * (rows > centre[0])
        below = _filter(np.clip(below, 0, 1), _gaussian(shape, 1.5 * unit))
        echo += (
            rng.choice([-1, 1]) * rng.uniform(5, 9) * below * np.exp(-np.maximum(rows - centre[0], 0) / (45 * unit))
        )

    echo -= rng.uniform(8, 18) * depth**1.5
    grain = _gaussian(shape, rng.uniform(0.8, 1.2) * unit**0.5, rng.uniform(0.5, 0.7) * unit**0.5)
    speckle = np.hypot(_noise(rng, shape, grain), _noise(rng, shape, grain))  # Rayleigh: many echoes in one cell
    decibels = echo + 20 * np.log10(speckle + 0.02)
    return np.clip((decibels + 38) / 55, 0, 1), mask


# Infrared: dim points before clouds and hills.


def _infrared(rng: np.random.Generator, shape: tuple[int, int], empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """Targets of a few pixels stand out from what is near them, while far larger things are brighter."""
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

    scene = _filter(scene, _gaussian(shape, rng.uniform(0.5, 0.9)))  # the lens blurs all alike
    mask = np.zeros(shape, dtype=bool)
    for _ in range(0 if empty else rng.integers(1, 4)):
        spread = rng.uniform(0.7, 2.6)  # pixels, whatever the size of the picture
        centre = rng.uniform(0.06, 0.94, size=2) * (np.array(shape) - 1)
        distance = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2
        profile = np.exp(-distance / (2 * spread**2))
        near = scene[distance < (4 * spread + 4) ** 2]
        scene = scene + (rng.uniform(0.12, 0.3) + 1.5 * near.std()) * profile
        mask |= (profile > 0.25) | (distance <= distance.min())
    scene += rng.uniform(0.008, 0.02) * rng.standard_normal(shape)
    scene += rng.uniform(0, 0.012) * rng.standard_normal((1, shape[1]))  # columns of the sensor differ
    return scene, mask


# Dichotomous: thin and pierced things to be cut out exactly.

Stroke = tuple[np.ndarray, float]  # points (N, 2) as x, y in a box of side 2, and width in pixels of 128; 0 fills


def _circle(radius: float, sides: int = 48) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, sides + 1)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _wheel(rng: np.random.Generator) -> list[Stroke]:
    spokes = rng.integers(8, 20)
    strokes = [(_circle(0.95), rng.uniform(2.5, 5)), (_circle(0.8), 1.2), (_circle(rng.uniform(0.12, 0.25)), 0)]
    twist = rng.uniform(-0.5, 0.5)
    for angle in 2 * np.pi * np.arange(spokes) / spokes:
        inner = 0.15 * np.array([np.cos(angle + twist), np.sin(angle + twist)])
        strokes.append((np.stack([inner, 0.9 * np.array([np.cos(angle), np.sin(angle)])]), rng.uniform(0.8, 1.3)))
    return strokes


def _web(rng: np.random.Generator) -> list[Stroke]:
    sides = rng.integers(6, 11)
    strokes = [(_circle(radius, sides), 1.0) for radius in np.linspace(0.2, 0.9, rng.integers(4, 7))]
    strokes += [(np.stack([np.zeros(2), 1.05 * point]), 1.4) for point in _circle(1, sides)]
    return [*strokes, (_circle(0.16), 0)]


def _fence(rng: np.random.Generator) -> list[Stroke]:
    height, lines = rng.uniform(0.5, 0.9), rng.integers(4, 8)
    frame = np.array([[-1, -height], [1, -height], [1, height], [-1, height], [-1, -height]])
    strokes: list[Stroke] = [(frame, rng.uniform(3, 5))]
    for x in np.linspace(-1, 1, lines + 2)[1:-1]:
        if rng.random() < 0.8:
            strokes.append((np.array([[x, -height], [x, height * rng.uniform(0.6, 1)]]), rng.uniform(1, 2.5)))
    for y in np.linspace(-height, height, lines)[1:-1]:
        strokes.append((np.array([[-1, y], [1, y]]), 1.2))
    legs = [np.array([[x, height], [x, 1.2]]) for x in (-0.9, 0.9)]
    return strokes + [(leg, 4.0) for leg in legs]


def _tree(rng: np.random.Generator) -> list[Stroke]:
    strokes: list[Stroke] = []

    def grow(start: np.ndarray, angle: float, length: float, width: float):
        end = start + length * np.array([np.sin(angle), -np.cos(angle)])
        strokes.append((np.stack([start, end]), width))
        if length < 0.12:
            if rng.random() < 0.5:
                strokes.append((end + _circle(rng.uniform(0.02, 0.07), 8), 0))
            return
        for turn in rng.uniform([-0.8, 0.15], [-0.15, 0.8]):
            grow(end, angle + turn, length * rng.uniform(0.66, 0.82), max(width * 0.68, 0.8))

    grow(np.array([0.0, 1.0]), rng.uniform(-0.15, 0.15), 0.55, 7.0)
    return strokes


def _cog(rng: np.random.Generator) -> list[Stroke]:
    teeth = rng.integers(9, 18)
    angles = np.linspace(0, 2 * np.pi, 4 * teeth + 1)
    radius = np.where(np.arange(4 * teeth + 1) % 4 < 2, 0.95, 0.78)
    outline = np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)
    holes = rng.integers(4, 8)
    strokes = [(outline, 0), (_circle(rng.uniform(0.12, 0.2)), -1)]
    return strokes + [(0.48 * point + _circle(rng.uniform(0.1, 0.2)), -1) for point in _circle(1, holes)[:-1]]


def _draw(rng: np.random.Generator, shape: tuple[int, int], strokes: list[Stroke], radius: float) -> np.ndarray:
    """Draw strokes turned, tilted and moved at random; coverage of each pixel, (H, W) in [0, 1]."""
    finer = 3
    canvas = Image.new("L", (shape[1] * finer, shape[0] * finer))
    draw = ImageDraw.Draw(canvas)
    angle, tilt = rng.uniform(-0.5, 0.5), rng.uniform(0.6, 1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag([tilt, 1])
    centre = np.array(_place(rng, shape, 0.35))[::-1]
    for points, width in strokes:
        path = [tuple(point) for point in (centre + radius * points @ turn.T) * finer]
        if width > 0:
            draw.line(path, fill=255, width=max(round(width * radius / 50 * finer), finer + 1), joint="curve")
        else:
            draw.polygon(path, fill=255 if width == 0 else 0)
    return np.asarray(canvas.reduce(finer)) / 255


def _dichotomous(rng: np.random.Generator, shape: tuple[int, int], empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """A sharp thing of thin parts and holes before a blurred scene of the same brightness."""
    unit = _unit(shape)
    shapes = (_wheel, _web, _fence, _tree, _cog)

    def surface(spectrum: np.ndarray, contrast: float) -> np.ndarray:
        tint = rng.uniform(-0.18, 0.18, size=3)
        tint -= tint @ (0.299, 0.587, 0.114)  # colour without brightness
        light = 0.5 + contrast * _noise(rng, shape, spectrum)
        drift = _noise(rng, shape, _gaussian(shape, 20 * unit))[..., None] * rng.normal(0, 0.06, size=3)
        return light[..., None] + tint + drift

    colours = surface(_fractal(shape, rng.uniform(1.2, 1.7)), rng.uniform(0.12, 0.2))
    for _ in range(rng.integers(1, 4)):  # things out of focus
        strokes = shapes[rng.integers(len(shapes))](rng)
        ghost = _filter(_draw(rng, shape, strokes, rng.uniform(25, 60) * unit), _gaussian(shape, 2.2 * unit))
        colours = colours + ghost[..., None] * rng.uniform(-0.3, 0.3)
    cover = np.zeros(shape)
    if not empty:
        for _ in range(rng.integers(1, 3)):
            strokes = shapes[rng.integers(len(shapes))](rng)
            cover = np.maximum(cover, _draw(rng, shape, strokes, rng.uniform(32, 50) * unit))
    thing = surface(_fractal(shape, 1.6), rng.uniform(0.12, 0.2))
    edge = np.gradient(_filter(cover, _gaussian(shape, 0.8 * unit)), axis=0) * unit
    thing = thing + 0.35 * edge[..., None]
    colours = colours + cover[..., None] * (thing - colours)
    return colours + 0.015 * rng.standard_normal((*shape, 3)), cover > 0.5


# The place in this table is part of the seed: add new kinds at the end.
KINDS: dict[str, Callable[[np.random.Generator, tuple[int, int], bool], tuple[np.ndarray, np.ndarray]]] = {
    "camouflage": _camouflage,
    "ultrasound": _ultrasound,
    "infrared": _infrared,
    "dichotomous": _dichotomous,
}
