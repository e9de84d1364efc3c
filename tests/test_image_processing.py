"""Reading images of every kind, `pixel_values`, and masks from logits."""

import io
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from unconceal.data.image_files import read_image
from unconceal.models import reading
from unconceal.models.image_processing_unconceal import NonFiniteLogits, UnconcealImageProcessor
from unconceal.models.reading import (
    UnclearMask,
    prediction_levels,
    srgb_profile,
    to_mask,
    to_rgb,
    white_of_predictions,
)
from unconceal.utils.errors import UserError


RAW = {"do_resize": False, "do_rescale": False, "do_normalize": False}


def pixels(image):
    return np.asarray(image).tolist()


def random_rgb(height=20, width=30):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- reading: to_rgb and to_mask ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16), [0, 0, 1, 1, 128, 255]),
        (np.array([[0, 257, 65535]], ">u2"), [0, 1, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),
        (np.array([[-100, 0, 155]], np.int32), [0, 100, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 7, 200]], np.float32), [0, 7, 200]),
        (np.array([[0, 257, 65535]], np.float32), [0, 1, 255]),
        (np.array([[-1, 0, 3]], np.float32), [0, 64, 255]),
        (np.full((1, 2), -5, np.float32), [0, 0]),
    ],
)
def test_deep_gray_is_scaled(values, expected):
    image = Image.fromarray(values)
    assert image.mode.startswith(("I", "F"))
    assert pixels(to_rgb(image)) == [[[value] * 3 for value in expected]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_rejected(bad, tmp_path):
    words = "got 1 of 6 pixel values that are NaN or infinite, expected finite numbers; fill them in"
    gray = np.array([[0, 0.5, 1], [0, bad, 1]], np.float32)
    path = tmp_path / "bad.tiff"
    Image.fromarray(gray).save(path)
    with pytest.raises(UserError, match=words):  # what `unconceal segment` reports for the file
        read_image(path)
    processor = UnconcealImageProcessor(size=8)
    for same in (gray, gray.astype(np.float16)[None], torch.from_numpy(gray).bfloat16(), Image.open(path), str(path)):
        with pytest.raises(ValueError, match=words):
            processor(same)
        with pytest.raises(ValueError, match="got 1 of 6 pixel values that are NaN or infinite"):
            processor(random_rgb(), segmentation_maps=same)
    color = np.zeros((2, 4, 4, 3), np.float32)
    color[1, 2, 1, 0] = bad
    for same in (color, list(color), torch.from_numpy(color).permute(0, 3, 1, 2)):
        with pytest.raises(ValueError, match="got 1 of 48 pixel values that are NaN or infinite"):
            processor(same)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_files(suffix):
    values = np.array([[0, 2570, 65535]], np.uint16)
    file = io.BytesIO(b"P5 3 1 65535\n" + values.byteswap().tobytes())
    if suffix != "pgm":
        file = io.BytesIO()
        Image.fromarray(values).save(file, suffix)
    assert pixels(to_rgb(Image.open(file))) == [[[0] * 3, [10] * 3, [255] * 3]]


def test_transparency_is_white_in_images_and_black_in_masks():
    rgba = np.array([[[255, 0, 0, 255], [0, 0, 255, 0], [0, 0, 0, 51]]], np.uint8)
    image = Image.fromarray(rgba)
    assert pixels(to_rgb(image)) == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert pixels(to_rgb(image.convert("RGBa")))[0][:2] == [[255, 0, 0], [255, 255, 255]]
    white_on_clear = Image.fromarray(np.array([[[255, 255, 255, 255], [255, 255, 255, 0]]], np.uint8))
    assert pixels(to_mask(white_on_clear)) == [[255, 0]]
    assert pixels(to_mask(image)) == [[255, 0, 0]]


def test_floats_may_leave_their_range_by_resizing():
    image = random_rgb(8, 8).astype(np.float32) / 255
    processor = UnconcealImageProcessor(size={"height": 8, "width": 8})
    for low, high in ((0, 1.0000001), (-1e-4, 1), (-0.05, 1.05)):
        given = image.copy()
        given[0, 0], given[0, 1] = low, high
        clipped = Image.fromarray(np.rint(given.clip(0, 1) * 255).astype(np.uint8))
        for one in (given, given[..., 0]):
            expected = processor(clipped if one.ndim == 3 else clipped.getchannel(0)).pixel_values
            assert torch.equal(processor(one).pixel_values, expected)
        plain = processor(given, do_rescale=False, do_normalize=False).pixel_values
        assert plain.max() == 1, "floats in [0, 1] keep their range"
    with pytest.raises(ValueError, match="color image with values from -0.2"):
        processor(image - 0.2)


def test_transparent_gray_of_16_bits_is_white(tmp_path):
    levels = np.array([[700, 0], [65535, 700]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "x.png", transparency=700)
    with Image.open(tmp_path / "x.png") as image:
        assert np.asarray(to_rgb(image))[..., 0].tolist() == [[255, 0], [255, 255]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_resize": "no"}, "got do_resize='no', expected true or false"),
        ({"do_rescale": 1}, "got do_rescale=1, expected true or false"),
        ({"resample": False}, "got resample=False, expected one of"),
        ({"size": {"height": 64.5, "width": 64}}, "got size="),
        ({"size": {"height": "64", "width": 64}}, "got size="),
        ({"size": {"height": -64, "width": 64}}, "got size="),
    ],
    ids=str,
)
def test_options_of_other_types_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        UnconcealImageProcessor(**options)(Image.new("RGB", (8, 8)))


SOFT = np.arange(0, 256, 5, dtype=np.uint8)[None]  # antialiased edges have many levels
IDS = np.array([[0, 1, 2]], np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.float32])
@pytest.mark.parametrize("value", [1, 2, 38, 100, 255, 300, 65535])
def test_one_value_beside_0_is_object(value, dtype):
    if value > 255 and dtype == np.uint8:
        return
    for values, expected in (([[0, value, 0]], [[0, 255, 0]]), ([[value, value]], [[255, 255]]), ([[0, 0]], [[0, 0]])):
        assert pixels(to_mask(np.array(values, dtype))) == expected
        assert pixels(to_mask(Image.fromarray(np.array(values, dtype if dtype != np.int64 else np.int32)))) == expected


