"""Configuration of OPDS, the one-stage progressive dichotomous segmentation network."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .backbones import NUM_LEVELS, check_backbone_config, make_backbone_config
from .configuration_unconceal import name_labels


@strict
class OpdsConfig(PreTrainedConfig):
    """Architecture and loss weights of OPDS. The defaults are the network on MSCAN-B, for images of 1024x1024.

    Training settings live in recipes, never here.

    Args:
        num_channels: Image channels.
        backbone_config: Configuration of the encoder, any backbone with features at strides 4, 8, 16 and 32; MSCAN-B by
            default. Where it does not say which features it returns, its last four levels are taken.
        decoder_hidden_sizes: Channels of the decoder's levels, finest first, multiples of 8. Four make the progressive
            decoder, one a single head at stride 4 on all features at once, the baseline to compare with.
        num_bases: Rank of the matrix factorisation in each hamburger.
        train_steps: Steps of the factorisation in training.
        eval_steps: Likewise in evaluation.
        bce_weight: Weight of the cross-entropy in each level's loss.
        iou_weight: Weight of the soft IoU in each level's loss.
        level_weights: Weight of each level's loss, finest first, one for each of the decoder's levels; all 1 by default.
            [1, 0, 0, 0] is single-scale supervision.
    """

    model_type = "opds_dichotomous"
    sub_configs = {"backbone_config": AutoConfig}

    num_channels: int = 3
    backbone_config: dict | PreTrainedConfig | None = None
    decoder_hidden_sizes: list[int] | tuple[int, ...] = (64, 160, 320, 512)
    num_bases: int = 64
    train_steps: int = 6
    eval_steps: int = 7
    bce_weight: float | int = 1.0
    iou_weight: float | int = 1.0
    level_weights: list[float | int] | tuple[float | int, ...] | None = None

    def __post_init__(self, **kwargs):
        self.backbone_config = make_backbone_config(self.backbone_config, self.num_channels)
        if self.level_weights is None:
            self.level_weights = [1.0] * len(self.decoder_hidden_sizes)
        name_labels(self, kwargs.get("num_labels"))
        super().__post_init__(**kwargs)

    def validate_backbone(self):
        """Reject encoders that do not return four levels of the image's channels."""
        check_backbone_config(self)

    def validate_sizes(self):
        """Reject sizes that cannot be built or wired together."""
        for name in ("num_channels", "num_bases", "train_steps", "eval_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        sizes = self.decoder_hidden_sizes
        if len(sizes) not in (1, NUM_LEVELS) or any(size < 8 or size % 8 for size in sizes):
            raise ValueError(f"`decoder_hidden_sizes` must be {NUM_LEVELS} multiples of 8, or one, got {sizes}.")

    def validate_loss_weights(self):
        """Reject weights that would reward errors, or leave the mask itself without a loss."""
        for name in ("bce_weight", "iou_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")
        weights, num_levels = self.level_weights, len(self.decoder_hidden_sizes)
        if not num_levels:
            return  # `validate_sizes` tells it
        if len(weights) != num_levels or not all(0 <= w < float("inf") for w in weights) or not weights[0]:
            raise ValueError(
                f"`level_weights` needs {num_levels} numbers of 0 or more, one for each of `decoder_hidden_sizes`, the "
                f"first above 0, got {weights}."
            )


OpdsConfig.register_for_auto_class()

__all__ = ["OpdsConfig"]
