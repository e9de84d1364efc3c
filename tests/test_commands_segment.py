"""`unconceal segment`: files of every kind, outputs, and errors."""

import io
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import noise, rejected
from PIL import Image
from transformers import AutoModelForImageSegmentation

from unconceal import SrsForImageSegmentation
from unconceal.__main__ import entry
from unconceal.api import load
from unconceal.commands.segment import REFINE
from unconceal.hub.stage import stage_model
from unconceal.models import refine
from unconceal.segmenting import plan_jobs
from unconceal.utils.errors import UserError


def write_odd_kinds(folder):
    """Write files of every kind; return their displayed sizes by name."""
    rgb = noise()
    rgba = rgb.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(rgb.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    rgb.save(folder / "plain.jpg")
    rgb.save(folder / "rotated.jpg", exif=exif)
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgba.save(folder / "rgba.png")
    rgba.convert("LA").save(folder / "gray_alpha.png")
    rgb.convert("1").save(folder / "one_bit.png")
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
    """Write unreadable files; return a part of their messages by name."""
    (folder / "words.png").write_text("not an image")
    (folder / "empty.jpg").touch()
    noise(200, 200).save(folder / "truncated.png")
    os.truncate(folder / "truncated.png", 80000)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))
    bomb = "got 60000x60000, expected at most 178956970 pixels"
    return {"words.png": "not an image", "empty.jpg": "not an image", "truncated.png": "truncated", "bomb.png": bomb}


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
    assert {Path(name).name for name in failed} == set(broken)
    assert [name for name, words in broken.items() if words not in failed[str(folder / name)]] == []
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
    call = [folder, "--out", out, "--output", "mask", "overlay", "cutout"]
    code, stdout, _ = segment(*call)
    assert code == 0
    assert stdout.startswith("2 images: 2 segmented")
    files = {str(path.relative_to(out)) for path in out.rglob("*.*")}
    assert files == {f"{stem}{kind}.png" for stem in ("a", "deep/a") for kind in ("", "_overlay", "_cutout")}
    mask, overlay, cutout = (Image.open(out / f"a{kind}.png") for kind in ("", "_overlay", "_cutout"))
    assert (overlay.mode, cutout.mode) == ("RGB", "RGBA")
    expected = ((np.asarray(mask) / 255 - 0.3) / 0.6).clip(0, 1)
    np.testing.assert_allclose(np.asarray(cutout.getchannel("A")) / 255, expected, atol=0.003)

    kept = {out / name: (out / name).stat().st_mtime_ns for name in ("a.png", "deep/a.png", "deep/a_cutout.png")}
    (out / "deep" / "a_overlay.png").unlink()
    code, stdout, _ = segment(*call)
    assert code == 0
    assert "1 segmented" in stdout
    assert "1 skipped" in stdout
    assert (out / "deep" / "a_overlay.png").is_file()  # only the missing output is written
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert "2 segmented" in segment(*call, "--overwrite")[1]
    assert all(path.stat().st_mtime_ns > before for path, before in kept.items())


def test_outputs_say_what_made_them(segment, checkpoint, tmp_path):
    noise().save(tmp_path / "x.jpg")
    call = [tmp_path / "x.jpg", "--out", tmp_path]
    segment(*call)
    with Image.open(tmp_path / "x.png") as mask:
        assert mask.info["Software"] == "unconceal segment"
        digest = "[0-9a-f]{12}"
        assert re.fullmatch(rf"{checkpoint.name} \({digest}\), refine auto, input {digest}", mask.info["Comment"])
    with rejected("x.png exists and is of other settings: .*, refine auto, now .*, threshold 0.5;"):
        segment(*call, "--threshold", 0.5)
    assert segment(*call, "--threshold", 0.5, "--overwrite")[0] == 0

    # A file of somebody else's is never replaced.
    photo = io.BytesIO()
    noise(seed=1).save(photo, format="PNG")
    for content in (photo.getvalue(), b"notes"):
        (tmp_path / "x.png").write_bytes(content)
        for more in ([], ["--overwrite"]):
            code, _, stderr = segment(*call, *more)
            assert code == 1
            assert "x.png exists and was not written by this command; choose another --out" in stderr
        assert (tmp_path / "x.png").read_bytes() == content


def test_outputs_name_the_type_that_was_used(segment, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("unconceal.utils.devices.has_bfloat16", lambda device: False)
    noise().save(tmp_path / "x.jpg")
    assert segment(tmp_path / "x.jpg", "--out", tmp_path, "--dtype", "bfloat16")[0] == 0
    with Image.open(tmp_path / "x.png") as mask:
        assert ", dtype float32, input" in mask.info["Comment"]
    assert caplog.text.count("float32 is used") == 1


def test_a_mask_of_another_image_is_not_kept(segment, tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("copy", 0)):
        (tmp_path / name).mkdir()
        noise(seed=seed).save(tmp_path / name / "x.png")
    out = tmp_path / "out"
    segment(tmp_path / "a", "--out", out)
    before = (out / "x.png").read_bytes()
    assert "1 skipped" in segment(tmp_path / "copy", "--out", out)[1]
    with rejected("x.png exists and is of another input of the same name; choose another --out, or pass --overwrite"):
        segment(tmp_path / "b", "--out", out)
    assert (out / "x.png").read_bytes() == before
    assert "1 segmented" in segment(tmp_path / "b", "--out", out, "--overwrite")[1]
    assert (out / "x.png").read_bytes() != before


def test_files_that_are_passed_over_are_counted(segment, tmp_path, caplog):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jfif", "deep/b.jpe"):
        noise().save(folder / name, format="JPEG")
    noise().save(folder / "c.ico", format="ICO")
    noise().save(folder / "scan", format="PNG")
    for name in ("notes.txt", "deep/more.txt", ".hidden"):
        (folder / name).write_text("text")
    (folder / "linked").symlink_to(folder / "deep")
    code, stdout, _ = segment(folder, "--out", tmp_path / "out")
    assert code == 0
    assert stdout.startswith("3 images: 3 segmented")
    assert "passed over in folders: 2 .txt, 1 linked folders, 1 without suffix;" in caplog.text


def test_closed_folders_are_counted(tree, monkeypatch, caplog):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "four")  # root may read any folder
    plan_jobs([Path()], Path("out"), ["mask"])
    assert "passed over in folders: 1 closed folders, 1 without suffix;" in caplog.text


