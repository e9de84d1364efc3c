"""Cut-outs without a fringe of the old background."""

import builtins
import importlib.util
import logging

import numpy as np
import pytest
from PIL import Image

from unconceal.api import cutout
from unconceal.models import cutout as cutout_module
from unconceal.models.cutout import estimator, mask_to_image, object_colors


has_pymatting = importlib.util.find_spec("pymatting") is not None
needs_pymatting = pytest.mark.skipif(not has_pymatting, reason="pymatting, the extra cutout, is not installed")
RED, GREEN = (np.array(color, np.float32) for color in ((210, 30, 20), (20, 200, 40)))


@pytest.fixture
def scene():
    """Return a red disc on green, its opacity, and its true colors."""
    rows, columns = np.mgrid[:160, :200].astype(np.float32)
    mask = np.clip((60 - np.hypot(rows - 80, columns - 100)) / 10 + 0.5, 0, 1)
    colors = RED + np.stack([0 * rows, rows / 4, columns / 4], -1)
    mixed = mask[..., None] * colors + (1 - mask[..., None]) * GREEN
    return Image.fromarray(np.rint(mixed).astype(np.uint8)), mask, colors


def likely(opacity: np.ndarray) -> np.ndarray:
    """Return the mask of a network that cuts out with an opacity."""
    return np.where((opacity > 0) & (opacity < 1), 0.3 + 0.6 * opacity, opacity)


@pytest.fixture
def without_pymatting(monkeypatch):
    """Make `import pymatting` fail."""
    real_import = builtins.__import__

    def failing(name, *args, **kwargs):
        if name == "pymatting":
            raise ModuleNotFoundError("No module named 'pymatting'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", failing)
    estimator.cache_clear()
    yield
    estimator.cache_clear()


def fringe(image, mask, colors):
    """Return the mean error at the soft edge of a cut-out on white."""
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    true = mask[..., None] * colors + (1 - mask[..., None]) * 255
    return np.abs(np.asarray(on_white) - true)[(mask > 0) & (mask < 1)].mean()


@needs_pymatting
def test_soft_pixels_lose_the_old_background(scene):
    image, mask, colors = scene
    plain, found = image.copy(), cutout(image, likely(mask))
    plain.putalpha(mask_to_image(mask))
    assert fringe(plain, mask, colors) > 15
    assert fringe(found, mask, colors) < 2
    before, after = np.asarray(image), np.asarray(found)
    np.testing.assert_allclose(after[..., 3] / 255, mask, atol=0.006)
    solid = (after[..., 3] == 255) | (after[..., 3] == 0)
    np.testing.assert_array_equal(after[solid][:, :3], before[solid])
    assert (after[~solid][:, :3] != before[~solid]).any()


def test_doubt_around_an_object_is_no_fog(monkeypatch):
    monkeypatch.setattr(cutout_module, "estimator", lambda: None)
    levels = np.array([[0, 0.1, 0.3, 0.45, 0.6, 0.75, 0.9, 0.95, 1]], np.float32)
    found = cutout(Image.new("RGB", (9, 1)), levels).getchannel("A")
    np.testing.assert_allclose(np.asarray(found)[0] / 255, [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1], atol=0.005)


def test_masks_outside_0_to_1_are_no_image():
    assert np.asarray(mask_to_image(np.array([[0, 1.0001]], np.float32))).tolist() == [[0, 255]]
    assert np.asarray(mask_to_image(np.array([[0, 255]], np.uint8))).tolist() == [[0, 255]]
    for values in ([0, np.nan], [0, np.inf], [-0.1, 1], [0, 255]):
        with pytest.raises(ValueError, match=r"values from .* expected \[0, 1\]; scale it"):
            mask_to_image(np.array([values], np.float32))


def test_hard_masks_keep_every_color(scene, monkeypatch):
    image, mask, _ = scene
    monkeypatch.setattr(cutout_module, "estimator", lambda: pytest.fail("nothing must be estimated"))
    for hard in ((mask > 0.5).astype(np.float32), np.zeros_like(mask), np.ones_like(mask)):
        np.testing.assert_array_equal(np.asarray(cutout(image, hard))[..., :3], np.asarray(image))


@needs_pymatting
def test_blocks_are_as_good_as_the_whole(scene, monkeypatch):
    image, mask, colors = scene
    monkeypatch.setattr(cutout_module, "BLOCK_SIZE", 64)
    monkeypatch.setattr(cutout_module, "BLOCK_MARGIN", 24)
    seen = []
    real = estimator()
    monkeypatch.setattr(cutout_module, "estimator", lambda: lambda *maps: seen.append(maps[1].shape) or real(*maps))
    assert fringe(cutout(image, likely(mask)), mask, colors) < 2
    assert len(seen) > 4
    assert max(height * width for height, width in seen) <= (64 + 2 * 24) ** 2


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_tiny_images(size):
    alpha = np.full(size, 128, np.uint8)
    assert object_colors(np.zeros((*size, 3), np.uint8), alpha).shape == (*size, 3)


def test_without_the_extra_one_line_says_so(scene, without_pymatting, caplog):
    image, mask, _ = scene
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            plain = cutout(image, mask)
    np.testing.assert_array_equal(np.asarray(plain)[..., :3], np.asarray(image))
    (line,) = (record.getMessage() for record in caplog.records if record.name == cutout_module.__name__)
    assert "No module named 'pymatting'" in line
    assert line.endswith("; pip install pymatting")
    assert "\n" not in line
