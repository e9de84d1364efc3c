"""The random changes of training samples that came after the first ones of test_data.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from unconceal.data.targets import find_target, paste_target
from unconceal.data.transforms import TrainingSet, TransformRecipe, degrade, zoom
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor


ROWS, COLUMNS = np.indices((40, 56))
HIGHEST = SimpleNamespace(uniform=max, random=np.ones)
LOWEST = SimpleNamespace(uniform=min, random=np.zeros)


def test_older_recipes_keep_their_samples():
    # The numbers are those of the version before zoom, hue, blur and noise.
    pixels = np.dstack([ROWS * 6, COLUMNS * 4, np.full_like(ROWS, 90)]).astype(np.uint8)
    mask = np.uint8(255) * ((ROWS > 8) & (ROWS < 20) & (COLUMNS < 30))
    columns = {"image": [Image.fromarray(pixels)] * 2, "mask": [Image.fromarray(mask)] * 2}
    rows = Dataset.from_dict(columns, Features(image=ImageFeature(), mask=ImageFeature()))
    recipe = TransformRecipe(
        crop_size=32,
        horizontal_flip_probability=0.5,
        max_crop_ratio=0.2,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        sharpness=1.0,
        rotate_probability=0.7,
        max_rotation=30,
    )
    samples = TrainingSet(rows, UnconcealImageProcessor(size=48, do_normalize=False), recipe, seed=7)
    for (epoch, index), channels, num_object in (
        ((0, 0), [0.4472, 0.4402, 0.4342], 329),
        ((0, 1), [0.3605, 0.2775, 0.2763], 286),
        ((1, 0), [0.3306, 0.2811, 0.2433], 281),
        ((2, 1), [0.4800, 0.3683, 0.3797], 286),
    ):
        samples.set_epoch(epoch)
        sample = samples[index]
        assert sample["pixel_values"].mean((1, 2)).tolist() == pytest.approx(channels, abs=2e-3)
        assert sample["labels"].sum() == pytest.approx(num_object, abs=3)


def test_defaults_change_nothing():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    mask = image.convert("L")
    for seed in range(5):
        rng = np.random.default_rng(seed)
        assert zoom(image, mask, TransformRecipe(), rng) == (image, mask)
        assert degrade(image, TransformRecipe(), rng) is image


def test_image_and_mask_are_zoomed_together():
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56), dtype=np.uint8))
    recipe, sizes = TransformRecipe(min_zoom=0.5, max_zoom=2, max_stretch=1.5), []
    for seed in range(60):
        window, its_mask = zoom(mask.convert("RGB"), mask, recipe, np.random.default_rng(seed))
        assert window.size == its_mask.size
        sizes.append(window.size)
        seen, marked = np.asarray(window.convert("L")), np.asarray(its_mask)
        outside = seen != marked
        assert not marked[outside].any()  # background, of the mean color
        assert set(seen[outside]) <= {round(np.asarray(mask).mean())}
    widths, heights = np.transpose(sizes)
    zooms, stretches = np.sqrt(40 * 56 / widths / heights), widths / heights * 40 / 56
    assert 0.48 < zooms.min() < 0.6 < 1.7 < zooms.max() < 2.05
    assert 0.62 < stretches.min() < 0.75 < 1.4 < stretches.max() < 1.6
    assert 20 < (zooms < 1).sum() < 40  # a logarithmic scale


def test_zoom_cuts_out_a_window_anywhere():
    numbers = Image.fromarray((ROWS * 6).astype(np.uint8))
    recipe, first = TransformRecipe(min_zoom=2, max_zoom=2), set()
    for seed in range(40):
        window, _ = zoom(numbers.convert("RGB"), numbers, recipe, np.random.default_rng(seed))
        assert window.size == (28, 20)
        first.add(window.getpixel((0, 0))[0] // 6)
    assert min(first) <= 2 < 18 <= max(first)
    dot = Image.new("RGB", (1, 1))
    assert zoom(dot, dot.convert("L"), TransformRecipe(max_zoom=50), HIGHEST)[0].size == (1, 1)


def test_hue_turns_and_brightness_stays():
    red = Image.new("RGB", (4, 4), (200, 0, 0))
    third = TransformRecipe(hue=1 / 3)
    assert degrade(red, third, HIGHEST).getpixel((0, 0)) == pytest.approx((0, 200, 0), abs=8)
    assert degrade(red, third, LOWEST).getpixel((0, 0)) == pytest.approx((0, 0, 200), abs=8)
    gray = Image.new("RGB", (4, 4), (80, 80, 80))
    assert degrade(gray, third, HIGHEST).tobytes() == gray.tobytes()


def test_color_blur_and_noise():
    pixels = np.random.default_rng(0).integers(60, 200, (40, 40, 3), dtype=np.uint8)
    image, spread = Image.fromarray(pixels), pixels.std()

    def change(seed, **fields):
        return np.asarray(degrade(image, TransformRecipe(**fields), np.random.default_rng(seed))).astype(int)

    gray = [np.ptp(change(seed, gray_probability=0.5), axis=2).max() == 0 for seed in range(40)]
    assert 10 < sum(gray) < 30
    spreads = np.array([change(seed, blur_probability=0.5, max_blur=3).std() for seed in range(40)])
    assert spreads.max() == spread and spreads.min() < spread / 4
    assert 8 < (spreads == spread).sum() < 30
    added = np.array([(change(seed, noise=0.1) - pixels).std() for seed in range(20)])
    assert 0.08 * 255 < added.max() < 0.105 * 255 and added.min() < 0.03 * 255


SPOT = np.exp(-((ROWS - 20) ** 2 + (COLUMNS - 30) ** 2) / 8)  # a target of a few pixels with its halo


def make_frame(shade: int, with_target: bool) -> tuple[Image.Image, Image.Image]:
    """Draw an infrared image of one shade, 56x40, and its mask."""
    pixels = (shade + 100 * with_target * SPOT).round().astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB"), Image.fromarray(np.uint8(255) * (with_target & (SPOT > 0.5)))


def test_targets_are_pasted_with_their_halo():
    target = find_target(*make_frame(40, True), np.random.default_rng(0))
    assert target.excess.max() == pytest.approx(100, abs=1)
    assert target.mask.sum() == (SPOT > 0.5).sum()
    (scene, empty), places = make_frame(90, False), set()
    for seed in range(20):
        image, mask = paste_target(scene, empty, target, np.random.default_rng(seed))
        added, marked = np.asarray(image.convert("L"), int) - 90, np.asarray(mask) > 0
        gain = added.max() / 100
        assert 0.59 < gain < 1.31
        assert np.array_equal(added > 50 * gain, marked)  # the spot above half its height
        assert (added[~marked] > 5).sum() > 10  # the halo
        border = np.concatenate([added[0], added[-1], added[:, 0], added[:, -1]])
        assert added.min() == 0 and added[added > 0].sum() == pytest.approx(gain * 100 * SPOT.sum(), rel=0.15)
        places.add(tuple(np.argwhere(marked).mean(0).round()))
        assert border.max() < 100
    assert len(places) > 10
    assert not np.asarray(empty).any() and scene == make_frame(90, False)[0]  # the originals stay


def test_targets_are_not_pasted_on_others_nor_where_they_vanish():
    rng = np.random.default_rng(0)
    target = find_target(*make_frame(40, True), rng)
    scene, empty = make_frame(40, False)
    full = Image.new("L", scene.size, 255)
    assert paste_target(scene, full, target, rng) == (scene, full)
    loud = Image.fromarray(rng.integers(0, 2, (40, 56), dtype=np.uint8) * 255).convert("RGB")
    assert paste_target(loud, empty, target, rng) == (loud, empty)
    small = scene.crop((0, 0, 8, 8)), empty.crop((0, 0, 8, 8))
    assert paste_target(*small, target, rng) == small
    assert find_target(scene, empty, rng) is None
    assert find_target(scene.resize((300, 300)), full.resize((300, 300)), rng) is None  # not small


def make_samples(pairs, recipe: TransformRecipe, **options) -> TrainingSet:
    """Make a training set of images and masks."""
    images, masks = zip(*pairs, strict=True)
    features = Features(image=ImageFeature(), mask=ImageFeature())
    rows = Dataset.from_dict({"image": list(images), "mask": list(masks)}, features)
    return TrainingSet(rows, UnconcealImageProcessor(do_normalize=False, **options), recipe, seed=0)


def test_pasting_adds_targets_of_other_images():
    recipe = TransformRecipe(rotate90_probability=0, flip_probability=0, paste_probability=1, max_pastes=1)
    samples = make_samples([make_frame(90, False), make_frame(40, True)], recipe, do_resize=False)
    found = set()
    for epoch in range(20):
        samples.set_epoch(epoch)
        sample = samples[0]
        assert torch.equal(sample["labels"], samples[0]["labels"])  # by seed, epoch and index
        found.add(int(sample["labels"].sum()))
    assert found == {0, int((SPOT > 0.5).sum())}  # nothing to paste, or the other's target


def test_images_of_their_own_size_are_zoomed_within_it():
    recipe = TransformRecipe(rotate90_probability=0, flip_probability=0, min_zoom=2, max_zoom=2)
    samples = make_samples([make_frame(40, True)], recipe, do_resize=False)
    areas = []
    for epoch in range(20):
        samples.set_epoch(epoch)
        sample = samples[0]
        assert sample["pixel_values"].shape == (3, 40, 56) and sample["labels"].shape == (40, 56)
        areas.append(sample["labels"].sum() / (SPOT > 0.5).sum())
    assert 3 < max(areas) < 5 and min(areas) < 2  # twice as large, or cut off


def test_squares_beyond_an_image_are_filled_up():
    recipe = TransformRecipe(rotate90_probability=0, flip_probability=0, crop_size=48)
    samples, starts = make_samples([make_frame(40, True)], recipe, do_resize=False), set()
    for epoch in range(30):
        samples.set_epoch(epoch)
        sample = samples[0]
        assert sample["pixel_values"].shape == (3, 48, 48) and sample["labels"].shape == (48, 48)
        rows = (sample["pixel_values"][0].std(dim=1) > 1e-6).nonzero().flatten()
        if len(rows):
            starts.add(int(rows[0]))
        assert set(sample["labels"].unique().tolist()) <= {0, 1}
        assert sample["pixel_values"][0].min() == pytest.approx(40 / 255, abs=1e-6)
    assert len(starts) > 3  # the image is not always at the top
