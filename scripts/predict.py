"""Segment pictures: the same as `unconceal segment`."""

import sys

from unconceal.cli import main
from unconceal.errors import run_main


if __name__ == "__main__":
    run_main(lambda: main(["segment", *sys.argv[1:]]))
