"""Build a data set from its raw folder, or generate one: `prepare_data.py NAME --help` tells what NAME needs."""

import argparse
import logging
import shlex
import sys

from unconceal.data import BUILDERS, KINDS, build, build_synthetic, otsu_table
from unconceal.utils.errors import UserError, run_main
from unconceal.utils.images import MAX_PIXELS


def parse_shares(text: str) -> tuple[str, float]:
    split, _, share = text.partition("=")
    try:
        return split, float(share)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected SPLIT=SHARE such as train=0.8") from None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")

    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out", required=True, help="folder to make")
    out.add_argument("--seed", type=int, default=0, help="seed of random splits and of generated pictures")
    out.add_argument("--overwrite", action="store_true", help="replace --out where it is a data set built before")

    limit = argparse.ArgumentParser(add_help=False)
    limit.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=f"refuse larger pictures ({MAX_PIXELS})"
    )

    raw = argparse.ArgumentParser(add_help=False, parents=[limit])
    raw.add_argument(
        "--random-split", action="store_true", help="split at random even where official lists or folders exist"
    )
    raw.add_argument(
        "--fractions",
        nargs="+",
        type=parse_shares,
        metavar="SPLIT=SHARE",
        help="split at random with these shares, such as train=0.8 val=0.2",
    )
    raw.add_argument("--skip-unusable", action="store_true", help="leave out unusable pairs instead of stopping")

    for builder in BUILDERS.values():
        one = names.add_parser(
            builder.name, help=builder.title, description=builder.find.__doc__.splitlines()[0], parents=[out, raw]
        )
        one.add_argument("--source", required=builder.name != "folder", help="raw folder")
        if builder.name == "folder":
            one.add_argument("--images", help="folder of images")
            one.add_argument("--masks", help="folder of masks")
            one.add_argument("--list", dest="list_file", help="text file with lines of `image mask`, or of names")
            one.add_argument("--mask-suffix", default="", help="what masks have after the name of the image")

    one = names.add_parser("synthetic", help="generated scenes", parents=[out])
    one.add_argument("--kind", required=True, choices=KINDS)
    one.add_argument("--size", type=int, default=256, help="side in pixels")
    for split in ("train", "val", "test"):
        one.add_argument(f"--{split}", type=int, default=0, metavar="N", help=f"pictures in {split}")
    one.add_argument("--empty-ratio", type=float, default=0.0, help="share of pictures without an object")

    one = names.add_parser("otsu", help="mean IoU that a mere threshold reaches on a built data set", parents=[limit])
    one.add_argument("folder", help="data set that this command built")
    return parser


def main(argv: list[str] | None = None):
    args = vars(make_parser().parse_args(argv))
    command = shlex.join(["python", "scripts/prepare_data.py", *(sys.argv[1:] if argv is None else argv)])
    name = args.pop("name")
    if name == "otsu":
        for (split, source), (iou, count) in otsu_table(**args).items():
            print(f"{split}\t{source}\t{count} pictures\tmean Otsu IoU {iou:.3f}")
        return
    out = args.pop("out")
    if name == "synthetic":
        counts = {split: args.pop(split) for split in ("train", "val", "test")}
        splits = build_synthetic(args.pop("kind"), out, counts, command=command, **args)
    else:
        if name == "folder" and not (args["source"] or args["list_file"] or (args["images"] and args["masks"])):
            raise UserError("nothing to build from; give --images and --masks, --list, or --source")
        args["fractions"] = dict(args["fractions"]) if args["fractions"] else None
        report = build(name, args.pop("source"), out, command=command, **args)
        splits = report.splits
        print(f"splits: {report.split_rule}")
        print(f"left out: {len(report.skipped)} unusable, {len(report.unlisted)} in no list")
        print(
            f"masks: {report.num_changed_masks} changed by the rule, {report.num_resized_masks} resized to their image, "
            f"{report.num_empty_masks} empty"
        )
    print(f"wrote {out}: " + ", ".join(f"{split} {count.num_examples}" for split, count in splits.items()))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    run_main(main)
