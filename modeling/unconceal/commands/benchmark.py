"""Measure what the networks cost: size, time, memory."""

import argparse
import json
import shlex
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

from ..utils.arguments import positive_int
from ..utils.errors import UserError
from ..utils.files import make_folder, replacing
from ..utils.markdown import markdown_table


# Side of the image in pixels, and batch sizes, by default.
DEFAULTS = {
    "srs": (256, (1, 8)),
    "run": (384, (1,)),
    "run-pvtv2-b4": (384, (1,)),
    "opds": (1024, (1,)),
    "opds-single-head": (1024, (1,)),
}
PARTS = ("size", "inference", "training", "operators")
DTYPES = ("float32", "bfloat16", "float16")
# With and without gradient checkpointing.
TASKS = (("inference", False), ("training", False), ("training", True))


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `unconceal benchmark`."""
    parser.description = (
        "Print Markdown tables of size, time and memory. Compare numbers of one run only. Every measurement runs in a "
        "fresh process."
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help=f"some of {', '.join(DEFAULTS)} (srs run opds)")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (all)")
    add("--image-size", type=positive_int, metavar="N", help="side in pixels (srs 256, run 384, opds 1024)")
    add("--batch-sizes", type=positive_int, nargs="+", metavar="N", help="images at once (srs 1 8, others 1)")
    add("--device", default="cpu", help="cpu, cuda, ... (cpu)")
    add("--dtype", default="float32", choices=DTYPES, help="type for autocast (float32)")
    add("--steps", type=positive_int, default=3, metavar="N", help="timed repetitions (3)")
    add("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")


def run(args: argparse.Namespace):
    """Run the parts and print their tables."""
    from ..evaluation.cost import machine
    from ..evaluation.report import git_commit
    from ..utils.devices import choose_device

    models = args.models or ["srs", "run", "opds"]
    for model in models:
        if model not in DEFAULTS:
            raise UserError(f"got the model {model}, expected some of {', '.join(DEFAULTS)}")
    if args.image_size is not None and args.image_size < 128:
        raise UserError(f"got --image-size {args.image_size}, expected at least 128")
    choose_device(args.device)
    if args.json:
        make_folder(args.json.parent)
        if args.json.is_dir():
            raise UserError(f"got the folder {args.json} as --json; give a file")
    report = {
        "command": shlex.join(["unconceal", *args.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        **machine(),
        "dtype": args.dtype,
    }
    print("\n".join(f"- {name}: {value}" for name, value in report.items()))
    sizes = {model: args.image_size or DEFAULTS[model][0] for model in models}
    if "size" in args.only:
        report["size"] = _print_sizes(sizes)
    if {"inference", "training"} & set(args.only):
        report["networks"] = _print_networks(sizes, args)
    if "operators" in args.only:
        report["operators"] = _print_operators(args)
    if args.json:
        with replacing(args.json) as beside:
            beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _print_sizes(sizes: dict[str, int]) -> list[dict]:
    from ..evaluation.cost import count_parts

    def published(value: float | None, unit: str) -> str:
        return "" if value is None else f"{value:g} {unit}"

    rows, report = [], []
    for model, size in sizes.items():
        for part in count_parts(model, size):
            counted = [f"{part.parameters / 1e6:.3f} M", f"{part.multiply_adds / 1e9:.2f} G"]
            # The authors' figures hold for the default size.
            theirs = part.published if size == DEFAULTS[model][0] else (part.published[0], None)
            rows.append([model, part.name, *counted, published(theirs[0], "M"), published(theirs[1], "G")])
            report.append({"model": model, "image_size": size, **vars(part)})
    print("\n## Size\n")
    header = ["network", "part", "parameters", "multiply-adds", "published parameters", "published multiply-adds"]
    print(markdown_table(header, rows))
    return report


def _print_networks(sizes: dict[str, int], args: argparse.Namespace) -> list[dict]:
    from ..evaluation.cost import Measurement, run_measurement

    print("\n## Time and memory\n")
    tasks = [(task, recomputes) for task, recomputes in TASKS if task in args.only]
    rows, results, first = [], [], {}
    for model, size in sizes.items():
        for (task, recomputes), batch_size in product(tasks, args.batch_sizes or DEFAULTS[model][1]):
            case = Measurement(task, model, batch_size, size, recomputes, args.device, args.dtype, args.steps)
            result = run_measurement(case)
            results.append(result)
            name = f"{task}, gradient checkpointing" if recomputes else task
            cells = [model, f"{size}x{size}", name, str(batch_size)]
            if "error" in result:
                rows.append([*cells, result["error"], "", ""])
                continue
            per_image = result["seconds"] / batch_size
            ratio = per_image / first.setdefault((model, task), per_image)
            rows.append([*cells, f"{1000 * per_image:.0f}", f"{ratio:.2f}", f"{result['peak_gib']:.2f} GiB"])
    header = ["network", "image", "task", "batch", "ms/image", "ratio to the first", "peak memory"]
    print(markdown_table(header, rows))
    return results


def _print_operators(args: argparse.Namespace) -> list[dict]:
    from ..evaluation.cost import Measurement, run_measurement

    shared = {"device": args.device, "dtype": args.dtype, "steps": args.steps}
    cases = [Measurement("scan", image_size=side, **shared) for side in (24, 96)]
    cases += [Measurement("dynamic_conv", batch_size=batch_size, **shared) for batch_size in (1, 8)]
    results, rows = [run_measurement(case) for case in cases], []
    for result in results:
        if result["task"] == "scan":
            name = f"selective scan, length {result['image_size'] ** 2}"
        else:
            name = f"dynamic convolution, batch {result['batch_size']}"
        rows.append([name, result.get("error") or f"{result['seconds_ref'] / result['seconds']:.2f}"])
    print("\n## Operators: speed relative to their plain reference\n")
    print(markdown_table(["operator", "times as fast"], rows))
    return results
