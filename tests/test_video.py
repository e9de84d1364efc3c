"""Videos: read, steady, write."""

import io
import os
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from unconceal.api import load
from unconceal.commands.segment import ALPHA
from unconceal.utils.errors import UserError
from unconceal.video import SAME_COLOR, Steadier, open_video


av = pytest.importorskip("av", reason="needs the extra `video`")

WIDTH, HEIGHT, RATE, FRAMES = 48, 32, 10, 6


def picture(number, width=WIDTH, height=HEIGHT):
    """Draw a dark square that moves over a bright ground."""
    pixels = np.full((height, width, 3), (200, 180, 90), dtype=np.uint8)
    pixels[8:20, 4 + 3 * number : 16 + 3 * number] = (20, 40, 60)
    return pixels


def write_clip(
    path, frames=FRAMES, size=(WIDTH, HEIGHT), sound="aac", rotation=0, codec="libx264", pixels="yuv420p", times=None
):
    """Write a clip with a tone of 440 Hz."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        if rotation:
            stream.set_display_rotation(rotation)
        if sound:
            heard = container.add_stream(sound, rate=48000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
                stream.codec_context.time_base = frame.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            wave = np.sin(np.arange(48000 * frames // RATE) * 2 * np.pi * 440 / 48000).astype(np.float32)
            tone = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
            tone.sample_rate, tone.pts = 48000, 0
            container.mux(heard.encode(tone))
            container.mux(heard.encode(None))
    return path


@pytest.fixture
def segment(segment):
    """Run `unconceal segment`; an error counts as the command counts it."""

    def run(*args):
        try:
            return segment(*args)
        except UserError as error:
            return 2, "", str(error)

    return run


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip.mp4")


def read(path):
    """Return frames as arrays, their times, and the sound's codec."""
    with av.open(str(path)) as container:
        sound = container.streams.audio[0].codec_context.name if container.streams.audio else None
        frames = list(container.decode(video=0))
    return [one.to_ndarray(format="rgb24") for one in frames], [one.time for one in frames], sound


def test_mask_overlay_and_cutout_of_a_clip(segment, clip, tmp_path):
    """Sizes and times stay, sound too, and masks are those of the frames."""
    out = tmp_path / "out"
    kinds = ("mask", "overlay", "cutout")
    code, stdout, stderr = segment(clip, "--out", out, "--output", *kinds, "--smoothing", 0)
    assert code == 0, stderr
    assert "1 video: 1 segmented" in stdout
    _, times, _ = read(clip)
    sounds = {"mask.mp4": None, "overlay.mp4": "aac", "cutout.webm": "opus"}
    for name, sound in sounds.items():
        frames, its_times, its_sound = read(out / f"clip_{name}")
        assert [one.shape for one in frames] == [(HEIGHT, WIDTH, 3)] * FRAMES
        assert its_times == pytest.approx(times, abs=0.002)
        assert its_sound == sound
    assert sorted(path.name for path in out.iterdir()) == sorted(f"clip_{name}" for name in sounds)


def test_masks_are_those_of_the_frames(checkpoint, segment, clip, tmp_path):
    network = load(checkpoint, "cpu")
    expected = [network.segment(one.image) for one in network.segment_video(clip, smoothing=0)]
    got = [one.mask for one in network.segment_video(clip, batch_size=4, smoothing=0)]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert [float(one.time) for one in network.segment_video(clip)] == pytest.approx([n / RATE for n in range(FRAMES)])
    segment(clip, "--out", tmp_path / "out", "--smoothing", 0)
    written, _, _ = read(tmp_path / "out" / "clip_mask.mp4")
    assert np.abs(np.stack(written)[..., 0] / 255 - np.stack(expected)).mean() < 0.03


def opacities(masks: list[np.ndarray]) -> np.ndarray:
    """Return the opacity of cut-outs by the masks (H, W, 3) of a video."""
    return ((np.stack(masks)[..., 0] / 255 - 0.3) / 0.6).clip(0, 1)


