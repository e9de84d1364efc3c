"""Score a segmentation model on one split of a data set, or mask files of any method against true masks.

Runs as it is; on several accelerators by `accelerate launch`, in several CPU processes by `torchrun --nproc-per-node N`.
Further commands: `evaluate.py table`, `curves`, `divisions` and `module`; each has its own --help.
"""

import argparse
import logging
import math
import os
import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from unconceal.api import load, weights_digest
from unconceal.commands.segment import count, probability
from unconceal.data.loading import load_splits
from unconceal.drawing.gallery import compare_curves, draw_gallery
from unconceal.drawing.sheets import check_plots
from unconceal.evaluation.mask_files import PredictionFolder
from unconceal.evaluation.networks import evaluate_model
from unconceal.evaluation.protocols import PROTOCOLS
from unconceal.evaluation.report import check_report_folder, format_table, write_report
from unconceal.evaluation.mask_files import counts, read_truth
from unconceal.evaluation.networks import checked_options
from unconceal.evaluation.report import PER_IMAGE, add_images
from unconceal.evaluation.tables import load_papers, make_tables, read_result, to_latex, to_markdown
from unconceal.evaluation.workers import default_workers
from unconceal.hub.metric_space import write_metric_space
from unconceal.models.image_processing_unconceal import to_mask, to_rgb
from unconceal.models.refine import REFINE
from unconceal.training.recipe import load_recipe
from unconceal.utils.errors import UserError, run_main
from unconceal.utils.files import is_folder, printable, replacing
from unconceal.utils.images import MAX_PIXELS


