"""RUN: finds what is camouflaged by unfolding an optimisation of mask and background.

Paper: "RUN: Reversible Unfolding Network for Concealed Object Segmentation", ICML 2025,
https://arxiv.org/abs/2501.18783. Written from the paper's figures and formulas.

An image C is the sum of what the mask M covers and a background B. Both are found together as the minimum of

    L(M, B) = 1/2 ||C - C * M - B||^2 + mu psi(M) + lambda phi(B) + alpha S(w * (M - M~)),

by turns: a closed form and a learned network for M (SOFS), then the same for B (ROBE), once in every stage.

| symbol | here | shape for an H x W image, at stride s of the stage |
|---|---|---|
| C | `image`, in [0, 1] | (B, 3, H / s, W / s) |
| E(C) | `features` of a stage | (B, hidden_size, H / s, W / s) |
| M_k, E_k | `mask_logits[k]`, `edge_logits[k - 1]` before the sigmoid | (B, 1, H / s, W / s) |
| M^_k | `RunMaskStep` output | (B, 1, H / s, W / s) |
| w, M~ | `uncertainty_filter` | (B, 1, H / s, W / s) |
| mu, alpha L_S, grad S / L_S | `proximity`, `sparsity`, `sparsity_gradient` of `RunMaskStep` | |
| B^_k, lambda | `background_minimizer`, `RunBackgroundStep.proximity` | (B, 3, H / s, W / s) |
| B_k, C^_k | `backgrounds[k]`, `reconstructions[k - 1]` | (B, 3, H / s, W / s) |
| VSS_s, VSS_l | `RunStateSpaceBlock` with and without windows | |
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbones import FINEST_STRIDE, NUM_LEVELS, STRIDE, UnconcealBackboneModel
from .configuration_run import RunConfig
from .losses import (
    ambiguity_coefficient,
    ambiguity_loss,
    contour_weights,
    edge_dice_loss,
    mask_edges,
    structure_loss,
)
from .modeling_unconceal import ChannelLayerNorm, padding_to, upsample
from .selective_scan import selective_scan


# Brightness that is added on both sides of B / C, so that black pixels have a share as well.
BLACK = 1e-2
# M^ is no probability: it is held this far from 0 and 1 where its logit is taken.
LEAST_PROBABILITY = 1e-2


@dataclass
class RunSegmentationOutput(ModelOutput):
    """Output of `RunForImageSegmentation`. With `output_stages` it shows the unfolding stage by stage.

    The maps of stage k have the stride of its level, 4 * 2 ** stage_levels[k - 1], and cover the image padded to multiples
    of 32 at the right and the bottom.

    Args:
        loss: Scalar, present when `labels` is given.
        logits: (B, 1, H, W), pre-sigmoid, the last stage's mask at the input size.
        mask_logits: K + 1 tensors (B, 1, h, w), pre-sigmoid: the coarse mask M_0, then M_1 to M_K.
        edge_logits: K tensors (B, 1, h, w), pre-sigmoid: E_1 to E_K.
        backgrounds: K + 1 tensors (B, 3, h, w), RGB, [0, 1] is black to white: B_0 to B_K. None without unfolding, too.
        reconstructions: K tensors (B, 3, h, w), RGB likewise: C^_1 to C^_K. None without ROBE, too.
        hidden_states: Present when asked for: the encoder's features (B, C, h, w), strides 4 to 32, then what the coarse
            mask and each stage's mask are drawn from, K + 1 tensors (B, hidden_size, h, w).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mask_logits: tuple[torch.Tensor, ...] | None = None
    edge_logits: tuple[torch.Tensor, ...] | None = None
    backgrounds: tuple[torch.Tensor, ...] | None = None
    reconstructions: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