@pytest.mark.parametrize("alpha", ALPHA)
def test_cutouts_keep_their_opacity(segment, clip, tmp_path, alpha):
    out = tmp_path / "out"
    code, _, stderr = segment(clip, "--out", out, "--output", "mask", "cutout", "--alpha", alpha)
    assert code == 0, stderr
    if alpha == "png":
        names = sorted(path.name for path in (out / "clip_cutout").iterdir())
        assert names == [f"{number:06d}.png" for number in range(FRAMES)]
        opacity = [np.asarray(Image.open(out / "clip_cutout" / name))[..., 3] for name in names]
    else:
        with av.open(str(out / f"clip_cutout.{alpha}")) as container:
            stream = container.streams.video[0]
            decoder = av.CodecContext.create("libvpx-vp9" if alpha == "webm" else "prores", "r")
            decoder.extradata = stream.codec_context.extradata
            frames = [frame for packet in container.demux(stream) for frame in decoder.decode(packet)]
            assert len(container.streams.audio) == 1
        opacity = [one.to_ndarray(format="rgba")[..., 3] for one in frames]
    masks, _, _ = read(out / "clip_mask.mp4")
    expected = 255 * opacities(masks)
    assert 30 < expected.mean() < 225
    assert np.abs(np.stack(opacity) - expected).mean() < 8


def test_cutouts_on_a_color_and_on_an_image(segment, clip, tmp_path):
    out, photo = tmp_path / "out", tmp_path / "blue.png"
    Image.new("RGB", (7, 5), (0, 0, 255)).save(photo)
    for background, color in (("lime", (0, 255, 0)), (photo, (0, 0, 255))):
        code, _, stderr = segment(
            *(clip, "--out", out / color.__repr__(), "--output", "cutout", "mask", "--background", background)
        )
        assert code == 0, stderr
        frames, _, sound = read(out / color.__repr__() / "clip_cutout.mp4")
        masks, _, _ = read(out / color.__repr__() / "clip_mask.mp4")
        weight = opacities(masks)[..., None]
        expected = weight * np.stack([picture(n) for n in range(FRAMES)]) + (1 - weight) * np.array(color)
        assert np.abs(np.stack(frames) - expected).mean() < 20  # a video of few pixels has half of the colors
        assert sound == "aac"


def test_background_of_images(segment, tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "photo.png")
    out = tmp_path / "out"
    code, _, stderr = segment(tmp_path / "photo.png", "--out", out, "--output", "cutout", "--background", "white")
    assert code == 0, stderr
    assert Image.open(out / "photo_cutout.png").mode == "RGB"
    code, _, stderr = segment(tmp_path / "photo.png", "--out", out, "--output", "cutout")
    assert code == 2
    assert "other settings" in stderr


def test_turned_and_odd_clips(segment, tmp_path):
    turned = write_clip(tmp_path / "turned.mp4", rotation=90)
    odd = write_clip(tmp_path / "odd.mkv", size=(51, 33), codec="ffv1", pixels="bgr0")
    with open_video(turned) as video:
        first = next(video.frames()).image
    assert first.size == (HEIGHT, WIDTH)
    upright = np.asarray(Image.fromarray(picture(0)).rotate(90, expand=True), float)
    assert np.abs(np.asarray(first, float) - upright).mean() < 10
    out = tmp_path / "out"
    for alpha in ALPHA:
        code, _, stderr = segment(turned, odd, "--out", out / alpha, "--output", "overlay", "cutout", "--alpha", alpha)
        assert code == 0, stderr
        assert read(out / alpha / "turned_overlay.mp4")[0][0].shape == (WIDTH, HEIGHT, 3)
        assert read(out / alpha / "odd_overlay.mp4")[0][0].shape == (33, 51, 3)


def test_uneven_times_stay(segment, tmp_path):
    times = [0, 40, 300, 310, 700, 1000]
    clip = write_clip(tmp_path / "uneven.mkv", times=times, sound=None)
    code, _, stderr = segment(clip, "--out", tmp_path / "out")
    assert code == 0, stderr
    assert read(tmp_path / "out" / "uneven_mask.mp4")[1] == pytest.approx([t / 1000 for t in times], abs=0.002)


