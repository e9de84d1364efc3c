"""The networks. Each module here travels to the Hub with the weights, so it imports only its siblings.

Importing this package registers the networks with the Auto classes of transformers.
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

# transformers 5.17 exports AutoImageProcessor at its top level only if torchvision is installed.
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
    """A network as recipes and commands name it.

    Attributes:
        config_class: Its configuration class.
        tasks: The model class of each task that the network is trained for.
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
    # A tuple lets the checkpoint's own `architectures` choose, as transformers does for its own networks.
    model_classes = (segmentation, *(one for one in network.tasks.values() if one is not segmentation))
    AutoModel.register(config_class, model_classes, exist_ok=True)
    AutoModelForImageSegmentation.register(config_class, segmentation, exist_ok=True)
    AutoModelForSemanticSegmentation.register(config_class, segmentation, exist_ok=True)
    AutoImageProcessor.register(
        config_class,
        # One class under both names. Otherwise transformers logs that it falls back from one to the other.
        image_processor_classes={"pil": UnconcealImageProcessor, "torchvision": UnconcealImageProcessor},
        exist_ok=True,
    )


for _network in NETWORKS.values():
    _register(_network)

__all__ = ["NETWORKS", "Network"]
