"""OPDS: segments intricate objects at high resolution, from coarse to fine.

Paper: "One-stage Progressive Dichotomous Segmentation", BMVC 2023. Its code and weights are not public. This is
written from its abstract and poster, which leave open the widths, the fusion, the losses and the schedule. The widths
here are those of the encoder, except 160 instead of 128 at stride 8. That gives 28.08 M parameters and 128.1 GMAC at
1024x1024; the poster says 28.0 M and 129.2 GMAC. The matrix factorization is that of "Is Attention Better Than Matrix
Decomposition?", ICLR 2021, https://arxiv.org/abs/2109.04553.

| poster | here | shape for an H x W image, at stride s of the level |
|---|---|---|
| features with convolutional attention | `features` of a level, from `MscanBackbone` | (B, C, H / s, W / s) |
| hamburger head | `OpdsHamburger` in each `OpdsDecoderLevel` | (B, decoder_hidden_sizes[i], H / s, W / s) |
| maps, refined level by level | `level_logits` before the sigmoid | (B, 1, H / s, W / s) |
| multi-scale supervision loss | `loss_terms` | scalars |
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbones import COARSEST_STRIDE, FINEST_STRIDE, UnconcealBackboneModel
from .configuration_opds import OpdsConfig
from .losses import add_terms, structure_loss
from .modeling_unconceal import pad_edges, upsample, without_autocast


# Added to the denominators of the factorization.
EPSILON = 1e-6


@dataclass
class OpdsSegmentationOutput(ModelOutput):
    """Output of `OpdsForImageSegmentation`.

    Args:
        loss: Scalar, present when `labels` is given.
        logits: (B, 1, H, W), pre-sigmoid, the mask of the finest level at the input size.
        level_logits: Present on request. The masks of the decoder's levels, (B, 1, h, w), pre-sigmoid, strides 32 to
            4. They cover the image, padded at the right and bottom to multiples of 32.
        hidden_states: Present on request. First the features of the encoder, (B, C, h, w), strides 4 to 32. Then the
            features behind each mask, (B, decoder_hidden_sizes[i], h, w), coarse to fine.
        loss_dict: The weighted terms of the loss by name, without gradients: `mask_stride_4` and so on.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    level_logits: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    loss_dict: dict[str, Tensor] | None = None


class OpdsConvNormAct(nn.Sequential):
    """1x1 convolution without bias, group norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
            nn.GroupNorm(out_channels // 8, out_channels),
            nn.ReLU(),
        )


def initial_bases(shape: torch.Size) -> Tensor:
    """Return the bases (channels, bases) that every factorization starts from."""
    # From one seed and on the CPU, so that all networks and devices get the same ones.
    generator = torch.Generator("cpu").manual_seed(0)
    return F.normalize(torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32), dim=0)


class OpdsMatrixFactorization(nn.Module):
    """Non-negative matrix factorization of the features of each image (Hamburger).

    Multiplicative updates bring D C near to the features X, (channels, positions). D are the bases, (channels, bases),
    and C the coefficients, (bases, positions). The gradient flows through every update.

    DEVIATION: Hamburger draws new random bases in every forward pass, so two passes differ. Here all passes start from
    the same bases.
    """

    def __init__(self, config: OpdsConfig, channels: int):
        super().__init__()
        self.train_steps, self.eval_steps = config.train_steps, config.eval_steps
        self.register_buffer("bases", torch.empty(channels, config.num_bases))
        self.bases.copy_(initial_bases(self.bases.shape))  # also for callers that skip `_init_weights`

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map non-negative (B, C, H, W) to their reconstruction."""
        with without_autocast(hidden_states.device.type):  # half precision cannot hold EPSILON or sums over positions
            height, width = hidden_states.shape[-2:]
            features = self.for_products(hidden_states).flatten(2)  # X: (B, C, L)
            bases = self.bases.float().expand(features.shape[0], -1, -1)  # D: (B, C, R)
            # 1. Coefficients, transposed, from the similarity of positions and bases.
            similarity = self.product(features.transpose(1, 2), bases)  # X^T D: (B, L, R)
            coefficients = similarity.float().softmax(dim=-1)
            # 2. Multiplicative updates of coefficients and bases, which bring D C nearer to X.
            for _ in range(self.train_steps if self.training else self.eval_steps):
                coefficients = self.update(coefficients, similarity, self.product(bases.transpose(1, 2), bases))
                gram = self.product(coefficients.transpose(1, 2), coefficients)  # C C^T: (B, R, R)
                bases = self.update(bases, self.product(features, coefficients), gram)
                similarity = self.product(features.transpose(1, 2), bases)
            # 3. The coefficients of the last bases.
            coefficients = self.update(coefficients, similarity, self.product(bases.transpose(1, 2), bases))
            reconstruction = self.product(bases, coefficients.transpose(1, 2)).unflatten(2, (height, width))
        return reconstruction.to(hidden_states.dtype)

    def for_products(self, values: Tensor) -> Tensor:
        """Return `values` in the type of matrix products."""
        return values.to(torch.float32 if self.bases.dtype != torch.bfloat16 else torch.bfloat16)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply matrices."""
        return self.for_products(left) @ self.for_products(right)

    def update(self, factors: Tensor, wanted: Tensor, gram: Tensor) -> Tensor:
        """Return F N / (F G + EPSILON) for factors F."""
        denominators = self.product(factors, gram)
        if torch.is_grad_enabled():
            return factors * wanted / (denominators + EPSILON)
        # In place: these are the largest tensors of the network.
        return factors.mul(wanted).div_(denominators.add_(EPSILON))


class OpdsHamburger(nn.Module):
    """Global context: residual matrix factorization between two 1x1 convolutions.

    DEVIATION: The head of SegNeXt has 32 groups in every norm, and dropout before its last layer. Here a group has 8
    channels, and there is no dropout.
    """

    def __init__(self, config: OpdsConfig, channels: int):
        super().__init__()
        self.proj_in = nn.Conv2d(channels, channels, kernel_size=1)
        # Checkpoints spell this name with an s.
        self.factorisation = OpdsMatrixFactorization(config, channels)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        self.norm = nn.GroupNorm(channels // 8, channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        context = self.factorisation(F.relu(self.proj_in(hidden_states)))
        return F.relu(hidden_states + self.norm(self.proj_out(context)))


class OpdsDecoderLevel(GradientCheckpointingLayer):
    """Decoder level: squeeze, global context, mask."""

    def __init__(self, config: OpdsConfig, in_channels: int, channels: int):
        super().__init__()
        self.squeeze = OpdsConvNormAct(in_channels, channels)
        self.hamburger = OpdsHamburger(config, channels)
        self.align = OpdsConvNormAct(channels, channels)
        self.mask_head = nn.Conv2d(channels, 1, kernel_size=1)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C_in, h, w) to features and mask logits."""
        hidden_states = self.align(self.hamburger(self.squeeze(hidden_states)))
        return hidden_states, self.mask_head(hidden_states)


