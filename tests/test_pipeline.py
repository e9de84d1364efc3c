"""Pipelines: soft masks by our own, hard ones by transformers'. That they open without the package is tested elsewhere."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from save_tiny_models import TESTERS
from transformers import pipeline

from unconceal import SoftMaskPipeline, UnconcealImageProcessor


PROCESSOR = UnconcealImageProcessor(size={"height": 64, "width": 64})


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
