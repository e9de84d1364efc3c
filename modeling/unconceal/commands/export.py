"""Write a trained network as a file that runs without this package: ONNX, or a program of torch.export.

The folder is laid out as optimum's: model.onnx or model.pt2, config.json, preprocessor_config.json. The network takes
pixel_values (batch, channels, height, width) and gives logits (batch, 1, height, width), of which the sigmoid is the mask;
batch, height and width are free.
"""

import argparse

import torch

from unconceal.api import load
from unconceal.hub.export import FORMATS, LAST_OPSET, LEAST_OPSET, OPSET, check_target, export_model
from unconceal.utils.errors import run_main


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder of the model, or its Hub id")
    parser.add_argument("--format", required=True, metavar="|".join(FORMATS), help="format of the file")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--opset",
        type=int,
        metavar="N",
        help=f"of ONNX, {LEAST_OPSET} to {LAST_OPSET} ({OPSET}, read by most runtimes)",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="height and width that consumers are told to resize pictures to (the processor's)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code kept with the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    parser.add_argument("--no-check", action="store_true", help="do not run the export against the network")
    return parser


def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
    check = not args.no_check
    check_target(args.format, args.out, args.opset, args.overwrite, check)
    segmenter = load(args.model, "cpu", revision=args.revision, trust_remote_code=args.trust_remote_code)
    size = tuple(args.size) if args.size else None
    report = export_model(segmenter, args.format, args.out, args.opset, size, args.overwrite, check)

    dtype = str(report.dtype).removeprefix("torch.")
    kept = "" if report.dtype == torch.float32 else f", from a checkpoint in {dtype}"
    opset = "" if report.opset is None else f", ONNX opset {report.opset}"
    print(f"wrote {report.path}: {report.num_bytes / 1e6:.1f} MB{opset}, float32{kept}")
    if not check:
        print("not checked against the network")
        return
    strays = f", more in {report.stray_share:.2%} of the pixels" if report.stray_share else ""
    print(
        f"largest difference of logits {report.difference:.1e}, allowed {report.tolerance:.1e}{strays} (of the largest "
        "logit, or of 1 where that is less)"
    )
    print(
        f"one picture of {report.size[0]}x{report.size[1]}, single run on {torch.get_num_threads()} thread(s): "
        f"{report.eager_seconds:.3f} s before, {report.exported_seconds:.3f} s exported, "
        f"{report.exported_seconds / report.eager_seconds:.2f} times as long"
    )


if __name__ == "__main__":
    run_main(main)
