"""The command line: `unconceal COMMAND ...` and `python -m unconceal COMMAND ...`."""

import argparse
import importlib
import io
import logging
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .commands import COMMANDS
from .models.memory import keep_freed_memory
from .utils.errors import UserError, run_main
from .utils.files import printable, with_home


# Arguments that are no paths. Recipes expand the paths among their settings.
TEXTS = {"device", "dtype", "license", "mask_suffix", "message", "name", "overrides", "repo_id", "revision", "split"}
TEXTS |= {"tag", "train_split", "truth_suffix"}
MAY_BE_EMPTY = {"mask_suffix", "truth_suffix"}
# Arguments that may hold undecodable bytes: images to read, and a name that is shown with question marks.
ANY_BYTES = {"background", "image", "name", "paths"}


class Parser(argparse.ArgumentParser):
    """Parser that expands the ~ of paths; shells leave --out=~/x alone.

    Records and libraries hold UTF-8 text only, so other arguments are refused.
    """

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if action.nargs == argparse.PARSER:  # the parser of the subcommand sees them again
            return super()._get_value(action, arg_string)
        if not arg_string.strip() and action.dest not in MAY_BE_EMPTY:
            name = "".join(action.option_strings[-1:]) or action.metavar or action.dest
            raise UserError(f"{name} is empty; give a value, or leave it out")
        value = arg_string if action.dest in TEXTS else with_home(arg_string)
        if action.dest not in ANY_BYTES and value != printable(value):
            got = " ".join([*action.option_strings[-1:], printable(value)])
            raise UserError(f"got {got}, expected a name in UTF-8; choose another folder, or rename it")
        return super()._get_value(action, value)


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
    args.argv = argv  # reports keep the command that made them
    keep_freed_memory()
    logging.basicConfig(format="%(message)s")
    return args.run(args) or 0


def entry(command: str | None = None):
    """Run the command line and exit; scripts name their command.

    Names of undecodable bytes are printed with backslashes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it can be closed, or replaced
            stream.reconfigure(errors="backslashreplace")
    run_main(lambda: main([command, *sys.argv[1:]] if command else None))


if __name__ == "__main__":
    entry()