@pytest.mark.parametrize(
    "values",
    [
        *([0, 1, 2], [0, 2, 1, 1], [1, 2, 3], [0, 38, 75, 113], [0, 1, 2, 4]),
        *([0, 15, 255], [0, 3, 20, 255], [*range(21), 255]),  # classes of PASCAL VOC and their border
        *([*range(64), 255], np.array([*range(21), 65535], np.int32)),
        *(np.array([0, 300, 600], np.uint16), np.array([0, 1, 2], np.float32), np.arange(9)),
    ],
)
def test_ids_of_classes_are_refused(values):
    values = np.array(values)[None]
    with pytest.raises(UnclearMask, match=r"holds the values .* a map of classes, .* --foreground 1,2"):
        to_mask(values if values.dtype != np.int64 else values.astype(np.uint8))
    assert pixels(to_mask(values, "any")) == [[255 * (value != 0) for value in values[0]]]
    assert pixels(to_mask(values, [1, 20])) == [[255 * (value in (1, 20)) for value in values[0]]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (SOFT, SOFT),
        (SOFT[:, :20], SOFT[:, :20]),  # a dark one
        (np.arange(40, dtype=np.uint8)[None], np.arange(40)[None]),  # nothing found, by `unconceal segment`
        (np.array([[0, 128, 255]], np.uint8), [[0, 128, 255]]),
        (np.array([[0, 64, 255]], np.uint8), [[0, 64, 255]]),  # of IRSTD-1k
        (np.array([[0, 64, 128, 191, 255]], np.uint8), [[0, 64, 128, 191, 255]]),
        (np.array([[0, 1, 2, 253, 254, 255]], np.uint8), [[0, 1, 2, 253, 254, 255]]),  # JPEG
        (np.array([[0, 32767, 32768, 65535]], np.uint16), [[0, 127, 128, 255]]),
        (np.array([[0, 100, 255]], np.int32), [[0, 100, 255]]),
        (np.array([[0, 0.2]], np.float32), [[0, 51]]),
        (np.array([[-0.0005, 0.2, 1.0005]], np.float32), [[0, 51, 255]]),  # rounding of a resize
        (np.array([[0, 0.5, 127.6, 255]], np.float32), [[0, 0, 128, 255]]),
        (np.array([[0, 0.5, 1]], np.float64), [[0, 128, 255]]),
        (np.array([[False, True]]), [[0, 255]]),
    ],
)
def test_gray_levels_stay_soft(values, expected):
    assert pixels(to_mask(values)) == np.asarray(expected).tolist()
    if values.dtype != np.float64:
        assert pixels(to_mask(Image.fromarray(values))) == np.asarray(expected).tolist()


@pytest.mark.parametrize("values", [[-1, 0], [0, 70000]])
def test_masks_out_of_range_are_refused(values):
    for dtype in (np.int32, np.float32):
        with pytest.raises(UnclearMask, match=f"values from {min(values)} to {max(values)}, expected 0 to 65535"):
            to_mask(np.array([values], dtype))


@pytest.mark.parametrize("highest", [1.002, 1.05, 100.5, 300.5])
def test_fractions_of_an_unknown_white_are_refused(highest):
    values = np.array([[0, 0.3, 0.9, highest]], np.float32)
    for mask in (values, Image.fromarray(values)):
        with pytest.raises(UnclearMask, match=f"fractions up to {highest:g}, .* expected \\[0, 1\\]; scale it"):
            to_mask(mask)