def test_what_is_finished_is_not_made_again(segment, clip, tmp_path):
    out = tmp_path / "out"
    arguments = (clip, "--out", out, "--output", "mask", "cutout", "--alpha")
    assert segment(*arguments, "png")[0] == 0
    before = (out / "clip_mask.mp4").stat().st_mtime_ns
    code, stdout, _ = segment(*arguments, "png")
    assert code == 0
    assert "1 skipped" in stdout
    (tmp_path / "other").mkdir()
    code, _, stderr = segment(write_clip(tmp_path / "other" / "clip.mp4", frames=2), *arguments[1:], "png")
    assert code == 2
    assert "clip_mask.mp4 exists and is of another input of the same name" in stderr
    code, _, stderr = segment(*arguments, "png", "--smoothing", 0.2)
    assert code == 2
    assert "other settings" in stderr
    assert (out / "clip_mask.mp4").stat().st_mtime_ns == before
    assert segment(*arguments, "png", "--smoothing", 0.2, "--overwrite")[0] == 0
    assert (out / "clip_mask.mp4").stat().st_mtime_ns != before


def test_files_of_others_stay(segment, clip, tmp_path):
    out = tmp_path / "out"
    (out / "clip_cutout").mkdir(parents=True)
    (out / "clip_cutout" / "notes.txt").write_text("mine")
    write_clip(out / "clip_mask.mp4", frames=1)
    before = (out / "clip_mask.mp4").read_bytes()
    code, _, stderr = segment(*(clip, "--out", out, "--output", "mask", "cutout", "--alpha", "png", "--overwrite"))
    assert code == 1
    assert "not written by this command" in stderr
    assert (out / "clip_mask.mp4").read_bytes() == before
    assert (out / "clip_cutout" / "notes.txt").read_text() == "mine"


