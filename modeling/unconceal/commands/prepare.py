"""Build a data set from its raw folder, or generate one."""

import argparse
import shlex

from ..data.sources import SOURCES, SYNTHETIC_KINDS, SYNTHETIC_SPLITS
from ..utils.arguments import FOREGROUND_HELP, class_ids, count, positive_int
from ..utils.images import MAX_PIXELS


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `unconceal prepare`."""
    parser.description = (
        "Build a data set from its raw folder, or generate one, as Parquet files with a card. "
        "`unconceal prepare NAME --help` says what NAME needs."
    )
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")

    for name, source in SOURCES.items():
        one = names.add_parser(name, help=source.title, description=f"{source.title}. Layout: {source.layout}")
        one.add_argument("--source", required=name != "folder", help="raw folder")
        if name == "folder":
            one.add_argument("--images", help="folder of images (default: images)")
            one.add_argument("--masks", help="folder of masks (default: masks)")
            one.add_argument("--list", dest="list_file", help="text file with lines of `image mask`, or of names")
            one.add_argument("--mask-suffix", default="", help="what a mask has after the name of its image")
        if name == "busi":
            one.add_argument("--more", metavar="DIR", help="folder with further cases in images/ and masks/")
        _add_output(one)
        again = "split train and val again at random, even if official lists exist; official test splits stay"
        one.add_argument("--random-split", action="store_true", help=again)
        shares = "split train, and other splits named here, at random with these shares: train=0.8 val=0.2"
        one.add_argument("--fractions", nargs="+", type=_parse_share, metavar="SPLIT=SHARE", help=shares)
        one.add_argument("--foreground", type=class_ids, metavar="IDS", help=FOREGROUND_HELP)
        _add_limits(one, "pairs")

    one = names.add_parser("synthetic", help="generated scenes", description="Generate scenes in which objects hide.")
    one.add_argument("--kind", required=True, choices=SYNTHETIC_KINDS)
    one.add_argument("--empty-ratio", type=float, default=0.0, help="share of images without an object")
    _add_numbers(one)
    _add_output(one)

    one = names.add_parser("camouflage", help="objects hidden in photos", description="Hide objects in your photos.")
    photos = "folders of photos; each is used for equally many images"
    one.add_argument("--photos", nargs="+", required=True, metavar="DIR", help=photos)
    shapes = "folders of masks whose silhouettes are used (default: all are drawn)"
    one.add_argument("--shapes", nargs="+", default=[], metavar="DIR", help=shapes)
    avoid = "folders of masks with the photos' names; few images show what they mark"
    one.add_argument("--avoid", nargs="+", default=[], metavar="DIR", help=avoid)
    _add_numbers(one)
    _add_output(one)
    _add_limits(one, "files")

    one = names.add_parser("composites", help="objects on other scenes", description="Paste objects on other scenes.")
    sets = "data sets whose objects are pasted; each is used for equally many images"
    one.add_argument("--objects", nargs="+", required=True, metavar="DATA", help=sets)
    scenes = "data sets whose photos are scenes, without their objects (default: those of --objects)"
    one.add_argument("--scenes", nargs="+", default=[], metavar="DATA", help=scenes)
    _add_numbers(one)
    _add_output(one)


def _add_numbers(parser: argparse.ArgumentParser):
    parser.add_argument("--size", type=int, default=256, help="side in pixels (default: 256)")
    for split in SYNTHETIC_SPLITS:
        parser.add_argument(f"--{split}", type=count, default=0, metavar="N", help=f"number of images in {split}")


def _add_limits(parser: argparse.ArgumentParser, what: str):
    parser.add_argument("--skip-unusable", action="store_true", help=f"leave out unusable {what} instead of stopping")
    limit = "refuse images of more pixels (default: %(default)s)"
    parser.add_argument("--max-pixels", type=positive_int, default=MAX_PIXELS, metavar="N", help=limit)


def _add_output(parser: argparse.ArgumentParser):
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--seed", type=count, default=0, help="seed of random splits and of generated images")
    again = "replace --out if it is a data set built before, with its card unedited"
    parser.add_argument("--overwrite", action="store_true", help=again)


def _parse_share(text: str) -> tuple[str, float]:
    split, _, share = text.partition("=")
    try:
        return split, float(share)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected SPLIT=SHARE such as train=0.8") from None


def run(args: argparse.Namespace):
    """Build or generate the data set and report what was written."""
    from ..data.builders import build, build_camouflage, build_composites, build_synthetic

    options = vars(args).copy()
    name, out = options.pop("name"), options.pop("out")
    options["command"] = shlex.join(["unconceal", *options.pop("argv")])
    del options["run"]
    generators = {
        "synthetic": (build_synthetic, "kind"),
        "camouflage": (build_camouflage, "photos"),
        "composites": (build_composites, "objects"),
    }
    if name in generators:
        counts = {split: options.pop(split) for split in SYNTHETIC_SPLITS}
        generator, first = generators[name]
        splits = generator(options.pop(first), out, counts, **options)
    else:
        options["fractions"] = dict(options["fractions"]) if options["fractions"] else None
        report = build(name, options.pop("source"), out, **options)
        splits = report.splits
        print(f"splits: {report.split_rule}")
        print(f"left out: {len(report.problems)} unusable, {len(report.unlisted)} in no list")
        print(
            f"masks: {report.num_changed_masks} changed by the rule, "
            f"{report.num_resized_masks} resized to their image, {report.num_empty_masks} empty, "
            f"{len(report.vanished)} of them by the rule"
        )
    print(f"wrote {out}: " + ", ".join(f"{split} {done.num_examples}" for split, done in splits.items()))
