"""Configuration of MSCAN, the encoder of SegNeXt."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin


# The published sizes (table 2).
SIZES = {
    "tiny": {"hidden_sizes": (32, 64, 160, 256), "depths": (3, 3, 5, 2)},
    "small": {"hidden_sizes": (64, 128, 320, 512), "depths": (2, 2, 4, 2)},
    "base": {"hidden_sizes": (64, 128, 320, 512), "depths": (3, 3, 12, 3)},
    "large": {"hidden_sizes": (64, 128, 320, 512), "depths": (3, 5, 27, 3), "drop_path_rate": 0.3},
}


@strict
class MscanConfig(BackboneConfigMixin, PreTrainedConfig):
    """Architecture of MSCAN, the base size by default; `from_size` gives others.

    Args:
        num_channels: Image channels.
        hidden_sizes: Channels of each stage, even. The first stage has stride 4, and strides double.
        depths: Blocks of each stage.
        mlp_ratios: Channels inside the feed-forward network of each stage, as a multiple of `hidden_sizes`.
        drop_path_rate: Probability of skipping the branches of the last block for an image, in training. It falls
            evenly to 0 at the first block.
        layer_scale_init_value: Initial factor on the branches of each block.
        out_features: Names of the returned stages: stage1, stage2, ... The last by default.
        out_indices: Indices of the returned stages from 0, instead of `out_features`.
    """

    model_type = "mscan_backbone"

    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 320, 512)
    depths: list[int] | tuple[int, ...] = (3, 3, 12, 3)
    mlp_ratios: list[int] | tuple[int, ...] = (8, 8, 4, 4)
    drop_path_rate: float | int = 0.1
    layer_scale_init_value: float | int = 1e-2

    def __post_init__(self, **kwargs):
        self.stage_names = [f"stage{i + 1}" for i in range(len(self.hidden_sizes))]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_size(cls, size: str, **kwargs) -> "MscanConfig":
        """Return the configuration of a published size: tiny, small, base or large."""
        if size not in SIZES:
            raise ValueError(f"got MSCAN size {size!r}, expected one of {', '.join(SIZES)}.")
        return cls(**{**SIZES[size], **kwargs})

    def validate_sizes(self):
        """Reject impossible sizes."""
        lengths = {len(self.hidden_sizes), len(self.depths), len(self.mlp_ratios)}
        if len(lengths) > 1 or not self.hidden_sizes:
            raise ValueError(
                f"`hidden_sizes`, `depths` and `mlp_ratios`: got {self.hidden_sizes}, {self.depths} and "
                f"{self.mlp_ratios}, expected one entry for each stage."
            )
        if min(*self.hidden_sizes, *self.depths, *self.mlp_ratios, self.num_channels) < 1 or self.hidden_sizes[0] % 2:
            raise ValueError(
                f"`num_channels`, `hidden_sizes`, `depths` and `mlp_ratios`: got {self.num_channels}, "
                f"{self.hidden_sizes}, {self.depths} and {self.mlp_ratios}, expected at least 1, and an even first of "
                "`hidden_sizes`."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate`: got {self.drop_path_rate}, expected at least 0 and below 1.")


MscanConfig.register_for_auto_class()
AutoConfig.register(MscanConfig.model_type, MscanConfig, exist_ok=True)

__all__ = ["SIZES", "MscanConfig"]
