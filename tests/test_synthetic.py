import numpy as np
import pytest
from PIL import ImageFilter
from skimage.filters import threshold_otsu
from skimage.measure import label

from unconceal.data.sources import SYNTHETIC_KINDS
from unconceal.data.synthetic import KINDS, generate
from unconceal.utils.errors import UserError


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


def test_the_command_offers_every_kind():
    assert tuple(KINDS) == SYNTHETIC_KINDS


def test_equal_arguments_give_equal_images_in_any_order(kind):
    first = [generate(kind, 48, 3, index) for index in (0, 1, 2)]
    again = [generate(kind, 48, 3, index) for index in (2, 1, 0)][::-1]
    for pair, other in zip(first, again, strict=True):
        assert [image.tobytes() for image in pair] == [image.tobytes() for image in other]


def test_seed_index_and_kind_change_the_image(kind):
    images = [generate(kind, 32, 0, 0), generate(kind, 32, 1, 0), generate(kind, 32, 0, 1)]
    images += [generate(other, 32, 0, 0) for other in KINDS if other != kind]
    assert len({image.tobytes() for image, _ in images}) == len(images)


@pytest.mark.parametrize("size", [32, 65, (33, 100), (128, 47)])
def test_sizes_modes_and_values(kind, size):
    height, width = (size, size) if isinstance(size, int) else size
    for index in range(3):
        image, mask = generate(kind, size, 0, index)
        assert (image.mode, mask.mode) == ("RGB", "L")
        assert image.size == mask.size == (width, height)
        assert set(np.unique(mask)) == {0, 255}
        assert np.asarray(image).std() > 4  # not one flat tone


def test_share_of_empty_masks(kind):
    for ratio, least, most in ((0, 0, 0), (0.5, 0.26, 0.74), (1, 1, 1)):
        is_empty = [generate(kind, 32, 0, i, ratio)[1].getbbox() is None for i in range(24)]
        assert least <= np.mean(is_empty) <= most


# What reveals the object is not its brightness.


def gray_object_and_surroundings(kind, index, reach, size=128):
    """Return gray values, the object, and all other pixels within `reach` of it."""
    image, mask = generate(kind, size, 0, index)
    is_object = np.asarray(mask) > 0
    near = (np.asarray(mask.filter(ImageFilter.MaxFilter(2 * reach + 1))) > 0) & ~is_object
    return np.asarray(image.convert("L")).astype(float), is_object, near


def test_a_threshold_does_not_find_the_object(kind):
    ious = []
    for index in range(6):
        gray, is_object, _ = gray_object_and_surroundings(kind, index, 1, size=256)
        bright = gray > threshold_otsu(gray)
        ious.append(max((side & is_object).sum() / (side | is_object).sum() for side in (bright, ~bright)))
    assert np.mean(ious) < 0.4


@pytest.mark.parametrize(("kind", "reach", "sign"), [("infrared", 4, 1), ("ultrasound", 8, -1)])
def test_objects_stand_out_from_their_surroundings(kind, reach, sign):
    differences = []
    for index in range(20):
        gray, is_object, near = gray_object_and_surroundings(kind, index, reach)
        differences.append(gray[is_object].mean() - gray[near].mean())
    assert sign * np.mean(differences) > 10


def test_camouflage_matches_in_tone_and_differs_in_direction():
    tones, turns = [], []
    for index in range(20):
        gray, is_object, near = gray_object_and_surroundings("camouflage", index, 8)
        down, across = np.gradient(gray)
        direction = (across + 1j * down) ** 2  # of twice the angle, so that opposite gradients agree
        tones.append(abs(gray[is_object].mean() - gray[near].mean()))
        turns.append(abs(np.angle(direction[is_object].mean() / direction[near].mean())))
    assert np.mean(tones) < 6
    assert np.mean(turns) > np.pi / 4


def test_polyps_have_the_colors_of_the_wall_and_are_shaded():
    colors, shades = [], []
    for index in range(20):
        image, mask = generate("polyp", 128, 0, index)
        gray, is_object, near = gray_object_and_surroundings("polyp", index, 12)
        red, green, _ = np.moveaxis(np.asarray(image).astype(float), 2, 0)
        colors.append(np.median((green / (red + 1))[is_object]) - np.median((green / (red + 1))[near]))
        rim = is_object & (np.asarray(mask.filter(ImageFilter.MinFilter(5))) == 0)
        shades.append(np.median(gray[is_object & ~rim]) - np.median(gray[rim]))
    assert np.mean(np.abs(colors)) < 0.1
    assert np.mean(shades) > 5  # the top faces the lamp


def test_defects_are_small_and_darker_than_their_surroundings_only():
    shares, differences, darker = [], [], []
    for index in range(40):
        gray, is_object, near = gray_object_and_surroundings("defect", index, 4, size=256)
        shares.append(is_object.mean())
        differences.append(gray[is_object].mean() - gray[near].mean())
        darker.append((gray[~is_object] < gray[is_object].mean()).sum() / is_object.sum())
    assert np.median(shares) < 0.01
    assert np.median(differences) < -8
    assert np.median(darker) > 3  # other pixels than those of the defect are as dark


def test_intricate_objects_have_thin_parts_and_holes():
    thin, holes = [], []
    for index in range(6):
        _, mask = generate("intricate", 256, 0, index)
        is_object = np.asarray(mask) > 0
        thick = np.asarray(mask.filter(ImageFilter.MinFilter(5)).filter(ImageFilter.MaxFilter(5))) > 0
        thin.append((is_object & ~thick).sum() / is_object.sum())
        holes.append(label(~is_object, connectivity=1).max() - 1)
    assert np.mean(thin) > 0.25  # of the area is narrower than 5 pixels
    assert np.median(holes) > 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fog", 64, 0, 0), "'fog'"),
        (("infrared", 16, 0, 0), "16x16"),
        (("infrared", 64, -1, 0), "seed -1"),
        (("infrared", 64, 0, 0, 1.5), "1.5"),
    ],
)
def test_wrong_arguments_are_errors(arguments, words):
    with pytest.raises(UserError, match=words):
        generate(*arguments)
