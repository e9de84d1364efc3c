"""Score a model or mask files; compare results."""

import argparse
import logging
import math
import os
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.arguments import FOREGROUND_HELP, class_ids, count, positive_int, probability
from ..utils.errors import UserError
from ..utils.files import is_folder, is_taken, printable, replacing
from ..utils.images import MAX_PIXELS
from .explain import is_sheet, save_sheet
from .segment import MODEL_HELP, REFINE


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# A test compares these with the modules that define them, which are slow to import.
PROTOCOL_NAMES = ("segmentation", "cod", "dis", "infrared", "lesion")
BENCHMARK_NAMES = (
    *("CHAMELEON", "CAMO", "COD10K", "NC4K"),
    *("DIS-VD", "DIS-TE1", "DIS-TE2", "DIS-TE3", "DIS-TE4"),
    *("BUS", "KBT"),
)
PER_IMAGE_FORMATS = ("csv", "parquet")
OPTIONS = ("threshold", "min_max", "hce", "max_distance", "by_area")


def pixels(text: str) -> float:
    """Parse a distance above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected more than 0")
    return value


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `unconceal evaluate`."""
    parser.usage = (
        f"{parser.prog} --model PATH_OR_ID --data PATH_OR_ID --split NAME [options]\n"
        f"       {parser.prog} --model PATH_OR_ID --images DIR --truth DIR [options]\n"
        f"       {parser.prog} --predictions DIR --truth DIR [options]\n"
        f"       {parser.prog} {{table,curves}} RESULT [RESULT ...] [options]"
    )
    parser.description = (
        "Score a segmentation model on one split of a data set, or mask files of any method against ground truth. "
        "Several accelerators: accelerate launch -m unconceal evaluate ... "
        "Several CPU processes: torchrun --nproc-per-node N -m unconceal evaluate ..."
    )
    add = parser.add_argument_group("what is scored").add_argument
    add("--model", metavar="PATH_OR_ID", help=MODEL_HELP)
    add("--revision", help="branch, tag or commit of the model on the Hub")
    add("--predictions", metavar="DIR", help="folder of mask files, named like the ground truth masks or the images")
    add("--data", metavar="PATH_OR_ID", help="folder of the data set, or its Hub id")
    add("--split", metavar="NAME", help="split to score, such as val or test")
    seed = "split the images of --train-split and --split again at random, as unconceal train --seeds N does"
    add("--split-seed", type=count, metavar="N", help=f"{seed}; with --truth, only record N")
    add("--division-seed", type=int, help=argparse.SUPPRESS)  # older name: N is only recorded
    train_split = "with --split-seed: the recipe's training split (that of the run, or train)"
    add("--train-split", metavar="NAME", help=train_split)
    add("--truth", metavar="DIR", help="instead of --data: folder of ground truth masks")
    suffix = "text after the name in ground truth files, such as _pixels0"
    add("--truth-suffix", default="", metavar="TEXT", help=suffix)
    images = "with --truth: folder of the images, which a model needs and sheets show"
    add("--images", metavar="DIR", help=images)
    add("--only-matched", action="store_true", help="skip files without ground truth, and the reverse")
    add("--limit", type=positive_int, metavar="N", help="score only the first N images")
    refine = "predict the edges of large images again, as unconceal segment does; papers do not (never)"
    add("--refine", choices=REFINE, default="never", help=refine)
    add("--foreground", type=class_ids, metavar="IDS", help=f"with --predictions and --truth, {FOREGROUND_HELP}")
    larger = f"with --predictions: refuse larger files ({MAX_PIXELS})"
    add("--max-pixels", type=positive_int, metavar="N", help=larger)

    add = parser.add_argument_group("report").add_argument
    add("--out", metavar="DIR", help="folder for results.json, curves and the numbers of each image")
    add("--overwrite", action="store_true", help="replace the results in --out")
    add("--format", choices=PER_IMAGE_FORMATS, default="csv", help="format of the numbers of each image (csv)")
    sheets = "also draw the curves, and sheets of N samples, the N best and the N worst images (N up to 50)"
    add("--sheets", type=int, choices=range(1, 51), metavar="N", help=sheets)
    add("--pictures", dest="sheets", type=int, choices=range(1, 51), help=argparse.SUPPRESS)  # older name
    add("--name", help="name in tables (the model, or the folder of predictions)")
    benchmark = "test set in the papers' tables (known from the data set's sources)"
    add("--benchmark", choices=BENCHMARK_NAMES, help=benchmark)

    add = parser.add_argument_group("work").add_argument
    add("--batch-size", type=positive_int, default=8, metavar="N", help="images in a forward pass (8)")
    add("--dtype", help="float32, bfloat16 or float16 (as saved)")
    add("--num-workers", type=count, default=0, metavar="N", help="loader processes for each device (0)")
    workers = "scoring processes per device, next to the forward pass (one per core, at most 8; 0: none)"
    add("--metric-workers", type=count, metavar="N", help=workers)

    add = parser.add_argument_group("how it is scored").add_argument
    add("--protocol", choices=PROTOCOL_NAMES, default="segmentation", help="protocol (segmentation)")
    threshold = "segmentation, infrared, lesion: a pixel is object if the soft mask is above this (0.5)"
    add("--threshold", type=probability, help=threshold)
    yes_or_no = argparse.BooleanOptionalAction
    min_max = "cod, dis: stretch each prediction to [0, 1] and round it to 8 bits before scoring (yes)"
    add("--min-max", action=yes_or_no, help=min_max)
    hce = "dis: compute the human correction effort; takes seconds per large image (yes)"
    add("--hce", action=yes_or_no, help=hce)
    distance = "infrared: a detection counts if it is closer than this to its target (3)"
    add("--max-distance", type=pixels, metavar="PIXELS", help=distance)
    by_area = "infrared: find false alarms by their area, with the flaw of the field's common code (no)"
    add("--by-area", action=yes_or_no, help=by_area)

    subparsers = parser.add_subparsers(title="compare results", prog=parser.prog, metavar="table|curves")
    parts = {}
    for name, text in (
        ("table", "print results next to the papers' figures, in a Markdown table for each test set"),
        ("curves", "draw the curves of results into one image: precision over recall, F over the threshold"),
    ):
        part = parts[name] = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        part.add_argument("results", nargs="+", metavar="RESULT", help="folder of a report, or its results.json")
        part.add_argument("--overwrite", action="store_true", help="replace --out")
    parts["table"].add_argument("--no-papers", action="store_true", help="leave out the papers' figures")
    parts["table"].add_argument("--out", type=Path, metavar="FILE", help="write to this file instead of printing")
    parts["table"].set_defaults(run=run_table)
    parts["curves"].add_argument("--out", required=True, type=Path, metavar="FILE.png", help="image file to write")
    parts["curves"].set_defaults(run=run_curves)


