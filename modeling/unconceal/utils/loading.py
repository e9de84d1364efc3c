"""Explain errors of the loaders of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from .errors import DEBUG, UserError, one_line


# What loaders raise for missing or damaged files, missing packages, unknown types and wrong values.
LOADING_ERRORS = (OSError, SafetensorError, ImportError, KeyError, RuntimeError, ValueError, StrictDataclassError)


@contextmanager
def loading_explained(what: str) -> Iterator[None]:
    """Turn errors while loading into a `UserError` with `what` in front.

    Classes outside `LOADING_ERRORS` are mostly defects of code: the message then names class and place.
    """
    try:
        yield
    except UserError:
        raise
    except LOADING_ERRORS as error:
        raise UserError(f"{what}: {one_line(error)}") from error
    except Exception as error:
        place = error.__traceback__
        while place.tb_next:
            place = place.tb_next
        where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
        raise UserError(
            f"{what}: {type(error).__name__} at {where}: {one_line(error)}; unless its files were edited, this is a "
            f"defect of the code and not of your input; {DEBUG}=1 shows the traceback"
        ) from error
