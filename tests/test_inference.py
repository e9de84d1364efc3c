"""Loading a network, segmenting files of every kind by the command line, and drawing."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from common import SMALLEST_SRS
from PIL import Image
from transformers import BertConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from unconceal.api import Segmenter, cutout, load, overlay
from unconceal.commands.segment import entry, main, plan_jobs
from unconceal.models.configuration_srs import SrsConfig
from unconceal.models.cutout import mask_to_image
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor
from unconceal.models.modeling_srs import SrsForImageSegmentation, SrsForReconstruction
from unconceal.utils.errors import UserError


PREDICT = Path(__file__).parents[1] / "scripts" / "predict.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny untrained network and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    SrsForImageSegmentation(SrsConfig(**SMALLEST_SRS)).save_pretrained(folder)
    UnconcealImageProcessor(size=32).save_pretrained(folder)
    return folder


@pytest.fixture
def segment(checkpoint, capsys):
    """Run `unconceal segment` and return (exit code, stdout, stderr)."""

    def run(*args):
        code = main(["segment", *map(str, args), "--model", str(checkpoint), "--device", "cpu"])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def bright():
    """A segmenter that calls bright pixels the object."""

    class BrightForImageSegmentation(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self):
            super().__init__(PreTrainedConfig())
            self.gain = torch.nn.Parameter(torch.tensor(8.0))

        def forward(self, pixel_values):
            return SemanticSegmenterOutput(logits=self.gain * pixel_values.mean(1, keepdim=True))

    return Segmenter(BrightForImageSegmentation(), UnconcealImageProcessor(size=32))


def picture(width=30, height=20, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_odd_kinds(folder):
    """Write a file of every kind and return each one's displayed (width, height) by name."""
    rgb, grey = picture(), picture().convert("L")
    alpha = Image.linear_gradient("L").resize(rgb.size)
    rgba, grey_alpha = rgb.copy(), grey.copy()
    rgba.putalpha(alpha)
    grey_alpha.putalpha(alpha)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    rgb.save(folder / "plain.jpg")
    rgb.save(folder / "rotated.jpg", exif=exif)
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgba.save(folder / "rgba.png")
    grey.save(folder / "grey.png")
    grey_alpha.save(folder / "grey_alpha.png")
    grey.convert("1").save(folder / "one_bit.png")
    rgb.convert("P").save(folder / "palette.png")
    rgb.convert("P").save(folder / "palette_transparent.png", transparency=3)
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep.astype(np.float32) / 60000).save(folder / "float.tiff")
    rgb.save(folder / "lossless.webp", lossless=True)
    rgb.save(folder / "moving.gif", save_all=True, append_images=[picture(seed=1)])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (20000, 10)).save(folder / "wide.png")
    odd = {"rotated": (20, 30), "dot": (1, 1), "wide": (20000, 10)}
    return {path.stem: odd.get(path.stem, (30, 20)) for path in folder.iterdir()}


def write_broken(folder):
    (folder / "words.png").write_text("not a picture")
    (folder / "empty.jpg").touch()
    whole = io.BytesIO()
    picture(200, 200).save(whole, "PNG")
    (folder / "truncated.png").write_bytes(whole.getvalue()[:-40000])

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))
    return {"words.png", "empty.jpg", "truncated.png", "bomb.png"}


# ---- the network on pictures -------------------------------------------------------------------------------------


