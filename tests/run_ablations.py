"""Variants of RUN without one of its parts, for ablation studies.

Each keeps the names of the weights that it shares with `RunForImageSegmentation`.
"""

import torch
from torch import nn

from unconceal import RunConfig, RunForImageSegmentation
from unconceal.models.modeling_run import RunConvNormAct, RunStage, mask_minimizer


PARTS = ("background", "residual_sparsity", "state_space", "unfolding")


class ConvBlock(nn.Sequential):
    """Residual block of two 3x3 convolutions."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + super().forward(hidden_states)


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


def run_without(part: str, config: RunConfig) -> RunForImageSegmentation:
    """Build RUN with random weights, without one of `PARTS`. Without unfolding it is a plain decoder."""
    model = RunForImageSegmentation(config)
    if part == "state_space":
        for stage in model.stages:
            for name in ("small_field", "large_field"):
                layers = [RunConvNormAct(config.hidden_size, config.hidden_size, kernel_size=3) for _ in range(2)]
                setattr(stage, name, ConvBlock(*layers))
    if part == "residual_sparsity":
        model.mask_step = MaskStepWithoutSparsity(model.mask_step)
    if part in ("background", "unfolding"):
        model.background_step = CutOutBackground()
    if part == "unfolding":
        model.mask_step = PreviousMask()
        model.stages = nn.ModuleList(DecoderStage(config) for _ in model.stages)
    model.post_init()
    return model
