"""Make a shipped network: pretrained/NAME out of a training run."""

import argparse
import sys
from pathlib import Path


# Python puts this folder on the path, where evaluate.py would hide the library `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from unconceal.utils.errors import run_main  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder that `unconceal train` wrote")
    parser.add_argument("name", metavar="NAME", help="name in modeling/unconceal/hub/shipped.yaml, such as polyp")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="checkpoint (RUN_DIR/segmentation/best)")
    results = "more results for the card, which `unconceal evaluate --model NAME --out` wrote"
    parser.add_argument("--results", type=Path, nargs="+", default=[], metavar="DIR", help=results)
    args = parser.parse_args()

    from unconceal.hub.ship import ship_model  # slow to import
    from unconceal.hub.shipped import describe

    print(f"wrote {ship_model(args.run, args.name, args.model, args.results)}")
    print(describe(args.name))


if __name__ == "__main__":
    run_main(main)