def run(args: argparse.Namespace):
    """Score a model or mask files."""
    check(args)
    import torch
    from accelerate import Accelerator

    from ..evaluation.protocols import PROTOCOLS
    from ..evaluation.report import IMAGE_FILES, add_images, check_report_folder, format_table, write_report
    from ..evaluation.workers import default_workers

    protocol = PROTOCOLS[args.protocol]
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    try:
        options = protocol.options(**{**protocol.report_options, **given})
    except ValueError as error:
        raise UserError(str(error)) from error
    # Without an accelerator, Accelerate needs `cpu` to recognize several processes.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    images = IMAGE_FILES if args.sheets else ()
    if args.out:
        check_report_folder(args.out, args.overwrite, images)
    dataset, unmatched = None, {}
    if args.model and args.images:
        from ..data.loading import load_folders

        folders = (args.images, args.truth, args.truth_suffix, args.only_matched)
        dataset, unmatched["unmatched"] = load_folders(*folders)
    elif args.data:
        with accelerator.main_process_first():  # the first fills the cache, the others read it
            dataset = open_split(args)
        if args.model and accelerator.is_main_process:
            say_trained_on(args)
    workers = default_workers(accelerator.num_processes) if args.metric_workers is None else args.metric_workers
    if args.model:
        rows, load_example, shown, kept = evaluate_network(args, accelerator, dataset, protocol, workers, options)
    elif accelerator.is_main_process:  # the metric workers read the files, without an accelerator
        rows, load_example, shown, kept = evaluate_files(args, dataset, protocol, workers, options)
    if not accelerator.is_main_process:
        return
    name = printable(args.name or args.model or args.predictions)
    summary = protocol.summarize(rows)
    settings = ", ".join(f"{key} {value}" for key, value in {**options, **shown}.items())
    truth = f"{args.split} of {args.data}" if args.data else args.truth
    print(f"{name} on {truth}, protocol {protocol.name}: {len(rows)} images, {settings}\n")
    print(format_table(protocol, summary))
    if args.out:
        record = {
            "name": name,
            "data": args.data or args.truth,
            "split": args.split,
            "benchmark": args.benchmark,
            "division_seed": args.division_seed if args.split_seed is None else args.split_seed,
            "options": options,
            **shown,
            **kept,
            **unmatched,
            "limit": args.limit,
            "num_processes": accelerator.num_processes,
            "command": shlex.join(["unconceal", *args.argv]),
        }
        if args.data and args.split_seed is not None:
            record["train_split"] = args.train_split
        write_report(args.out, protocol, rows, summary, record, args.format, images)
        if args.sheets:  # after the numbers, which a failure to draw must not lose
            from ..drawing.gallery import draw_gallery

            add_images(args.out, draw_gallery(name, protocol, options, rows, load_example, args.sheets))
        print(f"\nwrote {args.out}")


