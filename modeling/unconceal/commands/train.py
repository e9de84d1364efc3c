"""Train a network from a recipe."""

import argparse
import shlex

from ..utils.arguments import count


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `unconceal train`."""
    parser.description = (
        "Train a network from a recipe. To use several processes, run "
        "`accelerate launch -m unconceal train RECIPE ...`."
    )
    parser.add_argument("recipe", help="YAML file, see configs/")
    settings = "settings to change: data.path=data/sirst"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=settings)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, also within an epoch")
    parser.add_argument("--overwrite", action="store_true", help="discard the run in the output folder")
    seeds = "train once per seed, each on its own random split; print mean and deviation; put it last"
    parser.add_argument("--seeds", nargs="+", type=seed, metavar="N", help=seeds)


def seed(text: str) -> int:
    """Parse a seed. The option takes every word after it."""
    try:
        return count(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; put --seeds last") from error


def run(args: argparse.Namespace):
    """Train every phase of the recipe."""
    from accelerate import PartialState

    from ..training.loop import train
    from ..training.recipe import load_recipe
    from ..training.seeds import summarize_seeds, train_seeds

    recipe = load_recipe(args.recipe, args.overrides)
    command = shlex.join(["unconceal", *args.argv])
    if args.seeds:
        checkpoints = train_seeds(recipe, args.seeds, args.resume, args.overwrite, command)
    else:
        checkpoints = [train(recipe, args.resume, args.overwrite, command)]
    state = PartialState()
    for checkpoint in checkpoints:
        state.print(f"best checkpoint: {checkpoint}")
    if args.seeds:
        state.print(summarize_seeds(checkpoints))
    state.destroy_process_group()
