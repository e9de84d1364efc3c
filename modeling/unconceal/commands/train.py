"""Train a network from a recipe."""

import argparse


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `unconceal train`."""
    parser.description = "Train a network from a recipe. Several processes: accelerate launch -m unconceal train ..."
    parser.add_argument("recipe", help="YAML file, see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, as data.path=data/sirst"
    )
    parser.add_argument("--resume", action="store_true", help="continue after the last finished epoch, or start")
    parser.add_argument("--overwrite", action="store_true", help="discard the run in the output folder")


def run(args: argparse.Namespace):
    """Train every phase of the recipe."""
    from accelerate import PartialState

    from ..training import load_recipe, train

    best = train(load_recipe(args.recipe, args.overrides), resume=args.resume, overwrite=args.overwrite)
    PartialState().print(f"best checkpoint: {best}")
