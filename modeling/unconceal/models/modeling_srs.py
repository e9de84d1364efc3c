"""SRS: a reconstruction network guides a segmentation network.

Paper: "SRSNetwork: Siamese Reconstruction-Segmentation Networks based on Dynamic-Parameter Convolution", IEEE TIP
2025, https://arxiv.org/abs/2312.01741. Written from the paper's description and the shapes of the published
checkpoints.

Two networks of one topology are trained one after the other. The first, R, learns to reconstruct images. The second,
S, segments. The frozen encoder of R sees the same image. Its deepest feature sets the parameters of one convolution at
the deepest level of S.

| symbol | here | shape for an H x W image |
|---|---|---|
| x_i,0 | `SrsEncoder` output, level i | (B, C_i, H / 2^i, W / 2^i) |
| x_i,j, j > 0 | nodes of `SrsDecoder.columns[j - 1]` | like x_i,0 |
| y_3,0 of R | `guidance` | (B, G, H / 8, W / 8) |
| v, the dynamic parameters | `SrsDynamicConv.guidance_scale` | (B, G) |
| BLAM | `SrsFusion` | |
| IPATR | `SrsLocalContrast` | |
| Spu | `SrsSubpixelUp` | |
| ECA | `SrsPeakAttention` | |
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_srs import SrsConfig
from .inference import channel_mean, scale_pixels
from .losses import add_terms, bce_dice_terms
from .modeling_unconceal import UnconcealPreTrainedModel, pad_edges


NUM_LEVELS = 4
# Image sides are padded to a multiple of this: they are halved three times.
PADDING_MULTIPLE = 2 ** (NUM_LEVELS - 1)


@dataclass
class SrsReconstructionOutput(ModelOutput):
    """Output of `SrsForReconstruction`.

    Args:
        loss: Scalar, mean squared error of the reconstruction.
        reconstruction: (B, 3, H, W), in the normalized range of `pixel_values`.
        hidden_states: As in `SrsSegmentationOutput`.
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class SrsSegmentationOutput(ModelOutput):
    """Output of `SrsForImageSegmentation`.

    Args:
        loss: Scalar, present when `labels` is given.
        logits: (B, 1, H, W), pre-sigmoid, at the input size.
        hidden_states: Present on request, for the image padded at the right and bottom to multiples of 8. First the
            features of the encoder, (B, C_i, H / 2^i, W / 2^i), strides 1 to 8. Then the fused features of the
            decoder, strides 4 to 1, and those behind the output, (B, C_0, H, W).
        loss_dict: The weighted terms of the loss by name, without gradients.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    loss_dict: dict[str, Tensor] | None = None


def spatial_peak(hidden_states: Tensor) -> Tensor:
    """Return the maximum of each channel, (B, C, 1, 1)."""
    if not is_channels_last(hidden_states):
        return hidden_states.amax(dim=(2, 3), keepdim=True)
    # In this order it is ten times as fast for few channels.
    return hidden_states.permute(0, 2, 3, 1).amax(dim=1).amax(dim=1)[:, :, None, None]


def channel_peak(hidden_states: Tensor) -> Tensor:
    """Return the maximum over the channels, (B, 1, H, W)."""
    if is_channels_last(hidden_states):
        # For few channels, the maximum of two halves is faster than `amax`.
        while hidden_states.shape[1] % 2 == 0 and hidden_states.shape[1] <= 32:
            hidden_states = torch.maximum(*hidden_states.chunk(2, dim=1))
    return hidden_states if hidden_states.shape[1] == 1 else hidden_states.amax(dim=1, keepdim=True)


def is_channels_last(hidden_states: Tensor) -> bool:
    """Return whether (B, C, H, W) is stored channels-last."""
    return not torch.compiler.is_compiling() and hidden_states.is_contiguous(memory_format=torch.channels_last)


class SrsConvNormAct(nn.Sequential):
    """Convolution of equal size, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class SrsChannelAttention(nn.Module):
    """Channel weights in (0, 1) from mean and maximum over the image."""

    def __init__(self, channels: int, reduction_ratio: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // reduction_ratio, kernel_size=1, bias=False)
        self.excite = nn.Conv2d(channels // reduction_ratio, channels, kernel_size=1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the weights, (B, C, 1, 1), for (B, C, H, W)."""
        mean = hidden_states.mean(dim=(2, 3), keepdim=True)
        peak = spatial_peak(hidden_states)
        return sum(self.excite(F.relu(self.squeeze(pooled))) for pooled in (mean, peak)).sigmoid()


class SrsSpatialAttention(nn.Module):
    """Pixel weights in (0, 1) from mean and maximum over the channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the weights, (B, 1, H, W), for (B, C, H, W)."""
        mean = channel_mean(hidden_states)
        peak = channel_peak(hidden_states)
        return self.conv(torch.cat([mean, peak], dim=1)).sigmoid()


class SrsBlock(GradientCheckpointingLayer):
    """Residual block of two 3x3 convolutions with channel and spatial attention."""

    layers_in_order = (("conv1", "norm1", "activation1"), ("conv2", "norm2"))

    def __init__(self, in_channels: int, out_channels: int, reduction_ratio: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.activation1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.channel_attention = SrsChannelAttention(out_channels, reduction_ratio)
        self.spatial_attention = SrsSpatialAttention()
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, kernel_size=1)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H, W)."""
        residual = self.activation1(self.norm1(self.conv1(hidden_states)))
        residual = self.norm2(self.conv2(residual))
        residual = self.channel_attention(residual) * residual
        # The release ends the block in a ReLU, which its weights need. The paper's figure ends it in a batch norm.
        residual = scale_pixels(residual, self.spatial_attention(residual))
        return (residual + self.shortcut(hidden_states)).relu_()


class SrsNode(nn.Sequential):
    """Node of the grid: residual blocks; the first one changes the width."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, reduction_ratio: int):
        widths = [in_channels] + [out_channels] * depth
        super().__init__(*(SrsBlock(a, b, reduction_ratio) for a, b in zip(widths, widths[1:], strict=False)))


class SrsEncoder(nn.Module):
    """First column of the grid: a stem and four levels."""

    def __init__(self, config: SrsConfig, stem_size: int, hidden_sizes: list[int], depths: list[int]):
        super().__init__()
        self.stem = SrsConvNormAct(config.num_channels, stem_size, kernel_size=3)
        widths = [stem_size, *hidden_sizes]
        self.levels = nn.ModuleList(
            SrsNode(widths[i], widths[i + 1], depths[i], config.attention_reduction_ratio) for i in range(NUM_LEVELS)
        )

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Return four features, (B, C_i, H / 2^i, W / 2^i)."""
        features = [self.levels[0](self.stem(pixel_values))]
        for level in self.levels[1:]:
            features.append(level(F.max_pool2d(features[-1], kernel_size=2)))
        return features


class SrsSubpixelUp(nn.Module):
    """Doubling of the size by pixel shuffle, then a 3x3 convolution (Spu)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = SrsConvNormAct(in_channels // 4, out_channels, kernel_size=3)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, 2H, 2W)."""
        return self.conv(F.pixel_shuffle(hidden_states, 2))


class SrsPeakAttention(nn.Module):
    """Channel attention from the peaks of a channel and its two neighbors.

    It is efficient channel attention (ECA) with the maximum instead of the mean.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel_size=3, padding=1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the weighted (B, C, H, W)."""
        # The sigmoid of the peak equals the peak of the sigmoid, as in the paper, and is cheaper.
        peak = spatial_peak(hidden_states).flatten(1).sigmoid()  # (B, C)
        weights = self.conv(peak.unsqueeze(1)).sigmoid()  # (B, 1, C)
        return hidden_states * weights.transpose(1, 2).unsqueeze(-1)  # (B, C, 1, 1)


class SrsFusion(nn.Module):
    """Fusion of a fine feature and the upsampled coarser one (BLAM)."""

    def __init__(self, channels: int):
        super().__init__()
        self.refine = nn.Sequential(*(SrsConvNormAct(channels, channels, kernel_size=1) for _ in range(2)))
        self.attention = SrsPeakAttention()
        self.merge = SrsConvNormAct(2 * channels, channels, kernel_size=1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Fuse two tensors (B, C, H, W) into one."""
        return self.merge(torch.cat([self.attention(coarse), self.refine(fine)], dim=1))


class SrsLocalContrast(nn.Module):
    """Local contrast at three receptive fields (IPATR), for reconstruction only.

    Each convolution gives a local mean mu and, applied to x - mu, a local spread s in (0, 1). The contrast is
    (x - mu + e) / (s + e) with e = 1e-3.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel_size, padding=padding, dilation=dilation)
            for kernel_size, padding, dilation in ((1, 0, 1), (3, 1, 1), (3, 2, 2))
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return (B, C, H, W) with stronger contrast."""
        contrast = 0
        for conv in self.convs:
            difference = hidden_states - conv(hidden_states)
            # In float32: the quotient can overflow half precision.
            contrast = contrast + (difference.float() + 1e-3) / (conv(difference).float().sigmoid() + 1e-3)
        weights = (contrast / len(self.convs)).sigmoid().to(hidden_states.dtype)
        return hidden_states + hidden_states * weights


class SrsDecoder(nn.Module):
    """Other columns of the grid, then the coarse-to-fine fusion.

    Node (i, j) of level i and column j reads its left neighbor (i, j-1) and the upsampled (i+1, j-1). From column 2 on
    it also reads (i, j-2). Below the finest level it also reads the pooled (i-1, j).
    """

    def __init__(self, config: SrsConfig, hidden_sizes: list[int], depths: list[int], local_contrast: bool):
        super().__init__()
        ratio = config.attention_reduction_ratio
        self.columns = nn.ModuleList()
        for j in range(1, NUM_LEVELS):
            column = nn.ModuleList()
            for i in range(NUM_LEVELS - j):
                in_channels = hidden_sizes[i] + hidden_sizes[i + 1]
                in_channels += hidden_sizes[i] if j > 1 else 0
                in_channels += hidden_sizes[i - 1] if i > 0 else 0
                column.append(SrsNode(in_channels, hidden_sizes[i], depths[i], ratio))
            self.columns.append(column)
        # The fusion works on levels 0, 1 and 2, in this order.
        fused = range(NUM_LEVELS - 1)
        self.contrasts = nn.ModuleList(
            SrsLocalContrast(hidden_sizes[i]) if local_contrast else nn.Identity() for i in fused
        )
        self.upsamples = nn.ModuleList(SrsSubpixelUp(hidden_sizes[i + 1], hidden_sizes[i]) for i in fused)
        self.fusions = nn.ModuleList(SrsFusion(hidden_sizes[i]) for i in fused)
        self.projections = nn.ModuleList(
            nn.Conv2d(hidden_sizes[i], hidden_sizes[0], kernel_size=1) if i else nn.Identity() for i in fused
        )
        self.merge = SrsNode(len(fused) * hidden_sizes[0], hidden_sizes[0], depth=1, reduction_ratio=ratio)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        """Return three fused levels, coarse to fine, and all merged."""
        # 1. The grid, column by column, from fine to coarse.
        columns = [features]
        for nodes in self.columns:
            left, column = columns[-1], []
            for i, node in enumerate(nodes):
                inputs = [left[i], upsample_aligned(left[i + 1], 2)]
                if len(columns) > 1:
                    inputs.append(columns[-2][i])
                if i > 0:
                    inputs.append(F.max_pool2d(column[i - 1], kernel_size=2))
                column.append(node(torch.cat(inputs, dim=1)))
            columns.append(column)
        # 2. Fusion of the last node of every level with the coarser level.
        fused, below = [], features[-1]
        for i in reversed(range(NUM_LEVELS - 1)):
            last = columns[NUM_LEVELS - 1 - i][i]
            below = self.fusions[i](self.contrasts[i](last), self.upsamples[i](below))
            fused.insert(0, below)
        # 3. All levels at full resolution and the width of the finest.
        projected = [self.projections[i](hidden_states) for i, hidden_states in enumerate(fused)]
        projected = [upsample_aligned(part, 2**i) if i else part for i, part in enumerate(projected)]
        return *reversed(fused), self.merge(torch.cat(projected, dim=1))


class SrsDynamicConv(nn.Module):
    """3x3 convolution with a kernel for each image (DPConv).

    The reconstruction network gives G scalars v. Each scalar v_g sets the kernels of C / G output channels, with one
    weight and one bias for each entry: kernel_o = b_o + v_g(o) * w_o with g(o) = floor(o / (C / G)). As convolution is
    linear in its kernel,

        DPConv(x) = conv(x, b) + v * conv(x, w),

    two ordinary convolutions and a scale for each output channel. This form can be trained and suits accelerators. For
    inference on a CPU, one convolution with the kernel of the image takes half the time (`srs_dynamic_conv_ref`).
    """

    def __init__(self, channels: int, guidance_channels: int, reduction_ratio: int):
        super().__init__()
        self.channels_per_scalar = channels // guidance_channels
        self.channel_attention = SrsChannelAttention(guidance_channels, reduction_ratio)
        self.spatial_attention = SrsSpatialAttention()
        self.project = nn.Conv2d(guidance_channels, guidance_channels, kernel_size=1)
        self.static_conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.scaled_conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)

    def guidance_scale(self, guidance: Tensor) -> Tensor:
        """Return the dynamic parameters v, (B, G), of (B, G, h, w)."""
        # Channel attention changes only the spatial map, not the guidance.
        spatial_weights = self.spatial_attention(self.channel_attention(guidance) * guidance)
        # The 1x1 convolution commutes with the mean and is cheaper after it.
        return self.project((spatial_weights * guidance).mean(dim=(2, 3), keepdim=True)).flatten(1)

    def forward(self, hidden_states: Tensor, guidance: Tensor) -> Tensor:
        """Convolve (B, C, h, w), guided by (B, G, h', w')."""
        on_cpu = self.scaled_conv.weight.device.type == "cpu"  # "meta" if Accelerate keeps the weights on disk
        if on_cpu and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return srs_dynamic_conv_ref(self, hidden_states, guidance)
        scale = self.guidance_scale(guidance).repeat_interleave(self.channels_per_scalar, dim=1)  # (B, C)
        return self.static_conv(hidden_states) + scale[:, :, None, None] * self.scaled_conv(hidden_states)


def srs_dynamic_conv_ref(conv: SrsDynamicConv, hidden_states: Tensor, guidance: Tensor) -> Tensor:
    """Convolve with kernels of each image: the definition."""
    outputs = []
    for image, scalars in zip(hidden_states, conv.guidance_scale(guidance), strict=True):
        scale = scalars.repeat_interleave(conv.channels_per_scalar)[:, None, None, None]
        kernel = conv.static_conv.weight + scale * conv.scaled_conv.weight  # (C, C, 3, 3)
        outputs.append(F.conv2d(image[None], kernel, padding=1))
    return torch.cat(outputs)


def upsample_aligned(hidden_states: Tensor, factor: int) -> Tensor:
    """Enlarge (B, C, H, W) bilinearly by a factor, with aligned corners."""
    return F.interpolate(hidden_states, scale_factor=factor, mode="bilinear", align_corners=True)


class SrsPreTrainedModel(UnconcealPreTrainedModel):
    """Checkpointing of the SRS networks.

    DEVIATION: The paper's grouped convolution has a fan-in of 1 and so draws kernels from U(-1, 1). The output of its
    dynamic convolution is some 28 times the input. Ours starts at the scale of an ordinary convolution.
    """

    config_class = SrsConfig
    base_model_prefix = "srs"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SrsBlock"]


class SrsForReconstruction(SrsPreTrainedModel):
    """Reconstruction network R, trained in phase 1."""

    auto_classes = ("AutoModel",)

    def __init__(self, config: SrsConfig):
        super().__init__(config)
        sizes, depths = config.reconstruction_hidden_sizes, config.reconstruction_depths
        # The name is that of `SrsForImageSegmentation`, so that phase 2 finds it in a checkpoint of phase 1.
        self.reconstruction_encoder = SrsEncoder(config, config.reconstruction_stem_size, sizes, depths)
        self.reconstruction_decoder = SrsDecoder(config, sizes, depths, local_contrast=True)
        self.reconstruction_head = nn.Conv2d(sizes[0], config.num_channels, kernel_size=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool | None = None
    ) -> SrsReconstructionOutput:
        """Reconstruct a batch of images.

        Args:
            pixel_values: (B, 3, H, W), normalized RGB, at least 32x32.
            labels: Ignored; an image is its own label. All networks have this argument.
            output_hidden_states: Whether to return `hidden_states`. None means: as configured.

        Returns:
            `SrsReconstructionOutput`, always with a loss.

        Raises:
            ValueError: If the channels or the size of the image do not fit.
        """
        self.check_pixel_values(pixel_values)
        padded, cropping = pad_edges(pixel_values, PADDING_MULTIPLE)
        features = self.reconstruction_encoder(padded)
        decoded = self.reconstruction_decoder(features)
        reconstruction = F.pad(self.reconstruction_head(decoded[-1]), cropping)
        loss = F.mse_loss(reconstruction.float(), pixel_values.float())
        hidden_states = self.keep_hidden_states(output_hidden_states, (*features, *decoded))
        return SrsReconstructionOutput(loss, reconstruction, hidden_states)


class SrsForImageSegmentation(SrsPreTrainedModel):
    """Segmentation network S with R's frozen encoder, trained in phase 2.

    `SrsForImageSegmentation.from_pretrained(phase_1_folder)` loads the encoder from a checkpoint of
    `SrsForReconstruction` and initializes the rest.
    """

    _keys_to_ignore_on_load_unexpected = [r"^reconstruction_decoder\.", r"^reconstruction_head\."]

    def __init__(self, config: SrsConfig):
        super().__init__(config)
        self.reconstruction_encoder = SrsEncoder(
            config, config.reconstruction_stem_size, config.reconstruction_hidden_sizes, config.reconstruction_depths
        )
        self.encoder = SrsEncoder(config, config.stem_size, config.hidden_sizes, config.depths)
        self.dynamic_conv = SrsDynamicConv(
            config.hidden_sizes[-1], config.reconstruction_hidden_sizes[-1], config.attention_reduction_ratio
        )
        self.decoder = SrsDecoder(config, config.hidden_sizes, config.depths, local_contrast=False)
        self.head = nn.Conv2d(config.hidden_sizes[0], 1, kernel_size=1)
        self.post_init()
        self.train(self.training)

    def train(self, mode: bool = True):
        """Set training mode, but keep the encoder of R frozen."""
        super().train(mode)
        # Not in `__init__`, because loading a checkpoint replaces the parameters and then calls `eval()`.
        self.reconstruction_encoder.eval().requires_grad_(False)
        if self.config.reconstruction_batch_statistics:
            for module in self.reconstruction_encoder.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.train().track_running_stats = False  # keep the learned statistics
        return self

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool | None = None
    ) -> SrsSegmentationOutput:
        """Segment a batch of images.

        Args:
            pixel_values: (B, 3, H, W), normalized RGB, at least 32x32.
            labels: (B, H, W) or (B, 1, H, W) in [0, 1], 1 for object. Soft values are allowed.
            output_hidden_states: Whether to return `hidden_states`. None means: as configured.

        Raises:
            ValueError: If images or labels do not fit.
        """
        self.check_pixel_values(pixel_values)
        padded, cropping = pad_edges(pixel_values, PADDING_MULTIPLE)
        # 1. Guidance from the reconstruction network.
        with torch.no_grad():
            guidance = self.reconstruction_encoder(padded)[-1]  # (B, G, H / 8, W / 8)
        # 2. Encoder. The dynamic convolution corrects its deepest feature.
        features = self.encoder(padded)
        features[-1] = features[-1] + self.dynamic_conv(features[-1], guidance)
        # 3. Decoder and head.
        decoded = self.decoder(features)
        logits = F.pad(self.head(decoded[-1]), cropping)

        loss = loss_dict = None
        if labels is not None:
            labels = self.match_labels(labels, logits)
            weights = self.config.bce_weight, self.config.dice_weight
            terms = bce_dice_terms(logits, labels, *weights, batch_dice=self.config.batch_dice)
            loss, loss_dict = add_terms(terms)
        hidden_states = self.keep_hidden_states(output_hidden_states, (*features, *decoded))
        return SrsSegmentationOutput(loss, logits, hidden_states, loss_dict)


__all__ = ["SrsConfig", "SrsForImageSegmentation", "SrsForReconstruction", "SrsPreTrainedModel"]
