"""Configuration of OPDS, the one-stage progressive dichotomous segmentation network."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .backbones import NUM_LEVELS, check_backbone_config, make_backbone_config
from .configuration_unconceal import check_at_least, check_channels, name_labels


@strict
class OpdsConfig(PreTrainedConfig):
    """Architecture and loss weights of OPDS, on MSCAN-B by default.

    The defaults are for images of 1024x1024. Training settings belong in recipes.

    Args:
        num_channels: Image channels, always 3.
        backbone_config: Configuration of the encoder: a backbone with features at strides 4, 8, 16 and 32, MSCAN-B by
            default. Without a choice of features, the last four levels are used.
        decoder_hidden_sizes: Channels of the decoder's levels, finest first, multiples of 8. Four entries make the
            progressive decoder. One entry makes a single head at stride 4 on all features, the baseline.
        num_bases: Rank of the matrix factorization in each hamburger.
        train_steps: Steps of the factorization in training.
        eval_steps: Steps of the factorization in evaluation.
        bce_weight: Weight of the cross-entropy in each level's loss.
        iou_weight: Weight of the soft IoU in each level's loss.
        level_weights: Loss weight of each level of the decoder, finest first, 1 by default. [1, 0, 0, 0] is
            single-scale supervision.
    """

    model_type = "opds_dichotomous"
    keys_to_ignore_at_inference = ["loss_dict"]
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
        """Reject encoders without four levels or with other channels."""
        check_backbone_config(self)

    def validate_sizes(self):
        """Reject impossible sizes and loss weights."""
        check_channels(self)
        check_at_least(self, 1, "num_bases", "train_steps", "eval_steps")
        sizes = self.decoder_hidden_sizes
        num_levels, weights = len(sizes), self.level_weights
        if num_levels not in (1, NUM_LEVELS) or any(size < 8 or size % 8 for size in sizes):
            raise ValueError(f"`decoder_hidden_sizes`: got {sizes}, expected {NUM_LEVELS} multiples of 8, or one.")
        check_at_least(self, 0, "bce_weight", "iou_weight")
        if len(weights) != num_levels or not all(0 <= w < float("inf") for w in weights) or not weights[0]:
            raise ValueError(
                f"`level_weights`: got {weights}, expected {num_levels} numbers of 0 or more, one for each of "
                "`decoder_hidden_sizes`, the first above 0."
            )


OpdsConfig.register_for_auto_class()

__all__ = ["OpdsConfig"]
