"""RUN with the background of its first checkpoints: `background_step: correction`.

In these checkpoints ROBE corrects B only inside the mask, and no loss compares B with the label. Networks in this form
predict as before. They train with the present loss, except for the loss of the share. New networks use the share of
the background, see `modeling_run.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import FINEST_STRIDE, NUM_LEVELS
from .configuration_run import RunConfig
from .modeling_unconceal import upsample
from .run_layers import RunUNet, make_sparsity_gradient


# Brightness added to B and C, so that B / C is defined for black pixels.
BLACK = 1e-2
# M^ can leave [0, 1]. It is clamped this far from 0 and 1 before its logit is taken.
LEAST_PROBABILITY = 1e-2


class CorrectedMaskStep(nn.Module):
    """Closed-form mask M^_k with its learned parameters, shared by all stages."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.raw_proximity = nn.Parameter(torch.empty(()))
        self.raw_sparsity = nn.Parameter(torch.empty(()))
        self.sparsity_gradient = make_sparsity_gradient(config.sparsity_hidden_size)

    def forward(self, image: Tensor, background: Tensor, previous: Tensor, before_previous: Tensor) -> Tensor:
        """Return M^_k from C, B_{k-1}, M_{k-1} and M_{k-2}, in float32."""
        proximity, sparsity = (F.softplus(raw.float()) for raw in (self.raw_proximity, self.raw_sparsity))
        certain, hardened = filter_probabilities(previous)
        certain_before, hardened_before = filter_probabilities(before_previous)
        step_before = certain_before * (previous - hardened_before)  # T_{k-1}
        gradient = self.sparsity_gradient(step_before.to(self.sparsity_gradient[0].weight.dtype)).float()
        numerator = (image * (image - background)).sum(dim=1, keepdim=True) + proximity * previous
        numerator = numerator + sparsity * certain * (certain * hardened + step_before - gradient)
        return numerator / (image.square().sum(dim=1, keepdim=True) + proximity + sparsity * certain * certain)


def filter_probabilities(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return w and M~ of a mask M in [0, 1]."""
    certain = ((probs <= 0.4) | (probs >= 0.6)).to(probs.dtype)
    hardened = torch.where((probs > 0.1) & (probs < 0.4), 0.1, probs)
    return certain, torch.where((probs > 0.6) & (probs < 0.9), 0.9, hardened)


class CorrectedBackgroundStep(nn.Module):
    """Background B_k and reconstruction C^_k (ROBE), shared by all stages."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.raw_proximity = nn.Parameter(torch.empty(()))
        self.network = RunUNet(config.num_channels + 1, 2 * config.num_channels, config.reconstruction_hidden_sizes)

    def forward(self, image: Tensor, mask: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Return B_k and C^_k from C, M_k and B_{k-1}, in float32."""
        proximity = F.softplus(self.raw_proximity.float())
        estimate = (proximity * previous + image - mask * image) / (1 + proximity)  # B^_k
        foreground, correction = self.network(mask, estimate).chunk(2, dim=1)
        background = estimate + mask * correction
        return background, background + mask * foreground


def run_corrected_stages(model: nn.Module, full_image: Tensor, pyramid: list[Tensor], full: bool) -> dict:
    """Return the maps of all stages by name, and `logits`.

    Args:
        model: The network.
        full_image: C, padded, (B, 3, H, W).
        pyramid: Features of the neck, finest first.
        full: Whether to compute the last background, too.
    """
    hidden_states, coarse_logits = model.coarse_head(pyramid[-1])
    before_previous = coarse_logits
    share = 1 - coarse_logits.float().sigmoid()  # B_0 / C
    maps = {"mask_logits": [coarse_logits], "edge_logits": [], "share_logits": [], "hidden_states": [hidden_states]}
    maps |= {"backgrounds": [], "reconstructions": [None]}
    level_before = NUM_LEVELS - 1
    for k, level in enumerate(model.config.stage_levels):
        factor = 2 ** (level_before - level)
        hidden_states, previous, before_previous, share = (
            upsample(one, factor) for one in (hidden_states, maps["mask_logits"][-1], before_previous, share)
        )
        image = F.avg_pool2d(full_image, FINEST_STRIDE * 2**level)
        probs, probs_before = previous.float().sigmoid(), before_previous.float().sigmoid()
        background = image * share
        if k == 0:
            maps["backgrounds"].append(background)
        estimate = model.mask_step(image, background, probs, probs_before)  # M^_k
        hidden_states, logits, edges = model.stages[k % len(model.stages)](
            pyramid[level],
            hidden_states,
            estimate,
            share.mean(dim=1, keepdim=True),
            torch.logit(estimate, eps=LEAST_PROBABILITY),
        )
        maps["mask_logits"].append(logits)
        maps["edge_logits"].append(edges)
        maps["hidden_states"].append(hidden_states)
        if not full and k == model.num_stages - 1:
            break
        probs = logits.float().sigmoid()
        background, reconstruction = model.background_step(image, probs, background)
        maps["backgrounds"].append(background)
        maps["reconstructions"].append(reconstruction)
        share = ((background + BLACK * (1 - probs)) / (image + BLACK)).clamp(0, 1)
        before_previous, level_before = previous, level
    maps["logits"] = maps["mask_logits"][-1]
    return maps
