"""Print what a network costs, as Markdown: size, speed, memory, and its own operator against a plain reference.

`benchmark.py evaluation` prints what scoring costs: time by the number of workers, and where it goes.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from unconceal.api import choose_device
from unconceal.commands.segment import count
from unconceal.evaluation.mask_files import PredictionFolder
from unconceal.evaluation.protocols import PROTOCOLS
from unconceal.evaluation.report import format_table
from unconceal.evaluation.cost import distance_from_pysodmetrics, make_masks, profile, time_workers
from unconceal.evaluation.report import git_commit
from unconceal.evaluation.timing import (
    ENCODERS,
    Case,
    cases_table,
    machine,
    opds_sizes,
    opds_sizes_table,
    ratios_table,
    resolutions_table,
    run_case,
    run_sizes,
    run_sizes_table,
    srs_sizes,
    srs_sizes_table,
)
from unconceal.utils.errors import UserError, run_main
from unconceal.utils.files import make_folder, replacing
from unconceal.utils.markdown import markdown_table


def srs(parts: list[str], batch_sizes: list[int], shared: dict[str, Any]) -> dict[str, Any]:
    """Print the parts of SRS and return their numbers; `shared` are fields of `Case`."""
    report, image_size = {}, shared["image_size"]
    if "size" in parts:
        report["size"] = srs_sizes(image_size)
        print(f"\n## Size, one picture of {image_size}x{image_size} (published figures: 256x256)\n")
        print(srs_sizes_table(report["size"]))
        print("\nMultiply-adds of convolutions and matrix products only. The dynamic convolution's identity takes two")
        print("convolutions where the published form takes one and builds its kernel for every picture.")
    if "dynamic_conv" in parts:
        report["dynamic_conv"] = [run_case(Case("dynamic_conv", n, **shared)) for n in batch_sizes]
        print("\n## The dynamic convolution's identity against building the kernels of every picture\n")
        print(ratios_table("batch", dict(zip(batch_sizes, report["dynamic_conv"], strict=True))))
        print("\nAbove 1 the identity is the faster form.")
    if "speed" in parts:
        cases = [Case("inference", n, **shared) for n in batch_sizes]
        cases += [Case("training", n, checkpointing=on, **shared) for n in batch_sizes for on in (False, True)]
        report["speed"] = [run_case(case) for case in cases]
        print("\n## Speed of the network alone, phase 2\n")
        print(cases_table(report["speed"]))
    if "memory" in parts:
        # One step reaches the peak: the momentum stands after the warm-up.
        cases = [Case("training", 8, checkpointing=on, **{**shared, "steps": 1}) for on in (False, True)]
        # What the part before has measured is not measured again.
        known = [
            result for result in report.get("speed", ()) if (result["task"], result["batch_size"]) == ("training", 8)
        ]
        report["memory"] = known or [run_case(case) for case in cases]
        print("\n## Memory of training, phase 2, batch 8\n")
        print(cases_table(report["memory"]))
    return report


def run(parts: list[str], batch_sizes: list[int], shared: dict[str, Any]) -> dict[str, Any]:
    """Print the parts of RUN and return their numbers; `shared` are fields of `Case`."""
    report, image_size = {}, shared["image_size"]
    if "size" in parts:
        report["size"] = run_sizes(image_size)
        print(f"\n## Size, one picture of {image_size}x{image_size} (the authors' release: 384x384)\n")
        print(run_sizes_table(report["size"]))
        print(
            "\nMultiply-adds of convolutions, matrix products and scans. A scan takes four for each step, channel and"
        )
        print(
            "state: one is a matrix product, the others are elementwise. It also takes one exponential, not counted."
        )
    if "scan" in parts:
        # The reference takes half a minute for the longest, and the ratios are far from 1: one step tells.
        results = {n: run_case(Case("scan", 1, **{**shared, "image_size": n, "steps": 1})) for n in (24, 48, 96)}
        report["scan"] = list(results.values())
        print("\n## The selective scan against stepping through the sequence, 512 channels of 16 states\n")
        print(ratios_table("length", {side**2: result for side, result in results.items()}))
        print("\nThe reference's backward pass takes time by the square of the length, so longer ones are left out.")
    if "speed" in parts:
        kinds = [("inference", False), ("training", False), ("training", True)]
        cases = [
            Case(task, n, checkpointing=on, model=f"RUN, {encoder}", **shared)
            for task, on in kinds
            for encoder in ENCODERS
            for n in batch_sizes
        ]
        report["speed"] = [run_case(case) for case in cases]
        print("\n## Speed and memory of the network alone\n")
        print(cases_table(report["speed"], by_model=True))
    return report


def opds(parts: list[str], batch_sizes: list[int], shared: dict[str, Any]) -> dict[str, Any]:
    """Print the parts of OPDS and return their numbers; `shared` are fields of `Case`."""
    report, image_size = {}, shared["image_size"]
    if "size" in parts:
        report["size"] = opds_sizes(image_size)
        print(f"\n## Size, one picture of {image_size}x{image_size} (the poster: 1024x1024)\n")
        print(opds_sizes_table(report["size"]))
        print("\nMultiply-adds of convolutions and matrix products, those of the matrix factorisations included.")
    if "resolution" in parts:
        sizes = (image_size // 2, image_size, 2 * image_size)
        dtypes = dict.fromkeys(("float32", "bfloat16", shared["dtype"]))
        cases = [
            Case("inference", 1, **{**shared, "image_size": n, "dtype": t}, model="OPDS")
            for t in dtypes
            for n in sizes
        ]
        report["resolution"] = [run_case(case) for case in cases]
        print("\n## Time and memory of the network alone, one picture\n")
        print(resolutions_table(report["resolution"]))
    if "speed" in parts:
        kinds = [("inference", False), ("training", False), ("training", True)]
        models = ("OPDS", "OPDS, single head")
        cases = [
            Case(task, n, checkpointing=on, model=model, **shared)
            for task, on in kinds
            for model in models
            for n in batch_sizes
        ]
        report["speed"] = [run_case(case) for case in cases]
        print(f"\n## Speed and memory of the network alone, {image_size}x{image_size}\n")
        print(cases_table(report["speed"], by_model=True))
    return report


@dataclass(frozen=True)
class Network:
    """What is measured of a network, and the defaults of the options."""

    function: Callable[[list[str], list[int], dict[str, Any]], dict[str, Any]]
    parts: tuple[str, ...]
    image_size: int
    min_image_size: int
    batch_sizes: tuple[int, ...]
    steps: int


NETWORKS = {
    "srs": Network(
        srs,
        ("size", "dynamic_conv", "speed", "memory"),
        image_size=256,
        min_image_size=32,
        batch_sizes=(1, 8),
        steps=3,
    ),
    # An encoder's batch norm cannot train on a single position, which is what stride 32 leaves of smaller pictures.
    "run": Network(run, ("size", "scan", "speed"), image_size=384, min_image_size=64, batch_sizes=(1,), steps=1),
    "opds": Network(
        opds, ("size", "resolution", "speed"), image_size=1024, min_image_size=128, batch_sizes=(1,), steps=1
    ),
}


def evaluation(argv: list[str]):
    parser = argparse.ArgumentParser(
        prog="benchmark.py evaluation",
        description="Score mask files by the protocol `dis` with different numbers of workers, and compare with pysodmetrics.",
    )
    parser.add_argument("--predictions", metavar="DIR", help="folder of mask files (generated ones)")
    parser.add_argument("--truth", metavar="DIR", help="folder of true masks")
    parser.add_argument(
        "--workers", type=partial(count, least=0), nargs="+", default=[1, 2], metavar="N", help="(1 2)"
    )
    parser.add_argument("--images", type=count, default=8, metavar="N", help="pairs to generate (8)")
    parser.add_argument("--image-size", type=count, nargs=2, default=[1536, 2048], metavar="N", help="(1536 2048)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    args = parser.parse_args(argv)
    if bool(args.predictions) != bool(args.truth):
        raise UserError("give both --predictions and --truth, or neither to generate them")
    check_json(args.json)
    protocol = PROTOCOLS["dis"]
    report = about(["evaluation", *argv])
    with TemporaryDirectory() as generated:
        if not args.predictions:
            make_masks(Path(generated), args.images, tuple(args.image_size))
        folder = PredictionFolder(args.predictions or Path(generated) / "pred", args.truth or Path(generated) / "gt")
        print(f"\n## {len(folder.entries)} pictures by the protocol dis, HCE included\n")
        report["results"], report["workers"] = time_workers(folder, protocol, args.workers)
        print(format_table(protocol, report["results"]), "\n")
        first = report["workers"][0]["seconds"]
        rows = (
            (
                str(each["metric_workers"]),
                f"{each['seconds']:.1f} s",
                f"{first / each['seconds']:.2f}",
                f"{each['peak_gib']:.2f} GiB",
            )
            for each in report["workers"]
        )
        print(markdown_table(["workers", "time", "speed against the first", "peak memory of a worker"], rows))
        report["profile"] = profile(folder, protocol)
        print("\n## Where the time goes, in one process\n")
        rows = ((each["function"], str(each["calls"]), f"{each['share']:.0%}") for each in report["profile"])
        print(markdown_table(["function", "calls", "share of the time"], rows))
        report["distance"] = distance_from_pysodmetrics(folder, protocol)
        print("\n## Distance from pysodmetrics called directly\n")
        print(markdown_table(report["distance"], [(f"{value:.1e}" for value in report["distance"].values())]))
    write_json(args.json, report)


def about(argv: list[str]) -> dict[str, Any]:
    """What to know of a run; printed too."""
    report = {
        "command": shlex.join(["python", "scripts/benchmark.py", *argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        **machine(),
    }
    print("\n".join(f"- {name}: {value}" for name, value in report.items()))
    return report


def check_json(path: str | None):
    """Refuse a file that cannot be written, before the work whose result it shall hold."""
    if path:
        make_folder(Path(path).parent)
        if Path(path).is_dir():
            raise UserError(f"--json got the folder {path}; give a file")


def write_json(path: str | None, report: dict[str, Any]):
    if path:
        with replacing(path) as beside:
            beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def make_parser() -> argparse.ArgumentParser:
    def defaults(name: str) -> str:
        values = ((network, getattr(NETWORKS[network], name)) for network in NETWORKS)
        return "; ".join(
            f"{network}: {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
            for network, value in values
        )

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", default="srs", choices=NETWORKS, help="by default srs")
    parser.add_argument("--only", metavar="PARTS", help=f"some parts, with commas between; {defaults('parts')}")
    parser.add_argument("--image-size", type=int, metavar="N", help=f"side in pixels; {defaults('image_size')}")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", metavar="N", help=f"for speed; {defaults('batch_sizes')}"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of autocast")
    parser.add_argument("--steps", type=int, metavar="N", help=f"timed repetitions; {defaults('steps')}")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    return parser


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["evaluation"]:
        evaluation(argv[1:])
        return
    args = make_parser().parse_args(argv)
    network = NETWORKS[args.network]
    parts = list(network.parts) if args.only is None else args.only.split(",")
    if unknown := set(parts) - set(network.parts):
        raise UserError(f"--only got {', '.join(sorted(unknown))}; give some of {','.join(network.parts)}")
    image_size = network.image_size if args.image_size is None else args.image_size
    batch_sizes = list(network.batch_sizes) if args.batch_sizes is None else args.batch_sizes
    steps = network.steps if args.steps is None else args.steps
    if image_size < network.min_image_size or steps < 1 or min(batch_sizes) < 1:
        raise UserError(
            f"--image-size must be {network.min_image_size} or more, --steps and --batch-sizes 1 or more, "
            f"got {image_size}, {steps} and {' '.join(map(str, batch_sizes))}"
        )
    choose_device(args.device)
    check_json(args.json)
    shared = {"image_size": image_size, "device": args.device, "dtype": args.dtype, "steps": steps}
    report = about(argv)
    report |= shared
    print("\n".join(f"- {name}: {value}" for name, value in shared.items()))
    report |= network.function(parts, batch_sizes, shared)
    write_json(args.json, report)


if __name__ == "__main__":
    run_main(main)
