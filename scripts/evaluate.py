"""Score a segmentation model on one split of a data set.

Runs as it is; on several accelerators by `accelerate launch`, in several CPU processes by `torchrun --nproc-per-node N`.
"""

import argparse
import shlex
import sys
from functools import partial

import torch
from accelerate import Accelerator

from unconceal.cli import count, probability
from unconceal.data.loading import load_splits
from unconceal.errors import run_main
from unconceal.inference import load
from unconceal.metrics import (
    PROTOCOLS,
    check_report_folder,
    evaluate_model,
    write_report,
)
from unconceal.refine import REFINE


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="folder of the model, or its Hub id")
    parser.add_argument("--data", required=True, metavar="PATH_OR_ID", help="folder of the data set, or its Hub id")
    parser.add_argument("--split", required=True, help="split to score, such as val or test")
    parser.add_argument("--out", metavar="DIR", help="folder for per_image.csv and results.json")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in --out")
    parser.add_argument("--batch-size", type=count, default=8, metavar="N", help="pictures at a time")
    parser.add_argument(
        "--num-workers", type=partial(count, least=0), default=0, metavar="N", help="loader processes for each device"
    )
    parser.add_argument("--limit", type=count, metavar="N", help="score the first N pictures only")
    parser.add_argument(
        "--protocol", choices=list(PROTOCOLS), default="segmentation", help="how to score (segmentation)"
    )
    parser.add_argument(
        "--refine",
        choices=REFINE,
        default="never",
        help="look at the edges of large pictures again, as `unconceal segment` does; papers do not (never)",
    )
    options = parser.add_argument_group("options of the protocols")
    options.add_argument(
        "--threshold", type=probability, help="segmentation: soft mask above which a pixel is object (0.5)"
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
    return parser


def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
    protocol = PROTOCOLS[args.protocol]
    given = {"threshold": args.threshold, "min_max": args.min_max, "hce": args.hce}
    given = {name: value for name, value in given.items() if value is not None}
    options = protocol.options(**{**protocol.report_options, **given})
    # Accelerate takes several processes without an accelerator for one unless told that the CPU is meant.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if args.out:
        check_report_folder(args.out, args.overwrite)
    with accelerator.main_process_first():  # the first fills the cache, the others read it
        dataset = load_splits(args.data, [args.split])[args.split]
    if args.limit:
        dataset = dataset.select(range(min(args.limit, len(dataset))))
    segmenter = load(args.model, device=accelerator.device)
    rows = evaluate_model(
        segmenter.model,
        segmenter.processor,
        dataset,
        accelerator=accelerator,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        protocol=protocol,
        refine=args.refine,
        **options,
    )
    if not accelerator.is_main_process:
        return
    summary = protocol.summarize(rows)
    settings = ", ".join(f"{name} {value}" for name, value in {**options, "refine": args.refine}.items())
    print(f"{args.model} on {args.split} of {args.data}, protocol {protocol.name}: {len(rows)} images, {settings}\n")
    print(protocol.format_table(summary))
    if args.out:
        run = {
            "model": args.model,
            "data": args.data,
            "split": args.split,
            **options,
            "refine": args.refine,
            "limit": args.limit,
            "batch_size": args.batch_size,
            "num_processes": accelerator.num_processes,
            "device": accelerator.device.type,
            "command": shlex.join(["python", "scripts/evaluate.py", *(sys.argv[1:] if argv is None else argv)]),
        }
        write_report(args.out, protocol, rows, summary, run)
        print(f"\nwrote {args.out}")


if __name__ == "__main__":
    run_main(main)
