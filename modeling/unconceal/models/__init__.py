"""Networks and their registration with the Auto classes.

Every other module here travels to the Hub with the weights, so it imports only its siblings.
"""

from dataclasses import dataclass

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)

# transformers 5.17 exports it at the top level only if torchvision is installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_opds import OpdsConfig
from .configuration_run import RunConfig
from .configuration_srs import SrsConfig
from .image_processing_unconceal import UnconcealImageProcessor
from .modeling_opds import OpdsForImageSegmentation
from .modeling_run import RunForImageSegmentation
from .modeling_srs import SrsForImageSegmentation, SrsForReconstruction


@dataclass(frozen=True)
class Network:
    """Hold the classes of a network.

    Attributes:
        config_class: Configuration class.
        tasks: Model class of each training task.
    """

    config_class: type[PreTrainedConfig]
    tasks: dict[str, type[PreTrainedModel]]


NETWORKS = {
    "opds": Network(OpdsConfig, {"segmentation": OpdsForImageSegmentation}),
    "run": Network(RunConfig, {"segmentation": RunForImageSegmentation}),
    "srs": Network(SrsConfig, {"reconstruction": SrsForReconstruction, "segmentation": SrsForImageSegmentation}),
}


def _register(network: Network):
    config_class, segmentation = network.config_class, network.tasks["segmentation"]
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    # With a tuple, the `architectures` of the checkpoint choose the class.
    model_classes = (segmentation, *(one for one in network.tasks.values() if one is not segmentation))
    AutoModel.register(config_class, model_classes, exist_ok=True)
    AutoModelForImageSegmentation.register(config_class, segmentation, exist_ok=True)
    AutoModelForSemanticSegmentation.register(config_class, segmentation, exist_ok=True)
    AutoImageProcessor.register(
        config_class,
        # One class under both names, otherwise transformers logs a fallback.
        image_processor_classes={"pil": UnconcealImageProcessor, "torchvision": UnconcealImageProcessor},
        exist_ok=True,
    )


for _network in NETWORKS.values():
    _register(_network)

__all__ = ["NETWORKS", "Network"]
