"""Hugging Face models for objects that hide.

Importing the package registers its networks with the Auto classes of transformers.
"""

import importlib as _importlib
import sys as _sys
import typing as _typing
from pathlib import Path as _Path


if _typing.TYPE_CHECKING:
    from .api import Segmenter, load
    from .hub.shipped import pretrained
    from .models.configuration_efficientnet_lite import EfficientNetLiteConfig
    from .models.configuration_mscan import MscanConfig
    from .models.configuration_opds import OpdsConfig
    from .models.configuration_run import RunConfig
    from .models.configuration_srs import SrsConfig
    from .models.image_processing_unconceal import UnconcealImageProcessor
    from .models.modeling_efficientnet_lite import EfficientNetLiteBackbone
    from .models.modeling_mscan import MscanBackbone
    from .models.modeling_opds import OpdsForImageSegmentation
    from .models.modeling_run import RunForImageSegmentation
    from .models.modeling_srs import SrsForImageSegmentation, SrsForReconstruction
    from .models.pipeline_unconceal import SoftMaskPipeline

__version__ = "0.1.0"

# Where each public name is defined.
_MODULES = {
    "EfficientNetLiteBackbone": "models.modeling_efficientnet_lite",
    "EfficientNetLiteConfig": "models.configuration_efficientnet_lite",
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
    "pretrained": "hub.shipped",
}
__all__ = list(_MODULES)


def __getattr__(name):
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    """Return the public names."""
    return [*__all__, "__version__"]


def _is_command_line() -> bool:
    """Return whether this process runs `unconceal ...` or `python -m unconceal ...`."""
    program = str(_sys.argv[0]) if _sys.argv else ""
    if program == "-m":  # Python's placeholder while it imports the package that follows -m
        return ("-m", __name__) in zip(_sys.orig_argv, _sys.orig_argv[1:], strict=False)
    return _Path(program).stem == "unconceal"


# This imports torch and transformers, which takes seconds. On the command line each command imports what it needs.
if not _is_command_line():
    _importlib.import_module(f"{__name__}.models.networks")