def test_an_object_lies_above_the_threshold(segment, tmp_path, monkeypatch):
    monkeypatch.setattr("unconceal.api.predict_masks", lambda *args: [torch.tensor([[0.5, 0.75]])])
    Image.new("RGB", (2, 1)).save(tmp_path / "a.png")
    segment(tmp_path / "a.png", "--out", tmp_path / "out", "--threshold", 0.5)
    assert np.asarray(Image.open(tmp_path / "out" / "a.png")).tolist() == [[0, 255]]
    with pytest.raises(SystemExit):
        segment(tmp_path / "a.png", "--out", tmp_path / "out", "--threshold", 1)


def test_max_pixels(segment, tmp_path):
    noise(30, 20).save(tmp_path / "a.png")
    code, _, stderr = segment(tmp_path / "a.png", "--out", tmp_path / "out", "--max-pixels", 599)
    assert code == 1
    assert "got 30x20, expected at most 599 pixels" in stderr
    assert segment(tmp_path / "a.png", "--out", tmp_path / "out", "--max-pixels", 600)[0] == 0


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Folders with files that planning does not open."""
    monkeypatch.chdir(tmp_path)
    for name in ("one/a.png", "two/a.png", "three/a_overlay.png", "three/a.png", "four/b.jpg", "four/b.png", "bare/a"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    return tmp_path


def test_plans(tree):
    # The output folder may hold the input folder; a file named twice is one job.
    jobs = plan_jobs([Path("one"), Path("one/a.png"), tree / "one"], Path(), ["mask"])
    assert jobs == {tree / "one" / "a.png": {"mask": tree / "a.png"}}
    jobs = plan_jobs([Path("four"), Path("one")], Path("out"), ["mask"])  # a suffix that tells images apart stays
    assert [path.name for outputs in jobs.values() for path in outputs.values()] == ["b.jpg.png", "b.png.png", "a.png"]


@pytest.mark.parametrize(
    ("words", "paths", "out", "kinds"),
    [
        ("two runs", ["one", "two"], "out", ["mask"]),
        ("two runs", ["three"], "out", ["mask", "overlay"]),
        ("as input and as --out", ["one"], "one", ["mask"]),
        ("over the input", ["one/a.png"], "one", ["mask"]),
        ("does not exist", ["one", "absent"], "out", ["mask"]),
        ("found no image", ["bare"], "out", ["mask"]),
    ],
)
def test_wrong_plans_are_rejected(tree, words, paths, out, kinds):
    with pytest.raises(UserError, match=words):
        plan_jobs([Path(path) for path in paths], Path(out), kinds)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["a.png"], "--out"), (["-", "--out", "out"], "stdin"), (["a.png", "--out", "a.png"], "cannot write to a.png")],
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
    assert {path.name for path in out.iterdir()} == {long, "b", "d.png", "e.png", "e_overlay.png"}


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


def test_pipe(segment, monkeypatch):
    file = io.BytesIO()
    noise().save(file, "PNG")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(file.getvalue())))
    reader, writer = os.pipe()  # cannot seek
    with os.fdopen(reader, "rb") as piped:
        with os.fdopen(writer, "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert segment("-", "--output", "cutout") == (0, "", "")
        result = Image.open(io.BytesIO(piped.read()))
    assert (result.mode, result.size) == ("RGBA", (30, 20))


def test_a_network_without_numbers_writes_no_mask(segment, checkpoint, tmp_path, monkeypatch):
    noise().save(tmp_path / "a.png")
    forward = SrsForImageSegmentation.forward

    def overflow(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., 3, 4] = torch.inf
        return output

    with monkeypatch.context() as patch:
        patch.setattr(SrsForImageSegmentation, "forward", overflow)
        with pytest.raises(UserError, match="the output of the network is not finite .* use float32"):
            segment(tmp_path / "a.png", "--out", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.png"))

    model = AutoModelForImageSegmentation.from_pretrained(checkpoint)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = torch.nan
    shutil.copytree(checkpoint, tmp_path / "damaged")
    model.save_pretrained(tmp_path / "damaged")
    for use in (load, lambda folder: stage_model(folder, "org/net", tmp_path / "upload")):
        with pytest.raises(UserError, match="damaged holds weights that are not finite .*: 1 in all"):
            use(tmp_path / "damaged")


def test_photos_of_phones(segment, tmp_path, monkeypatch):
    """HEIC is read with its extra, and named without it."""
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs the extra `heic`")
    folder = tmp_path / "in"
    folder.mkdir()
    pillow_heif.from_pillow(noise(40, 30)).save(folder / "photo.heic")
    code, _, stderr = segment(folder, "--out", tmp_path / "out")
    assert code == 0, stderr
    assert Image.open(tmp_path / "out" / "photo.png").size == (40, 30)
    program = (
        "import sys; sys.modules['pillow_heif'] = None; from unconceal.data.image_files import read_image; "
        f"read_image({str(folder / 'photo.heic')!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "for HEIC pip install unconceal[heic]" in done.stderr