def uncertainty_filter(probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (w, M~) of a mask: 0 where it is undecided and else 1, and the mask with its leanings hardened.

    Args:
        probs: Any shape, in [0, 1].
    """
    certain = ((probs <= 0.4) | (probs >= 0.6)).to(probs.dtype)
    hardened = torch.where((probs > 0.1) & (probs < 0.4), 0.1, probs)
    hardened = torch.where((probs > 0.6) & (probs < 0.9), 0.9, hardened)
    return certain, hardened


def mask_minimizer(
    image: torch.Tensor,
    background: torch.Tensor,
    previous: torch.Tensor,
    proximity: torch.Tensor | float,
    certain: torch.Tensor | float = 0.0,
    hardened: torch.Tensor | float = 0.0,
    step_before: torch.Tensor | float = 0.0,
    gradient: torch.Tensor | float = 0.0,
    sparsity: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Return M^_k, the minimum over M of the quadratic surrogate, (B, 1, h, w) (section 3 of the paper, derived anew).

    With T(M) = w_k (M - M~_k), T_{k-1} = w_{k-1} (M_{k-1} - M~_{k-1}) and the sum over the image's channels, it minimises

        1/2 ||C - C M - B_{k-1}||^2 + mu/2 ||M - M_{k-1}||^2 + alpha L_S/2 ||T(M) - T_{k-1} + g||^2.

    DEVIATION: the paper's figure drops mu M_{k-1} and alpha L_S w_k w_{k-1} M~_{k-1} from the numerator, and the release
    w^2 from the denominator and solves each colour for itself; this is the exact minimum.

    Args:
        image: C, (B, 3, h, w), in [0, 1].
        background: B_{k-1}, as `image`.
        previous: M_{k-1}, (B, 1, h, w), in [0, 1].
        proximity: mu, positive.
        certain: w_k, as `previous`.
        hardened: M~_k, as `previous`.
        step_before: T_{k-1}, as `previous`.
        gradient: g = grad S(T_{k-1}) / L_S, as `previous`.
        sparsity: alpha L_S, at least 0; the four before count where it is above.
    """
    numerator = (image * (image - background)).sum(dim=1, keepdim=True) + proximity * previous
    numerator = numerator + sparsity * certain * (certain * hardened + step_before - gradient)
    denominator = image.square().sum(dim=1, keepdim=True) + proximity + sparsity * certain * certain
    return numerator / denominator


def background_minimizer(
    image: torch.Tensor, mask: torch.Tensor, previous: torch.Tensor, proximity: torch.Tensor | float
) -> torch.Tensor:
    """Return B^_k, the minimum over B of 1/2 ||C - C M_k - B||^2 + lambda/2 ||B - B_{k-1}||^2, (B, 3, h, w).

    Args:
        image: C, (B, 3, h, w), in [0, 1].
        mask: M_k, (B, 1, h, w), in [0, 1].
        previous: B_{k-1}, as `image`.
        proximity: lambda, positive.
    """
    return (proximity * previous + image - mask * image) / (1 + proximity)


def background_share(background: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return B / C in [0, 1], (B, 3, h, w): 1 - M where B is the image with the mask cut out, and on black.

    DEVIATION: the paper divides by C as it is, which says nothing where C is black.

    Args:
        background: B, (B, 3, h, w).
        image: C, (B, 3, h, w), in [0, 1].
        mask: M, (B, 1, h, w), in [0, 1].
    """
    return ((background + BLACK * (1 - mask)) / (image + BLACK)).clamp(0, 1)


class RunConvNormAct(nn.Sequential):
    """Convolution without bias, group norm, ReLU; by default it keeps the size.

    Group norm, because reconstruction and shared stages meet several resolutions with one set of statistics, and
    high-resolution batches are small.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1):
        super().__init__(
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                padding=dilation * (kernel_size // 2),
                dilation=dilation,
                bias=False,
            ),
            nn.GroupNorm(out_channels // 8, out_channels),
            nn.ReLU(),
        )


class RunNeck(nn.Module):
    """Brings the encoder's levels to one width and adds each level to the next finer one."""

    def __init__(self, in_channels: list[int], hidden_size: int):
        super().__init__()
        self.laterals = nn.ModuleList(RunConvNormAct(channels, hidden_size, kernel_size=1) for channels in in_channels)
        self.fusions = nn.ModuleList(RunConvNormAct(hidden_size, hidden_size, kernel_size=3) for _ in in_channels)

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Return four (B, hidden_size, H / s, W / s), finest first, from the encoder's feature maps in that order."""
        pyramid, above = [], None
        for feature_map, lateral, fusion in reversed(
            list(zip(feature_maps, self.laterals, self.fusions, strict=True))
        ):
            hidden_states = lateral(feature_map)
            if above is not None:
                hidden_states = hidden_states + upsample(above, 2)
            above = fusion(hidden_states)
            pyramid.insert(0, above)
        return pyramid


class RunCoarseHead(nn.Module):
    """A first mask from the deepest feature, seen through four receptive fields and the image's mean (ASPP)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.branches = nn.ModuleList(
            [
                RunConvNormAct(hidden_size, hidden_size, kernel_size=1),
                *(RunConvNormAct(hidden_size, hidden_size, kernel_size=3, dilation=rate) for rate in (6, 12, 18)),
            ]
        )
        self.pooled = nn.Sequential(nn.Conv2d(hidden_size, hidden_size, kernel_size=1), nn.ReLU())
        self.merge = RunConvNormAct((len(self.branches) + 1) * hidden_size, hidden_size, kernel_size=1)
        self.mask_head = nn.Conv2d(hidden_size, 1, kernel_size=3, padding=1)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states (B, C, h, w) and mask logits (B, 1, h, w) from (B, C, h, w)."""
        pooled = self.pooled(features.mean(dim=(2, 3), keepdim=True)).expand_as(features)
        hidden_states = self.merge(torch.cat([*(branch(features) for branch in self.branches), pooled], dim=1))
        return hidden_states, self.mask_head(hidden_states)


class RunScan2d(nn.Module):
    """State-space layer over an image: four selective scans, along rows and columns and back, summed (SS2D of VMamba).

    With a window size the scans run in square windows, each for itself: a small receptive field. Without, they run over the
    whole map.
    """

    def __init__(self, config: RunConfig, window_size: int | None):
        super().__init__()
        self.window_size = window_size
        self.inner_size = config.expand * config.hidden_size
        self.state_size = config.state_size
        self.rank = math.ceil(config.hidden_size / 16)
        self.in_proj = nn.Conv2d(config.hidden_size, 2 * self.inner_size, kernel_size=1, bias=False)
        self.conv = nn.Conv2d(self.inner_size, self.inner_size, kernel_size=3, padding=1, groups=self.inner_size)
        # For each direction: low-rank time steps, input and output matrices from the tokens.
        self.token_proj = nn.Parameter(torch.empty(4, self.rank + 2 * config.state_size, self.inner_size))
        self.step_proj = nn.Parameter(torch.empty(4, self.inner_size, self.rank))
        self.step_bias = nn.Parameter(torch.empty(4, self.inner_size))
        self.log_decay = nn.Parameter(torch.empty(4 * self.inner_size, config.state_size))  # log of -A
        self.skip = nn.Parameter(torch.empty(4 * self.inner_size))  # D
        self.norm = nn.LayerNorm(self.inner_size)
        self.out_proj = nn.Conv2d(self.inner_size, config.hidden_size, kernel_size=1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        height, width = hidden_states.shape[-2:]
        tokens, gate = self.in_proj(hidden_states).chunk(2, dim=1)
        tokens = F.silu(self.conv(tokens))
        if self.window_size is None:
            mixed = self.scan(tokens)
        else:
            # Windows beyond the border are filled with zeros, which add nothing to a state but let it fade.
            size = self.window_size
            padding = padding_to(size, height, width)
            tokens = F.pad(tokens, padding)
            mixed = join_windows(self.scan(split_windows(tokens, size)), tokens.shape, size)
            mixed = F.pad(mixed, [-side for side in padding])
        mixed = self.norm(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.out_proj(mixed * F.silu(gate))

    def scan(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scan (B, D, H, W) in four directions and return their sum, (B, D, H, W)."""
        batch_size, channels, height, width = tokens.shape
        # 1. Four sequences: along the rows, along the columns, and both reversed.
        rows, columns = tokens.flatten(2), tokens.transpose(2, 3).flatten(2)  # (B, D, L)
        forth = torch.stack([rows, columns], dim=1)
        sequences = torch.cat([forth, forth.flip(-1)], dim=1).flatten(1, 2)  # (B, 4 D, L)
        # 2. Time steps, input and output matrices of each token (Mamba, section 3.2). By grouped convolutions, as a batched
        # product leaves strides that tie an exported network to a batch size.
        projected = F.conv1d(sequences, self.token_proj.flatten(0, 1)[..., None], groups=4).unflatten(1, (4, -1))
        steps, inputs, outputs = projected.split([self.rank, self.state_size, self.state_size], dim=2)
        steps = F.conv1d(steps.flatten(1, 2), self.step_proj.flatten(0, 1)[..., None], groups=4)  # (B, 4 D, L)
        steps = F.softplus(steps.float() + self.step_bias.float().view(-1, 1))
        # 3. All directions in one scan, each its own group.
        mixed = selective_scan(
            sequences,
            steps,
            -self.log_decay.float().exp(),
            inputs,
            outputs,
            self.skip.float(),
        ).view(batch_size, 4, channels, height * width)
        # 4. Back to the image.
        mixed = mixed[:, :2] + mixed[:, 2:].flip(-1)  # (B, 2, D, L)
        rows = mixed[:, 0].reshape(batch_size, channels, height, width)
        return rows + mixed[:, 1].reshape(batch_size, channels, width, height).transpose(2, 3)


class RunChannelAttentionBlock(nn.Sequential):
    """Two 3x3 convolutions through a third of the width, weighted by channel attention (the CAB of MambaIR)."""

    def __init__(self, channels: int):
        narrow = max(channels // 3, 1)
        super().__init__(
            nn.Conv2d(channels, narrow, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(narrow, channels, kernel_size=3, padding=1),
            RunChannelAttention(channels),
        )


class RunChannelAttention(nn.Module):
    """Weighs each channel by what the means of all channels say."""

    def __init__(self, channels: int):
        super().__init__()
        narrow = max(channels // 16, 4)
        self.squeeze = nn.Conv2d(channels, narrow, kernel_size=1)
        self.excite = nn.Conv2d(narrow, channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the weighted (B, C, H, W)."""
        pooled = hidden_states.mean(dim=(2, 3), keepdim=True)
        return hidden_states * self.excite(F.gelu(self.squeeze(pooled))).sigmoid()


class RunStateSpaceBlock(nn.Module):
    """Visual state-space block: a scan and a channel-attention block, each on a scaled residual (VSS, MambaIR).

    DEVIATION: the release tells VSS_s from VSS_l by the kind of convolution after equal scans; here the scan itself has
    the small or the large field, by running within windows or over the whole map.
    """

    def __init__(self, config: RunConfig, window_size: int | None):
        super().__init__()
        self.scan_norm = ChannelLayerNorm(config.hidden_size)
        self.scan = RunScan2d(config, window_size)
        self.scan_scale = nn.Parameter(torch.empty(config.hidden_size, 1, 1))
        self.conv_norm = ChannelLayerNorm(config.hidden_size)
        self.conv = RunChannelAttentionBlock(config.hidden_size)
        self.conv_scale = nn.Parameter(torch.empty(config.hidden_size, 1, 1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        hidden_states = self.scan_scale * hidden_states + self.scan(self.scan_norm(hidden_states))
        return self.conv_scale * hidden_states + self.conv(self.conv_norm(hidden_states))


class RunConvBlock(nn.Module):
    """Residual block of two 3x3 convolutions; stands in for `RunStateSpaceBlock` where that is switched off."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.layers = nn.Sequential(*(RunConvNormAct(hidden_size, hidden_size, kernel_size=3) for _ in range(2)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        return hidden_states + self.layers(hidden_states)


class RunMaskStep(nn.Module):
    """The closed-form mask M^_k with its learned parts, shared by all stages."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.raw_proximity = nn.Parameter(torch.empty(()))
        self.sparsity_gradient = None
        if config.use_residual_sparsity:
            width = config.sparsity_hidden_size
            self.raw_sparsity = nn.Parameter(torch.empty(()))
            # Without biases: where nothing is left to harden, there is no gradient.
            self.sparsity_gradient = nn.Sequential(
                nn.Conv2d(1, width, kernel_size=3, padding=1, bias=False),
                nn.ReLU(),
                nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
                nn.ReLU(),
                nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
                nn.ReLU(),
                nn.Conv2d(width, 1, kernel_size=3, padding=1, bias=False),
            )

    @property
    def proximity(self) -> torch.Tensor:
        """mu, a positive scalar."""
        return F.softplus(self.raw_proximity.float())

    @property
    def sparsity(self) -> torch.Tensor:
        """alpha L_S, a positive scalar."""  # noqa: D403
        return F.softplus(self.raw_sparsity.float())

    def forward(
        self, image: torch.Tensor, background: torch.Tensor, previous: torch.Tensor, before_previous: torch.Tensor
    ) -> torch.Tensor:
        """Return M^_k, (B, 1, h, w), from C, B_{k-1}, M_{k-1} and M_{k-2}, all in float32."""
        if self.sparsity_gradient is None:
            return mask_minimizer(image, background, previous, self.proximity)
        certain, hardened = uncertainty_filter(previous)
        certain_before, hardened_before = uncertainty_filter(before_previous)
        step_before = certain_before * (previous - hardened_before)  # T_{k-1}
        gradient = self.sparsity_gradient(step_before.to(self.sparsity_gradient[0].weight.dtype)).float()
        return mask_minimizer(
            *(image, background, previous, self.proximity),
            *(certain, hardened, step_before, gradient, self.sparsity),
        )


class RunReconstructionNetwork(nn.Module):
    """U-Net of three levels that corrects the background and paints what the mask covers, shared by all stages."""

    def __init__(self, config: RunConfig):
        super().__init__()
        fine, middle, coarse = config.reconstruction_hidden_sizes
        channels = config.num_channels
        self.stem = RunConvNormAct(channels + 1, fine, kernel_size=3)
        self.down = nn.ModuleList(
            nn.Sequential(RunConvNormAct(a, b, kernel_size=3, stride=2), RunConvNormAct(b, b, kernel_size=3))
            for a, b in ((fine, middle), (middle, coarse))
        )
        self.up = nn.ModuleList(RunConvNormAct(a + b, b, kernel_size=3) for a, b in ((coarse, middle), (middle, fine)))
        self.head = nn.Conv2d(fine, 2 * channels, kernel_size=3, padding=1)

    def forward(self, mask: torch.Tensor, background: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the foreground and the background's correction, each (B, 3, h, w), from M_k and B^_k."""
        dtype = self.head.weight.dtype
        levels = [self.stem(torch.cat([mask, background], dim=1).to(dtype))]
        for down in self.down:
            levels.append(down(levels[-1]))
        hidden_states = levels.pop()
        for up in self.up:
            skip = levels.pop()
            hidden_states = F.interpolate(hidden_states, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            hidden_states = up(torch.cat([hidden_states, skip], dim=1))
        foreground, correction = self.head(hidden_states).float().chunk(2, dim=1)
        return foreground, correction


class RunBackgroundStep(nn.Module):
    """The background B_k and the reconstruction C^_k (ROBE), shared by all stages.

    DEVIATION: the reconstruction is B_k + M_k * F with a painted foreground F, the decomposition of section 3, so that it
    teaches B_k to be the image outside the mask; a free output would teach nothing of the background. The correction of
    B^_k acts where the mask covers: elsewhere B^_k is the image already, and noise there spoils the next closed form.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        self.raw_proximity = nn.Parameter(torch.empty(()))
        self.network = RunReconstructionNetwork(config)

    @property
    def proximity(self) -> torch.Tensor:
        """lambda, a positive scalar."""
        return F.softplus(self.raw_proximity.float())

    def forward(
        self, image: torch.Tensor, mask: torch.Tensor, previous: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return B_k and C^_k, (B, 3, h, w), from C, M_k and B_{k-1}, all in float32."""
        estimate = background_minimizer(image, mask, previous, self.proximity)  # B^_k
        foreground, correction = self.network(mask, estimate)
        background = estimate + mask * correction
        return background, background + mask * foreground


class RunStage(GradientCheckpointingLayer):
    """The learned part of a stage's mask: E(C) from neck and previous stage, then Reversible State Space (RSS).

    DEVIATION: the paper's convolution gives M_k itself, here what is added to the logit of M^_k. Without that sum a trained
    network takes everything from the features and no longer heeds the closed form.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        size = config.hidden_size
        self.features = RunConvNormAct(2 * size, size, kernel_size=3)
        if config.use_state_space:
            self.small_field = RunStateSpaceBlock(config, config.window_size)
            self.large_field = RunStateSpaceBlock(config, None)
        else:
            self.small_field, self.large_field = RunConvBlock(size), RunConvBlock(size)
        self.mask_head = nn.Conv2d(size, 1, kernel_size=3, padding=1)
        self.edge_head = nn.Conv2d(size, 1, kernel_size=3, padding=1)

    def forward(
        self,
        neck_features: torch.Tensor,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None,
        share: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return hidden states (B, C, h, w) and the logits of M_k and E_k, (B, 1, h, w).

        Args:
            neck_features: (B, C, h, w) of the stage's level.
            hidden_states: As `neck_features`, of the stage before.
            mask: M^_k, (B, 1, h, w); None without unfolding.
            share: B_{k-1} / C, (B, 1, h, w), in [0, 1]; None without unfolding.
        """
        inside = outside = features = self.features(torch.cat([neck_features, hidden_states], dim=1))  # E(C)
        if mask is not None:
            inside, outside = (features * map_.to(features.dtype) + features for map_ in (mask, share))
        hidden_states = self.small_field(inside) + self.large_field(outside)
        mask_logits = self.mask_head(hidden_states)
        if mask is not None:
            mask_logits = mask_logits + torch.logit(mask, eps=LEAST_PROBABILITY).to(mask_logits.dtype)
        return hidden_states, mask_logits, self.edge_head(hidden_states)


def split_windows(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """Cut (B, C, H, W), H and W multiples of `size`, into (B * windows, C, size, size)."""
    batch_size, channels, height, width = tokens.shape
    rows, columns = height // size, width // size
    tokens = tokens.view(batch_size, channels, rows, size, columns, size)
    return tokens.permute(0, 2, 4, 1, 3, 5).reshape(batch_size * rows * columns, channels, size, size)


def join_windows(windows: torch.Tensor, shape: torch.Size, size: int) -> torch.Tensor:
    """Undo `split_windows` for tokens of `shape`."""
    batch_size, channels, height, width = shape
    windows = windows.view(batch_size, height // size, width // size, channels, size, size)
    return windows.permute(0, 3, 1, 4, 2, 5).reshape(batch_size, channels, height, width)


class RunPreTrainedModel(UnconcealBackboneModel):
    """Weight initialisation and checkpointing of RUN."""

    config_class = RunConfig
    base_model_prefix = "run"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RunStage"]
    # Half precision would change how fast states fade.
    _keep_in_fp32_modules_strict = ["log_decay", "step_bias", "skip", "raw_proximity", "raw_sparsity"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Set every parameter of `module`: convolutions by PyTorch's default rule, scans as Mamba's."""
        if isinstance(module, RunScan2d):
            init.uniform_(module.token_proj, -(module.inner_size**-0.5), module.inner_size**-0.5)
            init.uniform_(module.step_proj, -(module.rank**-0.5), module.rank**-0.5)
            # Time steps from 0.001 to 0.1, evenly in their logarithm; the bias is their inverse softplus.
            steps = torch.empty_like(module.step_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            init.copy_(module.step_bias, steps + torch.log(-torch.expm1(-steps)))
            decays = torch.arange(1, module.state_size + 1, dtype=torch.float32, device=steps.device)
            init.copy_(module.log_decay, decays.log().expand_as(module.log_decay))
            init.ones_(module.skip)
        elif isinstance(module, RunStateSpaceBlock):
            init.ones_(module.scan_scale)
            init.ones_(module.conv_scale)
        elif isinstance(module, (RunMaskStep, RunBackgroundStep)):
            for parameter in module.parameters(recurse=False):
                init.constant_(parameter, math.log(math.expm1(0.1)))  # mu, alpha L_S and lambda start at 0.1
        elif isinstance(module, RunReconstructionNetwork):
            # The first backgrounds are the closed form's.
            init.normal_(module.head.weight, std=1e-3)
            init.zeros_(module.head.bias)
        else:
            super()._init_weights(module)


class RunForImageSegmentation(RunPreTrainedModel):
    """RUN: encoder, neck, a coarse mask, and K stages that turn by turn improve mask and background.

    The encoder starts at random; `from_backbone` and `load_backbone` give it pretrained weights. The weight of the
    ambiguity loss depends on `training_progress`; it is the final one if no training loop sets that.
    """

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.backbone = self.make_backbone()
        self.neck = RunNeck(self.backbone.channels, config.hidden_size)
        self.coarse_head = RunCoarseHead(config.hidden_size)
        self.mask_step = RunMaskStep(config) if config.use_unfolding else None
        self.background_step = RunBackgroundStep(config) if config.use_unfolding and config.use_background else None
        self.stages = nn.ModuleList(RunStage(config) for _ in range(1 if config.share_stages else config.num_stages))
        self.post_init()

    @property
    def num_stages(self) -> int:
        """Number of unfolded stages, K in the paper."""
        return self.config.num_stages

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_stages: bool = False,
    ) -> RunSegmentationOutput:
        """Segment a batch of images.

        Args:
            pixel_values: (B, 3, H, W), normalised RGB, at least 32x32.
            labels: (B, H, W) or (B, 1, H, W) in [0, 1], 1 for object. Soft values are allowed.
            output_hidden_states: Whether to return `hidden_states`; as the configuration says where it is None.
            output_stages: Whether to return the maps of every stage.

        Returns:
            `RunSegmentationOutput`.

        Raises:
            ValueError: If the number of channels is another, the image is too small, `labels` has another size, or the
                encoder's features are not at strides 4, 8, 16 and 32.
        """
        self.check_pixel_values(pixel_values)
        height, width = pixel_values.shape[-2:]
        padding = padding_to(STRIDE, height, width)
        pixel_values = F.pad(pixel_values, padding, mode="replicate")
        # 1. The image in [0, 1], and what the encoder sees in it.
        full_image = self.denormalize(pixel_values)  # C
        pyramid = self.encode(pixel_values)
        all_hidden_states = self.keep_hidden_states(output_hidden_states, pyramid)
        pyramid = self.neck(pyramid)
        # 2. Start: M_0 from the deepest feature, M_{-1} = M_0, B_0 = (1 - M_0) C.
        hidden_states, coarse_logits = self.coarse_head(pyramid[-1])
        if all_hidden_states is not None:
            all_hidden_states += (hidden_states,)
        before_previous = coarse_logits
        share = 1 - coarse_logits.float().sigmoid()  # B_0 / C
        mask_logits, edge_logits, backgrounds, reconstructions = [coarse_logits], [], [], []
        level_before = NUM_LEVELS - 1
        for k, level in enumerate(self.config.stage_levels):
            # 3. Everything at the resolution of this stage.
            factor = 2 ** (level_before - level)
            hidden_states, previous, before_previous = (
                upsample(maps, factor) for maps in (hidden_states, mask_logits[-1], before_previous)
            )
            estimate = mean_share = None
            if self.mask_step is not None:
                image = F.avg_pool2d(full_image, FINEST_STRIDE * 2**level)
                probs, probs_before = previous.float().sigmoid(), before_previous.float().sigmoid()
                # DEVIATION: not B_{k-1} itself is carried to this level, where its fine texture would be missing, but its
                # share of the image, which is smooth. It holds B to 0 <= B <= C, as the decomposition C = F + B demands.
                share = upsample(share, factor)
                background = image * share
                if k == 0:
                    backgrounds.append(background)
                # 4. SOFS: the closed form,
                estimate = self.mask_step(image, background, probs, probs_before)  # M^_k
                mean_share = share.mean(dim=1, keepdim=True)
            # and the learned network.
            hidden_states, logits, edges = self.stages[k % len(self.stages)](
                pyramid[level], hidden_states, estimate, mean_share
            )
            mask_logits.append(logits)
            edge_logits.append(edges)
            if all_hidden_states is not None:
                all_hidden_states += (hidden_states,)
            # 5. ROBE: closed form, then the learned network.
            if self.mask_step is not None:
                probs = logits.float().sigmoid()
                if self.background_step is not None:
                    background, reconstruction = self.background_step(image, probs, background)
                    reconstructions.append(reconstruction)
                else:
                    background = image - probs * image
                backgrounds.append(background)
                share = background_share(background, image, probs)
            before_previous, level_before = previous, level
        # 6. The last mask at the size of the input; by negative padding, as slicing would tie an exported network to a size.
        padded_logits = upsample(mask_logits[-1], FINEST_STRIDE * 2**level_before)
        logits = F.pad(padded_logits, [-side for side in padding])

        loss = None
        if labels is not None:
            loss = self.compute_loss(
                self.match_labels(labels, logits), full_image, logits, mask_logits, edge_logits, reconstructions
            )
        output = RunSegmentationOutput(loss, logits, hidden_states=all_hidden_states)
        if output_stages:  # not always: transformers' pipelines cannot take tuples apart into images
            output.mask_logits = tuple(mask_logits)
            output.edge_logits = tuple(edge_logits)
            output.backgrounds = tuple(backgrounds) or None
            output.reconstructions = tuple(reconstructions) or None
        return output

    def denormalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the image in [0, 1], (B, 3, H, W), float32, that the image processor normalised."""
        mean, std = (
            torch.tensor(values, device=pixel_values.device)[:, None, None]
            for values in (self.config.image_mean, self.config.image_std)
        )
        return (pixel_values.float() * std + mean).clamp(0, 1)

    def compute_loss(
        self,
        labels: torch.Tensor,
        image: torch.Tensor,
        logits: torch.Tensor,
        mask_logits: list[torch.Tensor],
        edge_logits: list[torch.Tensor],
        reconstructions: list[torch.Tensor],
    ) -> torch.Tensor:
        """Return the total loss, a scalar; the arguments are as in the output, `image` is padded as the maps are.

        DEVIATION: edges are compared at the resolution of their stage, where a cell is edge if any of its pixels is; in
        the release a coarse stage must draw thin lines at full size. Its release computes the reconstruction's error
        between masks and backgrounds of different stages and does not add it.
        """
        config, num_stages = self.config, len(edge_logits)
        height, width = labels.shape[-2:]
        padding = (0, image.shape[-1] - width, 0, image.shape[-2] - height)
        edges = F.pad(mask_edges(labels), padding)
        pixel_weights = contour_weights(labels)
        total = 0
        for k in range(num_stages + 1):
            weight = config.stage_weight_decay ** (num_stages - k)
            stride = image.shape[-1] // mask_logits[k].shape[-1]
            at_input_size = F.pad(upsample(mask_logits[k], stride), [-side for side in padding])
            stage = structure_loss(at_input_size, labels, pixel_weights, config.bce_weight, config.iou_weight)
            # What lies wholly beyond the input is no evidence.
            inside = (..., slice(math.ceil(height / stride)), slice(math.ceil(width / stride)))
            if k > 0:
                stage_edges = F.max_pool2d(edges, stride)[inside]
                stage = stage + config.edge_weight * edge_dice_loss(edge_logits[k - 1][inside], stage_edges)
            if k > 0 and reconstructions:
                error = F.mse_loss(reconstructions[k - 1][inside], F.avg_pool2d(image, stride)[inside])
                stage = stage + config.reconstruction_weight * error
            total = total + weight * stage
        coefficient = config.ambiguity_weight * ambiguity_coefficient(self.training_progress)
        return total + coefficient * ambiguity_loss(logits)


__all__ = ["RunConfig", "RunForImageSegmentation", "RunPreTrainedModel"]
