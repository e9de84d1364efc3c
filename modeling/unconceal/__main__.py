"""The command line: `unconceal COMMAND ...` and `python -m unconceal COMMAND ...`."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .commands import COMMANDS
from .models.memory import keep_freed_memory
from .utils.errors import UserError, run_main
from .utils.files import with_home


# Arguments that are no paths. Recipes expand the paths among their settings.
TEXTS = {"device", "dtype", "license", "mask_suffix", "message", "name", "overrides", "repo_id", "revision", "split"}
TEXTS |= {"tag", "train_split", "truth_suffix"}


class Parser(argparse.ArgumentParser):
    """Parser that expands the ~ of paths; shells leave --out=~/x alone."""

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        is_path = action.dest not in TEXTS and action.nargs != argparse.PARSER
        return super()._get_value(action, with_home(arg_string) if is_path else arg_string)


def make_parsers(command: str | None = None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None]:
    """Return the parser of the command line, and the parser of `command`.

    Only that one has arguments, and it is None for an unknown command. The other commands are listed without importing
    them. This keeps `--help` fast.
    """
    parser = Parser(prog="unconceal", description="Find objects that hide.")
    parser.add_argument("--version", action="version", version=f"unconceal {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    parsers = {name: subparsers.add_parser(name, help=summary) for name, summary in COMMANDS.items()}
    if command in parsers:
        module = importlib.import_module(f".commands.{command}", __package__)
        module.add_arguments(parsers[command])
        parsers[command].set_defaults(run=module.run)
    return parser, parsers.get(command)


def check_names(command: str | None, args: argparse.Namespace):
    """Refuse names that are no UTF-8.

    Records and cards could not hold them. `segment` reads images with such names, which are in no record.

    Raises:
        UserError: If there is one.
    """
    for name, value in vars(args).items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            text = str(one) if isinstance(one, (str, Path)) else ""
            if text != text.encode(errors="replace").decode() and (command, name) != ("segment", "paths"):
                shown = text.encode(errors="backslashreplace").decode()
                raise UserError(f"got {shown}, a name that is no UTF-8; rename the file or folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, command_parser = make_parsers(argv[0] if argv else None)
    if command_parser is None:
        args = parser.parse_args(argv)
    elif "--" in argv or any(action.nargs == argparse.PARSER for action in command_parser._actions):
        args = command_parser.parse_args(argv[1:])  # intermixed parsing supports neither `--` nor subcommands
    else:
        args = command_parser.parse_intermixed_args(argv[1:])  # options may stand between positional arguments
    check_names(argv[0] if argv else None, args)
    args.argv = argv  # reports keep the command that made them
    keep_freed_memory()
    logging.basicConfig(format="%(message)s")
    return args.run(args) or 0


def entry(command: str | None = None):
    """Run the command line and exit; scripts name their command."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # to print any file name
    run_main(lambda: main([command, *sys.argv[1:]] if command else None))


if __name__ == "__main__":
    entry()
