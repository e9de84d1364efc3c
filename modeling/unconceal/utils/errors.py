"""Report errors of users and of the program."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable


DEBUG = "UNCONCEAL_DEBUG"
# What the place of a file can cause in any command: no room, no permission, an impossible name, a link to itself.
ERRORS_OF_PLACES = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
)

# What `Path.resolve` says of a link to itself, up to Python 3.12.
LINK_LOOP = "Symlink loop"
# What torch says for any device.
NO_MEMORY = re.compile("(?i)out of memory|(not enough|allocate) memory|ALLOC_FAILED")
# What gloo and NCCL say.
LOST_PROCESS = re.compile("(?i)(closed|reset) by peer|remote process exited|socket.*closed|broken pipe")


class UserError(Exception):
    """Mistake of the user, explained in one line."""


def one_line(error: Exception) -> str:
    """Return a library's message as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def tells_lost_process(error: Exception) -> bool:
    """Return whether another training process is gone."""
    return isinstance(error, RuntimeError) and bool(LOST_PROCESS.search(str(error)))


def tells_no_memory(error: Exception) -> bool:
    """Return whether memory ran out, on any device."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error))))


def explained(error: Exception) -> str | None:
    """Return a line about a mistake of the user, or None.

    It is a `UserError`, an error of the file system such as a full disk, or too little memory. Any other error is a
    defect.
    """
    if isinstance(error, UserError):
        return str(error)
    if tells_no_memory(error):
        return f"memory ran out ({one_line(error)}); lower the batch size, or the size of the images or the network"
    if isinstance(error, RuntimeError) and str(error).startswith(LINK_LOOP):
        return f"{error}; give another path"
    # Libraries in other languages raise classes of their own.
    number = getattr(error, "errno", None) or next(map(int, re.findall(r"os error (\d+)", str(error))), None)
    if number not in ERRORS_OF_PLACES:
        return None
    file = getattr(error, "filename", None)
    return os.strerror(number) + (f": {file}" if file else "")


def run_main(main: Callable[[], int | None]):
    """Run a command line and exit with its code.

    If `explained` has a line for an error, this line is printed, and the exit code is 2. With UNCONCEAL_DEBUG=1 the
    traceback is shown, too. Any other error is a defect of the program and shows its traceback. Ctrl-C gives 130, a
    closed pipe (`| head`) 141.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped: interrupted by the user", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            traceback.print_exception(error)
        print(f"error: {line}", file=sys.stderr)
        code = 2
    sys.exit(code)
