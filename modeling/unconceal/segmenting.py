"""Segment many images: reading, network and writing overlap; processes share the work.

    read, resize (threads) -> network (this thread) -> draw, encode, write (threads)

Memory holds at most `2 * num_threads + batch_size + 2` images.
"""

import errno
import hashlib
import logging
import os
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .utils.errors import UserError
from .utils.files import file_sha256, is_folder, is_hub_id, make_folder, printable, replacing
from .utils.images import IMAGE_SUFFIXES, MAX_PIXELS, open_image
from .utils.threads import map_ahead


if TYPE_CHECKING:
    import numpy as np
    from accelerate import PartialState
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from .api import Segmenter


logger = logging.getLogger(__name__)

# After these no further file can be written.
FATAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Runs of equal values are all that repeats in masks and photographs. See the table in docs/use.md.
PNG_OPTIONS = {"format": "PNG", "compress_type": zlib.Z_RLE}
WEIGHTS = (".safetensors", ".bin", ".onnx", ".data", ".pt2")
SOFTWARE = "unconceal segment"  # in every output file, next to its mark
INPUT = ", input "  # in a mark, between settings and digest


@dataclass(frozen=True)
class Job:
    """One image to segment.

    Attributes:
        name: What messages call it.
        source: File of the image, or its bytes. A `UserError` says why there is none.
        outputs: Kind of output -> file to write.
        row: Columns of its data set.
    """

    name: str | Path
    source: Path | bytes | UserError
    outputs: Mapping[str, Path] = field(default_factory=dict)
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Tally:
    """Count what happened; `+` joins the counts of processes."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    network_seconds: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


def describe_settings(model: str, revision: str | None, **options: Any) -> str:
    """Return what decides the outputs: network and options."""
    from .hub.shipped import CONFIG, PROCESSOR, resolve

    with suppress(UserError):  # loading it reports the reason
        model = str(resolve(model))
    name = model if revision is None else f"{model}@{revision}"
    if is_folder(model):
        digest = hashlib.sha256()
        for path in sorted(Path(model).iterdir()):
            if path.is_file() and (path.suffix in WEIGHTS or path.name in (CONFIG, PROCESSOR)):
                digest.update(bytes.fromhex(file_sha256(path)))
        name = f"{Path(model).resolve().name} ({digest.hexdigest()[:12]})"
    elif is_hub_id(model):
        with suppress(OSError):  # loading it reports the reason
            name = f"{model} (commit {commit_of(model, revision)[:12]})"
    return printable(", ".join([name, *(f"{key} {value}" for key, value in options.items() if value is not None)]))


def commit_of(repo_id: str, revision: str | None) -> str:
    """Return the commit of a network on the Hub.

    Raises:
        OSError: If there is none, on the Hub or in the cache.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    from .hub.shipped import CONFIG

    return extract_commit_hash(cached_file(repo_id, CONFIG, revision=revision), None)


def digest_of(source: Path | bytes | UserError) -> str:
    """Return the SHA-256 of a job's source; "" without one."""
    with suppress(OSError):  # opening the image reports the reason
        if isinstance(source, Path):
            return file_sha256(source)
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else ""


def mark(settings: str, digest: str) -> str:
    """Return what an output says of its settings and its input."""
    return f"{settings}{INPUT}{digest[:12]}"


def unfinished(job: Job, settings: str, overwrite: bool, mark_of: Callable[[Path], str | None]) -> Job | None:
    """Return what is left of a job, or None.

    With `overwrite`, outputs of this command are written again. If another file has the name of an output, the job
    fails. `mark_of` returns the mark in an output, None for another file.

    Raises:
        UserError: If an output has other settings or another input, and `overwrite` is false.
    """
    left, digest = {}, ""
    for kind, path in job.outputs.items():
        # `lexists`: a broken link is also somebody's file. `Path.exists` raises an error if a name is too long.
        if not os.path.lexists(path):
            left[kind] = path
            continue
        found = mark_of(path)
        if found is None:
            reason = f"{path} exists and was not written by this command; choose another --out"
            return replace(job, source=UserError(reason), outputs={})
        if overwrite:
            left[kind] = path
        elif found != settings:  # earlier versions marked without the input
            digest = digest or digest_of(job.source)
            if not digest:
                return replace(job, outputs={})  # opening the image reports the reason
            if found != mark(settings, digest):
                raise other_mark(path, found, settings, "--out")
    return replace(job, outputs=left) if left else None


