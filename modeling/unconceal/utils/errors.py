"""How commands speak to people: one clear line for a user's mistake, and a non-zero exit."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what was got, what was expected, what to do."""


def one_line(error: Exception) -> str:
    """Return a library's message, which may have many lines, as one of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def run_main(main: Callable[[], int | None]):
    """Run a command line and exit with its code.

    A `UserError` is printed as one line and gives exit code 2, Ctrl-C gives 130, a closed pipe (`| head`) gives 141.
    Anything else is a defect of ours and keeps its traceback.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped: interrupted by the user", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
