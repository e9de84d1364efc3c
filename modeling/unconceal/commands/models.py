"""List the trained networks that ship with this package."""

import argparse
import json
from dataclasses import asdict

from ..utils.markdown import markdown_table


HEADER = ("name", "finds", "network", "parameters", "MB", "input", "trained on", "terms", "on its validation split")


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `unconceal models`."""
    parser.description = (
        "List the trained networks that ship with this package. Their names stand for a model everywhere: "
        "`unconceal segment photo.jpg --model NAME`, `unconceal.load(NAME)`."
    )
    parser.add_argument("--json", action="store_true", help="print all facts as JSON")


def run(args: argparse.Namespace):
    """Print a table or JSON."""
    from ..hub.shipped import describe, shipped_names

    networks = [describe(name) for name in shipped_names()]
    if args.json:
        print(json.dumps([asdict(each) for each in networks], indent=2))
        return
    if not networks:
        print("this installation has no trained networks; install from a whole copy of the repository (pip install .)")
        return
    rows = []
    for each in networks:
        numbers = ", ".join(f"{title} {value:.3f}" for title, value in each.numbers.items())
        parameters, size = f"{each.parameters / 1e6:.2f} M", f"{each.megabytes:.1f}"
        facts = (each.name, each.task, each.network, parameters, size, each.input_size)
        rows.append((*facts, each.data, each.terms, numbers))
    print(markdown_table(HEADER, rows))
