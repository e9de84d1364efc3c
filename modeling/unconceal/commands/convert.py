"""Convert checkpoints published by a paper's authors."""

import argparse
import os
import shlex
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import replacing


# Help, description, and an example of a file.
ENCODERS = {
    "mscan": (
        "MSCAN of any size: the encoder of OPDS",
        "Convert the encoder of an ImageNet classifier or of a whole SegNeXt. Name the new folder as "
        "phases.segmentation.init_backbone_from in a recipe.",
        "mscan_b.pth",
    ),
    "efficientnet-lite": (
        "EfficientNet-Lite of any size, an encoder for RUN and OPDS",
        "Convert the encoder of an ImageNet classifier. Recipes need no conversion: their init_backbone_from can name "
        "efficientnet-lite0, -lite1 or -lite2.",
        "efficientnet-lite0-57934424.pth",
    ),
}


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `unconceal convert`."""
    parser.description = "Convert checkpoints that a paper's authors published into checkpoints of this project."
    networks = parser.add_subparsers(dest="network", required=True, metavar="NETWORK")
    srs = networks.add_parser(
        "srs",
        help="SRS: the reconstruction network, alone or with the segmentation network that it guides",
        description="Convert the reconstruction network alone, or both networks with --segmentation.",
    )
    srs.add_argument("--reconstruction", required=True, metavar="R.pth", help="published reconstruction network")
    srs.add_argument("--segmentation", metavar="S.pth", help="published segmentation network")
    srs.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    whole = "with --segmentation: folder to make for the whole reconstruction network; --out holds only its encoder"
    srs.add_argument("--reconstruction-out", metavar="DIR", help=whole)
    quirks = (
        "repeat what the authors' code does but their paper does not say: batch statistics in the "
        "reconstruction network at test time, and a second division of the input by 255"
    )
    srs.add_argument("--release-quirks", action="store_true", help=quirks)
    srs.add_argument("--bgr", action="store_true", help="blue channel first, as the authors read the BUS files")
    for name, (about, description, example) in ENCODERS.items():
        one = networks.add_parser(name, help=about, description=description)
        one.add_argument("weights", metavar="FILE", help=f"published weights, such as {example}")
        one.add_argument("--out", required=True, metavar="DIR", help="folder to make")


def run(args: argparse.Namespace):
    """Convert the networks in the arguments."""
    from ..hub.convert import convert_efficientnet_lite, convert_mscan, efficientnet_lite_processor, load_published

    for out in filter(None, (args.out, getattr(args, "reconstruction_out", None))):
        if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
            raise UserError(f"{out} exists and is not an empty folder; choose another or remove it")
    if args.network == "srs":
        _convert_srs(args)
    else:
        published = load_published(args.weights)
        is_mscan = args.network == "mscan"
        encoder, dropped = (convert_mscan if is_mscan else convert_efficientnet_lite)(published)
        _report(args.network, published, dropped)
        _save(args, args.out, [args.weights], encoder, *([] if is_mscan else [efficientnet_lite_processor()]))


def _convert_srs(args: argparse.Namespace):
    from ..hub.convert import convert_srs_reconstruction, convert_srs_segmentation, load_published, srs_processor
    from ..models.configuration_srs import SrsConfig

    if args.reconstruction_out and not args.segmentation:
        advice = "for the reconstruction network alone use --out"
        raise UserError(f"got --reconstruction-out without --segmentation; {advice}")
    if args.reconstruction_out:
        out, other = (Path(os.path.realpath(one)) for one in (args.out, args.reconstruction_out))
        if out.is_relative_to(other) or other.is_relative_to(out):
            got = f"got {args.out} as --out and {args.reconstruction_out} as --reconstruction-out"
            raise UserError(f"{got}, expected two folders, none in the other; choose another")
    config = SrsConfig(reconstruction_batch_statistics=args.release_quirks)
    processor = srs_processor(args.release_quirks, args.bgr)
    published = load_published(args.reconstruction)
    reconstruction, dropped = convert_srs_reconstruction(published, config)
    _report("reconstruction", published, dropped)
    if not args.segmentation:
        _save(args, args.out, [args.reconstruction], reconstruction, processor)
        return
    published = load_published(args.segmentation)
    segmentation, dropped = convert_srs_segmentation(published, reconstruction)
    _report("segmentation", published, dropped)
    if args.reconstruction_out:
        _save(args, args.reconstruction_out, [args.reconstruction], reconstruction, processor)
    _save(args, args.out, [args.reconstruction, args.segmentation], segmentation, processor)


def _save(args: argparse.Namespace, out: str, files: list[str], *parts):
    from ..hub.convert import save_converted

    with replacing(out) as folder:
        save_converted(folder, files, shlex.join(["unconceal", *args.argv]), *parts)
    print(f"wrote {type(parts[0]).__name__} to {out}")


def _report(name: str, published: dict, dropped: list[str]):
    print(f"{name}: {len(published)} tensors read; dropped, because the network never uses them:")
    print("  " + (" ".join(dropped) or "none"))
