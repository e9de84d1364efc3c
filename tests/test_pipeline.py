"""Pipelines: soft masks by our own, hard masks by transformers."""

import base64
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from common import noise
from PIL import Image
from save_tiny_models import PROCESSOR, TESTERS, make_image, make_tiny_model
from transformers import pipeline

from unconceal import SoftMaskPipeline
from unconceal.api import Segmenter, cutout, overlay
from unconceal.models.cutout import mask_to_image
from unconceal.models.reading import srgb_profile


@pytest.fixture(scope="module")
def images():
    sizes = [(70, 50), (20, 33), (64, 64), (40, 90), (22, 21), (46, 45)]
    return [noise(*size, seed) for seed, size in enumerate(sizes)]


def make_pipeline(model, **options):
    return SoftMaskPipeline(model=model, image_processor=PROCESSOR, device="cpu", **options)


@pytest.fixture(scope="module")
def model():
    return TESTERS["srs"]().make_lively_model()


@pytest.fixture
def find(model):
    return make_pipeline(model)


def masks_of(model, images) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = model(**PROCESSOR(images))
    return PROCESSOR.post_process_masks(outputs, [image.size[::-1] for image in images])


def check(found, expected):
    assert len(found) == len(expected)
    for one, probs in zip(found, expected, strict=True):
        # Other batch sizes take other kernels, which sum in another order.
        torch.testing.assert_close(one["probs"], probs, rtol=0, atol=1e-5)
        assert (one["mask"].mode, one["mask"].size) == ("L", probs.shape[::-1])
        assert np.abs(np.asarray(one["mask"]) - 255 * one["probs"].numpy()).max() <= 0.5 + 1e-3


def test_all_kinds_of_inputs(model, images, tmp_path):
    find, expected = make_pipeline(model, refine="never"), masks_of(model, images)
    path = tmp_path / "image.png"
    images[0].save(path)
    array = np.asarray(images[0])
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for one in (images[0], path, str(path), array, tensor, array / 255):
        check([find(one)], expected[:1])
    check(find(images, batch_size=4), expected)
    check(find(tuple(images)), expected)
    check(find(np.stack([array, array])), expected[:1] * 2)
    check(list(find(image for image in images)), expected)
    check(list(find((image for image in images), batch_size=4)), expected)
    assert find([]) == []


def test_generator_is_read_as_masks_are_taken(find, images):
    taken = []

    def give():
        for image in images:
            taken.append(image)
            yield image

    masks = find(give())
    next(iter(masks))
    assert len(taken) <= 2


@pytest.fixture
def address(tmp_path):
    """Serve the files of a folder; give its URL."""
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_url(find, images, tmp_path, address):
    images[0].save(tmp_path / "image.png")
    found = find(f"{address}/image.png", timeout=300)
    torch.testing.assert_close(found["probs"], find(images[0])["probs"])
    with pytest.raises(ValueError, match="absent.png', expected an image file, or the URL"):
        find(f"{address}/absent.png", timeout=300)


def resized(*size: int) -> Image.Image:
    return make_image().resize(size)


@pytest.mark.parametrize("name", TESTERS)
def test_pipeline_refines_like_the_package(name):
    model = make_tiny_model(name)
    segmenter, find = Segmenter(model, PROCESSOR), make_pipeline(model)
    masks = {}
    for kind, image in (("large", resized(140, 90)), ("larger than the network's", resized(75, 70))):
        for refine in ("auto", "always", "never"):
            found = find(image, refine=refine)
            (expected,) = segmenter.segment([image], refine=refine)
            np.testing.assert_array_equal(found["probs"].numpy(), expected)
            np.testing.assert_array_equal(np.asarray(found["mask"]), np.asarray(mask_to_image(expected)))
            masks[kind, refine] = found["probs"]
        assert torch.equal(find(image)["probs"], masks[kind, "auto"])
        assert not torch.equal(masks[kind, "always"], masks[kind, "never"])
    assert torch.equal(masks["large", "auto"], masks["large", "always"])
    assert torch.equal(masks["larger than the network's", "auto"], masks["larger than the network's", "never"])


@pytest.fixture(scope="module")
def edgy():
    return make_tiny_model("srs")


