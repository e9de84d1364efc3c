"""Console script `unconceal`."""

import argparse
import errno
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

from ..api import Segmenter, cutout, load, overlay, read_image
from ..drawing.explain import explain
from ..models.cutout import estimator, mask_to_image
from ..models.refine import REFINE
from ..utils.errors import UserError, run_main
from ..utils.files import IMAGE_SUFFIXES, make_folder, replacing
from ..utils.images import MAX_PIXELS


DRAW = {
    "mask": lambda image, mask: mask_to_image(mask),
    "overlay": overlay,
    "cutout": cutout,
}
# After these no further file can be written.
FATAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Job:
    """One picture to read, and the file to write for each kind of output."""

    source: Path
    outputs: dict[str, Path]


def entry():
    """Run `unconceal` and exit."""
    run_main(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="unconceal", description="Find objects that hide.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_segment(commands)
    _add_explain(commands)
    args = parser.parse_args(argv)
    return args.run(args)


def _add_segment(commands):
    parser = commands.add_parser(
        "segment",
        usage="unconceal segment PATH [PATH ...] --model ID --out DIR [options]",
        help="write masks, overlays or cut-outs of pictures",
        description="Segment pictures. Folders are searched to any depth and their tree is kept. A picture gives "
        "NAME.png (mask), NAME_overlay.png and NAME_cutout.png, at its displayed size; where two pictures of a folder "
        "differ only in their suffix, it stays in the name (a.jpg.png, a.png.png). Exit code: 0, 1 if some pictures "
        "failed, 2 if nothing was done.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="picture or folder; - reads one picture from stdin")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="output folder; not used with -, which writes to stdout"
    )
    parser.add_argument("--output", nargs="+", choices=list(DRAW), default=["mask"], help="what to write (mask)")
    parser.add_argument(
        "--threshold", type=probability, metavar="T", help="write hard masks: object above T, 0 to below 1"
    )
    parser.add_argument(
        "--refine",
        choices=REFINE,
        default="auto",
        help="look at the edges of a large picture again, in tiles: auto, where a side is twice the network's or longer",
    )
    parser.add_argument("--batch-size", type=count, default=1, metavar="N", help="pictures or tiles at a time (1)")
    _add_common(parser)
    parser.set_defaults(run=_segment)


def _add_explain(commands):
    parser = commands.add_parser(
        "explain",
        usage="unconceal explain IMAGE --model ID --out FILE.png [options]",
        help="draw how a network unfolds a picture, stage by stage",
        description="Draw a sheet with a row for each stage of the unfolding: mask, its outline on the picture, edge, "
        "background, uncertainty, reconstruction and its error. For networks with stages (RUN).",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="one picture")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the sheet")
    _add_common(parser)
    parser.set_defaults(run=_explain)


def _add_common(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--model", required=True, metavar="ID", help="folder of a trained network, or its id on the Hub"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (the accelerator, if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (the checkpoint's)")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that is kept with the model")
    parser.add_argument("--overwrite", action="store_true", help="write again what exists")
    parser.add_argument(
        "--max-pixels", type=count, default=MAX_PIXELS, metavar="N", help=f"refuse larger pictures ({MAX_PIXELS})"
    )


def probability(text: str) -> float:
    """Parse a threshold in [0, 1), 1 left out because nothing is above it; argparse shows this function's name."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 0 to below 1")
    return value


def count(text: str, least: int = 1) -> int:
    """Parse a whole number from `least` on."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from {least}")
    return int(text)


def _segment(args: argparse.Namespace) -> int:
    kinds = list(dict.fromkeys(args.output))
    if "-" in args.paths:
        return _segment_pipe(args, kinds)
    if args.out is None:
        raise UserError("got no output folder; name one with --out")
    jobs = plan_jobs([Path(path) for path in args.paths], args.out, kinds)
    make_folder(args.out)
    todo = jobs if args.overwrite else [left for job in jobs if (left := _without_existing(job)).outputs]
    if todo and "cutout" in kinds and args.threshold is None:
        estimator()  # says what is missing before the first picture, not between two
    options = (args.out, args.batch_size, args.refine, args.threshold, args.max_pixels)
    failed = segment_files(_load(args), todo, *options) if todo else ()
    counts = [f"{len(todo) - len(failed)} segmented into {args.out}"]
    if len(todo) < len(jobs):
        counts.append(f"{len(jobs) - len(todo)} skipped because they exist (--overwrite writes them again)")
    if failed:
        counts.append(f"{len(failed)} failed")
    print(f"{len(jobs)} pictures: {', '.join(counts)}")
    return 1 if failed else 0


def _without_existing(job: Job) -> Job:
    # `lexists`: a broken link is somebody's too. `Path.exists` would raise an error where a name is too long.
    return replace(job, outputs={kind: path for kind, path in job.outputs.items() if not os.path.lexists(path)})


def _segment_pipe(args: argparse.Namespace, kinds: list[str]) -> int:
    if args.paths != ["-"] or len(kinds) != 1 or args.out is not None:
        raise UserError(
            "- takes one picture from stdin and writes one to stdout: no other path, one --output, no --out"
        )
    try:
        image = read_image(BytesIO(sys.stdin.buffer.read()), args.max_pixels)
    except UserError as error:
        raise UserError(f"stdin: {error}") from None
    (mask,) = _load(args).segment([image], args.batch_size, args.refine)
    picture = DRAW[kinds[0]](image, _hardened(mask, args.threshold))
    png = BytesIO()  # Pillow seeks while it writes, which a pipe cannot
    picture.save(png, "PNG")
    sys.stdout.buffer.write(png.getvalue())
    return 0


