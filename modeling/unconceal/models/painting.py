"""Paint over an object: what would be there without it."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


# As shares of the longer side of an image: what is painted beyond the mask, the width of the rim whose colors must
# fit, and the side of the squares whose mean is taken from a texture.
MARGIN, RIM, BLUR = 1 / 100, 1 / 20, 1 / 16
LARGEST_SIDE = 512


def remove_object(
    image: Image.Image, mask: np.ndarray, largest_side: int = LARGEST_SIDE, patches: int = 4
) -> np.ndarray:
    """Return an image without its object, (H, W, 3).

    Colors are float32 in [0, 1].

    Args:
        image: RGB image.
        mask: (H, W), in [0, 1]. Pixels above 0.5 are painted over, and a margin around them.
        largest_side: Objects in larger images are painted over at this side, in pixels.
        patches: As for `paint_over`.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    shape, scale = mask.shape, largest_side / max(mask.shape)
    small, small_mask = pixels, torch.tensor(mask)[None]
    if scale < 1:
        size = [max(1, round(side * scale)) for side in shape]
        small, small_mask = (F.interpolate(maps[None], size, mode="area")[0] for maps in (small, small_mask))
    painted, weight = paint_over(small, small_mask[0], patches)
    if scale < 1:
        painted, weight = (
            F.interpolate(maps[None], shape, mode="bilinear", align_corners=False)[0] for maps in (painted, weight)
        )
    return torch.lerp(pixels, painted, weight).permute(1, 2, 0).numpy()


def paint_over(image: Tensor, mask: Tensor, patches: int = 4) -> tuple[Tensor, Tensor]:
    """Return what is painted, (3, H, W), and where, (1, H, W).

    The colors around the object spread over it. The texture comes from the place of the image whose surroundings are
    most like those of the object. What is larger than any such place stays smooth.

    Args:
        image: (3, H, W), in [0, 1], float32.
        mask: (H, W), 1 for the object.
        patches: Largest number of places to copy from. Each fills what the ones before left open. 0 paints without
            texture.
    """
    longer = max(mask.shape)
    hole = grown((mask > 0.5).float()[None], MARGIN * longer)
    if not hole.any() or hole.all():
        return image, torch.zeros_like(hole)
    known = 1 - hole
    painted = spread_colors(known * image, known)
    texture = image - blurred(image, known, BLUR * longer)
    rim = grown(hole, RIM * longer) - hole
    missing = hole
    for _ in range(patches):
        shift = best_shift(image, known, missing, rim)
        if shift is None:
            break
        found = missing * moved(known, shift)
        painted = painted + found * moved(texture, shift)
        missing = missing - found
        if missing.sum() < 0.01 * hole.sum():
            break
    return painted.clamp(0, 1), hole


def spread_colors(colors: Tensor, known: Tensor) -> Tensor:
    """Fill what is not known with the colors around it.

    Means over ever larger squares of known pixels fill the holes, from coarse to fine (pull-push).

    Args:
        colors: (3, H, W), multiplied by `known`.
        known: (1, H, W), in [0, 1].
    """
    height, width = known.shape[-2:]
    if max(height, width) == 1:
        return colors / known.clamp(min=1e-3)
    padding = (0, width % 2, 0, height % 2)  # pixels beyond the border are not known
    means, shares = (F.avg_pool2d(F.pad(maps, padding), 2) for maps in (colors, known))
    coarse_known = (4 * shares).clamp(max=1)  # one known pixel of four is enough
    coarse = spread_colors(means * coarse_known / shares.clamp(min=1e-3), coarse_known)
    coarse = F.interpolate(coarse[None], scale_factor=2, mode="bilinear", align_corners=False)[0]
    return colors + (1 - known) * coarse[:, :height, :width]


def best_shift(image: Tensor, known: Tensor, missing: Tensor, rim: Tensor) -> tuple[int, int] | None:
    """Return (rows, columns) from missing pixels to those that fit best.

    A shift fits if it moves the rim to similar colors, and many of the missing pixels to known ones. None if no shift
    finds a known pixel.

    Args:
        image: (3, H, W).
        known: (1, H, W), 1 where the image may be copied.
        missing: (1, H, W), 1 where texture is missing.
        rim: (1, H, W), 1 for pixels around the hole.
    """
    height, width = known.shape[-2:]
    size = (2 * height, 2 * width)

    def spectrum(maps: Tensor) -> Tensor:
        return torch.fft.rfft2(maps, s=size)

    def at_shifts(fixed: Tensor, shifted: Tensor) -> Tensor:
        """Sum fixed(p) shifted(p + d) over p, for each shift d."""
        return torch.fft.irfft2(fixed.conj() * shifted, s=size)

    rim = rim * known
    source = spectrum(known)
    compared = at_shifts(spectrum(rim), source).clamp(min=0)
    distance = at_shifts(spectrum(rim * image.square().sum(0, keepdim=True)), source)
    distance = distance - 2 * at_shifts(spectrum(rim * image), spectrum(known * image)).sum(0, keepdim=True)
    distance = distance + at_shifts(spectrum(rim), spectrum(known * image.square().sum(0, keepdim=True)))
    found = at_shifts(spectrum(missing), source) / missing.sum()
    spread = (rim * (image - (rim * image).sum((1, 2), keepdim=True) / rim.sum()).square()).sum() / rim.sum()
    cost = distance.clamp(min=0) / compared.clamp(min=1) + 4 * (spread + 1e-4) * (1 - found)
    cost = torch.where((compared < 0.3 * rim.sum()) | (found < 0.02), torch.inf, cost)[0]
    if not cost.isfinite().any():
        return None
    row, column = divmod(int(cost.argmin()), size[1])
    return row - size[0] * (row >= height), column - size[1] * (column >= width)


def moved(maps: Tensor, shift: tuple[int, int]) -> Tensor:
    """Return maps(p + shift), 0 where that is outside."""
    height, width = maps.shape[-2:]
    rows, columns = shift
    padded = F.pad(maps, (width, width, height, height))
    return padded[:, height + rows : 2 * height + rows, width + columns : 2 * width + columns]


def grown(mask: Tensor, distance: float) -> Tensor:
    """Widen a mask (1, H, W) by a distance in pixels."""
    reach = max(1, round(distance))
    side = 2 * reach + 1
    # Rows, then columns: the same result as squares in a fraction of the time.
    mask = F.max_pool2d(mask, (side, 1), stride=1, padding=(reach, 0))
    return F.max_pool2d(mask, (1, side), stride=1, padding=(0, reach))


def blurred(image: Tensor, known: Tensor, side: float) -> Tensor:
    """Return the mean of the known pixels around each pixel."""
    reach = max(1, round(side / 2))
    means = []
    for maps in (known * image, known):
        maps = F.avg_pool2d(maps, (2 * reach + 1, 1), stride=1, padding=(reach, 0))
        means.append(F.avg_pool2d(maps, (1, 2 * reach + 1), stride=1, padding=(0, reach)))
    return means[0] / means[1].clamp(min=1e-3)
