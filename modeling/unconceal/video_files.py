"""Write masks, overlays and cut-outs of videos."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .segmenting import (
    FATAL_ERRNOS,
    PNG_OPTIONS,
    SOFTWARE,
    Job,
    Runner,
    TimedNetwork,
    check_outputs,
    digest_of,
    mark,
    mark_of_png,
    png_marks,
    say_failed,
)
from .utils.errors import UserError
from .utils.files import is_folder, replacing
from .utils.threads import map_ahead
from .video import SegmentedFrame, UnusableVideo, Video, open_video, pyav, reason_of, segment_frames


@dataclass(frozen=True)
class VideoFormat:
    """How pictures become a file.

    Attributes:
        codec: Encoder of the pictures.
        pixels: Pixel format of the encoder.
        options: Options of the encoder.
    """

    codec: str
    pixels: str
    options: Mapping[str, str]


# Without `auto-alt-ref` of 0 the encoder refuses transparency.
VP9_OPTIONS = {"crf": "20", "b": "0", "auto-alt-ref": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}
# By the name of the container, which is also the suffix. The last two keep the opacity of a cut-out.
FORMATS = {
    "mp4": VideoFormat("libx264", "yuv420p", {"crf": "16", "preset": "fast"}),
    "webm": VideoFormat("libvpx-vp9", "yuva420p", VP9_OPTIONS),
    "mov": VideoFormat("prores_ks", "yuva444p10le", {"profile": "4444"}),
}
PNG_NAME = re.compile(r"\d{6,}\.png")
# Sound of these codecs is copied. Other sound is encoded by the encoder.
SOUND = {
    "mp4": ({"aac", "mp3", "alac", "ac3"}, "aac"),
    "mov": ({"aac", "mp3", "alac", "ac3", "pcm_s16le", "pcm_s24le"}, "aac"),
    "webm": ({"opus", "vorbis"}, "libopus"),
}
SOUND_RATE = 48000
BT709, LIMITED_RANGE = 1, 1  # numbers of ITU-T H.273


def plan_outputs(
    videos: list[Path], out: Path, kinds: list[str], alpha: str, has_background: bool
) -> dict[Path, dict[str, Path]]:
    """Return the videos, each with the file of every kind.

    A cut-out as PNG is a folder.

    Raises:
        UserError: If a video is missing, two have one name, or an output would replace an input.
    """
    suffixes = dict.fromkeys(kinds, ".mp4")
    if not has_background and "cutout" in kinds:
        suffixes["cutout"] = "" if alpha == "png" else f".{alpha}"
    plan = {}
    for path in {path.absolute(): path for path in videos}.values():
        if not path.is_file():
            raise UserError(f"got {path}, which is not a file; give videos")
        plan[path] = {kind: out.resolve() / f"{path.stem}_{kind}{suffix}" for kind, suffix in suffixes.items()}
    check_outputs(plan)
    return plan


def mark_of_video(path: Path) -> str | None:
    """Return the mark in an output, None for another file."""
    if is_folder(path):
        frames = sorted(path.iterdir())
        ours = frames and all(PNG_NAME.fullmatch(one.name) for one in frames)
        return mark_of_png(frames[0]) if ours else None
    av = pyav()
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            found = {key.lower(): value for key, value in container.metadata.items()}.get("comment", "")
    except (av.FFmpegError, OSError, ValueError):
        return None
    return found.removeprefix(f"{SOFTWARE}: ") if found.startswith(f"{SOFTWARE}: ") else None


class Sound:
    """The sound of a video, written beside its new pictures."""

    def __init__(self, source: Path, target: Any):
        """Open `source`, which may have no sound, for the container `target`."""
        self.input = pyav().open(str(source), metadata_errors="replace")
        self.target, self.packets = target, iter(())
        if self.input.streams.audio:
            stream = self.input.streams.audio[0]
            copied, encoder = SOUND[target.format.name]
            if stream.codec_context.name in copied:
                self.stream = target.add_stream_from_template(stream)
                self.packets = self._copied(stream)
            else:
                self.stream = target.add_stream(encoder, rate=SOUND_RATE)
                self.packets = self._encoded(stream)
        self.next = next(self.packets, None)

    def write_until(self, time: Fraction | None):
        """Write the sound up to a time in seconds, or the rest."""
        while self.next is not None:
            start = self.next.pts if self.next.pts is not None else self.next.dts
            if time is not None and start is not None and start * self.next.time_base > time:
                return
            self.target.mux(self.next)
            self.next = next(self.packets, None)

    def _copied(self, stream: Any) -> Iterator[Any]:
        for packet in self.input.demux(stream):
            if packet.dts is not None:  # the last one is empty
                packet.stream = self.stream
                yield packet

    def _encoded(self, stream: Any) -> Iterator[Any]:
        for frame in self.input.decode(stream):
            yield from self.stream.encode(frame)
        yield from self.stream.encode(None)


class VideoWriter:
    """Write pictures as a video, with the sound of their source."""

    def __init__(self, path: Path, source: Video, has_sound: bool, mark: str):
        self.path, self.source, self.has_sound, self.mark = path, source, has_sound, mark
        self.container = self.stream = self.sound = self.size = None
        self.last, self.finished = -1, False

    def write(self, picture: Image.Image, time: Fraction):
        """Write the next picture: gray, RGB or RGBA."""
        if self.container is None:
            self._open(picture.size)
        if picture.size != self.size:
            raise UnusableVideo(f"its frames change from {self.size} to {picture.size}; cut it where they change")
        picture = picture if picture.mode == "RGBA" else picture.convert("RGB")
        pixels = {"RGB": "rgb24", "RGBA": "rgba"}[picture.mode]
        frame = pyav().VideoFrame.from_ndarray(np.asarray(picture), format=pixels)
        frame = frame.reformat(format=self.stream.pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG")
        # Two frames never share a time, although files say so now and then.
        self.last = max(self.last + 1, round(time / self.source.stream.time_base))
        frame.pts, frame.time_base = self.last, self.source.stream.time_base
        self.container.mux(self.stream.encode(frame))
        if self.sound:
            self.sound.write_until(time)

    def _open(self, size: tuple[int, int]):
        name = self.path.suffix[1:]
        self.container, form = pyav().open(str(self.path), "w", format=name), FORMATS[name]
        self.container.metadata["comment"] = f"{SOFTWARE}: {self.mark}"
        self.stream = self.container.add_stream(form.codec, rate=self.source.rate, options=dict(form.options))
        self.size = size
        self.stream.width, self.stream.height = size
        # Half of an odd side is no whole number of pixels.
        odd = any(side % 2 for side in size)
        self.stream.pix_fmt = form.pixels.replace("yuv420p", "yuv444p") if odd else form.pixels
        codec = self.stream.codec_context
        codec.time_base = self.source.stream.time_base
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = LIMITED_RANGE
        codec.thread_type = "AUTO"
        if ratio := self.source.stream.sample_aspect_ratio:
            codec.sample_aspect_ratio = ratio
        if self.has_sound:
            self.sound = Sound(self.source.path, self.container)

    def finish(self):
        """Write what the encoder holds, and the rest of the sound."""
        self.container.mux(self.stream.encode(None))
        if self.sound:
            self.sound.write_until(None)
        self.finished = True

    def close(self):
        """Close the file; without `finish` it is not whole."""
        if self.sound:
            self.sound.input.close()
        if self.container is not None:
            with suppress(*(() if self.finished else (pyav().FFmpegError, OSError))):  # it is removed anyway
                self.container.close()


class FrameWriter:
    """Write pictures as numbered PNG files in a folder."""

    def __init__(self, path: Path, mark: str):
        path.mkdir()
        self.path, self.marks, self.number = path, png_marks(mark), 0

    def write(self, picture: Image.Image, time: Fraction):
        """Write the next picture."""
        picture.save(self.path / f"{self.number:06d}.png", pnginfo=self.marks, **PNG_OPTIONS)
        self.number += 1

    def finish(self):
        """Do nothing: every file is whole."""

    close = finish


def write_videos(runner: Runner, jobs: list[Job], smoothing: float):
    """Segment videos and write their outputs.

    A video that cannot be read is reported on stderr and counted. It leaves no output.

    Raises:
        UserError: If nothing more can be written, or memory runs out.
    """
    for job in jobs:
        try:
            if isinstance(job.source, UserError):
                raise UnusableVideo(str(job.source))
            _write_video(runner, job, smoothing)
            runner.tally.done += 1
        except UnusableVideo as error:
            say_failed(job, str(error))
            runner.tally.failed += 1


def _write_video(runner: Runner, job: Job, smoothing: float):
    """Write all outputs of one video, or none."""
    network = TimedNetwork(runner.segmenter.network)

    def drawn(one: SegmentedFrame) -> tuple[Fraction, dict[str, Image.Image]]:
        return one.time, {kind: runner.draw(kind, one.image, one.mask) for kind in job.outputs}

    with ExitStack() as stack:
        video = stack.enter_context(open_video(job.source, runner.max_pixels))
        options = (runner.batch_size, runner.refine, smoothing, runner.num_threads, network)
        frames = map_ahead(drawn, segment_frames(runner.segmenter, video, *options), runner.num_threads)
        stack.enter_context(closing(frames))
        bar = tqdm(
            total=video.num_frames, unit="frame", desc=job.source.name, disable=None if runner.has_bar else True
        )
        stack.enter_context(bar)
        its_mark = mark(runner.settings, digest_of(job.source))
        writers = {}
        for kind, path in job.outputs.items():
            temporary = stack.enter_context(replacing(path))
            if path.suffix:
                writers[kind] = VideoWriter(temporary, video, kind != "mask", its_mark)
            else:
                writers[kind] = FrameWriter(temporary, its_mark)
            stack.enter_context(closing(writers[kind]))
        start = perf_counter()
        for time, pictures in frames:
            for kind, picture in pictures.items():
                with _writing(job.outputs[kind]):
                    writers[kind].write(picture, time)
            bar.update()
        for kind, writer in writers.items():
            with _writing(job.outputs[kind]):
                writer.finish()
    runner.tally.seconds += perf_counter() - start
    runner.tally.network_seconds += network.seconds


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Explain errors of writing an output."""
    try:
        yield
    except (pyav().FFmpegError, OSError) as error:
        reason = f"cannot write {path}: {reason_of(error)}"
        if getattr(error, "errno", None) in FATAL_ERRNOS:
            raise UserError(reason) from error
        raise UnusableVideo(reason) from error
