"""Layers of RUN: convolutions, U-Net, and blocks of selective scans for images."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_run import RunConfig
from .modeling_unconceal import ChannelLayerNorm, padding_to, upsample
from .selective_scan import is_exporting, selective_scan


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
    """First mask from the deepest feature, by spatial pyramid pooling (ASPP).

    DEVIATION: The release has dilations 6, 12 and 18. At stride 32 of 384 pixels, 12 and 18 see nothing but padding.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        size = config.hidden_size
        self.branches = nn.ModuleList([RunConvNormAct(size, size, kernel_size=1)])
        self.branches += [RunConvNormAct(size, size, 3, dilation=rate) for rate in config.coarse_dilations]
        self.pooled = nn.Sequential(nn.Conv2d(size, size, kernel_size=1), nn.ReLU())
        self.merge = RunConvNormAct((len(self.branches) + 1) * size, size, kernel_size=1)
        self.mask_head = nn.Conv2d(size, 1, kernel_size=3, padding=1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return features, (B, C, h, w), and mask logits."""
        pooled = self.pooled(features.mean(dim=(2, 3), keepdim=True)).expand_as(features)
        hidden_states = self.merge(torch.cat([*(branch(features) for branch in self.branches), pooled], dim=1))
        return hidden_states, self.mask_head(hidden_states)


class RunQuietConv2d(nn.Conv2d):
    """Convolution whose outputs are near zero at first."""


class RunUNet(nn.Module):
    """U-Net of three levels, whose outputs are near zero at first."""

    def __init__(self, in_channels: int, out_channels: int, hidden_sizes: Sequence[int]):
        super().__init__()
        fine, middle, coarse = hidden_sizes
        self.stem = RunConvNormAct(in_channels, fine, kernel_size=3)
        self.down = nn.ModuleList(
            nn.Sequential(RunConvNormAct(a, b, kernel_size=3, stride=2), RunConvNormAct(b, b, kernel_size=3))
            for a, b in ((fine, middle), (middle, coarse))
        )
        self.up = nn.ModuleList(RunConvNormAct(a + b, b, kernel_size=3) for a, b in ((coarse, middle), (middle, fine)))
        self.head = RunQuietConv2d(fine, out_channels, kernel_size=3, padding=1)

    def forward(self, *maps: Tensor) -> Tensor:
        """Map stacked (B, *, h, w) to (B, out_channels, h, w)."""
        dtype = self.head.weight.dtype
        levels = [self.stem(torch.cat([map_.to(dtype) for map_ in maps], dim=1))]
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
        return self.head(hidden_states).float()


def make_sparsity_gradient(hidden_size: int) -> nn.Sequential:
    """Return four convolutions from one channel to one, without biases."""
    layers = []
    for before, after in pairwise([1, *(hidden_size,) * 3, 1]):
        layers += [nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


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


def split_windows(tokens: Tensor, size: int) -> Tensor:
    """Split (B, C, H, W) into (B * windows, C, size, size)."""
    tokens = tokens.permute(0, 2, 3, 1).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return tokens.transpose(2, 3).flatten(0, 2).permute(0, 3, 1, 2)


def join_windows(windows: Tensor, shape: torch.Size, size: int) -> Tensor:
    """Join windows into tokens of `shape`, the inverse of `split_windows`."""
    batch_size, channels, height, width = shape
    windows = windows.permute(0, 2, 3, 1).reshape(batch_size, height // size, width // size, size, size, channels)
    return windows.transpose(2, 3).reshape(batch_size, height, width, channels).permute(0, 3, 1, 2)
