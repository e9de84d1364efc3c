"""Refined edges of large images: finer, without seams, unchanged elsewhere."""

from itertools import chain, repeat

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from unconceal.__main__ import main
from unconceal.api import Segmenter
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor
from unconceal.models.refine import choose_zooms, edge_band, tile_starts
from unconceal.utils.errors import UserError


SIZE = 64


def segmenter(answer):
    """Return a segmenter of 64x64 with the logits `answer(images)`."""

    class FakeForImageSegmentation(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self):
            super().__init__(PreTrainedConfig())
            self.unused = torch.nn.Parameter(torch.zeros(()))
            self.seen = 0

        def forward(self, pixel_values):
            self.seen += len(pixel_values)
            return SemanticSegmenterOutput(logits=answer(pixel_values))

    return Segmenter(FakeForImageSegmentation(), UnconcealImageProcessor(size=SIZE, do_normalize=False))


def bright(images):
    """Call bright pixels the object, at any scale."""
    return 20 * (images.mean(1, keepdim=True) - 0.5)


def once(answer, then):
    """Answer the whole image, then its tiles, in different ways."""
    answers = chain([answer], repeat(then))
    return lambda images: next(answers)(images)


def spiky_disc(side=512):
    """Return a disc with thin teeth, and its mask."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    center, radius = side / 2, side / 4
    draw.ellipse((center - radius, center - radius, center + radius, center + radius), fill=255)
    for angle in np.linspace(0, 2 * np.pi, 40, endpoint=False):
        tip = center + 1.15 * radius * np.cos(angle), center + 1.15 * radius * np.sin(angle)
        draw.line((center, center, *tip), fill=255, width=side // 128)
    return mask.convert("RGB"), np.asarray(mask) > 127


def iou(mask, expected):
    found = mask > 0.5
    return (found & expected).sum() / (found | expected).sum()


# ---- tiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refine", "size", "zooms"),
    [
        ("auto", (1500, 2100), (2,)),
        ("auto", (10, 20000), (2, 4)),
        ("auto", (1279, 1279), ()),
        ("auto", (1024, 1280), (2,)),
        ("auto", (4095, 1024), (2,)),
        ("always", (2047, 1000), (2,)),
        ("always", (4000, 6000), (2, 4)),
        ("always", (1024, 1024), ()),
        ("never", (4000, 6000), ()),
    ],
)
def test_zooms(refine, size, zooms):
    assert choose_zooms(refine, size, (1024, 1024)) == zooms


@pytest.mark.parametrize("length", [32, 33, 56, 57, 1000])
def test_tiles_cover_and_overlap(length):
    starts = tile_starts(length, 32)
    assert (starts[0], starts[-1]) == (0, length - 32)
    assert all(0 < step <= 24 for step in np.diff(starts))


def test_small_images_are_not_refined():
    fine = segmenter(bright)
    images = [Image.effect_noise((width, 70), 100).convert("RGB") for width in (20, 70, 79)]
    assert fine.segment(images, batch_size=3)[0].shape == (70, 20)
    assert fine.network.seen == 3
    for automatic, never in zip(fine.segment(images), fine.segment(images, refine="never"), strict=True):
        np.testing.assert_array_equal(automatic, never)


def test_only_tiles_on_an_edge_are_predicted():
    image, _ = spiky_disc(128)
    fine = segmenter(bright)
    corner = Image.new("RGB", (1024, 1024))
    corner.paste(image)
    fine.segment([corner])
    assert 1 < fine.network.seen < 1 + len(tile_starts(128, 64)) ** 2
    for color in ("black", "white"):  # no object, or only object
        fine.network.seen = 0
        (mask,) = fine.segment([Image.new("RGB", (500, 300), color)])
        assert fine.network.seen == 1
        assert ((mask > 0.5) == (color == "white")).all()


# ---- masks --------------------------------------------------------------------------------------------


def test_thin_structures_at_an_edge_are_recovered():
    image, expected = spiky_disc()
    fine = segmenter(bright)
    (coarse,), (refined,) = fine.segment([image], refine="never"), fine.segment([image])
    assert refined.shape == expected.shape
    assert refined.dtype == np.float32
    assert 0 <= refined.min() <= refined.max() <= 1
    assert iou(coarse, expected) < 0.945
    assert iou(refined, expected) > 0.985


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_wrong_tiles_change_only_the_band(logit):
    image, _ = spiky_disc()
    (coarse,) = segmenter(bright).segment([image], refine="never")
    (refined,) = segmenter(once(bright, lambda tiles: torch.full_like(tiles[:, :1], logit))).segment([image])
    # 4 pixels of the network to either side of an edge, 2 in which the band fades, and 1 by interpolation.
    reach = (4 + 2 + 1) * 512 // SIZE
    near = (coarse > 0.05) & (coarse < 0.95)
    for axis in (0, 1):
        near = np.any([np.roll(near, shift, axis) for shift in range(-reach, reach + 1)], axis=0)
    assert not near.all()
    np.testing.assert_array_equal(refined[~near], coarse[~near])
    assert np.abs(refined - coarse)[near].max() > 0.5


def test_no_seams():
    # Each tile adds an offset of its own to a mask that is otherwise flat across its borders.
    offsets = iter(np.random.default_rng(0).uniform(-2, 2, 1000))

    def answer(images):
        own = torch.tensor([next(offsets) for _ in images], dtype=torch.float32)
        return own[:, None, None, None] + images.mean(1, keepdim=True) * 0

    image = Image.new("RGB", (512, 512))
    image.paste("white", (0, 0, 256, 512))
    (mask,) = segmenter(once(bright, answer)).segment([image])
    along_edge = mask[:, 250:262]
    assert np.ptp(along_edge) > 0.2  # the tiles' offsets do show
    # At most 4 logits between two tiles, a quarter of a probability each, over 16 or more positions 2 pixels wide.
    assert np.abs(np.diff(along_edge, axis=0)).max() < 1 / (16 * 2)


def test_a_wide_area_of_doubt_is_not_an_edge():
    probs = torch.full((1, 1, 64, 64), 0.45)
    probs[..., :8] = 0.05
    assert not edge_band(probs, 4).any()
    probs[..., 32:] = 1
    weight = edge_band(probs, 4)[0, 0, 0]
    assert (weight[30:34] == 1).all()
    assert not weight[:25].any()
    assert not weight[39:].any()


def test_batches_equal_singles():
    def answer(images):
        return F.avg_pool2d(bright(images), 5, 1, 2) + images.mean((1, 2, 3), keepdim=True)

    images = [spiky_disc(200)[0], spiky_disc(40)[0], spiky_disc(300)[0].resize((190, 260))]
    singles = segmenter(answer).segment(images)
    for single, batched in zip(singles, segmenter(answer).segment(images, 2), strict=True):
        np.testing.assert_allclose(batched, single, atol=1e-6)


def test_half_precision_and_odd_shapes():
    fine = segmenter(lambda images: bright(images.float()).to(images.dtype))
    fine.model.to(torch.bfloat16)
    for size in ((1, 300), (300, 1), (131, 77)):
        image = Image.radial_gradient("L").resize(size).convert("RGB")
        (mask,) = fine.segment([image], refine="always")
        assert mask.shape == size[::-1]
        assert np.isfinite(mask).all()


def test_unknown_values_are_rejected():
    with pytest.raises(UserError, match="got refine='yes', expected one of auto, always, never"):
        segmenter(bright).segment([Image.new("RGB", (8, 8))], refine="yes")


def test_the_command_refines(tmp_path, monkeypatch):
    image, expected = spiky_disc(256)
    image.save(tmp_path / "a.png")
    monkeypatch.setattr("unconceal.commands.segment.load_model", lambda args: segmenter(bright))
    score = {}
    for refine in ("auto", "never"):
        main(["segment", str(tmp_path / "a.png"), "--model", "x", "--out", str(tmp_path / refine), "--refine", refine])
        score[refine] = iou(np.asarray(Image.open(tmp_path / refine / "a.png")) / 255, expected)
    assert score["auto"] > score["never"] + 0.03


# ---- images of their own size ----------------------------------------------------------------


def own_size_segmenter(answer):
    """Return a segmenter that keeps the size of images, in tiles of 64x48 at most."""
    processor = UnconcealImageProcessor(
        size={"height": 48, "width": 64}, do_resize=False, do_rescale=False, do_normalize=False
    )
    return Segmenter(segmenter(answer).model, processor)


@pytest.mark.parametrize("size", [(64, 48), (65, 40), (40, 49), (200, 150), (20, 30), (20, 100), (1, 1)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_tiles_of_images_of_their_own_size_have_no_seams(size, batch_size):
    shapes = []

    def answer(images):
        shapes.append(tuple(images.shape))
        return images[:, :1] / 10 - 10

    own = own_size_segmenter(answer)
    images = [Image.effect_noise(size, 200).convert("RGB") for _ in range(2)]
    masks = own.segment(images, batch_size=batch_size)
    for image, mask in zip(images, masks, strict=True):
        expected = torch.from_numpy(np.asarray(image)[..., 0] / 10 - 10).sigmoid()
        np.testing.assert_allclose(mask, expected, atol=1e-5)
    heights, widths = {shape[2] for shape in shapes}, {shape[3] for shape in shapes}
    assert heights == {min(max(32, size[1]), 48)}
    assert widths == {min(max(32, size[0]), 64)}
    assert max(shape[0] for shape in shapes) <= batch_size
    if size == (64, 48):
        assert len(shapes) == 2 // min(2, batch_size)  # an image that fits is one pass


def test_tiles_do_not_change_an_image_that_fits_into_one():
    own, image = own_size_segmenter(bright), Image.effect_noise((64, 48), 200).convert("RGB")
    own.processor.size = {"height": 480, "width": 640}
    np.testing.assert_array_equal(own.segment(image), own_size_segmenter(bright).segment(image))