def _explain(args: argparse.Namespace) -> int:
    out = args.out
    if out.suffix.lower() != ".png":
        raise UserError(f"got --out {out}, expected a file name that ends in .png")
    if out.resolve() == args.image.resolve():
        raise UserError(f"got {out} as input and as --out; choose another name for the sheet")
    if os.path.lexists(out) and not args.overwrite:
        raise UserError(f"{out} exists; --overwrite writes it again")
    try:
        image = read_image(args.image, args.max_pixels)
    except UserError as error:
        raise UserError(f"cannot read {args.image}: {error}") from None
    sheet = explain(_load(args), image)
    try:
        with replacing(out) as beside:
            sheet.save(beside)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    print(f"wrote {out}")
    return 0


def _load(args: argparse.Namespace) -> Segmenter:
    logging.set_verbosity_error()  # the loader's warnings are our errors, in one line
    logging.disable_progress_bar()
    return load(args.model, args.device, args.dtype, args.revision, args.trust_remote_code)


def plan_jobs(paths: list[Path], out: Path, kinds: list[str]) -> list[Job]:
    """List the pictures at `paths` and where the outputs of each will go.

    Hidden files and what lies inside `out` are left out.

    Raises:
        UserError: If a path is missing, no picture is found, `out` is one of the folders, or an output would replace
            another or a source.
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
            raise UserError(f"got {path}, which does not exist; give pictures or folders")
    if not relative_to:
        raise UserError(f"found no picture in {', '.join(map(str, paths))}; looked for {' '.join(IMAGE_SUFFIXES)}")
    # The same file named twice, or by name and in its folder, is one job.
    relative_to = {source: relative_to[source] for source in {s.absolute(): s for s in relative_to}.values()}

    stems = Counter(relative.with_suffix("") for relative in relative_to.values())
    inputs = {source.resolve() for source in relative_to}
    jobs, owners = [], {}
    for source, relative in relative_to.items():
        stem = relative.with_suffix("")
        name = relative.name if stems[stem] > 1 else stem.name
        outputs = {}
        for kind in kinds:
            # An overlay never takes the plain name, or a later run for masks would take it for the mask.
            output = out / relative.parent / f"{name}{'' if kind == 'mask' else f'_{kind}'}.png"
            if output in owners:
                raise UserError(f"{owners[output]} and {source} would both write {output}; segment them in two runs")
            if output in inputs:
                raise UserError(f"{source} would write over the input {output}; choose another --out")
            owners[output] = source
            outputs[kind] = output
        jobs.append(Job(source, outputs))
    return jobs


def _search(folder: Path, out: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the pictures of a folder with their paths inside it, in order."""
    for source in sorted(folder.rglob("*")):
        relative = source.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        # An output folder inside the input folder holds the masks of an earlier run.
        ours = out.is_relative_to(folder.resolve()) and source.resolve().is_relative_to(out)
        if source.suffix.lower() in IMAGE_SUFFIXES and source.is_file() and not hidden and not ours:
            yield source, relative


def segment_files(
    segmenter: Segmenter,
    jobs: list[Job],
    out: Path,
    batch_size: int,
    refine: str,
    threshold: float | None,
    max_pixels: int,
) -> set[Path]:
    """Segment the pictures of `jobs` and write their outputs, going on past files that cannot be read or written.

    Each failure is told on stderr when it comes, so that none is lost where the run stops.

    Args:
        segmenter: What segments.
        jobs: From `plan_jobs`.
        out: Folder that all outputs are in.
        batch_size: Pictures in memory at a time.
        refine: Whether large pictures are looked at again, as for `Segmenter.segment`.
        threshold: Probability above which a pixel is object; None writes soft masks.
        max_pixels: Larger pictures fail.

    Returns:
        The sources that failed.

    Raises:
        UserError: If nothing more can be written, or memory runs out.
    """
    failed, pending = set(), deque()

    def fail(source: Path, reason: str):
        failed.add(source)
        tqdm.write(f"failed: {source}: {reason}", file=sys.stderr)  # not `print`, which would tear the progress bar

    with tqdm(total=len(jobs), unit="picture", disable=None) as progress:

        def pictures() -> Iterator[Image.Image]:
            for job in jobs:
                try:
                    image = read_image(job.source, max_pixels)
                except UserError as error:
                    fail(job.source, str(error))
                    progress.update()
                    continue
                pending.append((job, image))
                yield image

        for mask in segmenter.stream(pictures(), batch_size, refine):
            job, image = pending.popleft()
            mask = _hardened(mask, threshold)
            for kind, path in job.outputs.items():
                try:
                    with replacing(path) as beside:
                        DRAW[kind](image, mask).save(beside)
                except UserError as error:
                    make_folder(out)  # stops the run where not only this file's own folder is shut
                    fail(job.source, str(error))
                except OSError as error:
                    reason = f"cannot write {path}: {error.strerror or error}"
                    if error.errno in FATAL_ERRNOS:
                        raise UserError(reason) from None
                    make_folder(out)
                    fail(job.source, reason)
            progress.update()
    return failed


def _hardened(mask: np.ndarray, threshold: float | None) -> np.ndarray:
    return mask if threshold is None else (mask > threshold).astype(np.float32)