def other_mark(path: Path, found: str, settings: str, option: str) -> UserError:
    """Return the error for an output of another model, options or input."""
    before = found.rsplit(INPUT, 1)[0]
    other = "another input of the same name" if before == settings else f"other settings: {before}, now {settings}"
    return UserError(f"{path} exists and is of {other}; choose another {option}, or pass --overwrite to replace it")


def mark_of_png(path: Path, software: str = SOFTWARE) -> str | None:
    """Return the mark in a file of `software`, otherwise None."""
    try:
        with open_image(path, sys.maxsize) as image:
            return image.info.get("Comment", "") if image.info.get("Software") == software else None
    except (OSError, ValueError, SyntaxError):
        return None


def png_marks(mark: str) -> "PngInfo":
    """Return the text that output files carry."""
    from PIL.PngImagePlugin import PngInfo

    marks = PngInfo()
    marks.add_text("Software", SOFTWARE)
    marks.add_itxt("Comment", mark)
    return marks


def say_failed(job: Job, reason: str):
    """Print why a job failed."""
    from tqdm import tqdm

    tqdm.write(f"failed: {job.name}: {reason}", file=sys.stderr)  # `print` would tear a bar


class TimedNetwork:
    """Network that counts the seconds of its forward passes."""

    def __init__(self, network: Any):
        self.network, self.device, self.dtype = network, network.device, network.dtype
        self.seconds = 0.0

    def __call__(self, **inputs: Any) -> Any:
        """Call the network and wait until it is ready."""
        start = time.perf_counter()
        outputs = self.network(**inputs)
        if self.device.type != "cpu":
            import torch

            torch.accelerator.synchronize(self.device)
        self.seconds += time.perf_counter() - start
        return outputs


@dataclass(frozen=True)
class Runner:
    """Segment jobs with one network; the command's options.

    Attributes:
        segmenter: What `load` made.
        batch_size: Images, or tiles of one image, in a forward pass.
        refine: As for `Segmenter.segment`.
        max_pixels: Larger images are refused.
        num_threads: Threads that read, and as many that write. With 0 everything is done in turn.
        threshold: Makes hard masks: object above it.
        background: What cut-outs are shown on; None keeps their opacity.
        settings: What the output files say of model and options.
        has_bar: Whether to show a progress bar on a terminal.
        tally: Counts what happened.
    """

    segmenter: "Segmenter"
    batch_size: int = 1
    refine: str = "auto"
    max_pixels: int = MAX_PIXELS
    num_threads: int = 2
    threshold: float | None = None
    background: "Background | None" = None
    settings: str = ""
    has_bar: bool = True
    tally: Tally = field(default_factory=Tally)

    def run(self, jobs: Iterable[Job], finish: Callable[..., tuple[Any, list[str]]]) -> Iterator[tuple[Job, Any]]:
        """Yield each successful job with the result of `finish(job, image, mask)`.

        Jobs end in their order. `finish` runs in threads and returns a result and reasons for failure. Each reason is
        printed on stderr and counted; it does not stop the run.

        Raises:
            UserError: If memory runs out, or `finish` raises it.
        """
        from tqdm import tqdm

        network, waiting, start = TimedNetwork(self.segmenter.network), deque(), time.perf_counter()

        def images() -> Iterator[Any]:
            for job, image in map_ahead(self._read, jobs, self.num_threads):
                waiting.append((job, image))
                if not isinstance(image, UserError):
                    yield image

        def masks() -> Iterator[tuple[Job, Any, Any]]:
            for mask in self.segmenter.stream(images(), self.batch_size, self.refine, network):
                while isinstance(waiting[0][1], UserError):
                    yield *waiting.popleft(), None
                yield *waiting.popleft(), mask
            yield from ((job, error, None) for job, error in waiting)

        def end(item: tuple[Job, Any, Any]) -> tuple[Job, Any, list[str]]:
            job, image, mask = item
            if mask is None:
                return job, None, [str(image)]
            return job, *finish(job, image.image, mask)

        total = len(jobs) if hasattr(jobs, "__len__") else None
        with tqdm(total=total, unit="image", disable=None if self.has_bar else True) as progress:
            for job, result, reasons in map_ahead(end, masks(), self.num_threads):
                for reason in reasons:
                    say_failed(job, reason)
                self.tally.failed += bool(reasons)
                self.tally.done += not reasons
                progress.update()
                if not reasons:
                    yield job, result
        self.tally.seconds += time.perf_counter() - start
        self.tally.network_seconds += network.seconds

    def _read(self, job: Job) -> tuple[Job, Any]:
        from .data.image_files import read_image

        if isinstance(job.source, UserError):
            return job, job.source
        source = BytesIO(job.source) if isinstance(job.source, bytes) else job.source
        try:
            image = read_image(source, self.max_pixels)
        except UserError as error:
            return job, error
        return job, self.segmenter.prepare(image)

    def write_files(self, jobs: Iterable[Job], out: Path):
        """Write the outputs of `jobs` below the folder `out`.

        Raises:
            UserError: If nothing more can be written, or memory runs out.
        """

        def write(job: Job, image: "Image.Image", mask: "np.ndarray") -> tuple[None, list[str]]:
            marks, reasons = png_marks(mark(self.settings, digest_of(job.source))), []
            for kind, path in job.outputs.items():
                try:
                    with replacing(path) as temporary:
                        self.draw(kind, image, mask).save(temporary, pnginfo=marks, **PNG_OPTIONS)
                except UserError as error:
                    reasons.append(str(error))
                except OSError as error:
                    reasons.append(f"cannot write {path}: {error.strerror or error}")
                    if error.errno in FATAL_ERRNOS:
                        raise UserError(reasons[-1]) from error
            if reasons:
                make_folder(out)  # stops the run unless only this file's own folder is closed
            return None, reasons

        for _ in self.run(jobs, write):
            pass

    def draw(self, kind: str, image: "Image.Image", mask: "np.ndarray") -> "Image.Image":
        """Draw a mask, overlay or cut-out."""
        return draw(kind, image, mask, self.threshold, self.background)


