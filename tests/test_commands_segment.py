"""`unconceal segment`: files of every kind, outputs, and errors."""

import io
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

from unconceal.__main__ import entry, main
from unconceal.commands.segment import REFINE, plan_jobs
from unconceal.models import refine
from unconceal.models.configuration_srs import SrsConfig
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor
from unconceal.models.modeling_srs import SrsForImageSegmentation
from unconceal.utils.errors import UserError


SCRIPT = Path(__file__).parents[1] / "scripts" / "predict.py"


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


def noise(width=30, height=20, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_odd_kinds(folder):
    """Write files of every kind; return their displayed sizes by name."""
    rgb, gray = noise(), noise().convert("L")
    alpha = Image.linear_gradient("L").resize(rgb.size)
    rgba, gray_alpha = rgb.copy(), gray.copy()
    rgba.putalpha(alpha)
    gray_alpha.putalpha(alpha)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    rgb.save(folder / "plain.jpg")
    rgb.save(folder / "rotated.jpg", exif=exif)
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgba.save(folder / "rgba.png")
    gray.save(folder / "gray.png")
    gray_alpha.save(folder / "gray_alpha.png")
    gray.convert("1").save(folder / "one_bit.png")
    rgb.convert("P").save(folder / "palette.png")
    rgb.convert("P").save(folder / "palette_transparent.png", transparency=3)
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep.astype(np.float32) / 60000).save(folder / "float.tiff")
    rgb.save(folder / "lossless.webp", lossless=True)
    rgb.save(folder / "moving.gif", save_all=True, append_images=[noise(seed=1)])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (20000, 10)).save(folder / "wide.png")
    odd = {"rotated": (20, 30), "dot": (1, 1), "wide": (20000, 10)}
    return {path.stem: odd.get(path.stem, (30, 20)) for path in folder.iterdir()}


def write_broken(folder):
    (folder / "words.png").write_text("not an image")
    (folder / "empty.jpg").touch()
    whole = io.BytesIO()
    noise(200, 200).save(whole, "PNG")
    (folder / "truncated.png").write_bytes(whole.getvalue()[:-40000])

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))
    return {"words.png", "empty.jpg", "truncated.png", "bomb.png"}


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
    assert "got 60000x60000, expected at most 178956970 pixels" in failed[str(folder / "bomb.png")]
    assert {path.stem for path in out.iterdir()} == set(sizes)
    for name, size in sizes.items():
        with Image.open(out / f"{name}.png") as mask:
            assert (mask.mode, mask.size) == ("L", size), name


