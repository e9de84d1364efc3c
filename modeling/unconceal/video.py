"""Segment videos frame by frame, in bounded memory, with little flicker.

    decode -> read, resize (threads) -> network -> mix with the mask before -> draw (threads) -> encode

PyAV reads and writes the files: `pip install unconceal[video]`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from .utils.errors import UserError, one_line
from .utils.images import MAX_PIXELS, size_text
from .utils.threads import map_ahead


if TYPE_CHECKING:
    from .api import Segmenter


SMOOTHING = 0.7
# Two frames show the same where their colors differ by less than this, of 255. Noise and compression differ by less.
SAME_COLOR = 12
UNSPECIFIED = 2  # of the color spaces in ITU-T H.273
HD_HEIGHT = 720  # videos of this height or more have the colors of BT.709, unless they say otherwise


@dataclass(frozen=True)
class Frame:
    """One picture of a video: upright RGB, and its time in seconds."""

    image: Image.Image
    time: Fraction


class SegmentedFrame(NamedTuple):
    """Frame, (height, width) soft mask in [0, 1], and time in seconds."""

    image: Image.Image
    mask: np.ndarray
    time: Fraction


class UnusableVideo(UserError):
    """Reason why a video cannot be read, without its name."""


def pyav() -> Any:
    """Return PyAV.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError("videos need PyAV; pip install unconceal[video]") from error
    return av


@dataclass(frozen=True)
class Video:
    """A video that is open for reading; `open_video` makes one.

    Attributes:
        path: Its file.
        container: PyAV's container.
        stream: PyAV's stream of pictures.
        max_pixels: Larger frames are refused.
    """

    path: Path
    container: Any
    stream: Any
    max_pixels: int

    @property
    def rate(self) -> Fraction:
        """Frames a second, on average."""
        return self.stream.average_rate or self.stream.guessed_rate or Fraction(25)

    @property
    def num_frames(self) -> int | None:
        """Number of frames as far as the file tells, for progress."""
        if self.stream.frames:
            return self.stream.frames
        if self.stream.duration:
            return max(1, round(self.stream.duration * self.stream.time_base * self.rate))
        return max(1, round(self.container.duration / 10**6 * self.rate)) if self.container.duration else None

    def frames(self) -> Iterator[Frame]:
        """Yield the frames in the order of display.

        Raises:
            UnusableVideo: If there is none, a frame is too large, or the file is damaged.
        """
        av, number = pyav(), 0
        try:
            for decoded in self.container.decode(self.stream):
                if decoded.width * decoded.height > self.max_pixels:
                    raise UnusableVideo(
                        f"its frames are {size_text((decoded.width, decoded.height))}, expected at most "
                        f"{self.max_pixels} pixels; raise --max-pixels"
                    )
                time = Fraction(number) / self.rate if decoded.pts is None else decoded.pts * decoded.time_base
                yield Frame(_to_image(decoded), time)
                number += 1
        except av.FFmpegError as error:
            raise UnusableVideo(f"it is damaged after frame {number}: {reason_of(error)}; repair or cut it") from error
        if not number:
            raise UnusableVideo("it holds no frame that can be read; give a video with pictures")


@contextmanager
def open_video(path: str | Path, max_pixels: int = MAX_PIXELS) -> Iterator[Video]:
    """Open a video.

    Raises:
        UnusableVideo: If it cannot be read or has no pictures.
    """
    av, path = pyav(), Path(path)
    try:
        container = av.open(str(path), metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UnusableVideo(f"it is no video, or damaged: {reason_of(error)}") from error
    with container:
        # The cover of a song is also a stream of pictures.
        streams = [one for one in container.streams.video if not one.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise UnusableVideo("it has no pictures; give a video")
        streams[0].thread_type = "AUTO"
        yield Video(path, container, streams[0], max_pixels)


def reason_of(error: Exception) -> str:
    """Return what an error of PyAV says, in one line."""
    return getattr(error, "strerror", None) or one_line(error)


def _to_image(frame: Any) -> Image.Image:
    """Return a decoded frame as RGB, upright."""
    is_hd = frame.colorspace == UNSPECIFIED and frame.height >= HD_HEIGHT
    colors = "ITU709" if is_hd else None
    image = Image.fromarray(frame.reformat(format="rgb24", src_colorspace=colors).to_ndarray())
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


class Steadier:
    """Reduce the flicker of masks where the picture stays the same.

    Each mask is mixed with the one before it: m + w (before - m). The weight w is `strength` where the colors of both
    frames are equal. It falls evenly to 0 where they differ by `SAME_COLOR`, on average over 5x5 pixels. So still
    parts flicker less, and nothing drags behind what moves.

    Args:
        strength: Largest weight of the mask before, from 0 to below 1.
    """

    def __init__(self, strength: float = SMOOTHING):
        if not 0 <= strength < 1:
            raise UserError(f"got a smoothing of {strength}, expected 0 to below 1")
        self.strength = strength
        self.before: tuple[Image.Image, np.ndarray] | None = None

    def __call__(self, image: Image.Image, mask: np.ndarray) -> np.ndarray:
        """Return the next mask, (H, W) in [0, 1], steadied."""
        if self.strength and self.before and self.before[0].size == image.size:
            image_before, mask_before = self.before
            difference = ImageChops.difference(image, image_before).convert("L").filter(ImageFilter.BoxBlur(2))
            weight = self.strength * (1 - np.asarray(difference, np.float32) / SAME_COLOR).clip(0, 1)
            mask = mask + weight * (mask_before - mask)
        self.before = image, mask
        return mask


def segment_frames(
    segmenter: Segmenter,
    video: Video,
    batch_size: int = 1,
    refine: str = "never",
    smoothing: float = SMOOTHING,
    num_threads: int = 2,
    network: Any | None = None,
) -> Iterator[SegmentedFrame]:
    """Yield the frames of an open video with their masks.

    Memory holds `batch_size + num_threads + 2` frames.

    Args:
        segmenter: The network.
        video: The video.
        batch_size: Frames in a forward pass.
        refine: As for `Segmenter.segment`.
        smoothing: `strength` of the `Steadier`.
        num_threads: Threads that prepare frames.
        network: As for `Segmenter.stream`.

    Raises:
        UnusableVideo: If the video is damaged.
        UserError: If memory runs out, or an argument is out of range.
    """
    steady, waiting = Steadier(smoothing), deque()

    def prepared() -> Iterator[Any]:
        for frame, image in map_ahead(lambda one: (one, segmenter.prepare(one.image)), video.frames(), num_threads):
            waiting.append(frame)
            yield image

    for mask in segmenter.stream(prepared(), batch_size, refine, network):
        frame = waiting.popleft()
        yield SegmentedFrame(frame.image, steady(frame.image, mask), frame.time)
