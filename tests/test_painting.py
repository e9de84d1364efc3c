"""Images with their object painted over."""

import numpy as np
import pytest
import torch
from common import noise

from unconceal.models.painting import best_shift, moved, paint_over, remove_object, spread_colors


def stripes(height=64, width=96):
    """Return vertical stripes of 8 pixels, (3, H, W), which get brighter to the bottom."""
    columns = (torch.arange(width) // 4 % 2).float()
    rows = torch.linspace(0.2, 0.6, height)
    return (rows[:, None] + 0.3 * columns).expand(3, height, width).contiguous()


def square(top=24, left=40, side=16, size=(64, 96)):
    mask = torch.zeros(size)
    mask[top : top + side, left : left + side] = 1
    return mask


def test_texture_and_shade_go_on_behind_the_object():
    clean, mask = stripes(), square()
    image = torch.where(mask > 0, 0.9, clean)
    painted, weight = paint_over(image, mask)
    assert weight[0][mask > 0].min() == 1
    assert (painted - clean).abs()[:, mask > 0].mean() < 0.05
    smooth = spread_colors((1 - weight) * image, 1 - weight)
    assert (smooth - clean).abs()[:, mask > 0].mean() > 0.1


def test_only_the_object_and_its_margin_change():
    image, mask = stripes(), square()
    _, weight = paint_over(image, mask)
    assert weight.max() == 1
    assert weight[0, :23].max() == weight[0, 41:].max() == weight[0, :, :39].max() == weight[0, :, 57:].max() == 0


def test_what_the_object_looks_like_does_not_matter():
    mask = square()
    painted = [paint_over(torch.where(mask > 0, value, stripes()), mask)[0] for value in (0.0, 1.0)]
    torch.testing.assert_close(*painted)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_is_painted_without_object_or_surroundings(value):
    image = stripes()
    _, weight = paint_over(image, torch.full((64, 96), value))
    assert not weight.any()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (33, 47)])
def test_any_size(size):
    mask = torch.zeros(size)
    mask[size[0] // 2, size[1] // 2] = 1
    image = torch.rand(3, *size)
    painted, weight = paint_over(image, mask)
    assert painted.shape == (3, *size)
    assert weight.shape == (1, *size)
    assert painted.isfinite().all()


def test_an_object_in_most_of_the_image_becomes_smooth():
    image, mask = stripes(), torch.ones(64, 96)
    mask[:, :4] = 0
    painted, weight = paint_over(image, mask)
    assert painted.isfinite().all()
    assert weight.mean() > 0.9


def test_best_shift_finds_the_copy():
    torch.manual_seed(0)
    image = torch.rand(3, 40, 50)
    image[:, 5:15, 30:40] = image[:, 20:30, 8:18]  # 15 rows up and 22 columns to the right
    missing, rim = square(23, 11, 4, (40, 50))[None], square(20, 8, 10, (40, 50))[None]
    known = 1 - missing
    assert best_shift(image, known, missing, rim - missing) == (-15, 22)
    torch.testing.assert_close(moved(image, (-15, 22))[:, 20:30, 8:18], image[:, 20:30, 8:18])


def test_moved_is_zero_outside():
    maps = torch.arange(6.0).view(1, 2, 3)
    assert moved(maps, (1, -1)).tolist() == [[[0, 3, 4], [0, 0, 0]]]
    assert torch.equal(moved(maps, (0, 0)), maps)


def test_colors_spread_over_holes():
    image = torch.rand(1, 1, 17).expand(3, 13, 17)  # each column has a color
    known = torch.ones(1, 13, 17)
    known[:, 4:9, 5:11] = 0
    filled = spread_colors(known * image, known)
    assert torch.equal(filled[:, :4], image[:, :4])
    assert (filled >= image.min() - 1e-6).all()
    assert (filled <= image.max() + 1e-6).all()
    known[:] = 0
    known[:, 12, 16] = 1
    torch.testing.assert_close(spread_colors(known * image, known), image[:, :, -1:].expand(3, 13, 17))


def test_large_images_keep_their_pixels_outside_the_object():
    image = noise(700, 600)
    mask = np.zeros((600, 700), np.float32)
    mask[200:300, 300:420] = 1
    removed = remove_object(image, mask)
    assert removed.dtype == np.float32
    pixels = np.asarray(image, dtype=np.float32) / 255
    np.testing.assert_allclose(removed[:150], pixels[:150], atol=1e-6)
    np.testing.assert_allclose(removed[:, :250], pixels[:, :250], atol=1e-6)
    assert np.abs(removed - pixels)[200:300, 300:420].mean() > 0.05
