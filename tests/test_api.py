"""Use a network from Python: load it, segment, draw."""

import ast
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_refine
import torch
from common import SMALLEST_SRS, noise, rejected
from PIL import Image
from transformers import BertConfig

import unconceal
from unconceal.api import cutout, load, overlay
from unconceal.models.configuration_srs import SrsConfig
from unconceal.models.cutout import mask_to_image
from unconceal.models.modeling_srs import SrsForImageSegmentation, SrsForReconstruction
from unconceal.utils.errors import UserError
from unconceal.utils.loading_errors import LOADING_ERRORS


@pytest.fixture(scope="module")
def bright():
    """Return a segmenter of bright objects."""
    return test_refine.segmenter(test_refine.bright)


def test_package_offers_its_public_names_only():
    assert dir(unconceal) == sorted([*unconceal.__all__, "__version__"])
    assert not {"Path", "sys", "importlib"} & vars(unconceal).keys()
    for name in unconceal.__all__:
        assert getattr(unconceal, name).__name__ == name
    source = Path(unconceal.__file__).read_text(encoding="utf-8")
    for_types = [each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.ImportFrom)]
    typed = {alias.name: each.module for each in for_types if each.level for alias in each.names}
    assert typed == unconceal._MODULES
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        unconceal.absent  # noqa: B018


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([Image.new("RGB", (8, 8))], {"batch_size": 0}, "batch_size=0, expected at least 1"),
        (np.zeros((8, 8, 3), np.uint8), {}, "got ndarray, expected a PIL image or a path"),
    ],
)
def test_what_cannot_be_segmented_is_one_line(bright, images, options, message):
    with pytest.raises(UserError, match=message):
        bright.segment(images, **options)


def test_masks_lie_where_the_object_is_displayed(bright):
    corner = Image.new("RGB", (90, 60))
    corner.paste("white", (60, 0, 90, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise for display
    file = io.BytesIO()
    corner.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    for image in (corner, Image.open(file)):
        (mask,) = bright.segment([image])
        assert mask.shape == (60, 90)
        assert mask.dtype == np.float32
        rows, columns = np.nonzero(mask > 0.5)
        assert (rows.min(), columns.max()) == (0, 89)
        assert (rows.max(), columns.min()) == pytest.approx((29, 60), abs=2)


def test_batches_equal_singles_and_keep_order(checkpoint):
    segmenter = load(checkpoint, device="cpu")
    images = [noise(30 + index, 20 + 7 * index, seed=index) for index in range(4)]
    singles = segmenter.segment(images)
    assert [mask.shape for mask in singles] == [(image.height, image.width) for image in images]
    for batch_size in (3, 99):
        for single, batched in zip(singles, segmenter.segment(images, batch_size), strict=True):
            np.testing.assert_allclose(batched, single, atol=1e-6)
    assert segmenter.segment([]) == []


def test_dtype(checkpoint):
    exact, half = (load(checkpoint, device="cpu", dtype=dtype).segment(noise()) for dtype in (None, "bfloat16"))
    assert exact.dtype == half.dtype == np.float32
    assert 0 < np.abs(half - exact).max() < 0.05


def test_one_image_and_paths(bright, tmp_path):
    noise().save(tmp_path / "a.png")
    expected = bright.segment([noise()])[0]
    for one in (noise(), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(bright.segment(one), expected)
    with pytest.raises(UserError, match="cannot read .*absent.png: No such file"):
        bright.segment(tmp_path / "absent.png")


def test_a_stream_holds_one_batch(bright):
    taken = []

    def endless():
        while True:
            taken.append(noise())
            yield taken[-1]

    masks = bright.stream(endless(), batch_size=3)
    for _ in range(4):
        next(masks)
    assert len(taken) == 6


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), UserError, "30x20; lower the batch size"),
        (None, UserError, "30x20; lower the batch size"),
        (RuntimeError("shapes do not fit"), RuntimeError, "shapes do not fit"),
    ],
    ids=["accelerator", "cpu", "defect"],
)
def test_only_running_out_of_memory_is_explained(bright, monkeypatch, error, raised, words):
    def fail(*args):
        if error:
            raise error
        torch.empty(2**60, dtype=torch.int8)

    monkeypatch.setattr("unconceal.api.predict_masks", fail)
    with pytest.raises(raised, match=words):
        bright.segment([noise()])


def edit_config(**changes):
    def damage(folder):
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        config.pop("auto_map")
        path.write_text(json.dumps(config))

    return damage


