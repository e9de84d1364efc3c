"""RUN: segments camouflaged objects by unfolding an optimization of mask and background.

Paper: "RUN: Reversible Unfolding Network for Concealed Object Segmentation", ICML 2025,
https://arxiv.org/abs/2501.18783. Written from its figures and formulas.

An image C is the sum of a foreground, which the mask M covers, and a background B. M and B minimize

    L(M, B) = 1/2 ||C - C * M - B||^2 + mu psi(M) + lambda phi(B) + alpha S(w * (M - M~)),

in turns. Every stage takes a closed form and a learned network for M (SOFS), then the same for B (ROBE).

B is held as a share of the image, s = B / C, one number for each pixel. So B keeps 0 <= B <= C and the texture of C.
Training knows the true share: 1 minus the label. Masks and shares are probabilities, and the closed forms are weighted
means of them, see `mean_logit`.

| symbol | here | shape for an H x W image, at stride r of the stage |
|---|---|---|
| C | `image`, in [0, 1] | (B, 3, H / r, W / r) |
| E(C) | `features` of a stage | (B, hidden_size, H / r, W / r) |
| M_k, E_k | `mask_logits[k]`, `edge_logits[k - 1]` before the sigmoid | (B, 1, H / r, W / r) |
| M^_k | `RunMaskStep` output before the sigmoid | (B, 1, H / r, W / r) |
| w, M~ | `uncertainty_filter` | (B, 1, H / r, W / r) |
| t, mu, alpha L_S | see `RunMaskStep` | |
| s_k, lambda | `share_logits[k]` before the sigmoid, `RunBackgroundStep.proximity` | (B, 1, H / r, W / r) |
| B_k, C^_k | `backgrounds[k]`, `reconstructions[k]` | (B, 3, H / r, W / r) |
| VSS_s, VSS_l | `RunStateSpaceBlock` with and without windows | |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbones import COARSEST_STRIDE, FINEST_STRIDE, NUM_LEVELS, UnconcealBackboneModel
from .configuration_run import RunConfig
from .losses import (
    add_terms,
    ambiguity_coefficient,
    ambiguity_loss,
    contour_weights,
    edge_dice_loss,
    mask_edges,
    structure_loss,
)
from .modeling_unconceal import pad_edges, upsample, without_autocast
from .run_correction import CorrectedBackgroundStep, CorrectedMaskStep, run_corrected_stages
from .run_layers import (
    RunCoarseHead,
    RunConvNormAct,
    RunNeck,
    RunQuietConv2d,
    RunScan2d,
    RunStateSpaceBlock,
    RunUNet,
    make_sparsity_gradient,
)


# The positive numbers of the closed forms are exp(SCALE * parameter). With SCALE, 100 steps of Adam at a learning rate
# of 1e-3 can change them by a factor of e. Without SCALE, these steps could change them only by a tenth.
SCALE = 10
# Logits of 0.6 and of 0.9.
DECIDED, SURE = math.log(1.5), math.log(9)
# Channels of the projections that a non-local background compares.
NON_LOCAL_SIZE = 16
# A non-local background compares each position with the positions of this level of the encoder.
CONTEXT_LEVEL, CONTEXT_STRIDE = 2, 16


@dataclass
class RunSegmentationOutput(ModelOutput):
    """Output of `RunForImageSegmentation`.

    With `output_stages` it holds the maps of every stage. Those of stage k have stride 4 * 2 ** stage_levels[k - 1],
    those of k = 0 stride 32. They cover the image, padded at the right and bottom to multiples of 32.

    Args:
        loss: Scalar, present when `labels` is given.
        logits: (B, 1, H, W), pre-sigmoid, M_K at the input size.
        mask_logits: K + 1 tensors (B, 1, h, w), pre-sigmoid: the coarse mask M_0, then M_1 to M_K.
        edge_logits: K tensors (B, 1, h, w), pre-sigmoid: E_1 to E_K.
        share_logits: K + 1 tensors (B, 1, h, w), pre-sigmoid: the share of the background in each pixel, s_0 to s_K.
        backgrounds: K + 1 tensors (B, 3, h, w), RGB from black 0 to white 1: B_0 to B_K, with B = s C.
        reconstructions: K + 1 tensors (B, 3, h, w), RGB in the same range: C^_0 to C^_K.
        hidden_states: Present on request. First the features of the encoder, (B, C, h, w), strides 4 to 32. Then the
            features behind M_0 to M_K, K + 1 tensors (B, hidden_size, h, w).
        loss_dict: The weighted terms of the loss by name and stage, without gradients: `mask_0`, `edges_1` and so on.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    mask_logits: tuple[Tensor, ...] | None = None
    edge_logits: tuple[Tensor, ...] | None = None
    share_logits: tuple[Tensor, ...] | None = None
    backgrounds: tuple[Tensor, ...] | None = None
    reconstructions: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    loss_dict: dict[str, Tensor] | None = None