class Background:
    """What is behind cut-outs: a color or an image."""

    def __init__(self, given: str):
        """Take a color, such as white, or the path of an image.

        Raises:
            UserError: If it is neither.
        """
        from PIL import Image, ImageColor

        from .api import opened

        self.name = given  # for the settings in outputs
        try:
            self.image = Image.new("RGB", (1, 1), ImageColor.getrgb(given)[:3])
        except ValueError:
            if not os.path.lexists(given):  # unlike `Path.exists`, it takes overlong names
                raise UserError(
                    f"got --background {given}, expected a color such as white or #00b140, or an image"
                ) from None
            self.image = opened(given)
            self.name = f"{Path(given).name} ({file_sha256(Path(given))[:12]})"
        self.fitted = self.image

    def behind(self, cut: "Image.Image") -> "Image.Image":
        """Return an RGBA cut-out on this background, as RGB."""
        from PIL import Image, ImageOps

        from .models.reading import tag_srgb

        fitted = self.fitted  # threads share it
        if fitted.size != cut.size:
            self.fitted = fitted = ImageOps.fit(self.image, cut.size)
        return tag_srgb(Image.composite(cut.convert("RGB"), fitted, cut.getchannel("A")))


def draw(
    kind: str,
    image: "Image.Image",
    mask: "np.ndarray",
    threshold: float | None = None,
    background: Background | None = None,
) -> "Image.Image":
    """Draw a mask, overlay or cut-out; `threshold` makes the mask hard."""
    from .api import cutout, overlay
    from .models.cutout import mask_to_image

    if threshold is not None:
        mask = (mask > threshold).astype("float32")
    if kind == "mask":
        return mask_to_image(mask)
    if kind == "overlay":
        return overlay(image, mask)
    cut = cutout(image, mask)
    return cut if background is None else background.behind(cut)