def test_a_mask_is_its_brightest_channel():
    colors = np.array([[[255, 0, 0], [255, 0, 0], [0, 0, 0]]], np.uint8)
    assert pixels(to_mask(Image.fromarray(colors))) == [[255, 255, 0]]
    shades = np.zeros((*SOFT.shape, 3), np.uint8)
    shades[..., 0] = SOFT
    assert pixels(to_mask(Image.fromarray(shades))) == SOFT.tolist()
    colors[0, 1] = 0, 64, 0
    with pytest.raises(UnclearMask, match="values 0, 1, 2"):
        to_mask(Image.fromarray(colors))
    assert pixels(to_mask(Image.fromarray(colors), "any")) == [[255, 255, 0]]


def test_a_color_palette_is_a_map_of_classes():
    image = Image.new("P", (3, 1))
    image.putpalette([90, 0, 0, 0, 0, 64, 0, 0, 0])
    image.putdata([0, 1, 2])
    with pytest.raises(UnclearMask, match="values 0, 1, 2"):
        to_mask(image)
    assert pixels(to_mask(image, "any")) == [[0, 255, 255]]
    assert pixels(to_mask(image, [2])) == [[0, 0, 255]]
    image.putdata([0, 1, 1])
    assert pixels(to_mask(image)) == [[0, 255, 255]]
    image.putpalette([100, 100, 100, 0, 0, 0, 255, 255, 255])  # grays are values
    image.putdata([0, 1, 2])
    assert pixels(to_mask(image)) == [[100, 0, 255]]


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 64, 64)])
def test_a_palette_that_a_program_made_keeps_background_and_object(color):
    expected = np.zeros((4, 6), np.uint8)
    expected[:3, :5] = 255
    drawn = Image.fromarray(np.where(expected[..., None], np.array(color, np.uint8), 0).astype(np.uint8))
    made = [drawn.quantize(2), drawn.quantize(2, Image.Quantize.MAXCOVERAGE), drawn.convert("P", palette=1)]
    assert 0 in [image.getpixel((0, 0)) for image in made]  # the object
    for hidden in ((0, 0, 0), (255, 255, 255)):
        image = Image.fromarray((expected == 0).astype(np.uint8)).convert("P")
        image.putpalette(color + hidden)
        file = io.BytesIO()
        image.save(file, "PNG", transparency=1)
        made.append(Image.open(file))
    for image in made:
        assert image.mode == "P"
        assert pixels(to_mask(image)) == pixels(to_mask(image, "any")) == expected.tolist()