def mean_logit(logits: Sequence[Tensor], weights: Sequence[Tensor | float]) -> Tensor:
    """Return the logit of a weighted mean of probabilities, in float32.

    It needs no clamp: the mean keeps its gradient near 0 and 1, for logits from -80 to 80.

    Args:
        logits: Logits of the probabilities, of shapes that broadcast.
        weights: Weight of each, at least 0, not all 0. They need not add up to 1.
    """
    likely, unlikely = (
        sum(weight * (sign * one.float()).sigmoid() for one, weight in zip(logits, weights, strict=True))
        for sign in (1, -1)
    )
    smallest = torch.finfo(torch.float32).tiny
    return (likely + smallest).log() - (unlikely + smallest).log()


def uncertainty_filter(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return w and the logits of M~ from those of M.

    w is 0 for undecided pixels, of probability 0.4 to 0.6, and otherwise 1. In M~ probabilities from 0.1 to 0.4 become
    0.1, those from 0.6 to 0.9 become 0.9.
    """
    certain = logits.abs() >= DECIDED
    hardened = torch.where(certain & (logits.abs() < SURE), SURE * logits.sign(), logits)
    return certain.to(logits.dtype), hardened


@dataclass
class RunContext:
    """What a non-local background looks up: image and features at stride 16."""

    image: Tensor
    features: Tensor


class RunMaskStep(nn.Module):
    """Closed-form mask M^_k, with its learned parameters.

    This follows section 3 of the paper. With the sum over channels and the mean over the pixels of a position, it
    minimizes

        1/2 ||C - C M - B_{k-1}||^2 + mu/2 ||M - M_{k-1}||^2 + alpha L_S/2 ||w_k (M - t)||^2.

    With B = s C it is a weighted mean of three opinions: 1 - s_{k-1} with weight ||C||^2, M_{k-1} with weight mu, and
    t with weight alpha L_S w_k.

    DEVIATION: In the paper t is M~_k + T_{k-1} - g, with T = w (M - M~) and a network for g, the gradient of the
    residual sparsity over L_S. That t can leave [0, 1]. Here the network changes the logit of M~_k instead. It sees
    T_{k-1} and has no bias: with nothing left to harden, t is M~_k.

    DEVIATION: This is the exact minimum. The paper's figure drops mu M_{k-1} and alpha L_S w_k w_{k-1} M~_{k-1} from
    the numerator. The release drops w^2 from the denominator and solves each color separately. mu and alpha L_S
    differ between stages.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        self.raw_proximity = nn.Parameter(torch.empty(config.num_stages))
        self.raw_sparsity = nn.Parameter(torch.empty(config.num_stages))
        self.sparsity_gradient = make_sparsity_gradient(config.sparsity_hidden_size)

    @property
    def proximity(self) -> Tensor:
        """Return mu of stages 1 to K, positive, (K,)."""
        return (SCALE * self.raw_proximity.float()).exp()

    @property
    def sparsity(self) -> Tensor:
        """Return alpha L_S, like `proximity`."""
        return (SCALE * self.raw_sparsity.float()).exp()

    def forward(
        self, k: int, energy: Tensor, share_logits: Tensor, previous: Tensor, before_previous: Tensor
    ) -> Tensor:
        """Return the logits of M^_k, (B, 1, h, w), in float32.

        Args:
            k: Number of the stage, from 1.
            energy: ||C||^2, the mean over the pixels of a position, (B, 1, h, w).
            share_logits: Logits of s_{k-1}, like `energy`.
            previous: Logits of M_{k-1}, like `energy`.
            before_previous: Logits of M_{k-2}, like `energy`.
        """
        previous, before_previous = previous.float(), before_previous.float()
        certain, hardened = uncertainty_filter(previous)
        certain_before, hardened_before = uncertainty_filter(before_previous)
        step_before = certain_before * (previous.sigmoid() - hardened_before.sigmoid())  # T_{k-1}
        gradient = self.sparsity_gradient(step_before.to(self.sparsity_gradient[0].weight.dtype)).float()
        opinions = [-share_logits, previous, hardened + gradient]
        return mean_logit(opinions, [energy, self.proximity[k - 1], self.sparsity[k - 1] * certain])


class RunBackgroundStep(nn.Module):
    """Share s_k of the background and reconstruction C^_k (ROBE).

    All stages share one. The closed form B^_k minimizes 1/2 ||C - C M_k - B||^2 + lambda/2 ||B - B_{k-1}||^2. As a
    share it is a weighted mean of 1 - M_k with weight 1 and s_{k-1} with weight lambda. A U-Net corrects its logit,
    inside the mask and outside. A loss compares s_k with the label.

    DEVIATION: The reconstruction is B_k + M_k * F, as in section 3, with a foreground F that the U-Net paints. It sees
    C only in B^_k, where C is not covered, and in the features. So it cannot copy.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        channels = config.num_channels
        self.raw_proximity = nn.Parameter(torch.empty(config.num_stages))
        in_channels = channels + 1 + config.hidden_size
        self.network = RunUNet(in_channels, 1 + channels, config.reconstruction_hidden_sizes)

    @property
    def proximity(self) -> Tensor:
        """Return lambda of stages 1 to K, positive, (K,)."""
        return (SCALE * self.raw_proximity.float()).exp()

    def forward(
        self, k: int, image: Tensor, mask_logits: Tensor, share_logits: Tensor, features: Tensor, context: RunContext
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of s_k and C^_k, in float32.

        Args:
            k: Number of the stage, 0 for the coarse mask.
            image: C, (B, 3, h, w), in [0, 1].
            mask_logits: Logits of M_k, (B, 1, h, w).
            share_logits: Logits of s_{k-1}, like `mask_logits`. Not used for k = 0.
            features: Features of the stage, (B, hidden_size, h, w).
            context: The image and its features at stride 16.
        """
        estimate = -mask_logits.float()
        if k > 0:
            estimate = mean_logit([estimate, share_logits], [1.0, self.proximity[k - 1]])
        mask = mask_logits.float().sigmoid()
        outputs = self.network(mask, image * estimate.sigmoid(), features)
        share_logits = estimate + outputs[:, :1]
        return share_logits, image * share_logits.sigmoid() + mask * outputs[:, 1:]


class RunNonLocalBackgroundStep(nn.Module):
    """Share s_k from comparing each position with the whole image.

    The image is seen at stride 16. With similarities a of the position to all others, and the mask m there,
    f = sum a m is its likeness to the object and b = sum a (1 - m) that to the background. The share is
    b / (b + f e^beta). The reconstruction is the mean color of similar positions, B~ of those outside the mask plus F~
    of those inside.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        self.levels = [NUM_LEVELS - 1, *config.stage_levels]
        self.query = nn.Conv2d(config.hidden_size, NON_LOCAL_SIZE, kernel_size=1)
        self.key = nn.Conv2d(config.hidden_size, NON_LOCAL_SIZE, kernel_size=1)
        self.raw_temperature = nn.Parameter(torch.empty(config.num_stages + 1))
        self.raw_bias = nn.Parameter(torch.empty(config.num_stages + 1))

    def forward(
        self, k: int, image: Tensor, mask_logits: Tensor, share_logits: Tensor, features: Tensor, context: RunContext
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of s_k and C^_k, in float32; see `RunBackgroundStep`."""
        queries, keys = self.query(features), self.key(context.features)
        with without_autocast(features.device.type):
            queries, keys = (F.normalize(maps.float(), dim=1) for maps in (queries, keys))
            queries = (SCALE * self.raw_temperature[k].float()).exp() * queries
            mask, rest = (self.to_context(k, (sign * mask_logits.float()).sigmoid()) for sign in (1, -1))
            values = torch.cat([mask, rest, mask * context.image, rest * context.image], dim=1)
            # One head: ONNX needs the dimension.
            sequences = (maps.flatten(2).transpose(1, 2).unsqueeze(1) for maps in (queries, keys, values))
            mixed = F.scaled_dot_product_attention(*sequences, scale=1.0).squeeze(1)
            mixed = mixed.transpose(1, 2).unflatten(2, features.shape[-2:])
        to_object, to_background, foreground, background = mixed.split([1, 1, *(image.shape[1],) * 2], dim=1)
        share_logits = to_background.clamp(min=1e-6).log() - to_object.clamp(min=1e-6).log()
        return share_logits - SCALE * self.raw_bias[k].float(), background + foreground

    def to_context(self, k: int, maps: Tensor) -> Tensor:
        """Resize maps (B, 1, h, w) of stage k to stride 16."""
        step = CONTEXT_LEVEL - self.levels[k]
        return upsample(maps, 2**-step) if step < 0 else F.avg_pool2d(maps, 2**step)


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
        self, neck_features: Tensor, hidden_states: Tensor, mask: Tensor, share: Tensor, estimate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return features and the logits of M_k and E_k.

        Args:
            neck_features: (B, C, h, w), at the level of the stage.
            hidden_states: Shape of `neck_features`, from the stage before.
            mask: M^_k, (B, 1, h, w).
            share: s_{k-1}, like `mask`.
            estimate: Logits of M^_k, like `mask`.
        """
        features = self.features(torch.cat([neck_features, hidden_states], dim=1))  # E(C)
        inside, outside = (features * map_.to(features.dtype) + features for map_ in (mask, share))
        hidden_states = self.small_field(inside) + self.large_field(outside)
        mask_logits = self.mask_head(hidden_states)
        return hidden_states, mask_logits + estimate.to(mask_logits.dtype), self.edge_head(hidden_states)


class RunPreTrainedModel(UnconcealBackboneModel):
    """Initial weights and checkpointing of RUN."""

    config_class = RunConfig
    base_model_prefix = "run"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RunStage"]
    # Half precision would change the decay of states.
    _keep_in_fp32_modules_strict = [
        "log_decay",
        "step_bias",
        "skip",
        "raw_proximity",
        "raw_sparsity",
        "raw_temperature",
        "raw_bias",
    ]

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
        elif isinstance(module, RunQuietConv2d):
            init.normal_(module.weight, std=1e-3)
            init.zeros_(module.bias)
        elif isinstance(module, RunMaskStep):
            init.zeros_(module.raw_proximity)  # mu starts at 1, alpha L_S at 0.1
            init.constant_(module.raw_sparsity, math.log(0.1) / SCALE)
        elif isinstance(module, RunBackgroundStep):
            init.constant_(module.raw_proximity, math.log(0.1) / SCALE)  # lambda
        elif isinstance(module, RunNonLocalBackgroundStep):
            init.constant_(module.raw_temperature, math.log(8) / SCALE)
            init.zeros_(module.raw_bias)
        elif isinstance(module, (CorrectedMaskStep, CorrectedBackgroundStep)):
            for parameter in module.parameters(recurse=False):
                init.constant_(parameter, math.log(math.expm1(0.1)))
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
        self.coarse_head = RunCoarseHead(config)
        mask_step, background_step = STEPS[config.background_step]
        self.mask_step, self.background_step = mask_step(config), background_step(config)
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
        image = self.denormalize(padded)  # C
        features = self.encode(padded)
        # 2. The stages, and M_K at the input size.
        stages = self.run_stages(image, self.neck(features), full=labels is not None or output_stages)
        logits = F.pad(upsample(stages.pop("logits"), FINEST_STRIDE), cropping)

        loss = loss_dict = None
        if labels is not None:
            labels = self.match_labels(labels, logits)
            names = ("mask_logits", "edge_logits", "share_logits", "reconstructions")
            loss, loss_dict = add_terms(self.loss_terms(labels, image, logits, *(stages[name] for name in names)))
        all_hidden_states = [*features, *stages.pop("hidden_states")]
        return RunSegmentationOutput(
            loss=loss,
            logits=logits,
            **{name: tuple(maps) for name, maps in stages.items() if output_stages},  # Pipeline cannot unbatch tuples
            hidden_states=self.keep_hidden_states(output_hidden_states, all_hidden_states),
            loss_dict=loss_dict,
        )

    def run_stages(self, full_image: Tensor, pyramid: list[Tensor], full: bool) -> dict[str, Any]:
        """Return the maps of all stages by name, and `logits`.

        Args:
            full_image: C, padded, (B, 3, H, W).
            pyramid: Features of the neck, finest first.
            full: Whether all maps are needed. If not, the last background is left out, because it changes no mask.
        """
        if self.config.background_step == "correction":
            return run_corrected_stages(self, full_image, pyramid, full)
        # 1. Start: M_0 from the deepest feature, M_{-1} = M_0, and B_0 by ROBE from (1 - M_0) C.
        hidden_states, coarse_logits = self.coarse_head(pyramid[-1])
        before_previous = previous = coarse_logits
        share_logits = -coarse_logits.float()
        energy = full_image.square().sum(dim=1, keepdim=True)
        context = RunContext(F.avg_pool2d(full_image, CONTEXT_STRIDE), pyramid[CONTEXT_LEVEL])
        maps = {
            "mask_logits": [coarse_logits],
            "edge_logits": [],
            "share_logits": [],
            "hidden_states": [hidden_states],
        }
        maps |= {"backgrounds": [], "reconstructions": []}
        level_before = NUM_LEVELS - 1
        for k, level in enumerate([level_before, *self.config.stage_levels]):
            # 2. All maps at the resolution of this stage.
            factor = 2 ** (level_before - level)
            stride = FINEST_STRIDE * 2**level
            image = F.avg_pool2d(full_image, stride)
            if k > 0:
                # DEVIATION: The share B_{k-1} / C is upsampled, because B_{k-1} lacks the fine texture of this level.
                hidden_states, previous, before_previous, share_logits = (
                    upsample(one, factor) for one in (hidden_states, previous, before_previous, share_logits)
                )
                # 3. SOFS: the closed form, then the learned network.
                pooled = F.avg_pool2d(energy, stride)
                estimate = self.mask_step(k, pooled, share_logits, previous, before_previous)  # logits of M^_k
                hidden_states, logits, edges = self.stages[(k - 1) % len(self.stages)](
                    pyramid[level], hidden_states, estimate.sigmoid(), share_logits.sigmoid(), estimate
                )
                before_previous, previous = previous, logits
                maps["mask_logits"].append(logits)
                maps["edge_logits"].append(edges)
                maps["hidden_states"].append(hidden_states)
            # 4. ROBE: closed form and learned network. After the last stage, only for those who ask.
            if not full and k == self.num_stages:
                break
            share_logits, reconstruction = self.background_step(
                k, image, previous, share_logits, hidden_states, context
            )
            maps["share_logits"].append(share_logits)
            maps["backgrounds"].append(image * share_logits.sigmoid())
            maps["reconstructions"].append(reconstruction)
            level_before = level
        return maps | {"logits": previous}

    def denormalize(self, pixel_values: Tensor) -> Tensor:
        """Return the image (B, 3, H, W) in [0, 1], in float32."""
        mean, std = (
            torch.tensor(values, device=pixel_values.device)[:, None, None]
            for values in (self.config.image_mean, self.config.image_std)
        )
        return (pixel_values.float() * std + mean).clamp(0, 1)

    def loss_terms(
        self,
        labels: Tensor,
        image: Tensor,
        logits: Tensor,
        mask_logits: list[Tensor],
        edge_logits: list[Tensor],
        share_logits: list[Tensor],
        reconstructions: list[Tensor],
    ) -> dict[str, Tensor]:
        """Return the weighted losses of masks, edges, shares and reconstructions.

        The arguments are maps as in the output, and C. M_K is compared at full size.

        DEVIATION: The other masks are compared at stride 4, with the mean of the label there. At full size they would
        take a third of a training step. Lines thinner than four pixels count less in them.

        DEVIATION: Edges are compared at the resolution of their stage; a cell is an edge if one of its pixels is. In
        the release, coarse stages must draw thin lines at full size. The release also computes the reconstruction
        error between different stages and does not add it.
        """
        config, num_stages = self.config, len(edge_logits)
        height, width = labels.shape[-2:]
        padding = (0, image.shape[-1] - width, 0, image.shape[-2] - height)
        edges = F.pad(mask_edges(labels), padding)
        small = F.avg_pool2d(F.pad(labels, padding, mode="replicate"), FINEST_STRIDE)
        # Cells outside the input do not count.
        small = small[inside(FINEST_STRIDE, height, width)]
        small_weights = contour_weights(small)

        def loss_of(maps: Tensor) -> Tensor:
            maps = upsample(maps, image.shape[-1] // FINEST_STRIDE // maps.shape[-1])
            maps = maps[inside(FINEST_STRIDE, height, width)]
            return structure_loss(maps, small, small_weights, config.bce_weight, config.iou_weight)

        terms = {}
        for k in range(num_stages + 1):
            weight = config.stage_weight_decay ** (num_stages - k)
            if k < num_stages:
                terms[f"mask_{k}"] = weight * loss_of(mask_logits[k])
            else:
                weights = contour_weights(labels)
                stage = structure_loss(logits, labels, weights, config.bce_weight, config.iou_weight)
                terms[f"mask_{k}"] = weight * stage
            stride = image.shape[-1] // mask_logits[k].shape[-1]
            cells = inside(stride, height, width)
            if k > 0:
                stage_edges = F.max_pool2d(edges, stride)[cells]
                error = edge_dice_loss(edge_logits[k - 1][cells], stage_edges)
                terms[f"edges_{k}"] = weight * config.edge_weight * error
            if share_logits:
                terms[f"background_{k}"] = weight * config.background_weight * loss_of(-share_logits[k])
            if reconstructions[k] is not None:
                error = F.mse_loss(reconstructions[k][cells], F.avg_pool2d(image, stride)[cells])
                terms[f"reconstruction_{k}"] = weight * config.reconstruction_weight * error
        coefficient = config.ambiguity_weight * ambiguity_coefficient(self.training_progress)
        return {**terms, "ambiguity": coefficient * ambiguity_loss(logits)}


def inside(stride: int, height: int, width: int) -> tuple:
    """Return the index of a map's cells that cover the input."""
    return (..., slice(math.ceil(height / stride)), slice(math.ceil(width / stride)))


# Mask step and background step by the values of `background_step`.
STEPS = {
    "share": (RunMaskStep, RunBackgroundStep),
    "non_local": (RunMaskStep, RunNonLocalBackgroundStep),
    "correction": (CorrectedMaskStep, CorrectedBackgroundStep),
}

__all__ = ["RunConfig", "RunForImageSegmentation", "RunPreTrainedModel"]
