"""Hugging Face models for objects that hide.

Importing the package makes the Auto classes of transformers know its networks.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
)

# Not from the top, where transformers 5.17 has it only beside torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .models.configuration_opds import OpdsConfig
from .models.configuration_run import RunConfig
from .models.configuration_srs import SrsConfig
from .models.image_processing_unconceal import UnconcealImageProcessor
from .models.modeling_opds import OpdsForImageSegmentation
from .models.modeling_run import RunForImageSegmentation
from .models.modeling_srs import SrsForImageSegmentation, SrsForReconstruction
from .models.mscan import MscanBackbone, MscanConfig
from .models.pipeline_unconceal import SoftMaskPipeline


__version__ = "0.1.0"

for config_class, model_classes in (
    (OpdsConfig, (OpdsForImageSegmentation,)),
    (RunConfig, (RunForImageSegmentation,)),
    (SrsConfig, (SrsForImageSegmentation, SrsForReconstruction)),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    # A tuple lets the checkpoint's own `architectures` choose, as transformers does for its own networks.
    AutoModel.register(config_class, model_classes, exist_ok=True)
    AutoModelForImageSegmentation.register(config_class, model_classes[0], exist_ok=True)
    AutoModelForSemanticSegmentation.register(config_class, model_classes[0], exist_ok=True)
    AutoImageProcessor.register(
        config_class,
        # Under both names, so that no installation is told that it falls back from one to the other.
        image_processor_classes={"pil": UnconcealImageProcessor, "torchvision": UnconcealImageProcessor},
        exist_ok=True,
    )

__all__ = [
    "MscanBackbone",
    "MscanConfig",
    "OpdsConfig",
    "OpdsForImageSegmentation",
    "RunConfig",
    "RunForImageSegmentation",
    "SoftMaskPipeline",
    "SrsConfig",
    "SrsForImageSegmentation",
    "SrsForReconstruction",
    "UnconcealImageProcessor",
]
