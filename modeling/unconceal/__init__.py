"""Hugging Face models for objects that hide.

Importing the package makes the Auto classes of transformers know its networks.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
)

from .models.configuration_srs import SrsConfig
from .models.image_processing_unconceal import UnconcealImageProcessor
from .models.modeling_srs import SrsForImageSegmentation, SrsForReconstruction


__version__ = "0.1.0"

AutoConfig.register(SrsConfig.model_type, SrsConfig, exist_ok=True)
# A tuple lets the checkpoint's own `architectures` choose, as transformers does for its own networks.
AutoModel.register(SrsConfig, (SrsForImageSegmentation, SrsForReconstruction), exist_ok=True)
AutoModelForImageSegmentation.register(SrsConfig, SrsForImageSegmentation, exist_ok=True)
AutoModelForSemanticSegmentation.register(SrsConfig, SrsForImageSegmentation, exist_ok=True)
AutoImageProcessor.register(
    SrsConfig,
    # Under both names, so that no installation is told that it falls back from one to the other.
    image_processor_classes={"pil": UnconcealImageProcessor, "torchvision": UnconcealImageProcessor},
    exist_ok=True,
)

__all__ = ["SrsConfig", "SrsForImageSegmentation", "SrsForReconstruction", "UnconcealImageProcessor"]
