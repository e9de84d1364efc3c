"""EfficientNet-Lite, a small convolutional encoder with published ImageNet weights.

Source: Google's "EfficientNet-Lite", 2020, after "EfficientNet: Rethinking Model Scaling for Convolutional Neural
Networks", ICML 2019, https://arxiv.org/abs/1905.11946. Written from the shapes of the published weights, which
`unconceal convert efficientnet-lite` converts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, AutoModel
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .configuration_efficientnet_lite import EfficientNetLiteConfig
from .inference import FusedConv2d, fuse_layers
from .modeling_unconceal import UnconcealPreTrainedModel, drop_path, init_by_fan_out, without_autocast


STEM_SIZE = 32  # in every size
# (blocks, kernel size, stride, expansion, channels) of lite0. A list for each stride from 4 to 32.
STAGES = (
    ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24)),
    ((2, 5, 2, 6, 40),),
    ((3, 3, 2, 6, 80), (3, 5, 1, 6, 112)),
    ((4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)


def pad_same(hidden_states: Tensor, kernel_size: int) -> Tensor:
    """Pad for a convolution of stride 2, as TensorFlow's "SAME".

    It pads less at the left and the top, so that the outputs of even sides start at the first pixel.
    """
    height, width = hidden_states.shape[-2:]
    before, after = kernel_size // 2 - 1, kernel_size // 2
    return F.pad(hidden_states, (before + width % 2, after, before + height % 2, after))


class EfficientNetLiteConvNormAct(nn.Sequential):
    """Convolution without bias, batch norm and, by default, ReLU6.

    Output sides are input sides / stride, rounded up.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, act: bool = True
    ):
        padding = kernel_size // 2 if stride == 1 else 0
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01),
            nn.ReLU6() if act else nn.Identity(),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H/stride, W/stride)."""
        conv, norm, act = self
        kernel_size = conv.kernel_size[0]
        if conv.stride[0] > 1:
            hidden_states = pad_same(hidden_states, kernel_size)
        if kernel_size > 3 and self.training and hidden_states.device.type == "cpu":
            # Backward, these depth-wise convolutions take three times as long in bfloat16.
            with without_autocast("cpu"):
                dtype = hidden_states.dtype
                hidden_states = conv(hidden_states.to(conv.weight.dtype)).to(dtype)
        else:
            hidden_states = conv(hidden_states)
        return act(norm(hidden_states))


class EfficientNetLiteBlock(GradientCheckpointingLayer):
    """Inverted residual: expansion, depth-wise convolution, projection."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, expansion: int, stride: int, drop_path_rate: float
    ):
        super().__init__()
        inner = in_channels * expansion
        self.drop_path_rate = drop_path_rate
        self.is_residual = stride == 1 and in_channels == out_channels
        self.expand = EfficientNetLiteConvNormAct(in_channels, inner, 1) if expansion > 1 else nn.Identity()
        self.depthwise = EfficientNetLiteConvNormAct(inner, inner, kernel_size, stride, groups=inner)
        self.project = EfficientNetLiteConvNormAct(inner, out_channels, 1, act=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H/stride, W/stride)."""
        branch = self.depthwise(self.expand(hidden_states))
        if isinstance(self.project, FusedConv2d):
            return self.project(branch, plus=hidden_states if self.is_residual else None)
        branch = self.project(branch)
        return hidden_states + drop_path(branch, self.drop_path_rate, self.training) if self.is_residual else branch

    def prepare_for_inference(self):
        """Make the projection add the residual."""
        fuse_layers(self.project, ["0", "1"])
        self.project = FusedConv2d(self.project[0])


class EfficientNetLitePreTrainedModel(UnconcealPreTrainedModel):
    """Initial weights and checkpointing of EfficientNet-Lite."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EfficientNetLiteBlock"]
    auto_classes = ("AutoModel",)
    min_image_size = 1

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialize convolutions from N(0, 2 / fan-out), as published."""
        if isinstance(module, nn.Conv2d):
            init_by_fan_out(module)
        else:
            super()._init_weights(module)


class EfficientNetLiteBackbone(BackboneMixin, EfficientNetLitePreTrainedModel):
    """EfficientNet-Lite as a backbone, with the features of `out_features`."""

    has_attentions = False

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.num_blocks = sum(config.scale_depth(row[0]) for stage in STAGES for row in stage)
        self.stem = EfficientNetLiteConvNormAct(config.num_channels, STEM_SIZE, 3, stride=2)
        self.num_features, self.stages = [], nn.ModuleList()
        in_channels, index = STEM_SIZE, 0
        for stage in STAGES:
            blocks = nn.ModuleList()
            for depth, kernel_size, stride, expansion, channels in stage:
                channels = config.scale_width(channels)
                for i in range(config.scale_depth(depth)):
                    options = {
                        "stride": 1 if i else stride,
                        "drop_path_rate": config.drop_path_rate * index / self.num_blocks,
                    }
                    blocks.append(EfficientNetLiteBlock(in_channels, channels, kernel_size, expansion, **options))
                    in_channels, index = channels, index + 1
            self.stages.append(blocks)
            self.num_features.append(in_channels)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs) -> BackboneOutput:
        """Encode a batch of images.

        Args:
            pixel_values: (B, 3, H, W), RGB, normalized by `IMAGE_MEAN` and `IMAGE_STD` for the published weights.
            output_hidden_states: Whether to return the image and the features of every stage as `hidden_states` too.
            kwargs: Ignored, as in the backbones of transformers.

        Returns:
            `BackboneOutput`, whose `feature_maps` are (B, C, H / s, W / s), sizes rounded up, finest first.

        Raises:
            ValueError: If the channels of the image do not fit.
        """
        self.check_pixel_values(pixel_values)
        hidden_states, features = self.stem(pixel_values), [pixel_values]
        for stage in self.stages:
            for block in stage:
                hidden_states = block(hidden_states)
            features.append(hidden_states)
        stages = zip(self.stage_names, features[1:], strict=True)
        feature_maps = tuple(feature_map for name, feature_map in stages if name in self.out_features)
        return BackboneOutput(feature_maps=feature_maps, hidden_states=tuple(features))


# For use alone, even without the package. Networks use their own copy of this file, see backbones.py.
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteBackbone, exist_ok=True)
AutoBackbone.register(EfficientNetLiteConfig, EfficientNetLiteBackbone, exist_ok=True)

__all__ = ["EfficientNetLiteBackbone", "EfficientNetLitePreTrainedModel"]