class OpdsPreTrainedModel(UnconcealBackboneModel):
    """Initial weights and checkpointing of OPDS."""

    config_class = OpdsConfig
    base_model_prefix = "opds"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MscanBlock", "OpdsDecoderLevel"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialize `module`: convolutions as PyTorch does, bases from a fixed seed."""
        if isinstance(module, OpdsMatrixFactorization):
            init.copy_(module.bases, initial_bases(module.bases.shape))
        else:
            super()._init_weights(module)


class OpdsForImageSegmentation(OpdsPreTrainedModel):
    """OPDS: encoder and progressive decoder; `from_backbone` loads a pretrained encoder."""

    def __init__(self, config: OpdsConfig):
        super().__init__(config)
        self.backbone = self.make_backbone()
        channels, sizes = self.backbone.channels, config.decoder_hidden_sizes
        # A single head sees all features. A level sees its own, and features and mask of the level before.
        own = [sum(channels)] if len(sizes) == 1 else channels
        before = [*(size + 1 for size in sizes[1:]), 0]
        self.levels = nn.ModuleList(OpdsDecoderLevel(config, own[i] + before[i], sizes[i]) for i in range(len(sizes)))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_levels: bool = False,
    ) -> OpdsSegmentationOutput:
        """Segment a batch of images.

        Args:
            pixel_values: (B, 3, H, W), normalized RGB, at least 32x32.
            labels: (B, H, W) or (B, 1, H, W) in [0, 1], 1 for object. Soft values are allowed.
            output_hidden_states: Whether to return `hidden_states`. None means: as configured.
            output_levels: Whether to return `level_logits`.

        Raises:
            ValueError: If images, labels or the strides of the encoder do not fit.
        """
        self.check_pixel_values(pixel_values)
        # 1. Features at strides 4, 8, 16 and 32.
        padded, cropping = pad_edges(pixel_values, COARSEST_STRIDE)
        features = self.encode(padded)
        all_hidden_states = list(features)
        if len(self.levels) == 1:  # one level sees all features
            features = [torch.cat([upsample(feature_map, 2**i) for i, feature_map in enumerate(features)], dim=1)]
        # 2. The mask of each level, coarse to fine.
        level_logits, known = [], []
        for feature_map, level in zip(reversed(features), reversed(self.levels), strict=True):
            if level_logits:
                before = all_hidden_states[-1]
                known = [upsample(before, 2), upsample(level_logits[-1].float(), 2).sigmoid().to(before.dtype)]
            hidden_states, logits = level(torch.cat([feature_map, *known], dim=1))
            level_logits.append(logits)
            all_hidden_states.append(hidden_states)
        # 3. The finest mask at the input size.
        logits = F.pad(upsample(level_logits[-1], FINEST_STRIDE), cropping)

        loss = loss_dict = None
        if labels is not None:
            terms = self.loss_terms(self.match_labels(labels, logits), logits, level_logits, cropping)
            loss, loss_dict = add_terms(terms)
        return OpdsSegmentationOutput(
            loss,
            logits,
            tuple(level_logits) if output_levels else None,  # on request: Pipeline cannot unbatch tuples
            self.keep_hidden_states(output_hidden_states, all_hidden_states),
            loss_dict,
        )

    def loss_terms(
        self, labels: Tensor, logits: Tensor, level_logits: list[Tensor], cropping: list[int]
    ) -> dict[str, Tensor]:
        """Return the weighted loss of each level."""
        config, weights = self.config, self.config.level_weights
        terms = {}
        for i, level_map in enumerate(reversed(level_logits)):
            if weights[i]:
                enlarged = logits if i == 0 else F.pad(upsample(level_map, FINEST_STRIDE * 2**i), cropping)
                terms[f"mask_stride_{FINEST_STRIDE * 2**i}"] = weights[i] * structure_loss(
                    enlarged, labels, torch.ones_like(labels), config.bce_weight, config.iou_weight
                )
        return terms


__all__ = ["OpdsConfig", "OpdsForImageSegmentation", "OpdsPreTrainedModel"]
