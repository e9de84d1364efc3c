"""Variants of RUN without one of its parts, for ablation studies.

Each keeps the names of the weights that it shares with `RunForImageSegmentation`.
"""

import torch
from torch import nn

from unconceal import RunConfig, RunForImageSegmentation
from unconceal.models.modeling_run import RunConvNormAct, RunStage, mask_minimizer


class ConvBlock(nn.Module):
    """Residual block of two 3x3 convolutions."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.layers = nn.Sequential(*(RunConvNormAct(hidden_size, hidden_size, kernel_size=3) for _ in range(2)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.layers(hidden_states)


class MaskStepWithoutSparsity(nn.Module):
    """Closed-form mask without the residual sparsity term."""

    def __init__(self, step: nn.Module):
        super().__init__()
        self.raw_proximity = step.raw_proximity

    def forward(self, image, background, previous, before_previous):
        return mask_minimizer(image, background, previous, nn.functional.softplus(self.raw_proximity.float()))


class PreviousMask(nn.Module):
    """No closed form: the mask of the stage before."""

    def forward(self, image, background, previous, before_previous):
        return previous


class CutOutBackground(nn.Module):
    """No ROBE: the image outside the mask, and a reconstruction without error."""

    def forward(self, image, mask, previous):
        return image - mask * image, image


class DecoderStage(RunStage):
    """Stage of a plain decoder, which ignores closed forms and backgrounds."""

    def forward(self, neck_features, hidden_states, mask, share):
        features = self.features(torch.cat([neck_features, hidden_states], dim=1))
        hidden_states = self.small_field(features) + self.large_field(features)
        return hidden_states, self.mask_head(hidden_states), self.edge_head(hidden_states)


class RunWithoutStateSpace(RunForImageSegmentation):
    """RUN with convolutions instead of state-space blocks."""

    def __init__(self, config: RunConfig):
        super().__init__(config)
        for stage in self.stages:
            stage.small_field, stage.large_field = ConvBlock(config.hidden_size), ConvBlock(config.hidden_size)
        self.post_init()


class RunWithoutResidualSparsity(RunForImageSegmentation):
    """RUN without the residual sparsity of the mask."""

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.mask_step = MaskStepWithoutSparsity(self.mask_step)
        self.post_init()


class RunWithoutBackground(RunForImageSegmentation):
    """RUN without the background network (ROBE)."""

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.background_step = CutOutBackground()
        self.post_init()


class RunWithoutUnfolding(RunForImageSegmentation):
    """RUN as a plain decoder, the baseline."""

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.mask_step, self.background_step = PreviousMask(), CutOutBackground()
        self.stages = nn.ModuleList(DecoderStage(config) for _ in self.stages)
        self.post_init()


ABLATIONS = {
    "background": RunWithoutBackground,
    "residual_sparsity": RunWithoutResidualSparsity,
    "state_space": RunWithoutStateSpace,
    "unfolding": RunWithoutUnfolding,
}
