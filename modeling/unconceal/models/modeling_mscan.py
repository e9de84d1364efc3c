"""MSCAN, the convolutional encoder of SegNeXt.

Paper: "SegNeXt: Rethinking Convolutional Attention Design for Semantic Segmentation", NeurIPS 2022,
https://arxiv.org/abs/2209.08575. Written from the paper and from the names and shapes of the published weights, which
`unconceal convert mscan` converts. OPDS uses it by default. RUN can use it, and it works alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, AutoModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .configuration_mscan import MscanConfig
from .inference import FusedConv2d, fold_norm_before, scale_outputs
from .modeling_unconceal import (
    ChannelLayerNorm,
    UnconcealPreTrainedModel,
    drop_path,
    init_by_fan_out,
    without_autocast,
)


# Lengths of the strips. Each is a pair of depth-wise convolutions, along rows and columns (section 3.1).
STRIP_SIZES = (7, 11, 21)


class MscanStem(nn.Sequential):
    """Two 3x3 convolutions of stride 2, each with batch norm."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            nn.Conv2d(in_channels, out_channels // 2, kernel_size=3, stride=2, padding=1),
            nn.BatchNorm2d(out_channels // 2),
            nn.GELU(),
            nn.Conv2d(out_channels // 2, out_channels, kernel_size=3, stride=2, padding=1),
            nn.BatchNorm2d(out_channels),
        )


class MscanDownsampling(nn.Sequential):
    """3x3 convolution of stride 2 with batch norm."""

    def __init__(self, in_channels: int, out_channels: int):
        conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)
        super().__init__(conv, nn.BatchNorm2d(out_channels))