def test_bad_files_give_one_line_each_and_leave_nothing(segment, clip, tmp_path):
    """A broken file does not stop the next one."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "words.mp4").write_text("not a video")
    (bad / "empty.mov").touch()
    (bad / "cut.mp4").write_bytes(clip.read_bytes()[:400])
    with av.open(str(bad / "frameless.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.start_encoding()
    with av.open(str(bad / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 4800), np.float32), format="fltp", layout="stereo")
        silence.sample_rate = 48000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    out = tmp_path / "out"
    files = sorted(bad.iterdir())
    code, stdout, stderr = segment(*files, clip, "--out", out)
    assert code == 1
    failed = dict(line.removeprefix("failed: ").split(": ", 1) for line in stderr.splitlines() if "failed: " in line)
    assert sorted(failed) == [str(path) for path in files]
    assert "no frame" in failed[str(bad / "frameless.avi")]
    assert "no pictures" in failed[str(bad / "song.mp4")]
    assert "6 videos: 1 segmented" in stdout
    assert [path.name for path in out.iterdir()] == ["clip_mask.mp4"]


def test_damage_in_the_middle_is_named(checkpoint, segment, tmp_path):
    """The command leaves no half of an output."""
    clip = write_clip(tmp_path / "clip.avi", frames=20, sound=None, codec="mjpeg", pixels="yuvj420p")
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot read .*clip.avi: it is damaged after frame [1-9]"):
        list(load(checkpoint, "cpu").segment_video(clip))
    code, _, stderr = segment(clip, "--out", tmp_path / "out", "--output", "mask", "overlay")
    assert code == 1
    assert "damaged after frame" in stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_options(segment, clip, tmp_path, monkeypatch):
    photo = tmp_path / "photo.png"
    Image.fromarray(picture(0)).save(photo)
    out = ("--out", tmp_path / "out")
    for arguments, said in (
        ((clip, photo, *out), "in two runs"),
        ((clip, "--to-data", tmp_path / "data"), "--to-data is for images"),
        ((photo, "--smoothing", 0.5, *out), "--smoothing is for videos"),
        ((clip, "--background", "white", *out), "--background is for cut-outs"),
        ((clip, "--alpha", "mov", *out), "--alpha is for cut-outs"),
        ((photo, "--output", "cutout", "--alpha", "mov", *out), "--alpha is for cut-outs"),
        ((clip, "--output", "cutout", "--background", "nocolor", *out), "a color such as white"),
        ((tmp_path / "missing.mp4", *out), "not a file"),
        ((clip, "--max-pixels", 100, *out), "raise --max-pixels"),
    ):
        code, _, stderr = segment(*arguments)
        assert code in (1, 2)
        assert said in stderr
        assert "Traceback" not in stderr
    monkeypatch.setitem(sys.modules, "av", None)
    code, _, stderr = segment(clip, *out)
    assert code == 2
    assert "pip install unconceal[video]" in stderr


def test_an_output_never_replaces_an_input(segment, tmp_path):
    write_clip(tmp_path / "clip.mp4")
    other = write_clip(tmp_path / "clip_mask.mp4")
    before = other.read_bytes()
    code, _, stderr = segment(tmp_path / "clip.mp4", other, "--out", tmp_path, "--overwrite")
    assert code == 2
    assert "would write over the input" in stderr
    assert other.read_bytes() == before


def test_still_parts_flicker_less_and_moving_ones_do_not_drag():
    rng = np.random.default_rng(0)
    still = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    masks = rng.random((30, 40, 40)).astype(np.float32)
    steady = Steadier(0.7)
    frames = []
    for number in range(30):
        pixels = still.copy()
        pixels[:, 20:] = 60 + 120 * (number % 2)  # the right half changes completely
        noisy = (pixels + rng.normal(0, 2, pixels.shape)).clip(0, 255).astype(np.uint8)
        frames.append(steady(Image.fromarray(noisy), masks[number]))
    changes = np.abs(np.diff(np.stack(frames), axis=0))
    raw = np.abs(np.diff(masks, axis=0))
    assert changes[..., :17].mean() < 0.45 * raw[..., :17].mean()
    np.testing.assert_array_equal(np.stack(frames)[:, :, 24:], masks[:, :, 24:])
    assert 0 <= np.stack(frames).min() <= np.stack(frames).max() <= 1


def test_the_weight_follows_its_definition():
    before, after = np.full((8, 8), 0.2, np.float32), np.full((8, 8), 0.8, np.float32)
    for difference in (0, SAME_COLOR // 3, SAME_COLOR, 3 * SAME_COLOR):
        steady = Steadier(0.5)
        steady(Image.new("RGB", (8, 8), (100, 100, 100)), before)
        level = 100 + difference
        got = steady(Image.new("RGB", (8, 8), (level, level, level)), after)
        weight = 0.5 * max(0, 1 - difference / SAME_COLOR)
        np.testing.assert_allclose(got, 0.8 - weight * 0.6, atol=1e-6)
    unchanged = Steadier(0)
    unchanged(Image.new("RGB", (8, 8)), before)
    assert unchanged(Image.new("RGB", (8, 8)), after) is after
    with pytest.raises(UserError, match="smoothing of 1"):
        Steadier(1)


def test_memory_does_not_grow_with_the_length(checkpoint, tmp_path):
    """The generator reads ahead by a few frames only."""
    clip = write_clip(tmp_path / "long.mp4", frames=40, sound=None)
    with open_video(clip) as video:
        read_so_far = 0
        frames = video.frames

        def counted():
            nonlocal read_so_far
            for frame in frames():
                read_so_far += 1
                yield frame

        class Counted:
            pass

        counting = Counted()
        counting.frames = counted
        from unconceal.video import segment_frames

        for number, _ in enumerate(segment_frames(load(checkpoint, "cpu"), counting, num_threads=2), start=1):
            assert read_so_far <= number + 4


def test_a_full_disk_is_one_line(segment, clip, tmp_path, monkeypatch):
    from unconceal import video_files

    def full(self, picture, time):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(video_files.VideoWriter, "write", full)
    code, _, stderr = segment(clip, "--out", tmp_path / "out")
    assert code == 2
    assert "No space left" in stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_stdin_takes_a_background(checkpoint, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from unconceal.__main__ import main

    given, got = io.BytesIO(), io.BytesIO()
    Image.fromarray(picture(0)).save(given, "PNG")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(given.getvalue())))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=got, write=lambda _: None, flush=lambda: None))
    command = ["segment", "-", "--model", str(checkpoint), "--output", "cutout", "--background", "red"]
    assert main(command) == 0
    assert Image.open(io.BytesIO(got.getvalue())).mode == "RGB"
