"""RUN: segments camouflaged objects by unfolding an optimization of mask and background.

Paper: "RUN: Reversible Unfolding Network for Concealed Object Segmentation", ICML 2025,
https://arxiv.org/abs/2501.18783. Written from its figures and formulas.

An image C is the sum of a foreground, which the mask M covers, and a background B. M and B minimize

    L(M, B) = 1/2 ||C - C * M - B||^2 + mu psi(M) + lambda phi(B) + alpha S(w * (M - M~)),

in turns. Every stage takes a closed form and a learned network for M (SOFS), then the same for B (ROBE).

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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbones import COARSEST_STRIDE, FINEST_STRIDE, NUM_LEVELS, UnconcealBackboneModel
from .configuration_run import RunConfig
from .losses import ambiguity_coefficient, ambiguity_loss, contour_weights, edge_dice_loss, mask_edges, structure_loss
from .modeling_unconceal import ChannelLayerNorm, pad_edges, padding_to, upsample
from .selective_scan import is_exporting, selective_scan


# Brightness added to B and C, so that B / C is defined for black pixels.
BLACK = 1e-2
# M^ can leave [0, 1]. It is clamped this far from 0 and 1 before its logit is taken.
LEAST_PROBABILITY = 1e-2


@dataclass
class RunSegmentationOutput(ModelOutput):
    """Output of `RunForImageSegmentation`.

    With `output_stages` it holds the maps of every stage. Those of stage k have stride 4 * 2 ** stage_levels[k - 1].
    They cover the image, padded at the right and bottom to multiples of 32.

    Args:
        loss: Scalar, present when `labels` is given.
        logits: (B, 1, H, W), pre-sigmoid, the mask of the last stage at the input size.
        mask_logits: K + 1 tensors (B, 1, h, w), pre-sigmoid: the coarse mask M_0, then M_1 to M_K.
        edge_logits: K tensors (B, 1, h, w), pre-sigmoid: E_1 to E_K.
        backgrounds: K + 1 tensors (B, 3, h, w), RGB from black 0 to white 1: B_0 to B_K.
        reconstructions: K tensors (B, 3, h, w), RGB in the same range: C^_1 to C^_K.
        hidden_states: Present on request. First the features of the encoder, (B, C, h, w), strides 4 to 32. Then the
            features behind M_0 to M_K, K + 1 tensors (B, hidden_size, h, w).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    mask_logits: tuple[Tensor, ...] | None = None
    edge_logits: tuple[Tensor, ...] | None = None
    backgrounds: tuple[Tensor, ...] | None = None
    reconstructions: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def uncertainty_filter(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return (w, M~) of a mask M, any shape, in [0, 1].

    w is 0 for undecided pixels and otherwise 1. M~ has values near 0 or 1 moved closer to them.
    """
    certain = ((probs <= 0.4) | (probs >= 0.6)).to(probs.dtype)
    hardened = torch.where((probs > 0.1) & (probs < 0.4), 0.1, probs)
    hardened = torch.where((probs > 0.6) & (probs < 0.9), 0.9, hardened)
    return certain, hardened


def mask_minimizer(
    image: Tensor,
    background: Tensor,
    previous: Tensor,
    proximity: Tensor | float,
    certain: Tensor | float = 0.0,
    hardened: Tensor | float = 0.0,
    step_before: Tensor | float = 0.0,
    gradient: Tensor | float = 0.0,
    sparsity: Tensor | float = 0.0,
) -> Tensor:
    """Return M^_k, the mask of minimal surrogate loss, (B, 1, h, w).

    This follows section 3 of the paper. With T(M) = w_k (M - M~_k), T_{k-1} = w_{k-1} (M_{k-1} - M~_{k-1}) and the sum
    over channels, it minimizes

        1/2 ||C - C M - B_{k-1}||^2 + mu/2 ||M - M_{k-1}||^2 + alpha L_S/2 ||T(M) - T_{k-1} + g||^2.

    DEVIATION: This is the exact minimum. The paper's figure drops mu M_{k-1} and alpha L_S w_k w_{k-1} M~_{k-1} from
    the numerator. The release drops w^2 from the denominator and solves each color separately.

    Args:
        image: C, (B, 3, h, w), in [0, 1].
        background: B_{k-1}, like `image`.
        previous: M_{k-1}, (B, 1, h, w), in [0, 1].
        proximity: mu, positive.
        certain: w_k, like `previous`.
        hardened: M~_k, like `previous`.
        step_before: T_{k-1}, like `previous`.
        gradient: g = grad S(T_{k-1}) / L_S, like `previous`.
        sparsity: alpha L_S, at least 0. At 0 the four arguments before it have no effect.
    """
    numerator = (image * (image - background)).sum(dim=1, keepdim=True) + proximity * previous
    numerator = numerator + sparsity * certain * (certain * hardened + step_before - gradient)
    denominator = image.square().sum(dim=1, keepdim=True) + proximity + sparsity * certain * certain
    return numerator / denominator


def background_minimizer(image: Tensor, mask: Tensor, previous: Tensor, proximity: Tensor | float) -> Tensor:
    """Return B^_k, the background of minimal surrogate loss, (B, 3, h, w).

    It minimizes 1/2 ||C - C M_k - B||^2 + lambda/2 ||B - B_{k-1}||^2.

    Args:
        image: C, (B, 3, h, w), in [0, 1].
        mask: M_k, (B, 1, h, w), in [0, 1].
        previous: B_{k-1}, like `image`.
        proximity: lambda, positive.
    """
    return (proximity * previous + image - mask * image) / (1 + proximity)


def background_share(background: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Return B / C in [0, 1], (B, 3, h, w).

    It is 1 - M for black pixels, and if B = (1 - M) C.

    DEVIATION: The paper divides by C itself, which is undefined for black pixels.

    Args:
        background: B, (B, 3, h, w).
        image: C, (B, 3, h, w), in [0, 1].
        mask: M, (B, 1, h, w), in [0, 1].
    """
    return ((background + BLACK * (1 - mask)) / (image + BLACK)).clamp(0, 1)


class RunConvNormAct(nn.Sequential):
    """Convolution without bias, group norm, ReLU; keeps the size by default.

    Batch norm would need large batches, and one set of statistics for several resolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1):
        padding = dilation * (kernel_size // 2)
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False),
            nn.GroupNorm(out_channels // 8, out_channels),
            nn.ReLU(),
        )


class RunNeck(nn.Module):
    """Feature pyramid: one width for all levels, added from coarse to fine."""

    def __init__(self, in_channels: list[int], hidden_size: int):
        super().__init__()
        self.laterals = nn.ModuleList(RunConvNormAct(channels, hidden_size, kernel_size=1) for channels in in_channels)
        self.fusions = nn.ModuleList(RunConvNormAct(hidden_size, hidden_size, kernel_size=3) for _ in in_channels)

    def forward(self, feature_maps: tuple[Tensor, ...]) -> list[Tensor]:
        """Map the encoder's features to (B, hidden_size, h, w), finest first."""
        pyramid = []
        for i in reversed(range(len(feature_maps))):
            hidden_states = self.laterals[i](feature_maps[i])
            if pyramid:
                hidden_states = hidden_states + upsample(pyramid[0], 2)
            pyramid.insert(0, self.fusions[i](hidden_states))
        return pyramid


class RunCoarseHead(nn.Module):
    """First mask from the deepest feature, by spatial pyramid pooling (ASPP)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.branches = nn.ModuleList([RunConvNormAct(hidden_size, hidden_size, kernel_size=1)])
        self.branches += [RunConvNormAct(hidden_size, hidden_size, 3, dilation=rate) for rate in (6, 12, 18)]
        self.pooled = nn.Sequential(nn.Conv2d(hidden_size, hidden_size, kernel_size=1), nn.ReLU())
        self.merge = RunConvNormAct((len(self.branches) + 1) * hidden_size, hidden_size, kernel_size=1)
        self.mask_head = nn.Conv2d(hidden_size, 1, kernel_size=3, padding=1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return features, (B, C, h, w), and mask logits."""
        pooled = self.pooled(features.mean(dim=(2, 3), keepdim=True)).expand_as(features)
        hidden_states = self.merge(torch.cat([*(branch(features) for branch in self.branches), pooled], dim=1))
        return hidden_states, self.mask_head(hidden_states)


class RunScan2d(nn.Module):
    """State-space layer for images (SS2D of VMamba).

    It sums four selective scans, along rows and columns in both directions. With a window size the scans stay in
    square windows, a small receptive field. Otherwise they cover the whole map.
    """

    def __init__(self, config: RunConfig, window_size: int | None):
        super().__init__()
        self.window_size = window_size
        self.inner_size = config.expand * config.hidden_size
        self.state_size = config.state_size
        self.rank = math.ceil(config.hidden_size / 16)
        self.in_proj = nn.Conv2d(config.hidden_size, 2 * self.inner_size, kernel_size=1, bias=False)
        self.conv = nn.Conv2d(self.inner_size, self.inner_size, kernel_size=3, padding=1, groups=self.inner_size)
        # Low-rank time steps, input and output matrices from the tokens, for each direction.
        self.token_proj = nn.Parameter(torch.empty(4, self.rank + 2 * config.state_size, self.inner_size))
        self.step_proj = nn.Parameter(torch.empty(4, self.inner_size, self.rank))
        self.step_bias = nn.Parameter(torch.empty(4, self.inner_size))
        self.log_decay = nn.Parameter(torch.empty(4 * self.inner_size, config.state_size))  # log of -A
        self.skip = nn.Parameter(torch.empty(4 * self.inner_size))  # D
        self.norm = nn.LayerNorm(self.inner_size)
        self.out_proj = nn.Conv2d(self.inner_size, config.hidden_size, kernel_size=1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        height, width = hidden_states.shape[-2:]
        tokens, gate = self.in_proj(hidden_states).chunk(2, dim=1)
        tokens = F.silu(self.conv(tokens))
        if self.window_size is None:
            mixed = self.scan(tokens)
        else:
            size, padding = self.window_size, padding_to(self.window_size, height, width)
            tokens = F.pad(tokens, padding)  # zeros add nothing to a state, which only fades
            mixed = join_windows(self.scan(split_windows(tokens, size)), tokens.shape, size)
            mixed = F.pad(mixed, [-side for side in padding])
        mixed = self.norm(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.out_proj(mixed * F.silu(gate))

    def scan(self, tokens: Tensor) -> Tensor:
        """Return the sum of four scans of (B, D, H, W)."""
        height, width = tokens.shape[-2:]
        # 1. Time steps, input and output matrices of each token and direction (Mamba, section 3.2).
        projected = project(tokens, self.token_proj.flatten(0, 1)).permute(0, 2, 3, 1)
        steps, inputs, outputs = scan_sequences(projected.chunk(4, dim=-1)).split(
            [self.rank, self.state_size, self.state_size], dim=-1
        )
        steps = steps.flatten(2).transpose(1, 2).unsqueeze(-1)  # (B, 4 rank, L, 1)
        steps = project(steps, self.step_proj.flatten(0, 1), groups=4).squeeze(-1)  # (B, 4 D, L)
        steps = F.softplus(steps.float() + self.step_bias.float().view(-1, 1))
        # 2. One scan of all directions, each a group.
        tokens = tokens.permute(0, 2, 3, 1)
        sequences = scan_sequences((tokens,) * 4).flatten(2).transpose(1, 2)  # (B, 4 D, L)
        inputs, outputs = inputs.permute(0, 2, 3, 1), outputs.permute(0, 2, 3, 1)  # (B, 4, states, L)
        mixed = selective_scan(sequences, steps, -self.log_decay.float().exp(), inputs, outputs)
        # 3. Back to the image. The tokens themselves (D x) are added once for all directions.
        mixed = mixed.transpose(1, 2).unflatten(2, (4, -1))  # (B, L, 4, D)
        rows, columns = (mixed[:, :, i] + mixed[:, :, i + 2].flip(1) for i in range(2))
        skip = self.skip.view(4, -1).sum(0).to(tokens.dtype)
        rows = torch.addcmul(rows.unflatten(1, (height, width)), tokens, skip)
        return (rows + columns.unflatten(1, (width, height)).transpose(1, 2)).permute(0, 3, 1, 2)


def project(tokens: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Map the channels of (B, C, H, W) by `weight`.

    By a convolution: the strides of a matrix product would tie an exported network to a batch size.
    """
    if is_exporting():
        tokens = tokens.contiguous()  # the memory format would tie it to sizes above 1
    return F.conv2d(tokens, weight[..., None, None], groups=groups)


def scan_sequences(maps: Sequence[Tensor]) -> Tensor:
    """Return four maps (B, H, W, C) as (B, L, 4, C).

    The first is read row by row, the second column by column, the others so in reverse. In this order of dimensions a
    step of all scans is a block of memory.
    """
    rows, columns, rows_back, columns_back = maps
    rows, rows_back = rows.flatten(1, 2), rows_back.flatten(1, 2)
    columns, columns_back = (z.transpose(1, 2).flatten(1, 2) for z in (columns, columns_back))
    return torch.stack([rows, columns, rows_back.flip(1), columns_back.flip(1)], dim=2)


class RunChannelAttentionBlock(nn.Sequential):
    """Two 3x3 convolutions and channel attention (CAB of MambaIR)."""

    def __init__(self, channels: int):
        narrow = max(channels // 3, 1)
        super().__init__(
            nn.Conv2d(channels, narrow, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(narrow, channels, kernel_size=3, padding=1),
            RunChannelAttention(channels),
        )


class RunChannelAttention(nn.Module):
    """Channel weights from the means of all channels."""

    def __init__(self, channels: int):
        super().__init__()
        narrow = max(channels // 16, 4)
        self.squeeze = nn.Conv2d(channels, narrow, kernel_size=1)
        self.excite = nn.Conv2d(narrow, channels, kernel_size=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the weighted (B, C, H, W)."""
        pooled = hidden_states.mean(dim=(2, 3), keepdim=True)
        return hidden_states * self.excite(F.gelu(self.squeeze(pooled))).sigmoid()


class RunStateSpaceBlock(nn.Module):
    """Visual state-space block: a scan and channel attention, each residual (VSS).

    DEVIATION: Here the scan itself has a small field (windows) or a large one (the whole map). In the release, VSS_s
    and VSS_l have equal scans and differ in the convolution after them.
    """

    def __init__(self, config: RunConfig, window_size: int | None):
        super().__init__()
        self.scan_norm = ChannelLayerNorm(config.hidden_size)
        self.scan = RunScan2d(config, window_size)
        self.scan_scale = nn.Parameter(torch.empty(config.hidden_size, 1, 1))
        self.conv_norm = ChannelLayerNorm(config.hidden_size)
        self.conv = RunChannelAttentionBlock(config.hidden_size)
        self.conv_scale = nn.Parameter(torch.empty(config.hidden_size, 1, 1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        hidden_states = self.scan_scale * hidden_states + self.scan(self.scan_norm(hidden_states))
        return self.conv_scale * hidden_states + self.conv(self.conv_norm(hidden_states))


class RunMaskStep(nn.Module):
    """Closed-form mask M^_k with its learned parameters, shared by all stages."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.raw_proximity = nn.Parameter(torch.empty(()))
        self.raw_sparsity = nn.Parameter(torch.empty(()))
        # Four convolutions, without biases: the gradient is zero if nothing is left to harden.
        widths = [1, *(config.sparsity_hidden_size,) * 3, 1]
        layers = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False), nn.ReLU()]
        self.sparsity_gradient = nn.Sequential(*layers[:-1])

    @property
    def proximity(self) -> Tensor:
        """Return mu, a positive scalar."""
        return F.softplus(self.raw_proximity.float())

    @property
    def sparsity(self) -> Tensor:
        """Return alpha L_S, a positive scalar."""
        return F.softplus(self.raw_sparsity.float())

    def forward(self, image: Tensor, background: Tensor, previous: Tensor, before_previous: Tensor) -> Tensor:
        """Return M^_k from C, B_{k-1}, M_{k-1} and M_{k-2}, in float32."""
        certain, hardened = uncertainty_filter(previous)
        certain_before, hardened_before = uncertainty_filter(before_previous)
        step_before = certain_before * (previous - hardened_before)  # T_{k-1}
        gradient = self.sparsity_gradient(step_before.to(self.sparsity_gradient[0].weight.dtype)).float()
        return mask_minimizer(
            image, background, previous, self.proximity, certain, hardened, step_before, gradient, self.sparsity
        )


class RunReconstructionNetwork(nn.Module):
    """U-Net for background correction and foreground, shared by all stages."""

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

    def forward(self, mask: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
        """Return foreground and background correction, each (B, 3, h, w)."""
        dtype = self.head.weight.dtype
        levels = [self.stem(torch.cat([mask, background], dim=1).to(dtype))]
        for down in self.down:
            hidden_states = levels[-1]
            if self.training and hidden_states.shape[-1] == 1:
                # torch on a CPU has undefined gradients for strided convolutions of one column in bfloat16.
                hidden_states = F.pad(hidden_states, (0, 1))
            levels.append(down(hidden_states))
        hidden_states = levels.pop()
        for up in self.up:
            skip = levels.pop()
            hidden_states = F.interpolate(hidden_states, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            hidden_states = up(torch.cat([hidden_states, skip], dim=1))
        return self.head(hidden_states).float().chunk(2, dim=1)


class RunBackgroundStep(nn.Module):
    """Background B_k and reconstruction C^_k (ROBE), shared by all stages.

    DEVIATION: The reconstruction is B_k + M_k * F with a painted foreground F, as in section 3. So it teaches B_k to
    be the image outside the mask; a free output would not. The correction of B^_k acts only inside the mask: outside,
    B^_k is the image already, and noise would spoil the next closed form.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        self.raw_proximity = nn.Parameter(torch.empty(()))
        self.network = RunReconstructionNetwork(config)

    @property
    def proximity(self) -> Tensor:
        """Return lambda, a positive scalar."""
        return F.softplus(self.raw_proximity.float())

    def forward(self, image: Tensor, mask: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Return B_k and C^_k from C, M_k and B_{k-1}, in float32."""
        estimate = background_minimizer(image, mask, previous, self.proximity)  # B^_k
        foreground, correction = self.network(mask, estimate)
        background = estimate + mask * correction
        return background, background + mask * foreground


class RunStage(GradientCheckpointingLayer):
    """Learned part of a stage's mask: E(C), then Reversible State Space (RSS).

    DEVIATION: The paper's convolution gives M_k itself; here its output is added to the logit of M^_k. Without that
    sum, a trained network ignores the closed form.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        size = config.hidden_size
        self.features = RunConvNormAct(2 * size, size, kernel_size=3)
        self.small_field = RunStateSpaceBlock(config, config.window_size)
        self.large_field = RunStateSpaceBlock(config, None)
        self.mask_head = nn.Conv2d(size, 1, kernel_size=3, padding=1)
        self.edge_head = nn.Conv2d(size, 1, kernel_size=3, padding=1)

    def forward(
        self, neck_features: Tensor, hidden_states: Tensor, mask: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return features and the logits of M_k and E_k.

        Args:
            neck_features: (B, C, h, w), at the level of the stage.
            hidden_states: Shape of `neck_features`, from the stage before.
            mask: M^_k, (B, 1, h, w).
            share: B_{k-1} / C, (B, 1, h, w), in [0, 1].
        """
        features = self.features(torch.cat([neck_features, hidden_states], dim=1))  # E(C)
        inside, outside = (features * map_.to(features.dtype) + features for map_ in (mask, share))
        hidden_states = self.small_field(inside) + self.large_field(outside)
        mask_logits = self.mask_head(hidden_states)
        mask_logits = mask_logits + torch.logit(mask, eps=LEAST_PROBABILITY).to(mask_logits.dtype)
        return hidden_states, mask_logits, self.edge_head(hidden_states)


def split_windows(tokens: Tensor, size: int) -> Tensor:
    """Split (B, C, H, W) into (B * windows, C, size, size)."""
    tokens = tokens.permute(0, 2, 3, 1).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return tokens.transpose(2, 3).flatten(0, 2).permute(0, 3, 1, 2)


def join_windows(windows: Tensor, shape: torch.Size, size: int) -> Tensor:
    """Join windows into tokens of `shape`, the inverse of `split_windows`."""
    batch_size, channels, height, width = shape
    windows = windows.permute(0, 2, 3, 1).reshape(batch_size, height // size, width // size, size, size, channels)
    return windows.transpose(2, 3).reshape(batch_size, height, width, channels).permute(0, 3, 1, 2)


class RunPreTrainedModel(UnconcealBackboneModel):
    """Initial weights and checkpointing of RUN."""

    config_class = RunConfig
    base_model_prefix = "run"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RunStage"]
    # Half precision would change the decay of states.
    _keep_in_fp32_modules_strict = ["log_decay", "step_bias", "skip", "raw_proximity", "raw_sparsity"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialize convolutions as PyTorch does, scans as Mamba does."""
        if isinstance(module, RunScan2d):
            init.uniform_(module.token_proj, -(module.inner_size**-0.5), module.inner_size**-0.5)
            init.uniform_(module.step_proj, -(module.rank**-0.5), module.rank**-0.5)
            # Time steps are log-uniform from 0.001 to 0.1. The bias is their inverse softplus.
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
                init.constant_(parameter, math.log(math.expm1(0.1)))  # mu, alpha L_S, lambda start at 0.1
        elif isinstance(module, RunReconstructionNetwork):
            # Training starts from the backgrounds of the closed form.
            init.normal_(module.head.weight, std=1e-3)
            init.zeros_(module.head.bias)
        else:
            super()._init_weights(module)


class RunForImageSegmentation(RunPreTrainedModel):
    """RUN: encoder, neck, coarse mask, and K stages of unfolding.

    `from_backbone` loads a pretrained encoder. The weight of the ambiguity loss rises with `training_progress`.
    """

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.backbone = self.make_backbone()
        self.neck = RunNeck(self.backbone.channels, config.hidden_size)
        self.coarse_head = RunCoarseHead(config.hidden_size)
        self.mask_step = RunMaskStep(config)
        self.background_step = RunBackgroundStep(config)
        self.stages = nn.ModuleList(RunStage(config) for _ in range(1 if config.share_stages else config.num_stages))
        self.post_init()

    @property
    def num_stages(self) -> int:
        """Return the number of unfolded stages, K in the paper."""
        return self.config.num_stages

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_stages: bool = False,
    ) -> RunSegmentationOutput:
        """Segment a batch of images.

        Args:
            pixel_values: (B, 3, H, W), normalized RGB, at least 32x32.
            labels: (B, H, W) or (B, 1, H, W) in [0, 1], 1 for object. Soft values are allowed.
            output_hidden_states: Whether to return `hidden_states`. None means: as configured.
            output_stages: Whether to return the maps of every stage.

        Raises:
            ValueError: If images, labels or the strides of the encoder do not fit.
        """
        self.check_pixel_values(pixel_values)
        padded, cropping = pad_edges(pixel_values, COARSEST_STRIDE)
        # 1. The image in [0, 1], and the features of the encoder.
        full_image = self.denormalize(padded)  # C
        features = self.encode(padded)
        pyramid = self.neck(features)
        # 2. Start: M_0 from the deepest feature, M_{-1} = M_0, B_0 = (1 - M_0) C.
        hidden_states, coarse_logits = self.coarse_head(pyramid[-1])
        all_hidden_states = [*features, hidden_states]
        before_previous = coarse_logits
        share = 1 - coarse_logits.float().sigmoid()  # B_0 / C
        mask_logits, edge_logits, backgrounds, reconstructions = [coarse_logits], [], [], []
        level_before = NUM_LEVELS - 1
        for k, level in enumerate(self.config.stage_levels):
            # 3. All maps at the resolution of this stage.
            factor = 2 ** (level_before - level)
            hidden_states, previous, before_previous = (
                upsample(maps, factor) for maps in (hidden_states, mask_logits[-1], before_previous)
            )
            image = F.avg_pool2d(full_image, FINEST_STRIDE * 2**level)
            probs, probs_before = previous.float().sigmoid(), before_previous.float().sigmoid()
            # DEVIATION: The share B_{k-1} / C is upsampled instead of B_{k-1}, which lacks the fine texture of this
            # level. The share is smooth, and it keeps 0 <= B <= C, as the decomposition C = F + B demands.
            share = upsample(share, factor)
            background = image * share
            if k == 0:
                backgrounds.append(background)
            # 4. SOFS: the closed form, then the learned network.
            estimate = self.mask_step(image, background, probs, probs_before)  # M^_k
            hidden_states, logits, edges = self.stages[k % len(self.stages)](
                pyramid[level], hidden_states, estimate, share.mean(dim=1, keepdim=True)
            )
            mask_logits.append(logits)
            edge_logits.append(edges)
            all_hidden_states.append(hidden_states)
            # 5. ROBE: closed form, then the learned network. After the last stage, only for those who ask.
            if labels is None and not output_stages and k == self.num_stages - 1:
                break
            probs = logits.float().sigmoid()
            background, reconstruction = self.background_step(image, probs, background)
            backgrounds.append(background)
            reconstructions.append(reconstruction)
            share = background_share(background, image, probs)
            before_previous, level_before = previous, level
        # 6. The last mask at the input size.
        logits = F.pad(upsample(mask_logits[-1], FINEST_STRIDE), cropping)

        loss = None
        if labels is not None:
            labels = self.match_labels(labels, logits)
            loss = self.compute_loss(labels, full_image, logits, mask_logits, edge_logits, reconstructions)
        stages = (mask_logits, edge_logits, backgrounds, reconstructions)
        return RunSegmentationOutput(
            loss,
            logits,
            *(tuple(maps) if output_stages else None for maps in stages),  # Pipeline cannot unbatch tuples
            self.keep_hidden_states(output_hidden_states, all_hidden_states),
        )

    def denormalize(self, pixel_values: Tensor) -> Tensor:
        """Return the image (B, 3, H, W) in [0, 1], in float32."""
        mean, std = (
            torch.tensor(values, device=pixel_values.device)[:, None, None]
            for values in (self.config.image_mean, self.config.image_std)
        )
        return (pixel_values.float() * std + mean).clamp(0, 1)

    def compute_loss(
        self,
        labels: Tensor,
        image: Tensor,
        logits: Tensor,
        mask_logits: list[Tensor],
        edge_logits: list[Tensor],
        reconstructions: list[Tensor],
    ) -> Tensor:
        """Return the total loss, from maps as in the output and C.

        DEVIATION: Edges are compared at the resolution of their stage; a cell is an edge if one of its pixels is. In
        the release, coarse stages must draw thin lines at full size. The release also computes the reconstruction
        error between different stages and does not add it.
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
            # Cells outside the input do not count.
            inside = (..., slice(math.ceil(height / stride)), slice(math.ceil(width / stride)))
            if k > 0:
                stage_edges = F.max_pool2d(edges, stride)[inside]
                stage = stage + config.edge_weight * edge_dice_loss(edge_logits[k - 1][inside], stage_edges)
                error = F.mse_loss(reconstructions[k - 1][inside], F.avg_pool2d(image, stride)[inside])
                stage = stage + config.reconstruction_weight * error
            total = total + weight * stage
        coefficient = config.ambiguity_weight * ambiguity_coefficient(self.training_progress)
        return total + coefficient * ambiguity_loss(logits)


__all__ = ["RunConfig", "RunForImageSegmentation", "RunPreTrainedModel"]
