"""Write a trained network as ONNX or as a program of torch.export."""

import argparse

from ..hub.formats import FORMATS, LAST_OPSET, LEAST_OPSET, OPSET
from .segment import MODEL_HELP


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `unconceal export`."""
    parser.description = (
        "Write a trained network as a file that runs without this package. The folder has the layout of optimum: "
        "model.onnx or model.pt2, config.json, preprocessor_config.json. "
        "Input: pixel_values (batch, channels, height, width). Output: logits (batch, 1, height, width); their "
        "sigmoid is the mask. Batch, height and width are free."
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL_HELP)
    add("--format", required=True, metavar="|".join(FORMATS), help="format of the file")
    add("--out", required=True, metavar="DIR", help="folder to make")
    opset = f"operator set of ONNX, {LEAST_OPSET} to {LAST_OPSET} (default: {OPSET}, which most runtimes read)"
    add("--opset", type=int, metavar="N", help=opset)
    size = "height and width to which users of the file should resize images (default: the processor's)"
    add("--size", type=int, nargs=2, metavar=("H", "W"), help=size)
    add("--revision", help="branch, tag or commit of the model on the Hub")
    add("--trust-remote-code", action="store_true", help="run the code kept with the checkpoint")
    add("--overwrite", action="store_true", help="replace an earlier export in --out")
    add("--no-check", action="store_true", help="do not compare the export with the network")


def run(args: argparse.Namespace):
    """Export the model, and report how far its logits differ."""
    import torch

    from ..api import load
    from ..hub.export import check_target, export_model
    from ..hub.exported import refuse_exported
    from ..utils.images import size_text

    check = not args.no_check
    check_target(args.format, args.out, args.opset, args.overwrite, check)
    refuse_exported(args.model, "unconceal export")
    segmenter = load(args.model, "cpu", revision=args.revision, trust_remote_code=args.trust_remote_code)
    report = export_model(segmenter, args.format, args.out, args.opset, args.size, args.overwrite, check)
    dtype = str(segmenter.model.dtype).removeprefix("torch.")
    source = "" if dtype == "float32" else f", from a checkpoint in {dtype}"
    opset = "" if report.opset is None else f", ONNX opset {report.opset}"
    print(f"wrote {report.path}: {report.num_bytes / 1e6:.1f} MB{opset}, float32{source}")
    if not check:
        print("not compared with the network")
        return
    strays = f"; {report.stray_share:.2%} of the pixels differ by more" if report.stray_share else ""
    print(
        f"largest difference of logits: {report.difference:.1e}, allowed {report.tolerance:.1e}{strays} "
        "(relative to the largest logit, or to 1 if that is larger)"
    )
    print(
        f"one image of {size_text(report.size[::-1])}, single run on {torch.get_num_threads()} thread(s): "
        f"{report.eager_seconds:.3f} s in PyTorch, {report.exported_seconds:.3f} s exported "
        f"({report.exported_seconds / report.eager_seconds:.2f} times)"
    )
