"""Write masks, overlays or cut-outs of images."""

import argparse
import errno
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.arguments import positive_int, probability
from ..utils.errors import UserError
from ..utils.files import make_folder, replacing
from ..utils.images import IMAGE_SUFFIXES, MAX_PIXELS


if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..api import Segmenter


OUTPUT_KINDS = ("mask", "overlay", "cutout")
REFINE = ("auto", "always", "never")  # of models/refine.py, which is slow to import
# After these no further file can be written.
FATAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `unconceal segment`."""
    parser.usage = "unconceal segment PATH [PATH ...] --model ID --out DIR [options]"
    parser.description = (
        "Write masks, overlays or cut-outs of images, as PNG of the displayed size. Folders are searched to any "
        "depth, and their tree is kept. An image NAME.jpg gives NAME.png (mask), NAME_overlay.png and "
        "NAME_cutout.png. If only the suffix tells two images apart, it stays in the name: a.jpg.png, a.png.png. "
        "Exit code: 0 for success, 1 if some images failed, 2 if nothing was done."
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="image or folder; - reads one image from stdin")
    add("--out", type=Path, metavar="DIR", help="output folder; with - the output goes to stdout")
    add("--output", nargs="+", choices=OUTPUT_KINDS, default=["mask"], help="what to write (mask)")
    add("--threshold", type=probability, metavar="T", help="write hard masks: object above T, from 0 to below 1")
    refine = "predict the edges of large images again, in tiles; auto: from twice the network's size"
    add("--refine", choices=REFINE, default="auto", help=refine)
    at_once = "images, or tiles of one image, at a time (1)"
    add("--batch-size", type=positive_int, default=1, metavar="N", help=at_once)
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser):
    """Add the shared arguments of `segment` and `explain`."""
    parser.add_argument("--model", required=True, metavar="ID", help="folder of a trained network, or its Hub id")
    parser.add_argument("--device", help="such as cpu or cuda:1 (the accelerator, if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (as saved)")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    larger = f"refuse larger images ({MAX_PIXELS})"
    parser.add_argument("--max-pixels", type=positive_int, default=MAX_PIXELS, metavar="N", help=larger)


def load_model(args: argparse.Namespace) -> "Segmenter":
    """Load the network of `--model`, without progress bars."""
    from transformers.utils import logging

    from ..api import load

    logging.set_verbosity_error()  # what the loader warns of is an error here, in one line
    logging.disable_progress_bar()
    return load(args.model, args.device, args.dtype, args.revision, args.trust_remote_code)


def run(args: argparse.Namespace) -> int:
    """Segment images and folders, or one image from stdin."""
    kinds = list(dict.fromkeys(args.output))
    if "-" in args.paths:
        return _segment_stdin(args, kinds)
    if args.out is None:
        raise UserError("got no output folder; name one with --out")
    jobs = plan_jobs([Path(path) for path in args.paths], args.out, kinds)
    make_folder(args.out)
    todo = {}
    for source, outputs in jobs.items():
        # `lexists`: a broken link is also somebody's file. `Path.exists` raises an error if a name is too long.
        if left := {kind: path for kind, path in outputs.items() if args.overwrite or not os.path.lexists(path)}:
            todo[source] = left
    failed = set()
    if todo:
        if "cutout" in kinds and args.threshold is None:
            from ..models.cutout import estimator

            estimator()  # logs what is missing before the first image, not between two
        failed = _segment_files(load_model(args), todo, args)
    counts = [f"{len(todo) - len(failed)} segmented into {args.out}"]
    if len(todo) < len(jobs):
        counts.append(f"{len(jobs) - len(todo)} skipped, the output exists (use --overwrite)")
    if failed:
        counts.append(f"{len(failed)} failed")
    print(f"{len(jobs)} image{'s' if len(jobs) > 1 else ''}: {', '.join(counts)}")
    return 1 if failed else 0


def _segment_stdin(args: argparse.Namespace, kinds: list[str]) -> int:
    if args.paths != ["-"] or len(kinds) != 1 or args.out is not None:
        raise UserError(
            "- reads one image from stdin and writes one to stdout; give no other path, one --output, no --out"
        )
    from ..api import opened

    image = opened(BytesIO(sys.stdin.buffer.read()), args.max_pixels, "stdin")
    (mask,) = load_model(args).segment([image], args.batch_size, args.refine)
    png = BytesIO()  # Pillow seeks while it writes, which a pipe cannot do
    _draw(kinds[0], image, mask, args.threshold).save(png, "PNG")
    sys.stdout.buffer.write(png.getvalue())
    return 0


def _draw(kind: str, image: "Image.Image", mask: "np.ndarray", threshold: float | None) -> "Image.Image":
    from ..api import cutout, overlay
    from ..models.cutout import mask_to_image

    if threshold is not None:
        mask = (mask > threshold).astype("float32")
    if kind == "mask":
        return mask_to_image(mask)
    return (overlay if kind == "overlay" else cutout)(image, mask)


def plan_jobs(paths: list[Path], out: Path, kinds: list[str]) -> dict[Path, dict[str, Path]]:
    """Return the images at `paths`, each with the file of every kind.

    Hidden files and what lies inside `out` are left out.

    Raises:
        UserError: If a path is missing, or no image is found. If `out` is one of the folders, or an output would
            replace another output or an input.
    """
    out = out.resolve()
    relative_to = {}  # source -> its place in the output tree
    for path in paths:
        if path.is_dir():
            if path.resolve() == out:
                raise UserError(f"got {path} as input and as --out; choose another output folder")
            relative_to.update(_search(path, out))
        elif path.exists():
            relative_to[path] = Path(path.name)
        else:
            raise UserError(f"got {path}, which does not exist; give images or folders")
    if not relative_to:
        raise UserError(f"found no image in {', '.join(map(str, paths))}; expected {' '.join(IMAGE_SUFFIXES)}")
    # A file named twice, or by name and in its folder, is one job.
    relative_to = {source: relative_to[source] for source in {s.absolute(): s for s in relative_to}.values()}

    stems = Counter(relative.with_suffix("") for relative in relative_to.values())
    inputs = {source.resolve() for source in relative_to}
    jobs, owners = {}, {}
    for source, relative in relative_to.items():
        stem = relative.with_suffix("")
        name = relative.name if stems[stem] > 1 else stem.name
        jobs[source] = {}
        for kind in kinds:
            # An overlay never takes the plain name: a later run for masks would take it for the mask.
            output = out / relative.parent / f"{name}{'' if kind == 'mask' else f'_{kind}'}.png"
            if output in owners:
                raise UserError(f"{owners[output]} and {source} would both write {output}; segment them in two runs")
            if output in inputs:
                raise UserError(f"{source} would write over the input {output}; choose another --out")
            owners[output] = source
            jobs[source][kind] = output
    return jobs


def _search(folder: Path, out: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the images of a folder and their relative paths, sorted."""
    for source in sorted(folder.rglob("*")):
        relative = source.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        # An output folder inside the input folder holds the masks of an earlier run.
        is_output = out.is_relative_to(folder.resolve()) and source.resolve().is_relative_to(out)
        if source.suffix.lower() in IMAGE_SUFFIXES and source.is_file() and not hidden and not is_output:
            yield source, relative