def plan_jobs(paths: list[Path], out: Path, kinds: list[str]) -> dict[Path, dict[str, Path]]:
    """Return the images at `paths`, each with the file of every kind.

    Hidden files and what lies inside `out` are left out. A line in the log counts other files and linked folders.

    Raises:
        UserError: If a path is missing, or no image is found. If `out` is one of the folders, or an output would
            replace another output or an input.
    """
    out = out.resolve()
    relative_to, passed = {}, Counter()  # source -> its place in the output tree
    for path in paths:
        if path.is_dir():
            if path.resolve() == out:
                raise UserError(f"got {path} as input and as --out; choose another output folder")
            relative_to.update(_search(path, out, passed))
        elif path.exists():
            relative_to[path] = Path(path.name)
        else:
            raise UserError(f"got {path}, which does not exist; give images or folders")
    if passed:
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(passed.items()))
        logger.warning("passed over in folders: %s; name such a file to segment it", counts)
    if not relative_to:
        raise UserError(f"found no image in {', '.join(map(str, paths))}; expected {' '.join(IMAGE_SUFFIXES)}")
    # A file named twice, or by name and in its folder, is one job.
    relative_to = {source: relative_to[source] for source in {s.absolute(): s for s in relative_to}.values()}

    stems = Counter(relative.with_suffix("") for relative in relative_to.values())
    jobs = {}
    for source, relative in relative_to.items():
        stem = relative.with_suffix("")
        name = relative.name if stems[stem] > 1 else stem.name
        jobs[source] = {}
        for kind in kinds:
            # An overlay never takes the plain name: a later run for masks would take it for the mask.
            jobs[source][kind] = out / relative.parent / f"{name}{'' if kind == 'mask' else f'_{kind}'}.png"
    check_outputs(jobs)
    return jobs


def check_outputs(plan: dict[Path, dict[str, Path]]):
    """Check that each output has one source and is no input.

    Outputs are absolute.

    Raises:
        UserError: If one is.
    """
    inputs, owners = {source.resolve() for source in plan}, {}
    for source, outputs in plan.items():
        for output in outputs.values():
            if output in owners:
                raise UserError(f"{owners[output]} and {source} would both write {output}; segment them in two runs")
            if output in inputs:
                raise UserError(f"{source} would write over the input {output}; choose another --out")
            owners[output] = source


def _search(folder: Path, out: Path, passed: Counter) -> Iterator[tuple[Path, Path]]:
    """Yield the images of a folder and their relative paths, sorted.

    `passed` counts what is neither an image by its suffix nor hidden.
    """
    for source in sorted(folder.rglob("*")):
        relative = source.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        # An output folder inside the input folder holds the masks of an earlier run.
        is_output = out.is_relative_to(folder.resolve()) and source.resolve().is_relative_to(out)
        if hidden or is_output:
            continue
        if source.is_dir():
            if source.is_symlink():
                passed["linked folders"] += 1
            elif not os.access(source, os.R_OK | os.X_OK):
                passed["closed folders"] += 1
        elif source.suffix.lower() in IMAGE_SUFFIXES and source.is_file():
            yield source, relative
        else:
            passed[source.suffix.lower() or "without suffix"] += 1


def join_processes(device: str | None = None) -> "PartialState | None":
    """Join the processes that a launcher started; None for a single one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    import torch
    from accelerate import PartialState

    # One process may end hours before the others.
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=timedelta(days=30))


def made_once(processes: "PartialState | None", make: Callable[[], Any]) -> Any:
    """Return what the main process makes, in all processes.

    Raises:
        UserError: In the main process. The others end with the same exit code.
    """
    if processes is None:
        return make()
    from accelerate.utils import broadcast_object_list

    made = [None]
    if processes.is_main_process:
        try:
            made = [make()]
        except UserError as error:
            made = [error]
    broadcast_object_list(made)
    if isinstance(made[0], UserError):
        if processes.is_main_process:
            raise made[0]
        sys.exit(2)
    return made[0]


def my_share(processes: "PartialState | None", items: list) -> list:
    """Return every n-th item for n processes."""
    return items if processes is None else items[processes.process_index :: processes.num_processes]


def joined(processes: "PartialState | None", tally: Tally) -> Tally:
    """Return the sum of all processes' counts."""
    if processes is None:
        return tally
    from accelerate.utils import gather_object

    return sum(gather_object([tally]), Tally())
