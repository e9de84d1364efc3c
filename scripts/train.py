"""Train a network by a recipe: `accelerate launch scripts/train.py configs/srs/smoke.yaml data.path=data/synthetic`."""

import argparse

from accelerate import PartialState

from unconceal.errors import run_main
from unconceal.training import load_recipe, train


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted changes, as data.path=data/sirst")
    parser.add_argument("--resume", action="store_true", help="go on after the last finished epoch, or start")
    parser.add_argument("--overwrite", action="store_true", help="discard the run in the output folder")
    args = parser.parse_intermixed_args(argv)  # options may stand anywhere
    best = train(load_recipe(args.recipe, args.overrides), resume=args.resume, overwrite=args.overwrite)
    PartialState().print(f"best checkpoint: {best}")
    return 0


if __name__ == "__main__":
    run_main(main)
