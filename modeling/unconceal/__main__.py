"""The command line: `unconceal COMMAND ...` and `python -m unconceal COMMAND ...`."""

import argparse
import importlib
import logging
import re
import sys
from collections.abc import Sequence

from . import __version__
from .commands import COMMANDS
from .models.memory import keep_freed_memory
from .utils.errors import run_main
from .utils.files import with_home


def make_parsers(command: str | None = None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None]:
    """Return the parser of the command line, and the parser of `command`.

    Only that one has arguments, and it is None for an unknown command. The other commands are listed without importing
    them. This keeps `--help` fast.
    """
    parser = argparse.ArgumentParser(prog="unconceal", description="Find objects that hide.")
    parser.add_argument("--version", action="version", version=f"unconceal {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    parsers = {name: subparsers.add_parser(name, help=summary) for name, summary in COMMANDS.items()}
    if command in parsers:
        module = importlib.import_module(f".commands.{command}", __package__)
        module.add_arguments(parsers[command])
        parsers[command].set_defaults(run=module.run)
    return parser, parsers.get(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    typed = list(sys.argv[1:] if argv is None else argv)
    # The shell leaves the ~ of --out=~/x and data.path=~/x alone.
    pairs = [re.fullmatch(r"([\w.-]+=)?(.*)", one, re.DOTALL).groups() for one in typed]
    argv = [(key or "") + with_home(value) for key, value in pairs]
    parser, command_parser = make_parsers(argv[0] if argv else None)
    if command_parser is None:
        args = parser.parse_args(argv)
    elif "--" in argv or any(action.nargs == argparse.PARSER for action in command_parser._actions):
        args = command_parser.parse_args(argv[1:])  # intermixed parsing supports neither `--` nor subcommands
    else:
        args = command_parser.parse_intermixed_args(argv[1:])  # options may stand between positional arguments
    args.argv = typed  # reports keep the command that made them
    keep_freed_memory()
    logging.basicConfig(format="%(message)s")
    return args.run(args) or 0


def entry(command: str | None = None):
    """Run the command line and exit; scripts name their command."""
    run_main(lambda: main([command, *sys.argv[1:]] if command else None))


if __name__ == "__main__":
    entry()
