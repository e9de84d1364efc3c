"""Maps of an unfolding, the sheet that shows them, and `unconceal explain`."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import SMALLEST_SRS, noise, rejected
from PIL import Image
from save_tiny_models import TESTERS
from test_sheets import cut

from unconceal import (
    RunConfig,
    RunForImageSegmentation,
    SoftMaskPipeline,
    SrsConfig,
    SrsForImageSegmentation,
    UnconcealImageProcessor,
)
from unconceal.__main__ import main
from unconceal.api import Segmenter, load
from unconceal.commands.explain import is_sheet, save_sheet
from unconceal.drawing.explain import LABEL_WIDTH, MAP_SIDE
from unconceal.drawing.layout import GAP
from unconceal.models.painting import remove_object
from unconceal.utils.errors import UserError


# 48 wide and 40 high, so that it is padded to 64 x 64 and ends inside a position at strides 32 and 16.
SIZE = {"height": 40, "width": 48}
ALL = {"mask", "edge", "opinion", "background", "uncertainty", "reconstruction", "error"}


def make_segmenter(size=SIZE, **config):
    torch.manual_seed(0)
    model = RunForImageSegmentation(RunConfig(**TESTERS["run"].tiny, **config)).eval()
    with torch.no_grad():  # as they start, near 0, they would draw every mask in one gray
        for name, parameter in model.named_parameters():
            if "mask_head" in name or "edge_head" in name:
                parameter.normal_(std=0.3)
    return Segmenter(model, UnconcealImageProcessor(size=size))


PHOTO = noise(90, 60)


def run_on(segmenter, image):
    with torch.inference_mode():
        pixel_values = segmenter.processor(image).pixel_values
        return pixel_values, segmenter.network(pixel_values=pixel_values, output_stages=True)


def maps_of(stage):
    return {name for name in ALL if getattr(stage, name) is not None}


def enlarged(maps, stride, width, height, input_width=48, input_height=40):
    """Take the position under the middle of each pixel."""
    columns = ((np.arange(width) + 0.5) * input_width / width // stride).astype(int)
    rows = ((np.arange(height) + 0.5) * input_height / height // stride).astype(int)
    return maps[0].float().numpy().transpose(1, 2, 0)[rows[:, None], columns]


# ---- maps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 80), (101, 67)])  # twice the network's input, and nothing in common with it
def test_maps_are_those_of_the_network_without_its_padding(size):
    segmenter, image = make_segmenter(), noise(*size)
    unfolding = segmenter.unfold(image)
    pixel_values, outputs = run_on(segmenter, image)
    full_image = F.pad(segmenter.model.denormalize(pixel_values), (0, 16, 0, 24), mode="replicate")
    (final,) = segmenter.processor.post_process_masks(outputs, [size[::-1]])
    np.testing.assert_array_equal(unfolding.mask, final)
    assert unfolding.input_size == (48, 40)
    assert [stage.stride for stage in unfolding.stages] == [32, 32, 16, 8, 4]
    assert [stage.map_size for stage in unfolding.stages] == [(64 // s, 64 // s) for s in (32, 32, 16, 8, 4)]
    for k, stage in enumerate(unfolding.stages):
        rebuilt = outputs.reconstructions[k]
        error = (rebuilt - F.avg_pool2d(full_image, stage.stride)).abs().mean(1, keepdim=True)
        opinion = (-outputs.share_logits[k]).sigmoid()
        maps = {
            "mask": outputs.mask_logits[k].sigmoid(),
            "opinion": opinion,
            "reconstruction": rebuilt,
            "error": error,
        }
        if k > 0:
            maps["edge"] = outputs.edge_logits[k - 1].sigmoid()
        assert maps_of(stage) == set(maps) | {"uncertainty", "background"}
        for name, expected in maps.items():
            got = getattr(stage, name)
            assert got.dtype == np.float32
            np.testing.assert_array_equal(
                got, enlarged(expected, stage.stride, *size).squeeze(), err_msg=f"{name} {k}"
            )
        expected = remove_object(image.resize(size), stage.mask)
        np.testing.assert_array_equal(stage.background, expected)
        np.testing.assert_array_equal(stage.uncertainty, 1 - np.abs(2 * stage.mask - 1))


def test_maps_shrink_by_averaging():
    segmenter = make_segmenter({"height": 64, "width": 64})
    _, outputs = run_on(segmenter, PHOTO)
    stage = segmenter.unfold(PHOTO, (8, 4)).stages[-1]  # a map of 16x16
    expected = F.avg_pool2d(outputs.mask_logits[-1].sigmoid(), (4, 2))[0, 0]
    np.testing.assert_allclose(stage.mask, expected, atol=1e-6)


def test_pipeline_unfolds_like_the_package(tmp_path):
    segmenter = make_segmenter()
    PHOTO.save(tmp_path / "photo.png")
    find = SoftMaskPipeline(model=segmenter.model, image_processor=segmenter.processor, device="cpu")
    first, *others = find.unfold(tmp_path / "photo.png", (45, 30)).stages
    assert list(first.images()) == ["mask", "background", "uncertainty"]
    for stage, expected in zip(others, segmenter.unfold(PHOTO, (45, 30)).stages[1:], strict=True):
        images = stage.images()
        assert list(images) == ["mask", "edge", "background", "uncertainty"]
        assert images["edge"].size == (45, 30)
        assert images == expected.images()


def test_one_stage_on_the_finest_level():
    first, last = make_segmenter(stage_levels=(0,)).unfold(PHOTO).stages
    assert maps_of(first) == ALL - {"edge"}
    assert maps_of(last) == ALL
    assert (first.stride, last.stride) == (32, 4)


def test_colors_are_rgb_for_a_network_that_sees_bgr():
    segmenter = make_segmenter(image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    options = {"size": SIZE, "image_mean": [0, 0, 0], "image_std": [1, 1, 1], "channel_order": "bgr"}
    segmenter = Segmenter(segmenter.model, UnconcealImageProcessor(**options))
    image = Image.new("RGB", (48, 40), (200, 100, 50))
    _, outputs = run_on(segmenter, image)
    rebuilt = segmenter.unfold(image).stages[-1].reconstruction
    np.testing.assert_array_equal(rebuilt[0, 0], outputs.reconstructions[-1][0, :, 0, 0].flip(0))


def test_older_networks_have_a_background_too():
    first, *_, last = make_segmenter(background_step="correction").unfold(PHOTO).stages
    assert maps_of(first) == {"mask", "uncertainty", "background"}
    assert maps_of(last) == ALL - {"opinion"}


def test_half_precision():
    segmenter = make_segmenter()
    segmenter.model.bfloat16()
    for stage in segmenter.unfold(PHOTO).stages:
        for name in maps_of(stage):
            assert np.isfinite(getattr(stage, name)).all()
            assert getattr(stage, name).dtype == np.float32


def test_networks_without_stages_are_rejected():
    srs, processor = SrsForImageSegmentation(SrsConfig(**SMALLEST_SRS)).eval(), UnconcealImageProcessor(size=32)
    words = "got SrsForImageSegmentation, which has no stages; expected .* RUN"
    with pytest.raises(UserError, match=words):
        Segmenter(srs, processor).explain(PHOTO)
    with pytest.raises(ValueError, match=words):
        SoftMaskPipeline(model=srs, image_processor=processor, device="cpu").unfold(PHOTO)


def test_out_of_memory_is_explained(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    segmenter = make_segmenter()
    monkeypatch.setattr(segmenter.network, "forward", full)
    with pytest.raises(UserError, match="ran out of memory .* 90x60"):
        segmenter.explain(PHOTO)


# ---- the sheet ---------------------------------------------------------------------------------------------------


MAPS = (MAP_SIDE, round(MAP_SIDE * 60 / 90))
SHOWN = np.asarray(PHOTO.resize(MAPS, Image.Resampling.BOX))


def cell_table(sheet):
    """Cut 8 columns and 5 rows of cells out of the sheet; None for a blank."""
    lefts = [LABEL_WIDTH + GAP + column * (MAPS[0] + GAP) for column in range(8)]
    tops = [sheet.height - row * (MAPS[1] + GAP) for row in (5, 4, 3, 2, 1)]
    return [[cut(sheet, left, top, *MAPS) for left in lefts] for top in tops]


def test_sheet():
    segmenter = make_segmenter()
    sheet = segmenter.explain(PHOTO)
    assert sheet.mode == "RGB"
    assert sheet.width == LABEL_WIDTH + GAP + 8 * (MAP_SIDE + GAP)
    rows = cell_table(sheet)
    blanks = [[cell is None for cell in row] for row in rows]
    assert blanks == [[False, False, True, *[False] * 5]] + [[False] * 8] * 4
    for column in (0, 2, 3, 4, 5, 6, 7):  # all stages' maps differ
        drawn = [row[column].tobytes() for row in rows if row[column] is not None]
        assert len(set(drawn)) == len(drawn) >= 4
    stage = segmenter.unfold(PHOTO, MAPS).stages[3]
    masks = np.repeat(np.rint(stage.mask * 255).astype(np.uint8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(rows[3][0], masks)
    np.testing.assert_array_equal(rows[3][4], np.rint(stage.background.clip(0, 1) * 255).astype(np.uint8))
    np.testing.assert_array_equal(cut(sheet, LABEL_WIDTH + GAP, GAP + 18, *MAPS), SHOWN)


def test_outline_runs_where_the_mask_passes_a_half():
    segmenter = make_segmenter()
    crossed = 0
    for stage, row in zip(segmenter.unfold(PHOTO, MAPS).stages, cell_table(segmenter.explain(PHOTO)), strict=True):
        inside = stage.mask > 0.5
        changed = (row[1] != SHOWN).any(-1)
        border = np.zeros_like(inside)
        border[:, 1:] |= inside[:, 1:] != inside[:, :-1]
        border[1:] |= inside[1:] != inside[:-1]
        assert changed[border].all()
        assert changed.any() == border.any()
        crossed += border.any()
    assert crossed >= 2


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (2, 3000)])
def test_sheets_of_extreme_images(size):
    sheet = make_segmenter().explain(Image.new("RGB", size, "red"))
    assert max(sheet.size) < 2500


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    segmenter = make_segmenter()
    segmenter.model.save_pretrained(folder)
    segmenter.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def command(tmp_path, monkeypatch, run_checkpoint):
    """Run `unconceal explain` in a folder with one image, photo.png."""
    monkeypatch.chdir(tmp_path)
    PHOTO.save("photo.png")

    def run(*options, image="photo.png", out="sheet.png", model=run_checkpoint):
        return main(["explain", image, "--model", str(model), "--out", out, "--device", "cpu", *options])

    return run


def test_command_writes_the_sheet(command, run_checkpoint, tmp_path, capsys):
    assert command(out="new/sheet.png") == 0
    assert capsys.readouterr().out == "wrote new/sheet.png\n"
    expected = load(run_checkpoint, device="cpu").explain(PHOTO)
    np.testing.assert_array_equal(np.asarray(Image.open("new/sheet.png")), np.asarray(expected))
    assert {path.name for path in tmp_path.rglob("*")} == {"photo.png", "new", "sheet.png"}


def test_command_overwrites_on_request(command, tmp_path):
    sheet = tmp_path / "sheet.png"
    save_sheet(Image.new("RGB", (9, 9)), sheet)
    before = sheet.read_bytes()
    with pytest.raises(UserError, match="sheet.png exists; replace it with --overwrite"):
        command()
    with pytest.raises(UserError, match="'absent'|absent"):  # nor does a run that fails take it away
        command("--overwrite", model=tmp_path / "absent")
    assert sheet.read_bytes() == before
    assert command("--overwrite") == 0
    assert Image.open(sheet).width > 9 and is_sheet(sheet)
    Image.open(sheet).save(sheet)  # as a program that edits it does
    for content in (sheet.read_bytes(), b"kept"):
        sheet.write_bytes(content)
        with rejected("sheet.png is no sheet of this command, so it is not replaced"):
            command("--overwrite")
        assert sheet.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image": "absent.png"}, "cannot read absent.png: No such file"),
        ({"image": "folder.png"}, "cannot read folder.png: Is a directory"),
        ({"image": "a" * 300}, "File name too long"),
        ({"image": "words.png"}, "words.png: not an image file"),
        ({"model": "absent"}, "got the model 'absent'"),
        ({"out": f"{'a' * 300}.png"}, "cannot write to a.*File name too long"),
        ({"out": "sheet.jpg"}, "got --out sheet.jpg, expected .* .png"),
        ({"out": "photo.png"}, "got photo.png as input and as --out"),
        ({"out": "words.png/sheet.png"}, "cannot write to words.png"),
        ({"out": "folder.png"}, "folder.png exists"),
    ],
)
def test_wrong_calls_are_one_line_and_write_nothing(command, tmp_path, arguments, words):
    (tmp_path / "words.png").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with rejected(words):
        command(**arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_limit_on_pixels_holds(command):
    with pytest.raises(UserError, match="got 90x60, expected at most 5399 pixels"):
        command("--max-pixels", "5399")
