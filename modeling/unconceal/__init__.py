"""Hugging Face models for objects that hide.

Importing the package registers its networks with the Auto classes of transformers.
"""

import importlib
import sys
from pathlib import Path


__version__ = "0.1.0"

# Where each public name is defined.
_MODULES = {
    "MscanBackbone": "models.modeling_mscan",
    "MscanConfig": "models.configuration_mscan",
    "OpdsConfig": "models.configuration_opds",
    "OpdsForImageSegmentation": "models.modeling_opds",
    "RunConfig": "models.configuration_run",
    "RunForImageSegmentation": "models.modeling_run",
    "Segmenter": "api",
    "SoftMaskPipeline": "models.pipeline_unconceal",
    "SrsConfig": "models.configuration_srs",
    "SrsForImageSegmentation": "models.modeling_srs",
    "SrsForReconstruction": "models.modeling_srs",
    "UnconcealImageProcessor": "models.image_processing_unconceal",
    "load": "api",
}
__all__ = list(_MODULES)


def __getattr__(name):
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    """List the public names."""
    return [*__all__, "__version__"]


def _is_command_line() -> bool:
    """Whether this process was started as `unconceal ...` or `python -m unconceal ...`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # what Python puts there while it imports the package that follows -m
        return "unconceal" in sys.orig_argv
    return Path(program).stem == "unconceal"


# Registering imports torch and transformers, which takes seconds. On the command line each command imports what it needs.
if not _is_command_line():
    importlib.import_module(f"{__name__}.models")
