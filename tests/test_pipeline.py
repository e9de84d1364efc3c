"""Pipelines: soft masks by our own, hard ones by transformers'. That they open without the package is tested elsewhere."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from save_tiny_models import PROCESSOR, TESTERS, make_picture, make_tiny_model
from transformers import pipeline

from unconceal import SoftMaskPipeline
from unconceal.api import Segmenter, cutout
from unconceal.models.cutout import mask_to_image


@pytest.fixture(scope="module")
def pictures():
    draw = np.random.default_rng(0)
    sizes = [(50, 70), (33, 20), (64, 64), (90, 40), (21, 22), (45, 46)]
    return [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def model():
    return TESTERS["srs"]().make_lively_model()


@pytest.fixture
def find(model):
    return SoftMaskPipeline(model=model, image_processor=PROCESSOR, device="cpu")


def masks_of(model, pictures) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = model(**PROCESSOR(pictures))
    return PROCESSOR.post_process_masks(outputs, [picture.size[::-1] for picture in pictures])


def check(found, expected):
    assert len(found) == len(expected)
    for one, probs in zip(found, expected, strict=True):
        # Other batch sizes take other kernels, which sum in another order.
        torch.testing.assert_close(one["probs"], probs, rtol=0, atol=1e-5)
        assert (one["mask"].mode, one["mask"].size) == ("L", probs.shape[::-1])
        assert np.abs(np.asarray(one["mask"]) - 255 * one["probs"].numpy()).max() <= 0.5 + 1e-3


def test_all_kinds_of_inputs(find, model, pictures, tmp_path):
    expected = masks_of(model, pictures)
    path = tmp_path / "picture.png"
    pictures[0].save(path)
    array = np.asarray(pictures[0])
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for one in (pictures[0], path, str(path), array, tensor, array / 255):
        check([find(one)], expected[:1])
    check(find(pictures, batch_size=4), expected)
    check(find(tuple(pictures)), expected)
    check(find(np.stack([array, array])), expected[:1] * 2)
    check(list(find(picture for picture in pictures)), expected)
    check(list(find((picture for picture in pictures), batch_size=4)), expected)
    assert find([]) == []


def test_generator_is_read_as_masks_are_taken(find, pictures):
    taken = []

    def give():
        for picture in pictures:
            taken.append(picture)
            yield picture

    masks = find(give())
    next(iter(masks))
    assert len(taken) <= 2


def test_masks_have_the_displayed_size(find, pictures, tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    pictures[0].save(path, exif=exif)
    assert find(path)["mask"].size == (50, 70)


def test_deep_grey_is_not_clipped(find, pictures, tmp_path):
    grey = np.asarray(pictures[0].convert("L"))
    path = tmp_path / "deep.png"
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    torch.testing.assert_close(find(path)["probs"], find(grey)["probs"])


def test_url(find, pictures, tmp_path):
    pictures[0].save(tmp_path / "picture.png")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = find(f"http://127.0.0.1:{server.server_port}/picture.png", timeout=10)
        server.shutdown()
    torch.testing.assert_close(found["probs"], find(pictures[0])["probs"])


def test_what_is_no_picture_is_refused(find, pictures):
    for wrong, words in (
        ("absent.png", "'absent.png', which is no file"),
        (7, "got int"),
        ([pictures[0], [pictures[0], pictures[0]]], "got 2 pictures as one input"),
        (np.zeros((5, 6, 7)), "(5, 6, 7)"),
    ):
        with pytest.raises(ValueError) as caught:
            find(wrong)
        assert words in str(caught.value)


@pytest.mark.parametrize("tester", TESTERS.values(), ids=TESTERS)
def test_half_precision(tester, pictures):
    model = tester().make_lively_model()
    (exact,) = masks_of(model, pictures[:1])
    find = SoftMaskPipeline(model=model.to(torch.bfloat16), image_processor=PROCESSOR, device="cpu")
    probs = find(pictures[0])["probs"]
    assert probs.dtype == torch.float32
    assert (probs - exact).abs().mean() < 0.1


# ---- large pictures, and cut-outs ---------------------------------------------------------------------------------


def resized(*size: int) -> Image.Image:
    return make_picture().resize(size)


def make_pipeline(model, **options):
    return SoftMaskPipeline(model=model, image_processor=PROCESSOR, device="cpu", **options)


@pytest.mark.parametrize("name", TESTERS)
def test_edges_are_looked_at_again_as_by_the_package(name):
    model = make_tiny_model(name)
    segmenter, find = Segmenter(model, PROCESSOR), make_pipeline(model)
    masks = {}
    for kind, picture in (("large", resized(210, 150)), ("larger than the network's", resized(100, 90))):
        for refine in ("auto", "always", "never"):
            found = find(picture, refine=refine)
            (expected,) = segmenter.segment([picture], refine=refine)
            np.testing.assert_array_equal(found["probs"].numpy(), expected)
            np.testing.assert_array_equal(np.asarray(found["mask"]), np.asarray(mask_to_image(expected)))
            masks[kind, refine] = found["probs"]
        assert torch.equal(find(picture)["probs"], masks[kind, "auto"])
        assert not torch.equal(masks[kind, "always"], masks[kind, "never"])
    assert torch.equal(masks["large", "auto"], masks["large", "always"])
    assert torch.equal(masks["larger than the network's", "auto"], masks["larger than the network's", "never"])


@pytest.fixture(scope="module")
def edgy():
    return make_tiny_model("srs")


@pytest.fixture(scope="module")
def sizes_mixed():
    return [resized(210, 150), resized(30, 20), resized(90, 260), resized(100, 90), resized(64, 130)]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_large_pictures_in_lists_and_generators(edgy, sizes_mixed, batch_size):
    expected = Segmenter(edgy, PROCESSOR).segment(sizes_mixed, batch_size)
    find = make_pipeline(edgy)
    for inputs in (sizes_mixed, (picture for picture in sizes_mixed)):
        found = list(find(inputs, batch_size=batch_size))
        assert len(found) == len(expected)
        for one, probs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one["probs"].numpy(), probs)


def test_tiles_of_one_picture_are_seen_in_batches(edgy):
    seen = []
    hook = edgy.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    picture = resized(210, 150)
    for options, call, most in (({}, {}, 1), ({}, {"batch_size": 4}, 4), ({"batch_size": 3}, {}, 3)):
        seen.clear()
        make_pipeline(edgy, **options)(picture, **call)
        assert (seen[0], max(seen)) == (1, most)
    hook.remove()


def test_large_pictures_in_half_precision(edgy):
    picture = resized(210, 150)
    (exact,) = Segmenter(edgy, PROCESSOR).segment([picture])
    model = make_tiny_model("srs").to(torch.bfloat16)
    probs = make_pipeline(model)(picture)["probs"]
    assert probs.dtype == torch.float32
    assert np.abs(probs.numpy() - exact).mean() < 0.1


def test_cutouts_are_those_of_the_package(edgy, sizes_mixed):
    find = make_pipeline(edgy)
    masks = Segmenter(edgy, PROCESSOR).segment(sizes_mixed, batch_size=2)
    for one, picture, mask in zip(find(sizes_mixed, batch_size=2, cutout=True), sizes_mixed, masks, strict=True):
        expected = cutout(picture, mask)
        assert one["cutout"].mode == "RGBA"
        np.testing.assert_array_equal(np.asarray(one["cutout"]), np.asarray(expected))
        for given in (mask, torch.from_numpy(mask), mask_to_image(mask)):
            np.testing.assert_array_equal(np.asarray(find.cut_out(picture, given)), np.asarray(expected))
    assert "cutout" not in find(sizes_mixed[0])


def test_cut_out_of_every_kind(find, pictures, tmp_path):
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    pictures[0].save(path, exif=exif)
    upright = pictures[0].transpose(Image.Transpose.ROTATE_270)
    hard = np.zeros((70, 50), bool)
    hard[20:40, 10:30] = True
    opacity = mask_to_image(hard)
    expected = upright.copy()
    expected.putalpha(opacity)
    for picture in (path, upright, np.asarray(upright)):
        for mask in (hard, hard.astype(int), torch.from_numpy(hard).bfloat16(), opacity, opacity.convert("1")):
            np.testing.assert_array_equal(np.asarray(find.cut_out(picture, mask)), np.asarray(expected))


def test_options_of_the_pipeline_hold_unless_a_call_has_its_own(edgy):
    picture = resized(210, 150)
    find = make_pipeline(edgy, refine="never", cutout=True)
    found, plain = find(picture), make_pipeline(edgy)(picture)
    assert "cutout" in found
    assert not torch.equal(found["probs"], plain["probs"])
    again = find(picture, refine="auto", cutout=False)
    assert "cutout" not in again
    assert torch.equal(again["probs"], plain["probs"])


def test_wrong_values_are_one_clear_line(find, pictures):
    (width, height), picture = pictures[0].size, pictures[0]
    for call, words in (
        (lambda: find(picture, refine="yes"), "got refine='yes', expected one of auto, always, never"),
        (lambda: find(pictures, refine=True), "got refine=True, expected one of auto, always, never"),
        (lambda: find(picture, cutout="yes"), "got cutout='yes', expected True or False"),
        (lambda: find(picture, batch_size=0), "got batch_size=0, expected a whole number from 1"),
        (lambda: make_pipeline(find.model, batch_size="2")(picture), "got batch_size='2', expected"),
        (lambda: find.cut_out(picture, Image.new("L", (height, width))), "a mask of 50x70, expected 70x50"),
        (lambda: find.cut_out(picture, np.zeros((width, height))), "a mask of 50x70, expected 70x50"),
        (lambda: find.cut_out(picture, torch.zeros(1, height, width)), "(1, 50, 70), expected (height, width)"),
        (lambda: find.cut_out(picture, np.full((height, width), np.uint8(255))), "values from 255 to 255, expected 0"),
        (lambda: find.cut_out(picture, torch.full((height, width), torch.nan)), "values from nan to nan, expected 0"),
        (
            lambda: find.cut_out(picture, "mask.png"),
            "got a mask of str, expected a Pillow image, an array or a tensor",
        ),
        (lambda: find.cut_out("absent.png", np.zeros((height, width))), "'absent.png', which is no file"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="got refine='yes'"):
        make_pipeline(find.model, refine="yes")


# ---- transformers' pipeline ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tester", TESTERS.values(), ids=TESTERS)
def test_hard_masks_of_more_pictures_than_a_network_has_stages(tester, pictures):
    model = tester().make_lively_model()
    segment = pipeline("image-segmentation", model=model, image_processor=PROCESSOR, device="cpu")
    for batch_size in (1, 6):
        found = segment(pictures, batch_size=batch_size)
        for one, probs in zip(found, masks_of(model, pictures), strict=True):
            assert {label["label"] for label in one} <= {"background", "object"}
            masks = {label["label"]: np.asarray(label["mask"]) > 0 for label in one}
            hard = masks.get("object", np.zeros(probs.shape, bool))
            sure = (probs - 0.5).abs().numpy() > 1e-4
            assert np.array_equal(hard[sure], (probs > 0.5).numpy()[sure])
