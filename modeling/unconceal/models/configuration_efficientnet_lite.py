"""Configuration of EfficientNet-Lite, an encoder with published ImageNet weights."""

import math

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .configuration_unconceal import check_at_least


# The published sizes: ratios of width and of depth.
SIZES = {"lite0": (1.0, 1.0), "lite1": (1.0, 1.1), "lite2": (1.1, 1.2), "lite3": (1.2, 1.4), "lite4": (1.4, 1.8)}
# Input of the published weights: (x - 127) / 128 for x in 0..255.
IMAGE_MEAN = (127 / 255,) * 3
IMAGE_STD = (128 / 255,) * 3


@strict
class EfficientNetLiteConfig(BackboneConfigMixin, PreTrainedConfig):
    """Architecture of EfficientNet-Lite, lite0 by default; `from_size` gives others.

    The stages of equal stride are counted as one. So there are four, at strides 4, 8, 16 and 32.

    Args:
        num_channels: Image channels.
        width_ratio: Channels of the blocks, as a multiple of those of lite0.
        depth_ratio: Blocks of the inner stages, as a multiple of those of lite0.
        drop_path_rate: Probability of skipping the last block for an image, in training. It falls evenly to 0 at the
            first block.
        out_features: Names of the returned stages: stage1 to stage4. All by default.
        out_indices: Indices of the returned stages from 0, instead of `out_features`.
    """

    model_type = "efficientnet_lite_backbone"

    num_channels: int = 3
    width_ratio: float | int = 1.0
    depth_ratio: float | int = 1.0
    drop_path_rate: float | int = 0.2

    def __post_init__(self, **kwargs):
        self.stage_names = [f"stage{i + 1}" for i in range(4)]
        names, indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if names is None and indices is None:
            names = self.stage_names
        self.set_output_features_output_indices(out_features=names, out_indices=indices)
        super().__post_init__(**kwargs)

    @classmethod
    def from_size(cls, size: str, **kwargs) -> "EfficientNetLiteConfig":
        """Return the configuration of a published size, lite0 to lite4."""
        if size not in SIZES:
            raise ValueError(f"got EfficientNet-Lite size {size!r}, expected one of {', '.join(SIZES)}.")
        width_ratio, depth_ratio = SIZES[size]
        return cls(**{"width_ratio": width_ratio, "depth_ratio": depth_ratio, **kwargs})

    def scale_width(self, channels: int) -> int:
        """Scale a number of channels to a multiple of 8."""
        exact = channels * self.width_ratio
        rounded = max(8, int(exact + 4) // 8 * 8)
        return rounded if rounded >= 0.9 * exact else rounded + 8

    def scale_depth(self, num_blocks: int) -> int:
        """Scale a number of blocks, rounded up; one block stays one."""
        return math.ceil(num_blocks * self.depth_ratio) if num_blocks > 1 else 1

    def validate_sizes(self):
        """Reject impossible sizes."""
        check_at_least(self, 1, "num_channels")
        check_at_least(self, 0.1, "width_ratio", "depth_ratio")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate`: got {self.drop_path_rate}, expected at least 0 and below 1.")


EfficientNetLiteConfig.register_for_auto_class()
AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)

__all__ = ["IMAGE_MEAN", "IMAGE_STD", "SIZES", "EfficientNetLiteConfig"]
