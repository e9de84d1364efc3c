"""Explain errors of the loaders of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from .errors import DEBUG, UserError, one_line


# What loaders raise for missing or damaged files, missing packages, unknown types and wrong values.
LOADING_ERRORS = (OSError, SafetensorError, ImportError, RuntimeError, ValueError, StrictDataclassError)
# The package, and where transformers keeps the code of checkpoints.
OWN_CODE = (__name__.partition(".")[0], "transformers_modules")


@contextmanager
def loading_explained(what: str, check: str = "if its files were not edited") -> Iterator[None]:
    """Turn errors while loading into a `UserError` with `what` in front.

    Other classes are mostly defects of the code, so the message names class and place.

    Args:
        what: What fails.
        check: What to check first; the message goes on with "this is a defect of the code".
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        place = _place(error)
        if isinstance(error, LOADING_ERRORS) and not _is_defect(error, place):
            raise UserError(f"{what}: {one_line(error)}") from error
        where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
        raise UserError(
            f"{what}: {type(error).__name__} at {where}: {one_line(error)}; {check}, this is a defect of the code; "
            f"{DEBUG}=1 shows the traceback"
        ) from error


def _package(place: TracebackType) -> str:
    return place.tb_frame.f_globals.get("__name__", "").partition(".")[0]


def _place(error: Exception) -> TracebackType:
    """Return the innermost call, not counting those inside torch."""
    place = step = error.__traceback__
    while step := step.tb_next:
        if _package(step) != "torch":
            place = step
    return place


def _is_defect(error: Exception, place: TracebackType) -> bool:
    """Return whether our own code failed; on purpose it raises other classes."""
    return isinstance(error, (ImportError, RuntimeError)) and _package(place) in OWN_CODE
