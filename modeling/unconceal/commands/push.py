"""Send a model, a data set or a Space to the Hub."""

import argparse
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import is_taken, replacing


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `unconceal push`."""
    parser.description = (
        "Send a model, a data set or a Space to the Hub, as one commit: all of it or nothing. "
        "Needs a token (`hf auth login`, or HF_TOKEN). A new repository is private unless --public is given. "
        "If interrupted, rerun the command; uploaded files are skipped."
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    model = kinds.add_parser("model", help="a checkpoint: weights, code, image processor, pipeline and card")
    where = "folder of the checkpoint, such as runs/NAME/segmentation/best, or a name of `unconceal models`"
    model.add_argument("path", metavar="PATH", help=where)
    results = "what `unconceal evaluate --out` wrote for this model"
    model.add_argument("--results", nargs="+", default=[], metavar="DIR", help=results)
    license = "license of the weights, as the Hub names it (default: the one on the card in the repository)"
    model.add_argument("--license", metavar="ID", help=license)
    model.add_argument("--card", metavar="FILE", help="send this card instead of the generated one")

    dataset = kinds.add_parser("dataset", help="a data set that `unconceal prepare` made")
    dataset.add_argument("path", metavar="PATH", help="its folder")
    license = "license of the data, as the Hub names it (default: the one on its card)"
    dataset.add_argument("--license", metavar="ID", help=license)
    allowed = "state that its makers allow you to publish a copy, if the card names no open license"
    dataset.add_argument("--may-redistribute", action="store_true", help=allowed)

    space = kinds.add_parser("space", help="the folder of a Space")
    space.add_argument("path", metavar="PATH", help="such as space")

    for kind in (model, dataset, space):
        kind.add_argument("repo_id", metavar="OWNER/NAME", help="the repository")
        add = kind.add_mutually_exclusive_group().add_argument
        add("--public", action="store_true", default=None, help="let everybody see it")
        add("--private", action="store_false", dest="public", default=None, help="hide it (default if it is new)")
        kind.add_argument("--revision", metavar="BRANCH", help="branch, created if missing (default: main)")
        kind.add_argument("--tag", help="name for this commit, such as v1.0")
        kind.add_argument("--message", default="Upload by Unconceal", help="commit message")
        kind.add_argument("--dry-run", action="store_true", help="list the files, send nothing")
        card = "with --dry-run: write the card to this new file"
        kind.add_argument("--write-card", type=Path, metavar="FILE", help=card)


def run(args: argparse.Namespace):
    """Stage the upload, then list it or send it."""
    from tempfile import TemporaryDirectory

    from huggingface_hub.errors import HTTPError
    from transformers.utils import logging

    from ..hub.push import CARD, check_card, check_names, check_token, push, read_card

    if args.write_card and not args.dry_run:
        raise UserError("got --write-card without --dry-run; add --dry-run, or read the card in the repository")
    if args.write_card and args.write_card.is_dir():
        raise UserError(f"got the folder {args.write_card} for --write-card, expected a file; name one")
    if args.write_card and is_taken(args.write_card):
        raise UserError(f"{args.write_card} exists, so --write-card does not write it; name a new file, or remove it")
    check_names(args.repo_id, args.revision, args.tag)
    if not args.dry_run:
        check_token()
    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        # A dry run needs no repository. The Hub is asked only about the card and what it links to.
        asks = not args.dry_run and args.kind != "space"
        present = read_card(args.repo_id, args.kind, args.revision) if asks else None
        upload = _stage(args, Path(folder), present)
        if not args.dry_run:
            print(push(upload, args.message, args.public, args.revision, args.tag))
            return
        try:
            check_card(upload)
        except (HTTPError, OSError):
            print("the Hub could not be asked whether it accepts the card")
        _print_files(args, upload)
        if args.write_card:
            with replacing(args.write_card) as file:
                file.write_bytes(upload.files[CARD].read_bytes())


def _stage(args: argparse.Namespace, folder: Path, present: str | None):
    from ..hub.stage import stage_dataset, stage_model, stage_space

    if args.kind == "model":
        return stage_model(args.path, args.repo_id, folder, args.results, args.license, args.card, present)
    if args.kind == "dataset":
        return stage_dataset(args.path, args.repo_id, folder, args.license, args.may_redistribute, present)
    return stage_space(args.path, args.repo_id)


def _print_files(args: argparse.Namespace, upload):
    sizes = {name: path.stat().st_size for name, path in upload.files.items()}
    for name, size in sizes.items():
        print(f"{size:>13,}  {name}")
    visibility = {None: "private if it is new", True: "public", False: "private"}[args.public]
    branch = f" branch {args.revision}" if args.revision else ""
    tag = f", tag {args.tag}" if args.tag else ""
    print(
        f"would send {len(sizes)} files, {sum(sizes.values()):,} bytes, to the {upload.repo_type} "
        f"{upload.repo_id}{branch}, {visibility}{tag}"
    )
