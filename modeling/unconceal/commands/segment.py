"""Write masks, overlays or cut-outs of images."""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..segmenting import (
    PNG_OPTIONS,
    Background,
    Job,
    Runner,
    Tally,
    describe_settings,
    draw,
    join_processes,
    joined,
    made_once,
    mark_of_png,
    my_share,
    plan_jobs,
    unfinished,
)
from ..utils.arguments import positive_int, probability
from ..utils.errors import UserError
from ..utils.files import make_folder, printable
from ..utils.images import MAX_PIXELS, is_video


if TYPE_CHECKING:
    from accelerate import PartialState

    from ..api import Segmenter


OUTPUT_KINDS = ("mask", "overlay", "cutout")
REFINE = ("auto", "always", "never")  # of models/refine.py, which is slow to import
ALPHA = ("webm", "mov", "png")  # of video_files.py
MODEL_HELP = "folder of a trained network, its Hub id, or a name that `unconceal models` lists"


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `unconceal segment`."""
    parser.usage = "unconceal segment PATH [PATH ...] --model ID --out DIR [options]"
    parser.description = (
        "Write masks, overlays or cut-outs of images, as PNG of the displayed size. Folders are searched to any "
        "depth, and their tree is kept. An image NAME.jpg gives NAME.png (mask), NAME_overlay.png and "
        "NAME_cutout.png. If only the suffix tells two images apart, it stays in the name: a.jpg.png, a.png.png. "
        "A video, named as a file, gives NAME_mask.mp4, NAME_overlay.mp4 and NAME_cutout.webm, the last two with its "
        "sound. "
        "Started by torchrun or accelerate launch, several processes share the images. "
        "Exit code: 0 for success, 1 if some images failed, 2 if nothing was done."
    )
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="image or folder; - reads one image from stdin")
    data = "instead of PATH: a data set, as a folder of Parquet files or a Hub id; rows give ID.png"
    add("--data", metavar="FOLDER|ID", help=data)
    add("--split", metavar="NAME", help="split of --data, and its name in --to-data")
    add("--out", type=Path, metavar="DIR", help="output folder; with - the output goes to stdout")
    to_data = "instead of --out: write images and masks as Parquet shards, into a folder or a Hub data set"
    add("--to-data", metavar="DIR|ID", help=to_data)
    add("--output", nargs="+", choices=OUTPUT_KINDS, default=["mask"], help="what to write (mask)")
    add("--threshold", type=probability, metavar="T", help="write hard masks: object above T, from 0 to below 1")
    refine = "predict edges again, in tiles; auto: of images a quarter larger than the network's size, not of videos"
    add("--refine", choices=REFINE, default="auto", help=refine)
    background = "show cut-outs on a color, such as white or '#00b140', or on an image"
    add("--background", metavar="COLOR|IMAGE", help=background)
    alpha = "for cut-outs of videos without --background: VP9, ProRes 4444 or a folder of frames (webm)"
    add("--alpha", choices=ALPHA, help=alpha)
    smoothing = "for videos: weight of the previous mask where the picture stays the same, 0 for none (0.7)"
    add("--smoothing", type=probability, metavar="S", help=smoothing)
    at_once = "images, or tiles of one image, at a time (1)"
    add("--batch-size", type=positive_int, default=1, metavar="N", help=at_once)
    add_model_arguments(parser)
    add("--compile", action="store_true", help="compile the network first, which takes minutes; for many images")


def add_model_arguments(parser: argparse.ArgumentParser):
    """Add the shared arguments of `segment` and `explain`."""
    parser.add_argument("--model", required=True, metavar="ID", help=MODEL_HELP)
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
    compile = getattr(args, "compile", False)
    return load(args.model, args.device, args.dtype, args.revision, args.trust_remote_code, compile)


def run(args: argparse.Namespace) -> int:
    """Segment images, folders or a data set, or one image from stdin."""
    args.output = list(dict.fromkeys(args.output))
    args.background = Background(args.background) if args.background else None
    if "-" in args.paths:
        return _segment_stdin(args)
    _check(args)
    processes = join_processes(args.device)
    args.device = args.device or (processes and processes.device)
    if args.dtype:  # not every device has it, and outputs name the one in use
        from ..utils.devices import choose_device, choose_dtype

        args.dtype = str(choose_dtype(args.dtype, choose_device(args.device))).removeprefix("torch.")
    segment = _segment_data if args.data or args.to_data else _segment_videos if args.videos else _segment_files
    tally = joined(processes, segment(args, processes))
    if processes is None or processes.is_main_process:
        _report(args, tally, 1 if processes is None else processes.num_processes)
    return 1 if tally.failed else 0


def _check(args: argparse.Namespace):
    if bool(args.paths) == bool(args.data):
        got = "both PATH and --data" if args.data else "no image"
        raise UserError(f"got {got}; give images or folders, or a data set with --data and --split")
    if bool(args.out) == bool(args.to_data):
        got = "both --out and --to-data" if args.out else "no output folder"
        raise UserError(f"got {got}; name one with --out, or a data set with --to-data")
    if args.data and not args.split:
        raise UserError("--data needs --split, the split to segment")
    if args.split and not (args.data or args.to_data):
        raise UserError("--split is for --data and --to-data; leave it out")
    if args.to_data and args.split:
        from ..data.splits import check_name

        check_name(args.split)
    if args.to_data and args.to_data != printable(args.to_data):
        raise UserError(f"got --to-data {printable(args.to_data)}, expected a name in UTF-8; choose another folder")
    if args.to_data and args.output != ["mask"]:
        raise UserError("--to-data holds masks only; leave --output out, or write files with --out")
    args.videos = [Path(path) for path in args.paths if is_video(path)]
    if args.videos and len(args.videos) < len(args.paths):
        raise UserError("got both videos and images; segment them in two runs")
    if args.videos and args.to_data:
        raise UserError("--to-data is for images; write videos with --out")
    if args.smoothing is not None and not args.videos:
        raise UserError("--smoothing is for videos; leave it out")
    if args.alpha and (not args.videos or args.background or "cutout" not in args.output):
        raise UserError("--alpha is for cut-outs of videos without --background; leave it out")
    if args.background and "cutout" not in args.output:
        raise UserError("--background is for cut-outs; add --output cutout")


def _segment_stdin(args: argparse.Namespace) -> int:
    if args.paths != ["-"] or len(args.output) != 1 or args.out or args.data or args.to_data:
        raise UserError(
            "- reads one image from stdin and writes one to stdout; give no other path, one --output, no --out"
        )
    from ..api import opened

    image = opened(BytesIO(sys.stdin.buffer.read()), args.max_pixels, "stdin")
    (mask,) = load_model(args).segment([image], args.batch_size, args.refine)
    png = BytesIO()  # Pillow seeks while it writes, which a pipe cannot do
    draw(args.output[0], image, mask, args.threshold, args.background).save(png, **PNG_OPTIONS)
    sys.stdout.buffer.write(png.getvalue())
    return 0


def _segment_files(args: argparse.Namespace, processes: "PartialState | None") -> Tally:
    """Write the files of this process; return what happened."""
    plan = made_once(processes, lambda: plan_jobs([Path(path) for path in args.paths], args.out, args.output))
    write = partial(Runner.write_files, out=args.out)
    return _write_plan(args, processes, plan, output_settings(args), mark_of_png, write)


def _segment_videos(args: argparse.Namespace, processes: "PartialState | None") -> Tally:
    """Write the videos of this process; return what happened."""
    from ..video import SMOOTHING
    from ..video_files import mark_of_video, plan_outputs, write_videos

    args.refine = "never" if args.refine == "auto" else args.refine
    smoothing = SMOOTHING if args.smoothing is None else args.smoothing
    settings = output_settings(args, smoothing=smoothing)
    plan = plan_outputs(args.videos, args.out, args.output, args.alpha or ALPHA[0], bool(args.background))
    return _write_plan(args, processes, plan, settings, mark_of_video, partial(write_videos, smoothing=smoothing))


def _write_plan(
    args: argparse.Namespace,
    processes: "PartialState | None",
    plan: dict[Path, dict[str, Path]],
    settings: str,
    mark_of: Callable[[Path], str | None],
    write: Callable[[Runner, list[Job]], None],
) -> Tally:
    """Write what is left of a plan; return what happened."""
    jobs = [Job(source, source, outputs) for source, outputs in plan.items()]
    left = made_once(processes, lambda: [unfinished(job, settings, args.overwrite, mark_of) for job in jobs])
    mine = my_share(processes, left)
    make_folder(args.out)
    todo = [job for job in mine if job]
    if not todo:
        return Tally(skipped=len(mine))
    runner = make_runner(args, processes, settings)
    runner.tally.skipped = len(mine) - len(todo)
    write(runner, todo)
    return runner.tally


def _segment_data(args: argparse.Namespace, processes: "PartialState | None") -> Tally:
    """Segment rows, or write a data set; return what happened."""
    from ..segmenting_data import DataTarget, file_jobs, shards_of_data, shards_of_files

    split = args.split or "train"
    if args.data:
        shards = shards_of_data(args.data, split)
    else:
        out = Path(args.to_data)
        plan = made_once(processes, lambda: plan_jobs([Path(path) for path in args.paths], out, ["mask"]))
        shards = shards_of_files(plan, out, split)
    mine = my_share(processes, shards)
    settings = output_settings(args)
    if args.out:
        make_folder(args.out)
        runner = make_runner(args, processes, settings)
        runner.write_files(
            file_jobs(mine, args.out, args.output, runner.settings, args.overwrite, runner.tally), args.out
        )
        return runner.tally
    target = DataTarget(args.to_data, split, settings)
    finished = made_once(processes, lambda: target.finished(shards, args.overwrite))
    todo = [shard for shard in mine if shard.name not in finished]
    tally = Tally(skipped=len(mine) - len(todo))
    if todo:
        runner = make_runner(args, processes)
        target.write(todo, runner)
        tally += runner.tally
    if processes is not None:
        processes.wait_for_everyone()
    if processes is None or processes.is_main_process:
        target.complete(shards)
    return tally


def output_settings(args: argparse.Namespace, **options: Any) -> str:
    """Return what the output files say of model and options."""
    options = {"refine": args.refine, "threshold": args.threshold, "dtype": args.dtype, **options}
    if args.background:
        options["background"] = args.background.name
    return describe_settings(args.model, args.revision, **options)


def make_runner(args: argparse.Namespace, processes: "PartialState | None", settings: str = "") -> Runner:
    """Load the network on the device of this process."""
    if "cutout" in args.output and args.threshold is None:
        from ..models.cutout import estimator

        estimator()  # logs what is missing before the first image, not between two
    from ..evaluation.workers import default_workers

    return Runner(
        load_model(args),
        batch_size=args.batch_size,
        refine=args.refine,
        max_pixels=args.max_pixels,
        num_threads=default_workers(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        threshold=args.threshold,
        background=args.background,
        settings=settings,
        has_bar=processes is None or processes.is_main_process,
    )


def _report(args: argparse.Namespace, tally: Tally, num_processes: int):
    counts = [f"{tally.done} segmented into {args.out or args.to_data}"]
    if tally.skipped:
        what = " shards" if args.to_data else ""
        counts.append(f"{tally.skipped}{what} skipped, the output exists (use --overwrite)")
    if tally.failed:
        counts.append(f"{tally.failed} failed")
    if tally.seconds:
        share = tally.network_seconds / tally.seconds
        counts.append(f"{tally.seconds / num_processes:.1f} s, {share:.0%} of it in the network")
    total = tally.done + tally.failed + (0 if args.to_data else tally.skipped)
    what = "video" if args.videos else "image"
    print(f"{total} {what}{'' if total == 1 else 's'}: {', '.join(counts)}")
