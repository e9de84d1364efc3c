"""Turn checkpoints that a paper's authors published into checkpoints of this project."""

import argparse
from pathlib import Path

from unconceal import SrsConfig
from unconceal.hub.convert import (
    convert_mscan,
    convert_srs_reconstruction,
    convert_srs_segmentation,
    load_published,
    srs_processor,
)
from unconceal.utils.errors import UserError, run_main
from unconceal.utils.files import replacing


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    networks = parser.add_subparsers(dest="network", required=True, metavar="NETWORK")
    srs = networks.add_parser(
        "srs",
        help="SRS: reconstruction network alone, or with the segmentation network that it guides",
        description="Convert the reconstruction network alone, or with --segmentation the pair.",
    )
    srs.add_argument("--reconstruction", required=True, metavar="R.pth", help="published reconstruction network")
    srs.add_argument("--segmentation", metavar="S.pth", help="published segmentation network")
    srs.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    srs.add_argument(
        "--reconstruction-out",
        metavar="DIR",
        help="with --segmentation: folder to make for the whole reconstruction network, of which --out holds the encoder",
    )
    srs.add_argument(
        "--release-quirks",
        action="store_true",
        help="repeat what the authors' code does beside its paper: batch statistics in the reconstruction network at "
        "test time, and a second division of the input by 255",
    )
    srs.add_argument("--bgr", action="store_true", help="blue first, as the authors read the BUS files")
    mscan = networks.add_parser(
        "mscan",
        help="MSCAN: the encoder of OPDS, of any size",
        description="Convert the ImageNet classifier's encoder, or that of a whole SegNeXt. Name the folder as "
        "phases.segmentation.init_backbone_from of a recipe.",
    )
    mscan.add_argument("weights", metavar="FILE", help="published weights, such as mscan_b.pth")
    mscan.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    return parser


def check_new(out: str):
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another or remove it")


def save(out: str, *parts):
    """Save a model, and its processor if it has one."""
    with replacing(out) as folder:
        for part in parts:
            part.save_pretrained(folder)
    model = parts[0]
    print(f"wrote {type(model).__name__} to {out}")


def report(name: str, state: dict, dropped: list[str]):
    print(f"{name}: {len(state)} tensors read; dropped, because the network never uses them:")
    print("  " + (" ".join(dropped) or "none"))


def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
    {"srs": convert_srs, "mscan": convert_encoder}[args.network](args)


def convert_encoder(args: argparse.Namespace):
    check_new(args.out)
    published = load_published(args.weights)
    encoder, dropped = convert_mscan(published)
    report("mscan", published, dropped)
    save(args.out, encoder)


def convert_srs(args: argparse.Namespace):
    if args.reconstruction_out and not args.segmentation:
        raise UserError(
            "--reconstruction-out goes with --segmentation; for the reconstruction network alone use --out"
        )
    for out in filter(None, (args.out, args.reconstruction_out)):
        check_new(out)
    config = SrsConfig(reconstruction_batch_statistics=args.release_quirks)
    processor = srs_processor(args.release_quirks, args.bgr)
    published = load_published(args.reconstruction)
    reconstruction, dropped = convert_srs_reconstruction(published, config)
    report("reconstruction", published, dropped)
    if not args.segmentation:
        save(args.out, reconstruction, processor)
        return
    published = load_published(args.segmentation)
    segmentation, dropped = convert_srs_segmentation(published, reconstruction)
    report("segmentation", published, dropped)
    if args.reconstruction_out:
        save(args.reconstruction_out, reconstruction, processor)
    save(args.out, segmentation, processor)


if __name__ == "__main__":
    run_main(main)