def open_split(args: argparse.Namespace) -> "Dataset":
    """Open the split to score; with --split-seed as training splits the data."""
    from ..data.loading import load_splits
    from ..data.sources import TEST_SPLITS
    from ..data.splits import split_datasets_at_random

    if args.split_seed is None:
        return load_splits(args.data, [args.split])[args.split]
    if args.split in TEST_SPLITS:
        got = f"got --split-seed {args.split_seed} for {args.split}, a test split"
        raise UserError(f"{got}, which no training splits again; leave --split-seed out")
    splits = load_splits(args.data, [args.train_split, args.split])
    return split_datasets_at_random(splits, args.split_seed)[args.split]


def say_trained_on(args: argparse.Namespace):
    """Log if training has seen images that are scored."""
    from ..training.checkpoints import read_record, trained_on

    with suppress(UserError):  # a damaged record does not change the scores
        record = read_record(args.model) if is_folder(args.model) else None
        if seen := trained_on(record, args.data, args.split, args.split_seed):
            logger.warning("%s; these scores tell little of new images", seen)


def check(args: argparse.Namespace):
    """Check that the options fit together; complete --train-split."""

    def flag(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    if bool(args.model) == bool(args.predictions):
        raise UserError(
            f"got {'both --model and' if args.model else 'neither --model nor'} --predictions, expected one of them; "
            "give --model with --data and --split, or --predictions with --truth"
        )
    folders = args.model and args.images and args.truth
    if args.data if folders else (args.model and not args.data or bool(args.data) != bool(args.split)):
        raise UserError("give --data and --split: the data set, and the split to score; or --images and --truth")
    if args.predictions and bool(args.truth) == bool(args.data):
        raise UserError("--predictions needs ground truth: give --truth DIR, or --data and --split")
    if args.predictions and args.refine != "never":
        raise UserError("--refine is for --model: files are scored unchanged; leave it out")
    for_files = ("truth", "truth_suffix", "images", "only_matched")
    is_split_again = args.data and args.split_seed is not None
    for applies, names, rule in (
        (args.model, ("revision", "dtype"), "is for --model; leave it out"),
        (
            args.predictions or folders,
            for_files,
            "is for --predictions, or for --model with both --images and --truth",
        ),
        (args.predictions, ("max_pixels",), "is for --predictions; leave it out"),
        (args.truth, ("truth_suffix", "images"), "is for --truth; the data set has its own names and images"),
        (args.predictions and args.truth, ("foreground",), "is for --predictions with --truth; prepare the masks"),
        (args.sheets or args.model, ("images",), "is for --sheets N; add --sheets, or leave --images out"),
        (args.out, ("sheets",), "needs a folder for the sheets; give --out"),
        (is_split_again, ("train_split",), "is for --data with --split-seed; add --split-seed, or leave it out"),
    ):
        for name in names:
            if getattr(args, name) and not applies:
                raise UserError(f"{flag(name)} {rule}")
    if is_split_again:
        args.train_split = find_train_split(args)
    if is_split_again and args.split == args.train_split:
        raise UserError(f"got {args.split} as --split and as --train-split; give the recipe's eval_split as --split")
    if args.out and args.predictions and os.path.realpath(args.out) == os.path.realpath(args.predictions):
        raise UserError(f"got {args.out} as --predictions and as --out; choose another folder for the results")
    if args.sheets:
        from ..drawing.sheets import check_plots

        check_plots()


def find_train_split(args: argparse.Namespace) -> str:
    """Return the training split for --split-seed.

    If the checkpoint lies in a run, the run's recipe names it.

    Raises:
        UserError: If the run was trained with other splits or another seed.
    """
    from ..training.checkpoints import RECIPE_FILE

    # A run is RUN/recipe.yaml and RUN/PHASE/{best,last}.
    file = Path(args.model or "").resolve().parent.parent / RECIPE_FILE
    if not args.model or not is_folder(args.model) or not file.is_file():
        return args.train_split or "train"
    from ..training.recipe import read_data_recipe

    data = read_data_recipe(file)
    if data.split_seed is None:
        raise UserError(f"got --split-seed {args.split_seed}, but {file} has no split_seed; leave --split-seed out")
    for option, got, expected in (
        ("--split-seed", args.split_seed, data.split_seed),
        ("--split", args.split, data.eval_split),
        ("--train-split", args.train_split or data.train_split, data.train_split),
    ):
        if got != expected:
            raise UserError(f"got {option} {got}, but {file} has {expected}; give {option} {expected}")
    return data.train_split


def evaluate_network(args, accelerator, dataset, protocol, workers, options):
    """Score a model; return rows, example loader, facts to print and keep."""
    from PIL import Image

    from ..api import load, weights_digest
    from ..data.loading import only_value, read_pair
    from ..data.masks import is_object
    from ..evaluation.networks import evaluate_model

    if accelerator.is_main_process and (problem := only_value(dataset)):
        logger.warning("%s, so the scores say little; check the data", problem)
    if args.limit:
        dataset = dataset.select(range(min(args.limit, len(dataset))))
    segmenter = load(args.model, accelerator.device, args.dtype, args.revision)
    from_folders = bool(args.images)
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
        resize_masks=from_folders,
        dtype=segmenter.dtype,
        **options,
    )

    def load_example(index: int):
        _, image, mask = read_pair(dataset, index)
        if from_folders:
            mask = mask.resize(image.size, Image.Resampling.NEAREST)
        return image, is_object(mask), segmenter.segment(image, refine=args.refine)

    kept = {
        "model": args.model,
        "revision": args.revision,
        "weights": weights_digest(segmenter.model),
        "dtype": str(segmenter.network.dtype).removeprefix("torch."),
        "batch_size": args.batch_size,
        "device": accelerator.device.type,
    }
    shown = {"refine": args.refine}
    if from_folders:
        shown["num_mask_resized"] = sum(row["mask_resized"] for row in rows)
    return rows, load_example, shown, kept