def test_transparency_is_the_mask_of_a_cut_out():
    rgba = np.dstack([random_rgb(4, 40) // 4, np.tile(np.arange(0, 200, 5, dtype=np.uint8), (4, 1))])
    assert pixels(to_mask(Image.fromarray(rgba))) == rgba[..., 3].tolist()
    rgba[..., :3] = 0  # all drawn in black
    assert pixels(to_mask(Image.fromarray(rgba))) == rgba[..., 3].tolist()


@pytest.mark.parametrize(
    ("masks", "white"),
    [
        ([[0, 1], [0, 0]], 1),
        ([[0, 0], [0, 0]], 255),
        ([[0, 1], [0, 200], [3, 4]], 255),  # the first is dark
        ([[0, 1], [0, 255]], 255),
        ([[0, 38], [38, 38]], 38),
    ],
)
def test_white_of_predictions_is_found_in_the_whole_set(masks, white):
    masks = [np.array([values], np.uint8) for values in masks]
    assert white_of_predictions(masks) == white
    deep = [mask.astype(np.int32) for mask in masks]
    assert white_of_predictions(deep) == white
    assert white_of_predictions([*deep, np.array([[0, 5, 60000]], np.int32)]) == 65535


def test_white_of_predictions_needs_few_masks():
    def masks():
        yield SOFT
        raise AssertionError("not needed")

    assert white_of_predictions(masks()) == 255


def test_dark_predictions_are_named(caplog):
    assert white_of_predictions([IDS]) == 255
    assert "no prediction has a value above 2 of 255; if the values 0, 1, 2 are ids of classes" in caplog.text
    for highest in (1000, 10000):
        deep = np.linspace(0, highest, 6).astype(np.int32)[None]
        assert white_of_predictions([deep, deep // 2]) == 65535
        assert f"no prediction has a value above {highest} of 65535" in caplog.text
    caplog.clear()
    assert white_of_predictions([deep, deep * 4]) == 65535
    assert not caplog.text


def test_predictions_in_colors_of_classes_are_refused():
    colors = np.array([[[0, 0, 0], [200, 0, 0], [0, 200, 0]]], np.uint8)
    with pytest.raises(UnclearMask, match="a map of classes"):
        prediction_levels(Image.fromarray(colors))
    assert pixels(prediction_levels(Image.fromarray(colors[:, :2]))) == [[0, 200]]
    scale = Image.new("P", (100, 1))
    scale.putpalette(sum(((2 * i, 0, 255 - 2 * i) for i in range(100)), ()))
    scale.putdata(range(100))
    assert pixels(prediction_levels(scale)) == [list(range(100))]


@pytest.mark.parametrize("mode", ["LA", "La", "PA"])
def test_gray_and_palette_with_alpha(mode):
    image = Image.new("L", (2, 1), 90).convert("P" if mode == "PA" else "L")
    image.putalpha(Image.fromarray(np.array([[255, 0]], np.uint8)))
    image = image.convert(mode)
    assert image.mode == mode
    assert pixels(to_rgb(image)) == [[[90, 90, 90], [255, 255, 255]]]


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    assert pixels(to_rgb(image)) == [[[10, 20, 30], [200, 0, 0]]]
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0)
    assert pixels(to_rgb(Image.open(file))) == [[[255, 255, 255], [200, 0, 0]]]


def test_opaque_images_keep_every_value():
    image = Image.fromarray(random_rgb())
    opaque = image.copy()
    opaque.putalpha(255)
    assert to_rgb(opaque) == image
    for mode in ("1", "CMYK", "HSV"):
        assert to_rgb(image.convert(mode)) == image.convert(mode).convert("RGB")


def test_exif_orientation_by_pixel():
    upright = random_rgb(2, 3)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    Image.fromarray(np.rot90(upright).copy()).save(file, "PNG", exif=exif)
    image = Image.open(file)
    rgb = to_rgb(image)
    np.testing.assert_array_equal(np.asarray(rgb), upright)
    np.testing.assert_array_equal(np.asarray(to_rgb(rgb)), upright)  # not turned twice
    np.testing.assert_array_equal(np.asarray(to_mask(image, "any")), np.full((2, 3), 255))


@pytest.mark.parametrize("exif", [b"no header", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\x01\0\x12\x01\x02"])
def test_damaged_exif_leaves_the_image_as_stored(exif):
    stored = random_rgb(2, 3)
    file = io.BytesIO()
    Image.fromarray(stored).save(file, "PNG", exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(np.asarray(to_rgb(to_rgb(Image.open(file)))), stored)
    assert to_mask(Image.open(file), "any").size == (3, 2)


# ---- color profiles, pages -----------------------------------------------------------------------------------------


def swapped_profile() -> bytes:
    """Return a profile of sRGB with red and green exchanged."""
    profile = bytearray(srgb_profile())
    tags = {bytes(profile[i : i + 4]): i + 4 for i in range(132, 132 + 12 * profile[131], 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    profile[red : red + 8], profile[green : green + 8] = profile[green : green + 8], profile[red : red + 8]
    return bytes(profile)


def gray_profile() -> bytes:
    """Return a profile of gray levels in proportion to light."""
    head = bytearray(srgb_profile()[:128])
    head[16:20] = b"GRAY"
    sizes = {b"desc": None, b"wtpt": None, b"kTRC": b"curv" + bytes(8)}
    whole = srgb_profile()
    for i in range(132, 132 + 12 * whole[131], 12):
        name, start, size = whole[i : i + 4], *(int.from_bytes(whole[i + j : i + j + 4]) for j in (4, 8))
        if name in (b"desc", b"wtpt"):
            sizes[name] = whole[start : start + size]
    table, data, place = len(sizes).to_bytes(4), b"", 128 + 4 + 12 * len(sizes)
    for name, tag in sizes.items():
        table += name + (place + len(data)).to_bytes(4) + len(tag).to_bytes(4)
        data += tag + bytes(-len(tag) % 4)
    head[:4] = (128 + len(table) + len(data)).to_bytes(4)
    return bytes(head) + table + data


def stored(image, profile, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind, icc_profile=profile)
    return Image.open(file)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_an_embedded_profile_is_applied(kind):
    red = Image.new("RGB", (80, 72), (220, 30, 40))
    image = stored(red, swapped_profile(), kind)
    seen = to_rgb(image)
    assert np.abs(np.asarray(seen, int) - (30, 220, 40)).max() <= 2
    assert to_rgb(seen) == seen  # not converted twice
    transparent = red.copy()
    transparent.putalpha(Image.new("L", red.size, 255))
    transparent.putpixel((0, 0), (0, 0, 0, 0))
    seen = to_rgb(stored(transparent, swapped_profile()))
    assert seen.getpixel((0, 0)) == (255, 255, 255)
    assert np.abs(np.array(seen.getpixel((5, 5))) - (30, 220, 40)).max() <= 2
    values = UnconcealImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)(image).pixel_values
    assert values[0, 1].min() > values[0, 0].max() + 100


def test_gray_of_8_and_16_bits_follows_its_profile():
    levels = np.array([[0, 55, 188, 255]], np.uint8)
    for values in (levels, levels.astype(np.uint16) * 257):
        seen = np.asarray(to_rgb(stored(Image.fromarray(values), gray_profile())), int)
        assert (seen == seen[..., :1]).all()
        assert seen[0, [0, 3], 0].tolist() == [0, 255]
        assert abs(seen[0, 1, 0] - 128) < 3  # 55 of 255 parts of the light look half as bright
    pair = Image.fromarray(levels)
    pair.putalpha(Image.new("L", pair.size, 255))
    assert abs(to_rgb(stored(pair, gray_profile())).getpixel((1, 0))[0] - 128) < 3


def test_srgb_images_keep_every_value():
    image = Image.fromarray(random_rgb())
    other_maker = bytearray(srgb_profile())
    other_maker[24:36] = b"otherdate!!!"
    for profile in (srgb_profile(), bytes(other_maker)):
        np.testing.assert_array_equal(np.asarray(to_rgb(stored(image, profile))), random_rgb())


@pytest.mark.parametrize("profile", [b"damaged", srgb_profile()[:200], gray_profile()])
def test_an_unusable_profile_is_ignored_and_named(profile, caplog):
    reading._transform.cache_clear()
    image = Image.fromarray(random_rgb())
    np.testing.assert_array_equal(np.asarray(to_rgb(stored(image, profile))), random_rgb())
    assert "an embedded color profile cannot be used" in caplog.text
    assert "\n" not in caplog.messages[0]


def test_masks_have_no_color_profile():
    mask = Image.fromarray(SOFT)
    assert pixels(to_mask(stored(mask, gray_profile()))) == SOFT.tolist()


def test_outputs_say_that_they_are_srgb():
    tagged = reading.tag_srgb(Image.new("RGB", (4, 4), "red"))
    for kind in ("PNG", "TIFF"):
        file = io.BytesIO()
        tagged.save(file, kind)
        profile = ImageCms.ImageCmsProfile(io.BytesIO(Image.open(file).info["icc_profile"]))
        assert "sRGB" in ImageCms.getProfileDescription(profile)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_page_is_used_and_said_once(kind, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    reading._said.clear()
    pages = [Image.new("RGB", (20, 10), color) for color in ("black", "white")]
    for _ in range(2):
        pages[0].save(tmp_path / "pages", kind, save_all=True, append_images=pages[1:])
        assert to_rgb(Image.open(tmp_path / "pages")).getpixel((3, 3)) == (0, 0, 0)
    assert caplog.messages == ["pages has several pages or frames; only the first is used, here and in all such files"]


# ---- preprocessing -----------------------------------------------------------------------------------------------


def test_every_container_gives_the_same_numbers(tmp_path):
    processor = UnconcealImageProcessor(size=16)
    rgb = random_rgb()
    path = tmp_path / "a.png"
    Image.fromarray(rgb).save(path)
    expected = processor(Image.fromarray(rgb)).pixel_values
    chw = torch.from_numpy(rgb).permute(2, 0, 1)
    for same in (
        *(rgb, rgb.astype(np.int64), rgb / 255, rgb.astype(np.uint16) * 257, rgb.transpose(2, 0, 1), rgb[None], [rgb]),
        *(chw, chw / 255, chw[None], torch.from_numpy(rgb), [[chw]]),
        *(path, str(path), [path]),
    ):
        assert torch.equal(processor(same).pixel_values, expected)
    arrays = processor(rgb, return_tensors="np").pixel_values
    assert arrays.dtype == np.float32
    np.testing.assert_array_equal(arrays, expected)
    gray = rgb[..., 0]
    expected = processor(Image.fromarray(gray)).pixel_values
    for same in (gray, gray[..., None], gray[None], torch.from_numpy(gray)):
        assert torch.equal(processor(same).pixel_values, expected)


def test_ambiguous_channels():
    processor = UnconcealImageProcessor(**RAW)
    either = np.zeros((3, 5, 3), np.uint8)
    assert processor(either).pixel_values.shape == (1, 3, 3, 5)
    assert processor(torch.from_numpy(either)).pixel_values.shape == (1, 3, 5, 3)
    assert processor(either, input_data_format="channels_first").pixel_values.shape == (1, 3, 5, 3)
    assert processor(torch.from_numpy(either), input_data_format="channels_last").pixel_values.shape == (1, 3, 3, 5)


def test_numbers_by_hand():
    image = Image.new("RGB", (1, 1), (255, 0, 51))
    values = UnconcealImageProcessor(do_resize=False)(image).pixel_values.flatten().tolist()
    assert values == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225], rel=1e-6)
    bgr = UnconcealImageProcessor(do_resize=False, channel_order="bgr")(image).pixel_values.flatten().tolist()
    assert bgr == pytest.approx([(0.2 - 0.485) / 0.229, -0.456 / 0.224, (1 - 0.406) / 0.225], rel=1e-6)
    assert UnconcealImageProcessor(**RAW)(image).pixel_values.flatten().tolist() == [255, 0, 51]


def test_without_rescaling_values_keep_their_range():
    processor, rgb = UnconcealImageProcessor(size=16), random_rgb()
    expected = processor(rgb).pixel_values
    unit = torch.from_numpy(rgb).permute(2, 0, 1) / 255
    for same in (rgb / 255, rgb.astype(np.float32) / 255, unit, unit.half(), [unit, rgb / 255]):
        got = processor(same, do_rescale=False).pixel_values
        torch.testing.assert_close(got, expected.expand_as(got), rtol=0, atol=0.03 if same is not unit else 1e-5)
    mixed = processor([rgb, rgb / 255], do_rescale=False, do_normalize=False).pixel_values
    torch.testing.assert_close(mixed[0], mixed[1] * 255)
    assert mixed[0].max() > 100


def test_resize_is_pillow_antialiased():
    rgb = random_rgb(60, 90)
    got = UnconcealImageProcessor(size={"height": 8, "width": 12}, do_normalize=False, do_rescale=False)(rgb)
    expected = Image.fromarray(rgb).resize((12, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(got.pixel_values[0].permute(1, 2, 0).numpy(), np.asarray(expected, np.float32))


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 20000)])
def test_extreme_sizes(size):
    processor = UnconcealImageProcessor(size=32)
    batch = processor(Image.new("RGB", size, "gray"))
    assert batch.pixel_values.shape == (1, 3, 32, 32)
    outputs = SimpleNamespace(logits=torch.zeros(1, 1, 32, 32))
    (mask,) = processor.post_process_masks(outputs, [size[::-1]])
    assert mask.shape == size[::-1]
    torch.testing.assert_close(mask, torch.full_like(mask, 0.5))


def test_labels():
    processor = UnconcealImageProcessor(size=8)
    mask = np.zeros((4, 4), np.uint8)
    mask[:2, 2:] = 255
    expected = torch.zeros(1, 8, 8)
    expected[:, :4, 4:] = 1
    image = random_rgb(4, 4)
    kinds = (Image.fromarray(mask), mask, mask > 0, mask / 255.0, mask[None], mask[..., None], torch.from_numpy(mask))
    kinds += (
        mask // 255,
        mask // 255 * np.uint16(300),
        torch.from_numpy(mask // 255).long(),
        [Image.fromarray(mask // 6)],
    )
    for same in kinds:
        labels = processor(image, segmentation_maps=same).labels
        assert labels.dtype == torch.float32
        assert torch.equal(labels, expected)
    stacked = np.stack([mask, mask])
    for same in (stacked, stacked[:, None], stacked[..., None], [mask, mask]):
        assert torch.equal(processor([image, image], same).labels, expected.repeat(2, 1, 1))
    soft = processor(image, np.full((4, 4), 0.2)).labels
    torch.testing.assert_close(soft, torch.full((1, 8, 8), 0.2))
    soft = processor(image, Image.fromarray(SOFT[:, :16].reshape(4, 4)), do_resize=False).labels
    torch.testing.assert_close(soft, torch.from_numpy(SOFT[:, :16].reshape(1, 4, 4) / np.float32(255)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: UnconcealImageProcessor(channel_order="gbr"), "channel_order='gbr'"),
        (lambda: UnconcealImageProcessor(mask_resample=99), r"mask_resample=99, expected one of 0 \(nearest\)"),
        (lambda: UnconcealImageProcessor(resample=-1), "resample=-1"),
        (lambda: UnconcealImageProcessor(rescale_factor=0), "rescale_factor=0, expected a number above 0"),
        (lambda: UnconcealImageProcessor(rescale_factor=float("nan")), "rescale_factor=nan"),
        (lambda: UnconcealImageProcessor(image_mean=[0.5, 0.5]), "image_mean=.*, expected 1 or 3 finite numbers"),
        (lambda: UnconcealImageProcessor(image_mean=["x"] * 3), "image_mean="),
        (lambda: UnconcealImageProcessor(image_std=[1, 1, 0]), "image_std=.*, expected 1 or 3 numbers above 0"),
        (lambda: UnconcealImageProcessor()(random_rgb(), image_std=float("inf")), "image_std=inf"),
        (lambda: UnconcealImageProcessor(size={"shortest_edge": 3}), "shortest_edge"),
        (lambda: UnconcealImageProcessor(do_center_crop=True), "do_center_crop"),
        (lambda: UnconcealImageProcessor()(random_rgb(), size=None), "size=None"),
        (lambda: UnconcealImageProcessor()(random_rgb(), data_format="channels_last"), "data_format='channels_last'"),
        (lambda: UnconcealImageProcessor()([]), "no images"),
        (lambda: UnconcealImageProcessor()("absent.png"), "absent.png"),
        (lambda: UnconcealImageProcessor()(3), "int"),
        (lambda: UnconcealImageProcessor()(np.zeros((5, 4, 2))), r"\(5, 4, 2\)"),
        (lambda: UnconcealImageProcessor()(np.zeros((0, 4, 3))), r"\(0, 4, 3\)"),
        (lambda: UnconcealImageProcessor()(torch.randn(3, 8, 8)), "before any normalization"),
        (lambda: UnconcealImageProcessor()(random_rgb(), np.diag([1, 2, 3])), "values 0, 1, 2, 3, a map of"),
        (lambda: UnconcealImageProcessor()(random_rgb(), np.zeros((2, 4, 4))), "1 images and 2"),
        (lambda: UnconcealImageProcessor(**RAW)([random_rgb(), random_rgb(4, 4)]), "do_resize=True"),
        (lambda: UnconcealImageProcessor()(random_rgb(), sizes=8), "sizes"),
    ],
)
def test_mistakes_are_rejected(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_four_channels_mean_alpha():
    rgba = np.dstack([random_rgb(), random_rgb()[..., 0]])
    processor = UnconcealImageProcessor(size=16)
    expected = processor(Image.fromarray(rgba)).pixel_values
    assert not torch.equal(expected, processor(rgba[..., :3]).pixel_values)
    first = rgba.transpose(2, 0, 1)
    for same in (rgba, rgba / 255, first, torch.from_numpy(first), [rgba]):
        assert torch.equal(processor(same).pixel_values, expected)
    narrow = first[..., :4]  # four columns could be channels, too
    expected = processor(Image.fromarray(rgba[:, :4])).pixel_values
    assert torch.equal(processor(narrow, input_data_format="channels_first").pixel_values, expected)


# ---- post-processing ---------------------------------------------------------------------------------------------


def masks(logits, sizes=None):
    return UnconcealImageProcessor().post_process_masks(SimpleNamespace(logits=logits), sizes)


def test_enlarging_by_hand():
    # Two pixels, logits -4 and 4, to four: align_corners=False samples at -0.25, 0.25, 0.75, 1.25 -> -4, -2, 2, 4.
    (mask,) = masks(torch.tensor([[[[-4.0, 4.0]]]]), [(1, 4)])
    torch.testing.assert_close(mask, torch.tensor([[-4.0, -2.0, 2.0, 4.0]]).sigmoid())
    (mask,) = masks(torch.tensor([[[[-4.0], [4.0]]]]), torch.tensor([[4, 1]]))
    torch.testing.assert_close(mask, torch.tensor([[-4.0], [-2.0], [2.0], [4.0]]).sigmoid())


def test_shrinking_keeps_a_small_target():
    logits = torch.full((1, 1, 4, 4), -60.0)
    logits[..., 0, 0] = 60.0
    (mask,) = masks(logits, [(1, 1)])
    # Of four pixels to one the antialiased weights are (5, 7, 7, 5) / 24 on either axis.
    torch.testing.assert_close(mask, torch.full((1, 1), (5 / 24) ** 2))
    (mask,) = masks(logits, [(2, 2)])
    assert mask.argmax() == 0
    assert mask[0, 0] > 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sizes_range_and_dtype(dtype):
    logits = torch.randn(3, 1, 16, 24, generator=torch.Generator().manual_seed(0)).mul(30).to(dtype)
    sizes = [(16, 24), (5, 70), (33, 31)]
    results = masks(logits, sizes)
    assert [tuple(mask.shape) for mask in results] == sizes
    assert all(mask.dtype == torch.float32 and mask.min() >= 0 and mask.max() <= 1 for mask in results)
    torch.testing.assert_close(results[0], logits[0, 0].float().sigmoid())
    assert [mask.shape for mask in masks(logits)] == [(16, 24)] * 3


def test_semantic_map_is_the_thresholded_mask():
    outputs = SimpleNamespace(logits=torch.tensor([[[[-1.0, 0.0, 1.0]]]]))
    processor = UnconcealImageProcessor()
    (ids,) = processor.post_process_semantic_segmentation(outputs)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[0, 0, 1]]  # strictly above, as the metrics count
    assert processor.post_process_semantic_segmentation(outputs, threshold=0.6)[0].tolist() == [[0, 0, 1]]
    assert processor.post_process_semantic_segmentation(outputs, [(1, 6)])[0].tolist() == [[0, 0, 0, 1, 1, 1]]


def test_scores_of_the_semantic_map():
    outputs = SimpleNamespace(logits=torch.randn(2, 1, 8, 6))
    processor = UnconcealImageProcessor()
    sizes = [(8, 6), (20, 9)]
    found = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
    plain = processor.post_process_semantic_segmentation(outputs, sizes)
    for one, ids, mask, size in zip(found, plain, masks(outputs.logits, sizes), sizes, strict=True):
        assert torch.equal(one.segmentation, ids)
        assert one.segmentation_scores.shape == (2, *size)
        assert torch.equal(one.segmentation_scores[1], mask)
        assert torch.equal(one.segmentation_scores.argmax(0), ids)


def test_wrong_outputs_are_rejected():
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\)"):
        masks(torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="2 target sizes for 1"):
        masks(torch.zeros(1, 1, 4, 4), [(1, 1), (2, 2)])


# ---- with transformers -------------------------------------------------------------------------------------------


def test_saved_options_return_and_yield_to_others(tmp_path):
    unusual = UnconcealImageProcessor(
        size={"height": 24, "width": 40},
        resample=3,
        mask_resample=2,
        channel_order="bgr",
        rescale_factor=1 / 128,
        image_mean=[0.1, 0.2, 0.3],
        image_std=[1.0, 2.0, 3.0],
    )
    unusual.save_pretrained(tmp_path)
    default = UnconcealImageProcessor().to_dict()
    assert len([name for name, value in unusual.to_dict().items() if default.get(name) != value]) >= 7
    for way in ({}, {"use_fast": True}, {"use_fast": False}, {"backend": "pil"}, {"backend": "torchvision"}):
        again = AutoImageProcessor.from_pretrained(tmp_path, **way)
        assert type(again) is UnconcealImageProcessor
        assert again.to_dict() == unusual.to_dict()
        assert torch.equal(again(random_rgb()).pixel_values, unusual(random_rgb()).pixel_values)
    expected = unusual(random_rgb(), size=42, do_normalize=False).pixel_values
    assert expected.shape == (1, 3, 42, 42)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, size=42, do_normalize=False)
    assert torch.equal(loaded(random_rgb()).pixel_values, expected)
    assert unusual(random_rgb()).pixel_values.shape == (1, 3, 24, 40)  # options of a call hold for one call


def test_thin_parts_of_a_mask_fade_or_break_into_dots():
    rows = np.zeros((256, 256), np.uint8)
    rows[::16] = 255  # lines of one pixel, a sixteenth of the whole
    mask, image = Image.fromarray(rows), Image.new("RGB", (256, 256))
    size = {"height": 24, "width": 24}
    hard, soft = (UnconcealImageProcessor(size=size, mask_resample=way)(image, mask).labels for way in (0, 2))
    assert set(hard.unique().tolist()) <= {0.0, 1.0}
    assert (hard == 1).any(dim=2).sum() < 16  # some of the 16 lines are lost
    assert soft.mean().item() == pytest.approx(1 / 16, rel=0.1)
    assert (soft > 0.05).any(dim=2).sum() >= 16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [(8, 8), (3, 40)])
def test_output_that_is_not_finite_becomes_no_mask(value, size):
    logits = torch.zeros(2, 1, 6, 6)
    logits[1, 0, 2, 3] = value
    processor, outputs = UnconcealImageProcessor(), SimpleNamespace(logits=logits)
    for post_process in (processor.post_process_masks, processor.post_process_semantic_segmentation):
        with pytest.raises(NonFiniteLogits, match="not finite .* float32"):
            post_process(outputs, [size, size])


def test_colors_of_a_mask_are_classes():
    colors = np.zeros((6, 8, 3), np.uint8)
    colors[:2, :2], colors[3:, 3:] = (128, 0, 0), (0, 128, 0)
    mask = Image.fromarray(colors)
    with pytest.raises(ValueError, match="holds the values 0, 1, 2, a map of classes"):
        to_mask(mask)
    assert (np.asarray(to_mask(mask, "any")) > 0).sum() == 4 + 15
    assert (np.asarray(to_mask(mask, [1])) > 0).sum() == 15  # green is below red
    colors[3:, 3:] = 0
    assert np.asarray(to_mask(Image.fromarray(colors))).tolist()[0][:3] == [255, 255, 0]


def test_many_colors_of_a_mask_are_classes():
    for number in (12, 63):
        hues = np.stack([np.arange(number) * 4, 255 - np.arange(number) * 4, np.full(number, 90)], -1)
        colors = np.concatenate([[[0, 0, 0]], hues]).astype(np.uint8)[None]
        with pytest.raises(UnclearMask, match="a map of classes"):
            to_mask(Image.fromarray(colors))
        assert pixels(to_mask(Image.fromarray(colors), [1, number])) == [[0, 255, *[0] * (number - 2), 255]]


@pytest.mark.parametrize("color", [(255, 0, 0), (255, 128, 0), (128, 64, 128), (30, 60, 40)])
def test_shades_of_one_color_are_levels(color):
    soft = np.rint(np.linspace(0, 1, 50)[None, :, None] * np.array(color)).astype(np.uint8)
    assert pixels(to_mask(Image.fromarray(soft))) == soft.max(axis=-1).tolist()
    drawn = np.zeros((32, 32, 3), np.uint8)
    drawn[8:24, 5:20] = color
    file = io.BytesIO()
    Image.fromarray(drawn).save(file, "JPEG", quality=100, subsampling=0)
    image = Image.open(file)
    levels, has_ids = reading.mask_levels(image)
    assert levels.tolist() == np.asarray(image).max(axis=-1).tolist()
    assert not has_ids


@pytest.mark.parametrize("alpha", [255, 180, 90])
def test_classes_on_transparency_are_refused_as_on_black(alpha):
    rgba = np.zeros((4, 8, 4), np.uint8)
    rgba[1:3, 1:3], rgba[1:3, 4:6] = (255, 0, 0, alpha), (0, 0, 255, alpha)
    with pytest.raises(UnclearMask, match="values 0, 1, 2, a map of classes"):
        to_mask(Image.fromarray(rgba))
    assert pixels(to_mask(Image.fromarray(rgba), "any")) == (rgba[..., 3] // alpha * 255).tolist()
    rgba[1:3, 4:6, :3] = 255, 0, 0
    assert pixels(to_mask(Image.fromarray(rgba))) == (rgba[..., 3] // alpha * 255).tolist()