def edit_processor(**changes):
    def damage(folder):
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("config.json"), "without config.json"),
        (write("config.json", "{"), "cannot load"),
        (remove("model.safetensors"), "cannot load"),
        (lambda folder: os.truncate(folder / "model.safetensors", 3000), "damaged or incomplete"),
        # As in a clone without Git LFS.
        (write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "damaged or incomplete"),
        (edit_config(model_type="no_such_network"), "no_such_network"),
        (edit_config(hidden_sizes=[8, 8, 8, 16]), "other shapes"),
        (edit_config(depths="x"), "'depths' with value 'x'"),
        (edit_config(depths=[1, 1]), r"got .*\[1, 1\], expected 4 entries"),
        (edit_config(dtype="floot"), "floot"),
        (edit_config(id2label=3), "cannot load"),
        (remove("preprocessor_config.json"), "preprocessor_config.json"),
        (write("preprocessor_config.json", "[]"), "preprocessor_config.json"),
        (write("preprocessor_config.json", '{"image_processor_type": "ViTImageProcessor"}'), "expected Unconceal"),
        (edit_processor(size=10), "no usable preprocessor_config.json: .*got 10x10 pixels"),
        (edit_processor(image_mean=None), "no usable preprocessor_config.json"),
        (edit_processor(rescale_factor="x"), "no usable preprocessor_config.json: got rescale_factor='x'"),
        (lambda folder: BertConfig().save_pretrained(folder), "BertConfig"),
        (lambda folder: SrsForReconstruction(SrsConfig(**SMALLEST_SRS)).save_pretrained(folder), "was saved as Srs"),
    ],
)
def test_unusable_checkpoints_are_one_clear_line(checkpoint, tmp_path, damage, words):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(folder)
    with rejected(words):
        load(folder, device="cpu")


@pytest.mark.parametrize("error", [AttributeError, TypeError, SyntaxError, ZeroDivisionError, IndexError])
def test_defects_while_loading_name_their_place(checkpoint, monkeypatch, error):
    assert not issubclass(error, LOADING_ERRORS)

    def defect(self, config):
        raise error("no such thing")

    monkeypatch.setattr(SrsForImageSegmentation, "__init__", defect)
    words = rf"{error.__name__} at test_api.py:\d+: no such thing.* defect of the code; UNCONCEAL_DEBUG=1"
    with pytest.raises(UserError, match=words) as caught:
        load(checkpoint, device="cpu")
    assert type(caught.value.__cause__) is error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model_id_or_path": "/no/such/folder"}, "/no/such/folder"),
        ({"model_id_or_path": __file__}, "which is not a folder"),
        ({"model_id_or_path": "name"}, "owner/name"),
        ({"model_id_or_path": "owner/name", "device": "abacus"}, "abacus"),
        ({"model_id_or_path": "owner/name", "dtype": "int8"}, "int8"),
        ({"model_id_or_path": "owner/no-such-network"}, "cannot load owner/no-such-network.*connect"),
        ({"model_id_or_path": "owner/no-such-network", "revision": "v1.0"}, "cannot load owner/no-such-.*connect"),
    ],
)
def test_wrong_arguments_are_rejected(arguments, words):
    with rejected(words):
        load(**arguments)


GRAY = Image.new("RGB", (3, 1), (100, 100, 100))
RAMP = np.array([[0, 0.5, 1]], np.float32)


def test_drawings_by_pixel():
    assert np.asarray(mask_to_image(RAMP)).tolist() == [[0, 128, 255]]
    tinted = overlay(GRAY, RAMP, color=(200, 0, 100), alpha=0.5)
    assert np.asarray(tinted).tolist() == [[[100, 100, 100], [125, 75, 100], [150, 50, 100]]]
    assert np.asarray(cutout(GRAY, RAMP)).tolist() == [[[100] * 3 + [0], [100] * 3 + [86], [100] * 3 + [255]]]
    assert GRAY.mode == "RGB"  # the image passed in stays as it was


@pytest.mark.parametrize("draw", [overlay, cutout])
def test_masks_of_any_scale_draw_alike(draw):
    hard = np.array([[False, True, True]])
    expected = draw(GRAY, hard.astype(np.float32))
    assert expected != draw(GRAY, np.zeros((1, 3), np.float32))
    for white in (1, 255, 255.0, np.uint8(1), np.uint8(255), np.float16(1), np.int64(300)):
        assert draw(GRAY, hard * white) == expected
    assert draw(GRAY, hard) == expected
    levels = np.array([[0, 128, 255]], np.uint8)
    assert draw(GRAY, levels) == draw(GRAY, levels / 255)


@pytest.mark.parametrize("draw", [overlay, cutout])
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, np.nan, 1], "got 1 of 3 pixel values that are NaN or infinite"),
        ([0, 0.5, 1.05], "fractions up to 1.05"),
        ([-1, 0, 1], "values from -1 to 1"),
    ],
)
def test_masks_of_unclear_values_are_rejected(draw, values, words):
    with rejected(words):
        draw(GRAY, np.array([values], np.float32))


@pytest.mark.parametrize("draw", [overlay, cutout])
def test_a_mask_of_another_size_is_rejected(draw):
    with pytest.raises(UserError, match="got a mask of 1x3, expected 3x1"):
        draw(GRAY, RAMP.T)
