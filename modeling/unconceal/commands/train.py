"""Train a network from a recipe."""

import argparse
import shlex
from typing import TYPE_CHECKING

from ..utils.arguments import count


if TYPE_CHECKING:
    from ..training.recipe import Recipe


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
    trial = "train a few steps of each phase, write nothing, and say how long the whole takes and how much memory"
    parser.add_argument("--dry-run", action="store_true", help=trial)
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
    if args.dry_run:
        print_trial(recipe)
        return
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


def print_trial(recipe: "Recipe"):
    """Try a recipe and print what it would cost."""
    from accelerate import PartialState

    from ..training.trial import try_recipe
    from ..utils.images import size_text
    from ..utils.markdown import markdown_table

    rows = [
        {
            "phase": row["task"],
            "images": str(row["images"]),
            "epochs": str(row["epochs"]),
            "batch": f"{row['batch_size']} of {size_text(row['image_size'])}",
            "images/s": f"{row['images_per_second']:.3g}",
            "hours": f"{row['hours']:.2g}",
            "peak memory": f"{row['peak_gib']:.2f} GiB",
        }
        for row in try_recipe(recipe)
    ]
    state = PartialState()
    state.print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
    state.print("\nThe recipe works. Hours are without evaluations. Nothing was written.")
    state.destroy_process_group()
