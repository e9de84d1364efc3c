"""Send a model, a data set, a metric or a Space to the Hub: whole or not at all.

Needs a token (`hf auth login`, or HF_TOKEN). New repositories are private unless --public. The same command again goes
on where it was cut off.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.utils import logging

from unconceal.hub.push import CARD, Upload, check_references, check_token, push
from unconceal.hub.stage import stage_dataset, stage_metric, stage_model, stage_space
from unconceal.utils.errors import UserError, run_main
from unconceal.utils.files import replacing


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    model = kinds.add_parser("model", help="a checkpoint: weights, code, image processor, pipeline and a card")
    model.add_argument("path", metavar="PATH", help="folder of the checkpoint, such as runs/NAME/segmentation/best")
    model.add_argument("--recipe", metavar="FILE", help="recipe that it was trained by (that of its run)")
    model.add_argument(
        "--results", nargs="+", default=[], metavar="DIR", help="what evaluate.py --out wrote of this model"
    )
    model.add_argument("--license", metavar="ID", help="licence of the weights, as the Hub names it (none stated)")
    model.add_argument("--card", metavar="FILE", help="card to send in place of the generated one")

    dataset = kinds.add_parser("dataset", help="a data set that prepare_data.py made")
    dataset.add_argument("path", metavar="PATH", help="its folder")
    dataset.add_argument("--license", metavar="ID", help="licence of the data, as the Hub names it (that of its card)")
    dataset.add_argument(
        "--may-redistribute",
        action="store_true",
        help="state that the makers allow you to publish a copy, where the card names no open licence",
    )

    metric = kinds.add_parser("metric", help="a protocol, which evaluate.load then opens")
    metric.add_argument("path", metavar="PROTOCOL", help="such as cod")

    space = kinds.add_parser("space", help="a Space's folder")
    space.add_argument("path", metavar="PATH", help="such as space")

    for kind in (model, dataset, metric, space):
        kind.add_argument("repo_id", metavar="OWNER/NAME", help="the repository")
        seen = kind.add_mutually_exclusive_group()
        seen.add_argument("--public", action="store_true", default=None, help="let the world see it")
        seen.add_argument(
            "--private", action="store_false", dest="public", default=None, help="do not (the default when it is new)"
        )
        kind.add_argument("--revision", metavar="BRANCH", help="branch, made if it does not exist (main)")
        kind.add_argument("--tag", help="name to give to what is sent, such as v1.0")
        kind.add_argument("--message", default="Upload by Unconceal", help="of the commit")
        kind.add_argument("--dry-run", action="store_true", help="list what would be sent, and send nothing")
        kind.add_argument(
            "--write-card", type=Path, metavar="FILE", help="with --dry-run: write the card there to look at it"
        )
    return parser


def stage(args: argparse.Namespace, folder: Path) -> Upload:
    if args.kind == "model":
        return stage_model(
            args.path,
            args.repo_id,
            folder,
            recipe=args.recipe,
            results=args.results,
            license=args.license,
            card=args.card,
        )
    if args.kind == "dataset":
        return stage_dataset(
            args.path, args.repo_id, folder, license=args.license, may_redistribute=args.may_redistribute
        )
    if args.kind == "metric":
        return stage_metric(args.path, args.repo_id, folder)
    return stage_space(args.path, args.repo_id)


def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
    if args.write_card and not args.dry_run:
        raise UserError("--write-card goes with --dry-run; without it the card is in the repository")
    if args.write_card and args.write_card.is_dir():
        raise UserError(f"--write-card got the folder {args.write_card}; give a file")
    check_references(revision=args.revision, tag=args.tag)
    if not args.dry_run:
        check_token()
    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        upload = stage(args, Path(folder))
        if args.dry_run:
            for name, path in upload.files.items():
                print(f"{path.stat().st_size:>13,}  {name}")
            seen = {None: "private if it is new", True: "public", False: "private"}[args.public]
            to = f" branch {args.revision}" if args.revision else ""
            tag = f", tag {args.tag}" if args.tag else ""
            print(
                f"would send {len(upload.files)} files, {upload.num_bytes:,} bytes, to the {upload.repo_type} "
                f"{upload.repo_id}{to}, {seen}{tag}"
            )
            if args.write_card:
                with replacing(args.write_card) as beside:
                    beside.write_bytes(upload.files[CARD].read_bytes())  # each kind has one
            return
        done = push(upload, public=args.public, revision=args.revision, tag=args.tag, message=args.message)
    seen = "private" if done.is_private else "public"
    news = "" if done.is_new else "; nothing has changed since"
    print(f"{done.url} ({seen}), commit {done.commit}{news}")
    if done.removed:
        print(f"removed, as they were of an earlier push: {', '.join(done.removed)}")


if __name__ == "__main__":
    run_main(main)