def evaluate_files(args, dataset, protocol, workers, options):
    """Score mask files; return the same as `evaluate_network`."""
    from ..evaluation.mask_files import PredictionFolder

    truth = args.truth if dataset is None else dataset
    max_pixels = args.max_pixels or MAX_PIXELS
    files = (args.predictions, truth, args.truth_suffix, args.images)
    folder = PredictionFolder(*files, args.only_matched, max_pixels, args.limit, args.foreground)
    rows = folder.evaluate(protocol, workers, **options)
    changes = {f"num_{name}": sum(row[name] for row in rows) for name in ("converted", "resized", "mask_changed")}
    unmatched = {"without_truth": folder.without_truth, "without_prediction": folder.without_prediction}
    return rows, folder.load_example, changes, {"predictions": args.predictions, **unmatched}


def run_table(args: argparse.Namespace):
    """Print results next to the papers' figures."""
    check_free(args, "table", _is_table)
    from ..evaluation.tables import make_tables, read_result, to_markdown

    text = to_markdown(make_tables(map(read_result, args.results), with_papers=not args.no_papers))
    if args.out is None:
        print(text)
        return
    with replacing(args.out) as path:
        path.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {args.out}")


def run_curves(args: argparse.Namespace):
    """Draw the curves of results into one image."""
    if args.out.suffix.lower() != ".png":
        raise UserError(f"got --out {args.out}, expected a file name that ends in .png; rename it")
    check_free(args, "curves", is_sheet)
    from ..drawing.gallery import compare_curves
    from ..evaluation.tables import read_result

    save_sheet(compare_curves([read_result(path) for path in args.results]), args.out)
    print(f"wrote {args.out}")


def _is_table(path: Path) -> bool:
    """Return whether a file holds what `to_markdown` writes, and no more."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return text.startswith("### ") and text.rstrip().rpartition("\n")[2].startswith("Measured: ")


def check_free(args: argparse.Namespace, word: str, is_ours: Callable[[Path], bool]):
    """Check that options stand last and --out is free or ours."""
    if args.argv[1] != word:  # argparse drops an --out before it
        raise UserError(f"got {args.argv[1]} before `{word}`, expected options after it; put them after `{word}`")
    if args.out is None:
        return
    if is_folder(args.out):
        raise UserError(f"got the folder {args.out} as --out, expected a file; add a file name")
    if is_taken(args.out) and not args.overwrite:
        raise UserError(f"{args.out} exists; choose another --out, or pass --overwrite to replace it")
    if is_taken(args.out) and not is_ours(args.out):
        raise UserError(f"{args.out} is no file of this command, so it is not replaced; choose another --out")
