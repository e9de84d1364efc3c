"""Networks and their registration with the Auto classes.

Unlike its siblings, this module does not travel to the Hub.
"""

import os
from functools import wraps
from typing import NamedTuple

from PIL import Image
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
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline

from .configuration_opds import OpdsConfig
from .configuration_run import RunConfig
from .configuration_srs import SrsConfig
from .image_processing_unconceal import UnconcealImageProcessor, fetch
from .modeling_opds import OpdsForImageSegmentation
from .modeling_run import RunForImageSegmentation
from .modeling_srs import SrsForImageSegmentation, SrsForReconstruction
from .reading import to_rgb


class Network(NamedTuple):
    """Hold the configuration class, and the model class of each training task."""

    config_class: type[PreTrainedConfig]
    tasks: dict[str, type[PreTrainedModel]]


NETWORKS = {
    "opds": Network(OpdsConfig, {"segmentation": OpdsForImageSegmentation}),
    "run": Network(RunConfig, {"segmentation": RunForImageSegmentation}),
    "srs": Network(SrsConfig, {"reconstruction": SrsForReconstruction, "segmentation": SrsForImageSegmentation}),
}


# One class under both names, otherwise transformers logs a fallback.
_PROCESSORS = dict.fromkeys(("pil", "torchvision"), UnconcealImageProcessor)
for _config_class, _tasks in NETWORKS.values():
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    _default = _tasks["segmentation"]
    # With a tuple, the `architectures` of the checkpoint choose the class.
    AutoModel.register(_config_class, tuple(dict.fromkeys([_default, *_tasks.values()])), exist_ok=True)
    AutoModelForImageSegmentation.register(_config_class, _default, exist_ok=True)
    AutoModelForSemanticSegmentation.register(_config_class, _default, exist_ok=True)
    AutoImageProcessor.register(_config_class, image_processor_classes=_PROCESSORS, exist_ok=True)

# Without this, transformers takes the name of the image processor for that of a video processor, and asks whether to
# run its code.
ImageSegmentationPipeline._load_video_processor = False


def _read_in_pipelines():
    """Let `pipeline("image-segmentation")` read every image by `to_rgb`.

    Its own reading makes 16-bit gray white, and it has no hook. Pipelines of other models stay as they are.
    """
    preprocess = ImageSegmentationPipeline.preprocess

    @wraps(preprocess)
    def read_and_preprocess(self, image, *args, **kwargs):
        if isinstance(image, (str, Image.Image)) and isinstance(self.image_processor, UnconcealImageProcessor):
            # `Path.is_file` raises an error for an image as text in base64.
            if isinstance(image, str) and not os.path.isfile(image):  # noqa: PTH113
                image = fetch(image, kwargs.get("timeout"))
            (image,) = map(to_rgb, self.image_processor.to_pil(image))
        return preprocess(self, image, *args, **kwargs)

    ImageSegmentationPipeline.preprocess = read_and_preprocess


_read_in_pipelines()

__all__ = ["NETWORKS", "Network"]