def test_masks_lie_where_the_object_is_displayed(bright):
    corner = Image.new("RGB", (90, 60))
    corner.paste("white", (60, 0, 90, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise for display
    turned = corner.transpose(Image.Transpose.ROTATE_90)
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    for image in (corner, Image.open(file)):
        (mask,) = bright.segment([image])
        assert mask.shape == (60, 90)
        assert mask.dtype == np.float32
        rows, columns = np.nonzero(mask > 0.5)
        assert (rows.min(), columns.max()) == (0, 89)
        assert rows.max() == pytest.approx(29, abs=2)
        assert columns.min() == pytest.approx(60, abs=2)


def test_batches_equal_singles_and_keep_order(checkpoint):
    segmenter = load(checkpoint, device="cpu")
    images = [picture(30 + index, 20 + 7 * index, seed=index) for index in range(5)]
    singles = segmenter.segment(images)
    assert [mask.shape for mask in singles] == [(image.height, image.width) for image in images]
    for batch_size in (2, 5, 99):
        for single, batched in zip(singles, segmenter.segment(images, batch_size), strict=True):
            np.testing.assert_allclose(batched, single, atol=1e-6)
    assert segmenter.segment([]) == []


def test_a_stream_holds_one_batch(bright):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield picture()

    masks = bright.stream(endless(), batch_size=3)
    for _ in range(4):
        next(masks)
    assert taken == 6


def test_half_precision(checkpoint):
    (exact,) = load(checkpoint, device="cpu").segment([picture()])
    segmenter = load(checkpoint, device="cpu", dtype="bfloat16")
    assert segmenter.model.dtype == torch.bfloat16
    (mask,) = segmenter.segment([picture()])
    assert mask.dtype == np.float32
    np.testing.assert_allclose(mask, exact, atol=0.05)


def test_out_of_memory_is_explained(bright, monkeypatch):
    def accelerator(self, images, *options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def cpu(self, images, *options):
        torch.empty(2**60, dtype=torch.int8)

    for full in (accelerator, cpu):
        monkeypatch.setattr(Segmenter, "_segment_batch", full)
        with pytest.raises(UserError, match="30x20; lower the batch size"):
            bright.segment([picture()])

    def defect(self, images, *options):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Segmenter, "_segment_batch", defect)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        bright.segment([picture()])


# ---- loading -----------------------------------------------------------------------------------------------------


def damaged(checkpoint, folder, damage):
    shutil.copytree(checkpoint, folder)
    damage(folder)
    return folder


def edit_config(**changes):
    def damage(folder):
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        config.pop("auto_map")
        path.write_text(json.dumps(config))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "without config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot load"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load"),
        (lambda folder: os.truncate(folder / "model.safetensors", 3000), "damaged or cut short"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
        (edit_config(model_type="no_such_network"), "no_such_network"),
        (edit_config(hidden_sizes=[8, 8, 8, 16]), "other shapes"),
        (edit_config(depths="x"), "'depths' with value 'x'"),
        (edit_config(depths=[1, 1]), r"need 4 entries, got .*\[1, 1\]"),
        (edit_config(dtype="floot"), "floot"),
        (edit_config(id2label=3), "cannot load"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("[]"), "preprocessor_config.json"),
        (lambda folder: BertConfig().save_pretrained(folder), "BertConfig"),
        (
            lambda folder: SrsForReconstruction(SrsConfig(**SMALLEST_SRS)).save_pretrained(folder),
            "SrsForReconstruction",
        ),
    ],
)
def test_unusable_checkpoints_are_one_clear_line(checkpoint, tmp_path, damage, words):
    with pytest.raises(UserError, match=words) as caught:
        load(damaged(checkpoint, tmp_path / "damaged", damage), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model_id_or_path": "/no/such/folder"}, "/no/such/folder"),
        ({"model_id_or_path": __file__}, "which is no folder"),
        ({"model_id_or_path": "name"}, "owner/name"),
        ({"model_id_or_path": "owner/name", "device": "abacus"}, "abacus"),
        ({"model_id_or_path": "owner/name", "dtype": "int8"}, "int8"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(UserError, match=words):
        load(**arguments)


def test_another_processor_is_refused(checkpoint, tmp_path):
    def damage(folder):
        (folder / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')

    with pytest.raises(UserError, match="expected UnconcealImageProcessor"):
        load(damaged(checkpoint, tmp_path / "damaged", damage), device="cpu")


# ---- drawing -----------------------------------------------------------------------------------------------------

GREY = Image.new("RGB", (3, 1), (100, 100, 100))
RAMP = np.array([[0, 0.5, 1]], np.float32)


def test_drawings_by_pixel():
    assert np.asarray(mask_to_image(RAMP)).tolist() == [[0, 128, 255]]
    assert np.asarray(overlay(GREY, RAMP, color=(200, 0, 100), alpha=0.5)).tolist() == [
        [[100, 100, 100], [125, 75, 100], [150, 50, 100]]
    ]
    assert np.asarray(cutout(GREY, RAMP)).tolist() == [[[100] * 3 + [0], [100] * 3 + [128], [100] * 3 + [255]]]
    assert GREY.mode == "RGB"  # the picture passed in is left alone


@pytest.mark.parametrize("draw", [overlay, cutout])
def test_drawing_with_a_mask_of_another_size(draw):
    with pytest.raises(UserError, match=r"\(1, 3\)"):
        draw(GREY, RAMP.T)


# ---- the command -------------------------------------------------------------------------------------------------


def test_every_kind_of_file_and_the_broken_ones(segment, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    sizes = write_odd_kinds(folder)
    broken = write_broken(folder)
    code, stdout, stderr = segment(folder, "--out", out, "--batch-size", 4)
    assert code == 1
    assert f"{len(sizes)} segmented" in stdout
    assert f"{len(broken)} failed" in stdout
    failed = dict(line.removeprefix("failed: ").split(": ", 1) for line in stderr.splitlines() if "failed: " in line)
    assert {Path(name).name for name in failed} == broken
    assert "not an image" in failed[str(folder / "words.png")]
    assert "truncated" in failed[str(folder / "truncated.png")]
    assert "178956970" in failed[str(folder / "bomb.png")]
    assert "max-pixels" in failed[str(folder / "bomb.png")]
    assert {path.stem for path in out.iterdir()} == set(sizes)
    for name, size in sizes.items():
        with Image.open(out / f"{name}.png") as mask:
            assert (mask.mode, mask.size) == ("L", size), name


def test_tree_kinds_skip_and_overwrite(segment, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "in" / "masks"  # an output folder inside the input folder
    (folder / "deep").mkdir(parents=True)
    picture().save(folder / "a.jpg")
    picture(seed=1).save(folder / "deep" / "a.png")
    (folder / "._a.jpg").write_text("a file system's own")
    (folder / "notes.txt").write_text("no picture")
    kinds = ["--output", "mask", "overlay", "cutout"]
    code, stdout, _ = segment(folder, "--out", out, *kinds)
    assert code == 0
    assert stdout.startswith("2 pictures: 2 segmented")
    files = {str(path.relative_to(out)) for path in out.rglob("*.*")}
    assert files == {f"{stem}{kind}.png" for stem in ("a", "deep/a") for kind in ("", "_overlay", "_cutout")}
    assert Image.open(out / "a_overlay.png").mode == "RGB"
    assert Image.open(out / "a_cutout.png").mode == "RGBA"
    np.testing.assert_array_equal(
        np.asarray(Image.open(out / "a_cutout.png").getchannel("A")), np.asarray(Image.open(out / "a.png"))
    )

    for name in ("a.png", "deep/a.png", "deep/a_cutout.png"):
        (out / name).write_text("kept")
    (out / "deep" / "a_overlay.png").unlink()
    code, stdout, _ = segment(folder, "--out", out, *kinds)
    assert code == 0
    for name in ("a.png", "deep/a.png", "deep/a_cutout.png"):  # what one of a picture's outputs lacks is written alone
        assert (out / name).read_text() == "kept"
    assert "1 segmented" in stdout
    assert "1 skipped" in stdout
    assert (out / "deep" / "a_overlay.png").is_file()
    code, stdout, _ = segment(folder, "--out", out, *kinds, "--overwrite")
    assert "2 segmented" in stdout
    for name in ("a.png", "deep/a.png"):
        assert Image.open(out / name).mode == "L"


def test_threshold_gives_hard_masks(segment, tmp_path):
    picture().save(tmp_path / "a.png")
    segment(tmp_path / "a.png", "--out", tmp_path / "soft")
    soft = np.asarray(Image.open(tmp_path / "soft" / "a.png"))
    level = float(np.median(soft)) / 255
    segment(tmp_path / "a.png", "--out", tmp_path / "hard", "--threshold", level)
    hard = np.asarray(Image.open(tmp_path / "hard" / "a.png"))
    assert set(np.unique(hard)) == {0, 255}
    assert (hard[soft > level * 255 + 1] == 255).all()
    assert (hard[soft < level * 255 - 1] == 0).all()


def test_an_object_lies_above_the_threshold(segment, tmp_path, monkeypatch):
    monkeypatch.setattr(Segmenter, "_segment_batch", lambda self, *args: [np.full((1, 2), [0.5, 0.75], np.float32)])
    Image.new("RGB", (2, 1)).save(tmp_path / "a.png")
    segment(tmp_path / "a.png", "--out", tmp_path / "out", "--threshold", 0.5)
    assert np.asarray(Image.open(tmp_path / "out" / "a.png")).tolist() == [[0, 255]]
    with pytest.raises(SystemExit):
        segment(tmp_path / "a.png", "--out", tmp_path / "out", "--threshold", 1)


def test_same_stem_keeps_the_suffix(segment, tmp_path):
    for name in ("a.jpg", "a.png", "b.png"):
        picture().save(tmp_path / name)
    code, _, _ = segment(tmp_path, "--out", tmp_path / "out")
    assert code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.jpg.png", "a.png.png", "b.png"}


def test_max_pixels(segment, tmp_path):
    picture(30, 20).save(tmp_path / "a.png")
    code, _, stderr = segment(tmp_path / "a.png", "--out", tmp_path / "out", "--max-pixels", 599)
    assert code == 1
    assert "30x20 is over the limit of 599 pixels" in stderr
    limit = Image.MAX_IMAGE_PIXELS
    assert segment(tmp_path / "a.png", "--out", tmp_path / "out", "--max-pixels", 600)[0] == 0
    assert limit == Image.MAX_IMAGE_PIXELS  # Pillow's own setting is as before


def test_plans(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one/a.png", "two/a.png", "three/a_overlay.png", "three/a.png"):
        Path(name).parent.mkdir(exist_ok=True)
        picture().save(name)
    # The output folder may hold the input folder; a file named twice is one job.
    jobs = plan_jobs([Path("one"), Path("one/a.png"), tmp_path / "one"], Path(), ["mask"])
    assert [job.outputs["mask"] for job in jobs] == [tmp_path / "a.png"]

    def refused(words, paths, out, kinds=("mask",)):
        with pytest.raises(UserError, match=words):
            plan_jobs([Path(path) for path in paths], Path(out), list(kinds))

    refused("two runs", ["one", "two"], "out")
    refused("two runs", ["three"], "out", ["mask", "overlay"])
    refused("as input and as --out", ["one"], "one")
    refused("over the input", ["one/a.png"], "one")
    refused("does not exist", ["one", "absent"], "out")
    Path("bare").mkdir()
    refused("found no picture", ["bare"], "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.png"], "--out"),
        (["-", "--out", "out"], "stdin"),
        (["a.png", "--out", "a.png"], "cannot write to a.png"),
    ],
)
def test_nothing_is_done_on_a_wrong_call(segment, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    picture().save("a.png")
    with pytest.raises(UserError, match=words):
        segment(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_full_disk_stops_and_leaves_no_half_file(segment, tmp_path, monkeypatch, capsys):
    def full(self, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    picture().save(tmp_path / "b.png")
    (tmp_path / "a.png").write_text("not a picture")
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        segment(tmp_path / "a.png", tmp_path / "b.png", "--out", tmp_path / "out")
    assert f"failed: {tmp_path / 'a.png'}: not an image" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_that_cannot_be_written_fails_alone(segment, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    long = f"{'a' * 245}.png"  # its mask has a name that a file system takes, its overlay has not
    for name in (long, "b/c.png", "d.png", "e.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(folder / name)
    (out / "d.png").mkdir(parents=True)  # a folder where a file should be
    (out / "b").write_text("a file where a folder should be")
    code, stdout, stderr = segment(folder, "--out", out, "--output", "mask", "overlay", "--overwrite")
    assert code == 1
    assert "1 segmented" in stdout
    assert "3 failed" in stdout
    failed = [line for line in stderr.splitlines() if line.startswith("failed: ")]
    assert {line.split(": ")[1] for line in failed} == {str(folder / name) for name in (long, "b/c.png", "d.png")}
    assert "File name too long" in failed[0]
    assert {path.name for path in out.iterdir()} == {long, "b", "d.png", "d_overlay.png", "e.png", "e_overlay.png"}


def test_an_output_folder_that_shuts_stops(segment, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def shut(self, path, *args, **kwargs):
        shutil.rmtree(out)
        out.write_text("not a folder any more")
        raise PermissionError(13, "Permission denied")

    picture().save(tmp_path / "b.png")
    (tmp_path / "a.png").write_text("not a picture")
    monkeypatch.setattr(Image.Image, "save", shut)
    with pytest.raises(UserError, match=f"cannot write to {out}"):
        segment(tmp_path / "a.png", tmp_path / "b.png", "--out", out)
    assert "a.png: not an image" in capsys.readouterr().err


def test_entry_prints_one_line_and_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["unconceal", "segment", "absent.png", "--model", "none", "--out", "out"])
    with pytest.raises(SystemExit) as caught:
        entry()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: got absent.png, which does not exist; give pictures or folders\n"


def test_script_as_a_pipe(checkpoint):
    file = io.BytesIO()
    picture().save(file, "PNG")
    command = [sys.executable, str(PREDICT), "-", "--output", "cutout", "--model", str(checkpoint), "--device", "cpu"]
    piped = subprocess.run(command, input=file.getvalue(), capture_output=True)
    assert (piped.returncode, piped.stderr) == (0, b"")
    result = Image.open(io.BytesIO(piped.stdout))
    assert (result.mode, result.size) == ("RGBA", (30, 20))