def test_tree_kinds_skip_and_overwrite(segment, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "in" / "masks"  # an output folder inside the input folder
    (folder / "deep").mkdir(parents=True)
    noise().save(folder / "a.jpg")
    noise(seed=1).save(folder / "deep" / "a.png")
    (folder / "._a.jpg").write_text("a file system's own")
    (folder / "notes.txt").write_text("not an image")
    kinds = ["--output", "mask", "overlay", "cutout"]
    code, stdout, _ = segment(folder, "--out", out, *kinds)
    assert code == 0
    assert stdout.startswith("2 images: 2 segmented")
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
    for name in ("a.png", "deep/a.png", "deep/a_cutout.png"):  # only the missing output is written
        assert (out / name).read_text() == "kept"
    assert "1 segmented" in stdout
    assert "1 skipped" in stdout
    assert (out / "deep" / "a_overlay.png").is_file()
    code, stdout, _ = segment(folder, "--out", out, *kinds, "--overwrite")
    assert "2 segmented" in stdout
    for name in ("a.png", "deep/a.png"):
        assert Image.open(out / name).mode == "L"


def test_threshold_gives_hard_masks(segment, tmp_path):
    noise().save(tmp_path / "a.png")
    segment(tmp_path / "a.png", "--out", tmp_path / "soft")
    soft = np.asarray(Image.open(tmp_path / "soft" / "a.png"))
    level = float(np.median(soft)) / 255
    segment(tmp_path / "a.png", "--out", tmp_path / "hard", "--threshold", level)
    hard = np.asarray(Image.open(tmp_path / "hard" / "a.png"))
    assert set(np.unique(hard)) == {0, 255}
    assert (hard[soft > level * 255 + 1] == 255).all()
    assert (hard[soft < level * 255 - 1] == 0).all()


def test_an_object_lies_above_the_threshold(segment, tmp_path, monkeypatch):
    monkeypatch.setattr("unconceal.api.predict_masks", lambda *args: [torch.tensor([[0.5, 0.75]])])
    Image.new("RGB", (2, 1)).save(tmp_path / "a.png")
    segment(tmp_path / "a.png", "--out", tmp_path / "out", "--threshold", 0.5)
    assert np.asarray(Image.open(tmp_path / "out" / "a.png")).tolist() == [[0, 255]]
    with pytest.raises(SystemExit):
        segment(tmp_path / "a.png", "--out", tmp_path / "out", "--threshold", 1)


def test_same_stem_keeps_the_suffix(segment, tmp_path):
    for name in ("a.jpg", "a.png", "b.png"):
        noise().save(tmp_path / name)
    code, _, _ = segment(tmp_path, "--out", tmp_path / "out")
    assert code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.jpg.png", "a.png.png", "b.png"}


def test_max_pixels(segment, tmp_path):
    noise(30, 20).save(tmp_path / "a.png")
    code, _, stderr = segment(tmp_path / "a.png", "--out", tmp_path / "out", "--max-pixels", 599)
    assert code == 1
    assert "got 30x20, expected at most 599 pixels" in stderr
    assert segment(tmp_path / "a.png", "--out", tmp_path / "out", "--max-pixels", 600)[0] == 0


def test_wrong_plans_are_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one/a.png", "two/a.png", "three/a_overlay.png", "three/a.png"):
        Path(name).parent.mkdir(exist_ok=True)
        noise().save(name)
    # The output folder may hold the input folder; a file named twice is one job.
    jobs = plan_jobs([Path("one"), Path("one/a.png"), tmp_path / "one"], Path(), ["mask"])
    assert jobs == {tmp_path / "one" / "a.png": {"mask": tmp_path / "a.png"}}

    def rejected(words, paths, out, kinds=("mask",)):
        with pytest.raises(UserError, match=words):
            plan_jobs([Path(path) for path in paths], Path(out), list(kinds))

    rejected("two runs", ["one", "two"], "out")
    rejected("two runs", ["three"], "out", ["mask", "overlay"])
    rejected("as input and as --out", ["one"], "one")
    rejected("over the input", ["one/a.png"], "one")
    rejected("does not exist", ["one", "absent"], "out")
    Path("bare").mkdir()
    rejected("found no image", ["bare"], "out")


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
    noise().save("a.png")
    with pytest.raises(UserError, match=words):
        segment(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("disk_is_full", [True, False])
def test_a_lost_output_folder_stops_the_run(segment, tmp_path, monkeypatch, capsys, disk_is_full):
    out = tmp_path / "out"

    def fail(self, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        if disk_is_full:
            raise OSError(28, "No space left on device")
        shutil.rmtree(out)
        out.write_text("not a folder any more")
        raise PermissionError(13, "Permission denied")

    noise().save(tmp_path / "b.png")
    (tmp_path / "a.png").write_text("not an image")
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(UserError, match="No space left on device" if disk_is_full else f"cannot write to {out}"):
        segment(tmp_path / "a.png", tmp_path / "b.png", "--out", out)
    assert f"failed: {tmp_path / 'a.png'}: not an image" in capsys.readouterr().err
    assert not disk_is_full or not list(out.iterdir())


def test_an_output_that_cannot_be_written_fails_alone(segment, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    long = f"{'a' * 245}.png"  # its mask has a name that a file system takes, its overlay has not
    for name in (long, "b/c.png", "d.png", "e.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise().save(folder / name)
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


def test_choices_are_those_of_the_networks():
    assert REFINE == refine.REFINE


@pytest.mark.parametrize("debug", ["", "1"])
def test_a_user_error_is_one_line_and_exit_code_2(monkeypatch, capsys, debug):
    monkeypatch.setenv("UNCONCEAL_DEBUG", debug)
    monkeypatch.setattr(sys, "argv", ["predict.py", "absent.png", "--model", "none", "--out", "out"])
    with pytest.raises(SystemExit) as caught:
        entry("segment")
    assert caught.value.code == 2
    *traceback, line = capsys.readouterr().err.splitlines()
    assert line == "error: got absent.png, which does not exist; give images or folders"
    assert ("in plan_jobs" in "".join(traceback)) == bool(debug)


def test_script_as_a_pipe(checkpoint):
    file = io.BytesIO()
    noise().save(file, "PNG")
    command = [sys.executable, str(SCRIPT), "-", "--output", "cutout", "--model", str(checkpoint), "--device", "cpu"]
    piped = subprocess.run(command, input=file.getvalue(), capture_output=True)
    assert (piped.returncode, piped.stderr) == (0, b"")
    result = Image.open(io.BytesIO(piped.stdout))
    assert (result.mode, result.size) == ("RGBA", (30, 20))