@pytest.fixture(scope="module")
def sizes_mixed():
    return [resized(140, 90), resized(30, 20), resized(50, 130), resized(100, 90)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_large_images_in_lists_and_generators(edgy, sizes_mixed, batch_size):
    expected = Segmenter(edgy, PROCESSOR).segment(sizes_mixed, batch_size)
    find = make_pipeline(edgy)
    for inputs in (sizes_mixed, (image for image in sizes_mixed)):
        for one, probs in zip(find(inputs, batch_size=batch_size), expected, strict=True):
            np.testing.assert_array_equal(one["probs"].numpy(), probs)


def test_tiles_are_batched(edgy):
    seen = []
    hook = edgy.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    for options, call, most in (({}, {}, 1), ({}, {"batch_size": 4}, 4), ({"batch_size": 3}, {}, 3)):
        seen.clear()
        make_pipeline(edgy, **options)(resized(140, 90), **call)
        assert (seen[0], max(seen)) == (1, most)
    hook.remove()


def test_pipeline_cuts_out_like_the_package(edgy, sizes_mixed):
    find, images = make_pipeline(edgy), sizes_mixed[:2]
    masks = Segmenter(edgy, PROCESSOR).segment(images, batch_size=2)
    for one, image, mask in zip(find(images, batch_size=2, cutout=True), images, masks, strict=True):
        expected = cutout(image, mask)
        assert expected.mode == "RGBA"
        for same in (one["cutout"], *(find.cut_out(image, given) for given in (mask, mask_to_image(mask)))):
            assert same == expected
    assert "cutout" not in find(images[0])


def test_cut_out_accepts_images_and_masks_of_every_kind(find, images, tmp_path):
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    images[0].save(path, exif=exif)
    upright = images[0].transpose(Image.Transpose.ROTATE_270)
    hard = np.zeros((70, 50), bool)
    hard[20:40, 10:30] = True
    opacity = mask_to_image(hard)
    expected = np.dstack([np.asarray(upright), np.asarray(opacity)])
    cut = upright.copy()
    cut.putalpha(opacity)
    kinds = (hard, torch.from_numpy(hard).bfloat16(), opacity, opacity.convert("1"), cut)
    kinds += tuple(hard * np.array(white, dtype) for white, dtype in ((1, int), (1, "u1"), (38, "u1"), (300, "u2")))
    kinds += (torch.from_numpy(hard).long(), Image.fromarray(hard.astype(np.uint8)), hard * 255.0)
    for mask in kinds:
        np.testing.assert_array_equal(np.asarray(find.cut_out(path, mask)), expected)
    for image in (upright, np.asarray(upright)):
        np.testing.assert_array_equal(np.asarray(find.cut_out(image, hard)), expected)


def test_cut_out_takes_dark_masks_as_soft(find, images):
    levels = np.zeros((70, 50), np.uint8).T
    levels[10:40, 20:50] = 3
    levels[20:30, 30:40] = 9
    cut = find.cut_out(images[0], Image.fromarray(levels))
    assert not np.asarray(cut.getchannel("A")).any()  # as ids of classes they would be object


def test_a_mask_of_nothing_is_black():
    """A mask of few, dark levels could be read as ids of classes."""
    probs = np.full((20, 30), 8 / 255, np.float32)
    assert mask_to_image(probs).getextrema() == (0, 0)
    probs[3, 4] = 9 / 255
    assert mask_to_image(probs).getextrema() == (8, 9)


def test_deep_gray_looks_the_same_in_every_pipeline(model, find, tmp_path, address):
    gray = np.asarray(noise(48, 40, 0).convert("L"))
    gray = gray[:, :48]
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    path = tmp_path / "deep.png"
    deep.save(path)
    segment = pipeline("image-segmentation", model=model, image_processor=PROCESSOR, device="cpu")
    pixel_values, expected = PROCESSOR(Image.fromarray(gray)).pixel_values, find(Image.fromarray(gray))["probs"]
    text = base64.b64encode(path.read_bytes()).decode()
    for image in (deep, str(path), f"{address}/deep.png", f"data:image/png;base64,{text}", text):
        if image is not text:  # only the pipeline of transformers takes base64 alone
            assert torch.equal(PROCESSOR(image).pixel_values, pixel_values)
            assert torch.equal(find(image)["probs"], expected)
        found = {label["label"]: np.asarray(label["mask"]) > 0 for label in segment(image)}
        hard = found.get("object", np.zeros(gray.shape, bool))
        np.testing.assert_array_equal(hard, expected.numpy() > 0.5)


def test_hard_pipeline_refuses_text_that_is_no_image(model):
    segment = pipeline("image-segmentation", model=model, image_processor=PROCESSOR, device="cpu")
    for text in ("absent.png", "data:image/png;base64,bm90aGluZw=="):
        with pytest.raises(ValueError, match=f"got '{text}', expected an image file"):
            segment(text)


def test_cutouts_and_overlays_are_tagged_as_srgb(find, images, tmp_path):
    mask = np.linspace(0, 1, 3500, dtype=np.float32).reshape(50, 70)
    for image in (find.cut_out(images[0], mask), cutout(images[0], mask), overlay(images[0], mask)):
        image.save(tmp_path / "output.png")
        assert Image.open(tmp_path / "output.png").info["icc_profile"] == srgb_profile()


def test_calls_override_options_of_the_pipeline(edgy):
    image = resized(140, 90)
    find = make_pipeline(edgy, refine="never", cutout=True)
    found, plain = find(image), make_pipeline(edgy)(image)
    assert "cutout" in found
    assert not torch.equal(found["probs"], plain["probs"])
    again = find(image, refine="auto", cutout=False)
    assert "cutout" not in again
    assert torch.equal(again["probs"], plain["probs"])


HALF = torch.full((50, 70), 0.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda find, image: find("absent.png"), "'absent.png', which is not a file"),
        (lambda find, image: find(7), "got int"),
        (lambda find, image: find([image, [image, image]]), "got 2 images as one input"),
        (lambda find, image: find(np.zeros((5, 6, 7))), "(5, 6, 7)"),
        (lambda find, image: find(image, refine="yes"), "got refine='yes', expected one of auto, always, never"),
        (lambda find, image: find([image], refine=True), "got refine=True, expected one of auto, always, never"),
        (lambda find, image: make_pipeline(find.model, refine="yes"), "got refine='yes'"),
        (lambda find, image: find(image, cutout="yes"), "got cutout='yes', expected True or False"),
        (lambda find, image: find(image, batch_size=0), "got batch_size=0, expected a whole number from 1"),
        (lambda find, image: make_pipeline(find.model, batch_size="2")(image), "got batch_size='2', expected"),
        (lambda find, image: find.cut_out(image, mask_to_image(HALF.T)), "a mask of 50x70, expected 70x50"),
        (lambda find, image: find.cut_out(image, HALF.T), "a mask of 50x70, expected 70x50"),
        (lambda find, image: find.cut_out(image, HALF[None]), "(1, 50, 70), expected (height, width)"),
        (lambda find, image: find.cut_out(image, (HALF * -2).numpy()), "values from -1 to -1, expected 0"),
        (lambda find, image: find.cut_out(image, HALF * torch.nan), "values that are NaN"),
        (lambda find, image: find.cut_out(image, "mask.png"), "got a mask of str, expected a PIL image, an array"),
        (lambda find, image: find.cut_out("absent.png", HALF), "'absent.png', which is not a file"),
    ],
)
def test_wrong_values_are_rejected_in_one_line(find, images, call, words):
    with pytest.raises(ValueError) as caught:
        call(find, images[0])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tester", TESTERS.values(), ids=TESTERS)
def test_hard_masks_of_more_images_than_stages(tester, images):
    model = tester().make_lively_model()
    segment = pipeline("image-segmentation", model=model, image_processor=PROCESSOR, device="cpu")
    for batch_size in (1, 6):
        found = segment(images, batch_size=batch_size)
        for one, probs in zip(found, masks_of(model, images), strict=True):
            assert {label["label"] for label in one} <= {"background", "object"}
            masks = {label["label"]: np.asarray(label["mask"]) > 0 for label in one}
            hard = masks.get("object", np.zeros(probs.shape, bool))
            sure = (probs - 0.5).abs().numpy() > 1e-4
            assert np.array_equal(hard[sure], (probs > 0.5).numpy()[sure])