def _segment_files(segmenter: "Segmenter", jobs: dict[Path, dict[str, Path]], args: argparse.Namespace) -> set[Path]:
    """Write the outputs of `jobs`; return the sources that failed.

    A file that cannot be read or written does not stop the run. It is reported on stderr at once.

    Raises:
        UserError: If nothing more can be written, or memory runs out.
    """
    from tqdm import tqdm

    from ..data.image_files import read_image

    failed, pending = set(), deque()

    def fail(source: Path, reason: str):
        failed.add(source)
        tqdm.write(f"failed: {source}: {reason}", file=sys.stderr)  # `print` would tear the progress bar

    with tqdm(total=len(jobs), unit="image", disable=None) as progress:

        def images() -> Iterator["Image.Image"]:
            for source in jobs:
                try:
                    image = read_image(source, args.max_pixels)
                except UserError as error:
                    fail(source, str(error))
                    progress.update()
                    continue
                pending.append((source, image))
                yield image

        for mask in segmenter.stream(images(), args.batch_size, args.refine):
            source, image = pending.popleft()
            for kind, path in jobs[source].items():
                try:
                    with replacing(path) as temporary:
                        _draw(kind, image, mask, args.threshold).save(temporary)
                except UserError as error:
                    make_folder(args.out)  # stops the run unless only this file's own folder is closed
                    fail(source, str(error))
                except OSError as error:
                    reason = f"cannot write {path}: {error.strerror or error}"
                    if error.errno in FATAL_ERRNOS:
                        raise UserError(reason) from error
                    make_folder(args.out)
                    fail(source, reason)
            progress.update()
    return failed
