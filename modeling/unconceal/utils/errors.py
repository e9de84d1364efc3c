"""Report errors of users and of the program."""

import os
import sys
import traceback
from collections.abc import Callable


DEBUG = "UNCONCEAL_DEBUG"


class UserError(Exception):
    """Mistake of the user, explained in one line."""


def one_line(error: Exception) -> str:
    """Return a library's message as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def run_main(main: Callable[[], int | None]):
    """Run a command line and exit with its code.

    A `UserError` is printed as one line and gives exit code 2. With UNCONCEAL_DEBUG=1 its traceback is shown, too. Any
    other error is a defect of the program and shows its traceback. Ctrl-C gives 130, a closed pipe (`| head`) 141.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped: interrupted by the user", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