class MscanDepthwiseConv(nn.Conv2d):
    """Depth-wise convolution of constant size."""

    def __init__(self, channels: int, kernel_size: tuple[int, int]):
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        super().__init__(channels, channels, kernel_size, padding=padding, groups=channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        if hidden_states.device.type != "cpu" or self.in_channels >= 32:
            return super().forward(hidden_states)
        # With few channels, oneDNN hangs on a long strip in bfloat16.
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with without_autocast("cpu"):
            outputs = self._conv_forward(hidden_states.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return outputs.to(hidden_states.dtype)


class MscanGate(nn.Module):
    """Convolutional attention from 5x5 squares and strips (equation 1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.local = MscanDepthwiseConv(channels, (5, 5))
        self.strips = nn.ModuleList(
            nn.Sequential(MscanDepthwiseConv(channels, (1, size)), MscanDepthwiseConv(channels, (size, 1)))
            for size in STRIP_SIZES
        )
        self.mix = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        near = self.local(hidden_states)
        attention = near
        for strip in self.strips:
            attention = attention + strip(near)
        return self.mix(attention) * hidden_states


class MscanAttention(nn.Module):
    """Residual gate between two 1x1 convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj_in = nn.Conv2d(channels, channels, kernel_size=1)
        self.gate = MscanGate(channels)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        return hidden_states + self.proj_out(self.gate(F.gelu(self.proj_in(hidden_states))))


class MscanFeedForward(nn.Sequential):
    """1x1 convolution to more channels, 3x3 depth-wise convolution, GELU, and back."""

    def __init__(self, channels: int, inner_channels: int):
        super().__init__(
            nn.Conv2d(channels, inner_channels, kernel_size=1),
            MscanDepthwiseConv(inner_channels, (3, 3)),
            nn.GELU(),
            nn.Conv2d(inner_channels, channels, kernel_size=1),
        )


class MscanBlock(GradientCheckpointingLayer):
    """Residual attention and feed-forward network, with layer scale and drop path."""

    def __init__(self, channels: int, mlp_ratio: int, drop_path_rate: float, layer_scale_init_value: float):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.layer_scale_init_value = layer_scale_init_value
        self.attention_norm = nn.BatchNorm2d(channels)
        self.attention = MscanAttention(channels)
        self.attention_scale = nn.Parameter(torch.empty(channels))
        self.feed_forward_norm = nn.BatchNorm2d(channels)
        self.feed_forward = MscanFeedForward(channels, mlp_ratio * channels)
        self.feed_forward_scale = nn.Parameter(torch.empty(channels))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        branch = self.attention(self.attention_norm(hidden_states))
        hidden_states = hidden_states + self.drop_path(self.attention_scale[:, None, None] * branch)
        branch = self.feed_forward(self.feed_forward_norm(hidden_states))
        return hidden_states + self.drop_path(self.feed_forward_scale[:, None, None] * branch)

    def drop_path(self, branch: Tensor) -> Tensor:
        """Drop the branch (B, C, H, W) of random images in training."""
        return drop_path(branch, self.drop_path_rate, self.training)


class MscanInferenceBlock(nn.Module):
    """`MscanBlock` for inference: norms and scales are part of the convolutions.

    The input of the attention is its residual, too. Its norm remains as a scale of that residual.
    """

    def __init__(self, block: MscanBlock):
        super().__init__()
        attention, gate, scale = block.attention, block.attention.gate, block.attention_scale
        norm_scale, norm_shift = fold_norm_before(block.attention_norm, attention.proj_in)
        scale_outputs(attention.proj_out, scale)
        attention.proj_out.bias.add_(scale * norm_shift)
        self.register_buffer("residual_scale", (scale * norm_scale)[:, None, None])
        self.proj_in = FusedConv2d(attention.proj_in, "gelu")
        self.local = gate.local
        self.strips = gate.strips
        self.mix = FusedConv2d(gate.mix)
        self.proj_out = FusedConv2d(attention.proj_out)
        expand, depthwise, _, reduce = block.feed_forward
        fold_norm_before(block.feed_forward_norm, expand)
        scale_outputs(reduce, block.feed_forward_scale)
        self.expand, self.depthwise, self.reduce = expand, FusedConv2d(depthwise, "gelu"), FusedConv2d(reduce)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        projected = self.proj_in(hidden_states)
        attention = near = self.local(projected)
        for strip in self.strips:
            attention = strip(near).add_(attention)
        gated = self.mix(attention, times=projected)
        hidden_states = self.proj_out(gated, plus=hidden_states).addcmul(hidden_states, self.residual_scale)
        return self.reduce(self.depthwise(self.expand(hidden_states)), plus=hidden_states)


class MscanStage(nn.Module):
    """Downsampling, blocks, layer norm."""

    def __init__(self, embedding: nn.Module, blocks: list[MscanBlock], channels: int):
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = ChannelLayerNorm(channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to half or, first, quarter size."""
        hidden_states = self.embedding(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.norm(hidden_states)

    def prepare_for_inference(self):
        """Replace the blocks by their inference form."""
        self.blocks = nn.ModuleList(MscanInferenceBlock(block) for block in self.blocks)


class MscanPreTrainedModel(UnconcealPreTrainedModel):
    """Initial weights and checkpointing of MSCAN."""

    config_class = MscanConfig
    base_model_prefix = "mscan"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MscanBlock"]
    auto_classes = ("AutoModel",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialize convolutions from N(0, 2 / fan-out), as published."""
        if isinstance(module, nn.Conv2d):
            init_by_fan_out(module)
        elif isinstance(module, MscanBlock):
            init.constant_(module.attention_scale, module.layer_scale_init_value)
            init.constant_(module.feed_forward_scale, module.layer_scale_init_value)
        else:
            super()._init_weights(module)


class MscanBackbone(BackboneMixin, MscanPreTrainedModel):
    """MSCAN as a backbone, with the features of `out_features`."""

    has_attentions = False

    def __init__(self, config: MscanConfig):
        super().__init__(config)
        self.num_features = list(config.hidden_sizes)
        num_blocks = sum(config.depths)
        rates = iter([config.drop_path_rate * i / max(num_blocks - 1, 1) for i in range(num_blocks)])
        self.stages = nn.ModuleList()
        in_channels = config.num_channels
        for channels, depth, mlp_ratio in zip(config.hidden_sizes, config.depths, config.mlp_ratios, strict=True):
            embedding = MscanDownsampling if len(self.stages) else MscanStem
            scale = config.layer_scale_init_value
            blocks = [MscanBlock(channels, mlp_ratio, next(rates), scale) for _ in range(depth)]
            self.stages.append(MscanStage(embedding(in_channels, channels), blocks, channels))
            in_channels = channels
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs) -> BackboneOutput:
        """Encode a batch of images.

        Args:
            pixel_values: (B, 3, H, W), normalized RGB, at least 32x32.
            output_hidden_states: Whether to return the image and the features of every stage as `hidden_states` too.
            kwargs: Ignored, as in the backbones of transformers.

        Returns:
            `BackboneOutput`, whose `feature_maps` are (B, C, H / s, W / s), sizes rounded up, finest first.

        Raises:
            ValueError: If the channels or the size of the image do not fit.
        """
        self.check_pixel_values(pixel_values)
        hidden_states = [pixel_values]
        for stage in self.stages:
            hidden_states.append(stage(hidden_states[-1]))
        stages = zip(self.stage_names, hidden_states[1:], strict=True)
        feature_maps = tuple(feature_map for name, feature_map in stages if name in self.out_features)
        return BackboneOutput(feature_maps=feature_maps, hidden_states=tuple(hidden_states))


# For use alone, even without the package. Networks use their own copy of this file, see backbones.py.
AutoModel.register(MscanConfig, MscanBackbone, exist_ok=True)
AutoBackbone.register(MscanConfig, MscanBackbone, exist_ok=True)

__all__ = ["MscanBackbone", "MscanPreTrainedModel"]
