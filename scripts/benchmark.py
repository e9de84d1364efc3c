"""Print what SRS costs, as Markdown: size, speed, memory, and the two forms of its dynamic convolution."""

import argparse
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

from unconceal.benchmark import (
    Case,
    cases_table,
    dynamic_conv_table,
    machine,
    run_case,
    sizes,
    sizes_table,
)
from unconceal.errors import UserError, run_main
from unconceal.files import make_folder, replacing
from unconceal.inference import choose_device
from unconceal.metrics.report import git_commit


PARTS = ("size", "dynamic_conv", "speed", "memory")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--image-size", type=int, default=256, help="side in pixels")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], metavar="N", help="for speed")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of autocast")
    parser.add_argument("--steps", type=int, default=3, help="timed repetitions")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    return parser


def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"--only got {', '.join(sorted(unknown))}; give some of {','.join(PARTS)}")
    if args.image_size < 32 or args.steps < 1 or min(args.batch_sizes) < 1:
        raise UserError("--image-size must be 32 or more, --steps and --batch-sizes 1 or more")
    choose_device(args.device)
    if args.json:  # before the work whose result it shall hold
        make_folder(Path(args.json).parent)
        if Path(args.json).is_dir():
            raise UserError(f"--json got the folder {args.json}; give a file")
    shared = {"image_size": args.image_size, "device": args.device, "dtype": args.dtype, "steps": args.steps}
    report = {
        "command": shlex.join(["python", "scripts/benchmark.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        **machine(),
        **shared,
    }
    print("\n".join(f"- {name}: {value}" for name, value in report.items()))
    if "size" in parts:
        report["size"] = sizes(args.image_size)
        print(f"\n## Size, one picture of {args.image_size}x{args.image_size} (published figures: 256x256)\n")
        print(sizes_table(report["size"]))
        print("\nMultiply-adds of convolutions and matrix products only. The dynamic convolution's identity takes two")
        print("convolutions where the published form takes one and builds its kernel for every picture.")
    if "dynamic_conv" in parts:
        report["dynamic_conv"] = [run_case(Case("dynamic_conv", n, **shared)) for n in args.batch_sizes]
        print("\n## The dynamic convolution's identity against building the kernels of every picture\n")
        print(dynamic_conv_table(report["dynamic_conv"]))
        print("\nAbove 1 the identity is the faster form.")
    if "speed" in parts:
        cases = [Case("inference", n, **shared) for n in args.batch_sizes]
        cases += [Case("training", n, checkpointing=on, **shared) for n in args.batch_sizes for on in (False, True)]
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
    if args.json:
        with replacing(args.json) as path:
            Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
