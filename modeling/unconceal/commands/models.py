"""List the trained networks that ship with this package."""

import argparse
import json
from dataclasses import asdict


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `unconceal models`."""
    parser.description = (
        "List the trained networks that ship with this package. Their names stand for a model everywhere: "
        "`unconceal segment photo.jpg --model NAME`, `unconceal.load(NAME)`."
    )
    parser.add_argument("--json", action="store_true", help="print all facts as JSON")


def run(args: argparse.Namespace):
    """Print a table or JSON."""
    from ..hub.shipped import describe, shipped_names, shipped_table

    names = shipped_names()
    if args.json:
        print(json.dumps([asdict(describe(name)) for name in names], indent=2))
    elif names:
        print(shipped_table())
    else:
        print("this installation has no trained networks; install from a whole copy of the repository (pip install .)")