def pixels(text: str) -> float:
    """Parse a distance; argparse shows this function's name."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected more than 0")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scored = parser.add_argument_group("what is scored")
    one = scored.add_mutually_exclusive_group(required=True)
    one.add_argument("--model", metavar="PATH_OR_ID", help="folder of the model, or its Hub id")
    scored.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    one.add_argument("--predictions", metavar="DIR", help="folder of mask files, named as the true masks or pictures")
    scored.add_argument("--data", metavar="PATH_OR_ID", help="folder of the data set, or its Hub id")
    scored.add_argument("--split", help="split to score, such as val or test")
    scored.add_argument("--truth", metavar="DIR", help="with --predictions, in place of --data: folder of true masks")
    scored.add_argument(
        "--truth-suffix", default="", metavar="TEXT", help="what true masks have after the name, such as _pixels0"
    )
    scored.add_argument("--images", metavar="DIR", help="with --truth: folder of the pictures, for --pictures")
    scored.add_argument(
        "--only-matched", action="store_true", help="leave out predictions without truth, and the reverse"
    )
    scored.add_argument("--limit", type=count, metavar="N", help="score the first N pictures only")
    scored.add_argument(
        "--refine",
        choices=REFINE,
        default="never",
        help="look at the edges of large pictures again, as `unconceal segment` does; papers do not (never)",
    )
    scored.add_argument(
        "--max-pixels", type=count, metavar="N", help=f"with --predictions: refuse larger files ({MAX_PIXELS})"
    )

    report = parser.add_argument_group("report")
    report.add_argument("--out", metavar="DIR", help="folder for the numbers of each picture, curves and results.json")
    report.add_argument("--overwrite", action="store_true", help="replace the results in --out")
    report.add_argument(
        "--format", choices=list(PER_IMAGE), default="csv", help="of the numbers of each picture (csv)"
    )
    report.add_argument(
        "--pictures",
        type=int,
        choices=range(1, 51),
        metavar="N",
        help="also draw curves, and sheets of N samples, the N best and the N worst pictures (N up to 50)",
    )
    report.add_argument("--name", help="what tables call it (the model, or the folder of predictions)")
    report.add_argument(
        "--division-seed", type=int, metavar="N", help="seed of the random division that it was run on"
    )
    report.add_argument(
        "--benchmark",
        choices=[name for name, test in load_papers()[0].items() if not test.mean_of],
        help="test set of the papers' tables (as the data set's sources tell)",
    )

    work = parser.add_argument_group("work")
    work.add_argument("--batch-size", type=count, default=8, metavar="N", help="pictures at a time (8)")
    work.add_argument(
        "--num-workers", type=partial(count, least=0), default=0, metavar="N", help="loader processes for each device"
    )
    work.add_argument(
        "--metric-workers",
        type=partial(count, least=0),
        metavar="N",
        help="processes that score beside the forward pass, for each device (one a core, 8 at most; 0: none beside)",
    )

    options = parser.add_argument_group("how it is scored")
    options.add_argument(
        "--protocol", choices=list(PROTOCOLS), default="segmentation", help="how to score (segmentation)"
    )
    options.add_argument(
        "--threshold",
        type=probability,
        help="segmentation, infrared, lesion: soft mask above which a pixel is object (0.5)",
    )
    options.add_argument(
        "--min-max",
        action=argparse.BooleanOptionalAction,
        help="cod, dis: stretch each prediction to [0, 1] and round it to 8 bits before scoring (yes)",
    )
    options.add_argument(
        "--hce",
        action=argparse.BooleanOptionalAction,
        help="dis: count the human correction effort, seconds for each large picture (yes)",
    )
    options.add_argument(
        "--max-distance",
        type=pixels,
        metavar="PIXELS",
        help="infrared: a target and what was found are less than this apart (3)",
    )
    options.add_argument(
        "--by-area",
        action=argparse.BooleanOptionalAction,
        help="infrared: find false alarms by their area, with the flaw of the field's common code (no)",
    )
    return parser


OPTIONS = ("threshold", "min_max", "hce", "max_distance", "by_area")


def check(args: argparse.Namespace):
    """Refuse what does not go together."""
    for name, value in vars(args).items():
        if isinstance(value, str) and not value.strip() and name != "truth_suffix":
            raise UserError(f"--{name.replace('_', '-')} is empty; give a value, or leave it out")
    if args.model and not args.data or bool(args.data) != bool(args.split):
        raise UserError("give --data and --split: the data set, and which of its splits to score")
    if args.predictions and bool(args.truth) == bool(args.data):
        raise UserError("--predictions needs what to score against: --truth DIR, or --data and --split")
    if args.predictions and args.refine != "never":
        raise UserError("--refine is for --model: files are scored as they are")
    if args.predictions and args.revision:
        raise UserError("--revision is for --model")
    for name in ("truth", "truth_suffix", "images", "only_matched", "max_pixels"):
        if args.model and getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} is for --predictions; a model is scored on --data")
    for name in ("truth_suffix", "images"):
        if args.data and getattr(args, name):
            raise UserError(
                f"--{name.replace('_', '-')} is for --truth; the data set has names and pictures of its own"
            )
    if args.images and not args.pictures:
        raise UserError("--images is for --pictures N, the sheets to draw them on")
    if args.pictures and not args.out:
        raise UserError("--pictures needs --out, the folder to draw them into")
    if args.out and args.predictions and os.path.realpath(args.out) == os.path.realpath(args.predictions):
        raise UserError(f"got {args.out} as --predictions and as --out; choose another folder for the results")
    if args.pictures:
        check_plots()


def evaluate(argv: list[str]):
    args = make_parser().parse_args(argv)
    check(args)
    protocol = PROTOCOLS[args.protocol]
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    options = checked_options(protocol, **{**protocol.report_options, **given})
    # Accelerate takes several processes without an accelerator for one unless told that the CPU is meant.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if args.out:
        check_report_folder(args.out, args.overwrite)
    dataset = None
    if args.data:
        with accelerator.main_process_first():  # the first fills the cache, the others read it
            dataset = load_splits(args.data, [args.split])[args.split]
    workers = default_workers(accelerator.num_processes) if args.metric_workers is None else args.metric_workers
    if args.model:
        rows, look, about = evaluate_network(args, accelerator, dataset, protocol, workers, options)
    elif accelerator.is_main_process:  # files need no accelerator, and are read by the workers
        rows, look, about = evaluate_files(args, dataset, protocol, workers, options)
    if not accelerator.is_main_process:
        return
    name = printable(args.name or args.model or args.predictions)
    summary = protocol.summarize(rows)
    settings = ", ".join(f"{key} {value}" for key, value in {**options, **about["shown"]}.items())
    truth = f"{args.split} of {args.data}" if args.data else args.truth
    print(f"{name} on {truth}, protocol {protocol.name}: {len(rows)} images, {settings}\n")
    print(format_table(protocol, summary))
    if args.out:
        run = {
            "name": name,
            "data": args.data or args.truth,
            "split": args.split,
            "benchmark": args.benchmark,
            "division_seed": args.division_seed,
            "options": options,
            **about["shown"],
            **about["kept"],
            "limit": args.limit,
            "num_processes": accelerator.num_processes,
            "command": shlex.join(["python", "scripts/evaluate.py", *argv]),
        }
        write_report(args.out, protocol, rows, summary, run, args.format)
        if args.pictures:  # after the numbers, which a picture that cannot be drawn shall not cost
            add_images(args.out, draw_gallery(name, protocol, options, rows, look, args.pictures))
        print(f"\nwrote {args.out}")


def evaluate_network(args, accelerator, dataset, protocol, workers, options):
    if args.limit:
        dataset = dataset.select(range(min(args.limit, len(dataset))))
    segmenter = load(args.model, device=accelerator.device, revision=args.revision)
    rows = evaluate_model(
        segmenter.model,
        segmenter.processor,
        dataset,
        accelerator=accelerator,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        metric_workers=workers,
        protocol=protocol,
        refine=args.refine,
        **options,
    )

    def look(index: int):
        image, mask = dataset[index]["image"], dataset[index]["mask"]
        (probs,) = segmenter.segment([image], refine=args.refine)
        return to_rgb(image), read_truth(np.asarray(to_mask(mask)))[0], probs

    kept = {
        "model": args.model,
        "revision": args.revision,
        "weights": weights_digest(segmenter.model),
        "batch_size": args.batch_size,
        "device": accelerator.device.type,
    }
    return rows, look, {"shown": {"refine": args.refine}, "kept": kept}


def evaluate_files(args, dataset, protocol, workers, options):
    truth = args.truth if dataset is None else dataset
    max_pixels = args.max_pixels or MAX_PIXELS
    folder = PredictionFolder(
        args.predictions, truth, args.truth_suffix, args.images, args.only_matched, max_pixels, args.limit
    )
    rows = folder.evaluate(protocol, workers, **options)
    kept = {
        "predictions": args.predictions,
        "without_truth": folder.without_truth,
        "without_prediction": folder.without_prediction,
    }
    return rows, folder.look, {"shown": counts(rows), "kept": kept}


def table(argv: list[str]):
    parser = argparse.ArgumentParser(
        prog="evaluate.py table", description="Put results beside the papers' figures, a table for each test set."
    )
    parser.add_argument("results", nargs="+", metavar="RESULT", help="results.json, or a folder that holds one")
    parser.add_argument("--format", choices=("markdown", "latex"), default="markdown", help="(markdown)")
    parser.add_argument("--no-papers", action="store_true", help="leave the papers' figures out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of printing")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    args = parser.parse_args(argv)
    if args.out:
        check_free(args.out, args.overwrite)
    tables = make_tables([read_result(path) for path in args.results], with_papers=not args.no_papers)
    text = {"markdown": to_markdown, "latex": to_latex}[args.format](tables)
    if args.out is None:
        print(text)
        return
    with replacing(args.out) as path:
        path.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {args.out}")


def curves(argv: list[str]):
    parser = argparse.ArgumentParser(
        prog="evaluate.py curves",
        description="Draw precision over recall, and F over the threshold, of several results.",
    )
    parser.add_argument("results", nargs="+", metavar="RESULT", help="folder that an evaluation wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="the picture")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() != ".png":
        raise UserError(f"got --out {args.out}, expected a file name that ends in .png")
    check_free(args.out, args.overwrite)
    picture = compare_curves([read_result(path) for path in args.results])
    with replacing(args.out) as path:
        picture.save(path)
    print(f"wrote {args.out}")


def check_free(out: Path, overwrite: bool):
    if is_folder(out):
        raise UserError(f"--out got the folder {out}; give a file")
    if os.path.lexists(out) and not overwrite:
        raise UserError(f"{out} exists; choose another --out, or pass --overwrite to replace it")


def divisions(argv: list[str]):
    parser = argparse.ArgumentParser(
        prog="evaluate.py divisions",
        description="Train and evaluate a recipe on several random divisions of its data set; print mean and deviation "
        "beside the paper's figures. What is finished is kept, so the command can be repeated.",
    )
    parser.add_argument("recipe", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted changes, as data.path=data/bus")
    parser.add_argument("--seeds", nargs="+", type=partial(count, least=0), default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets a folder for each division")
    parser.add_argument("--name", help="what tables call it (the recipe)")
    parser.add_argument(
        "--checkpoint",
        choices=("best", "last"),
        default="best",
        help="best was chosen on the split that is reported, as in SRS's paper; last was not chosen (best)",
    )
    parser.add_argument(
        "--launcher",
        default=sys.executable,
        metavar="COMMAND",
        help="what runs the scripts, such as 'accelerate launch --multi_gpu' (python)",
    )
    args = parser.parse_intermixed_args(argv)
    scripts = Path(__file__).parent
    try:
        launcher = shlex.split(args.launcher)
    except ValueError as error:
        raise UserError(f"cannot read --launcher {args.launcher!r}: {error}") from None
    folders = run_divisions(
        args.recipe,
        load_recipe(args.recipe, args.overrides),
        args.overrides,
        args.seeds,
        args.out,
        train=[*launcher, str(scripts / "train.py")],
        evaluate=[*launcher, str(scripts / "evaluate.py")],
        name=args.name or args.recipe,
        checkpoint=args.checkpoint,
    )
    print(to_markdown(make_tables([read_result(folder) for folder in folders])))


def module(argv: list[str]):
    parser = argparse.ArgumentParser(
        prog="evaluate.py module",
        description="Write a protocol as the files of a Hub Space, for `evaluate.load` without this package.",
    )
    parser.add_argument("protocol", choices=list(PROTOCOLS))
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make; its name is that of the Space")
    args = parser.parse_args(argv)
    print(f"wrote {args.out}: {', '.join(write_metric_space(args.protocol, args.out))}")


COMMANDS = {"table": table, "curves": curves, "divisions": divisions, "module": module}


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
    else:
        evaluate(argv)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    run_main(main)
