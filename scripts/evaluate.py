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
    check_report_folder,
    evaluate_model,
    format_table,
    summarize,
    write_report,
)


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
    parser.add_argument("--threshold", type=probability, default=0.5, help="soft mask above which a pixel is object")
    parser.add_argument("--limit", type=count, metavar="N", help="score the first N pictures only")
    return parser


def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
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
        threshold=args.threshold,
    )
    if not accelerator.is_main_process:
        return
    summary = summarize(rows)
    print(f"{args.model} on {args.split} of {args.data}: {len(rows)} images, threshold {args.threshold}\n")
    print(format_table(summary))
    if args.out:
        run = {
            "model": args.model,
            "data": args.data,
            "split": args.split,
            "threshold": args.threshold,
            "limit": args.limit,
            "batch_size": args.batch_size,
            "num_processes": accelerator.num_processes,
            "device": accelerator.device.type,
            "command": shlex.join(["python", "scripts/evaluate.py", *(sys.argv[1:] if argv is None else argv)]),
        }
        write_report(args.out, rows, summary, run)
        print(f"\nwrote {args.out}")


if __name__ == "__main__":
    run_main(main)
