"""The networks by name, as recipes and scripts call them."""

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from .models.configuration_opds import OpdsConfig
from .models.configuration_run import RunConfig
from .models.configuration_srs import SrsConfig
from .models.modeling_opds import OpdsForImageSegmentation
from .models.modeling_run import RunForImageSegmentation
from .models.modeling_srs import SrsForImageSegmentation, SrsForReconstruction


@dataclass(frozen=True)
class Network:
    """A configuration class and the model class of each task that the network is trained for."""

    config_class: type[PreTrainedConfig]
    tasks: dict[str, type[PreTrainedModel]]


NETWORKS = {
    "opds": Network(OpdsConfig, {"segmentation": OpdsForImageSegmentation}),
    "run": Network(RunConfig, {"segmentation": RunForImageSegmentation}),
    "srs": Network(SrsConfig, {"reconstruction": SrsForReconstruction, "segmentation": SrsForImageSegmentation}),
}

__all__ = ["NETWORKS", "Network"]
