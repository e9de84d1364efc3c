import io
import time

import numpy as np
import pytest
from PIL import Image, ImageFilter
from skimage.measure import label
from skimage.morphology import binary_opening

from unconceal.data import KINDS, generate, otsu_iou
from unconceal.utils.errors import UserError


# Twice and more what is measured over 100 pictures at 256; real BUSI masks give about 0.13, real SIRST masks 0.03.
OTSU_BOUNDS = {"camouflage": 0.2, "ultrasound": 0.2, "infrared": 0.05, "dichotomous": 0.3, "intricate": 0.4}


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


def test_same_arguments_same_picture(kind):
    first = [generate(kind, 48, 3, index) for index in (0, 1, 2)]
    again = [generate(kind, 48, 3, index) for index in (2, 1, 0)][::-1]
    for (picture, mask), (other_picture, other_mask) in zip(first, again, strict=True):
        assert picture.tobytes() == other_picture.tobytes()
        assert mask.tobytes() == other_mask.tobytes()


def test_seed_index_and_kind_change_the_picture(kind):
    pictures = [generate(kind, 32, 0, 0), generate(kind, 32, 1, 0), generate(kind, 32, 0, 1)]
    pictures += [generate(other, 32, 0, 0) for other in KINDS if other != kind]
    assert len({picture.tobytes() for picture, _ in pictures}) == len(pictures)


@pytest.mark.parametrize("size", [32, 65, (33, 100), (128, 47)])
def test_sizes_modes_and_values(kind, size):
    height, width = (size, size) if isinstance(size, int) else size
    for index in range(3):
        picture, mask = generate(kind, size, 0, index)
        assert (picture.mode, mask.mode) == ("RGB", "L")
        assert picture.size == mask.size == (width, height)
        assert set(np.unique(mask)) == {0, 255}
        assert np.asarray(picture).std() > 4  # not one flat tone


def test_empty_share(kind):
    shares = [
        np.mean([generate(kind, 32, 0, i, ratio)[1].getbbox() is None for i in range(24)]) for ratio in (0, 0.5, 1)
    ]
    assert shares[0] == 0
    assert 0.25 < shares[1] < 0.75
    assert shares[2] == 1


def test_a_threshold_does_not_find_it(kind):
    ious = [otsu_iou(*generate(kind, 256, 0, index)) for index in range(12)]
    assert np.mean(ious) < OTSU_BOUNDS[kind]


def grey_and_surroundings(kind, index, reach):
    """Grey values, the object, and what lies within `reach` pixels of it."""
    picture, mask = generate(kind, 128, 0, index)
    truth = np.asarray(mask) > 0
    near = (np.asarray(mask.filter(ImageFilter.MaxFilter(2 * reach + 1))) > 0) & ~truth
    return np.asarray(picture.convert("L")).astype(float), truth, near


# The scenes can be learnt: what shows the object is there, though it is not brightness over the whole picture.


def test_infrared_targets_are_small_and_stand_out_nearby():
    brighter = []
    for index in range(20):
        grey, truth, near = grey_and_surroundings("infrared", index, 4)
        assert 1 <= truth.sum() <= 3 * np.pi * 5.5**2
        brighter.append(grey[truth].mean() - grey[near].mean())
    assert np.mean(brighter) > 10


def test_ultrasound_lesions_are_darker_than_what_is_beside_them():
    darker = []
    for index in range(20):
        grey, truth, near = grey_and_surroundings("ultrasound", index, 8)
        darker.append(grey[near].mean() - grey[truth].mean())
    assert np.mean(darker) > 10


def test_camouflage_matches_in_tone_and_differs_in_direction():
    tones, turns = [], []
    for index in range(20):
        grey, truth, near = grey_and_surroundings("camouflage", index, 8)
        down, across = np.gradient(grey)
        direction = (across + 1j * down) ** 2  # of the double angle, so that opposite gradients agree
        tones.append(abs(grey[truth].mean() - grey[near].mean()))
        turns.append(abs(np.angle(direction[truth].mean() / direction[near].mean())))
    assert np.mean(tones) < 6
    assert np.mean(turns) > np.pi / 4


def test_intricate_things_have_thin_parts_and_holes_and_a_colour_of_their_own():
    thin, holes, tones, tints = [], [], [], []
    for index in range(10):
        picture, mask = generate("intricate", 256, 0, index)
        colours, truth = np.asarray(picture).astype(float), np.asarray(mask) > 0
        thick = np.asarray(mask.filter(ImageFilter.MinFilter(5)).filter(ImageFilter.MaxFilter(5))) > 0
        thin.append((truth & ~thick).sum() / truth.sum())
        holes.append(label(~truth, connectivity=1).max() - 1)
        difference = colours[truth].mean(0) - colours[~truth].mean(0)
        tones.append(abs(difference.mean()))
        tints.append(np.ptp(difference))
    assert np.mean(thin) > 0.25  # of its area, narrower than 5 pixels
    assert np.median(holes) > 10
    assert np.mean(tones) < 25
    assert np.mean(tints) > 40


def test_intricate_lines_are_two_pixels_wide_in_a_picture_of_512():
    shares = []
    for index in range(3):
        truth = np.asarray(generate("intricate", 512, 0, index)[1]) > 0
        shares.append((truth & ~binary_opening(truth, np.ones((2, 2)))).sum() / truth.sum())
    assert np.mean(shares) < 0.05  # but for the corners of slanting lines


def test_fast_enough():
    start = time.process_time()
    for kind in KINDS:
        generate(kind, 128, 0, 0)
    assert time.process_time() - start < 2  # about 0.1 s on one core; the bound only catches a blunder


def test_png_keeps_every_value(kind):
    picture, _ = generate(kind, 40, 0, 0)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    assert Image.open(buffer).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fog", 64, 0, 0), "'fog'"),
        (("infrared", 16, 0, 0), "16x16"),
        (("infrared", 64, -1, 0), "seed -1"),
        (("infrared", 64, 0, 0, 1.5), "1.5"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(UserError, match=words):
        generate(*arguments)
