"""Configuration of RUN, the reversible unfolding network."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .backbones import NUM_LEVELS, check_backbone_config, make_backbone_config
from .configuration_unconceal import check_at_least, check_channels, name_labels


# Older checkpoints and recipes hold these keys, always true. Variants without a part are not shipped.
REMOVED_SWITCHES = ("use_unfolding", "use_state_space", "use_background", "use_residual_sparsity")

OLD_DILATIONS = (6, 12, 18)
BACKGROUND_STEPS = ("share", "non_local", "correction")


def drop_removed_switches(values: dict):
    """Drop the removed switches.

    Raises:
        ValueError: If one is off.
    """
    for name in REMOVED_SWITCHES:
        if not values.pop(name, True):
            raise ValueError(f"`{name}`: got false, expected true; RUN without this part is no longer supported.")


@strict
class RunConfig(PreTrainedConfig):
    """Architecture and loss weights of RUN, on ResNet-50 by default.

    Training settings belong in recipes.

    Args:
        num_channels: Image channels, always 3.
        backbone_config: Configuration of the encoder: a backbone with features at strides 4, 8, 16 and 32, ResNet-50
            by default. Without a choice of features, the last four levels are used.
        hidden_size: Channels of the neck and of every stage; a multiple of 8.
        stage_levels: Encoder level of each stage, from 3 (stride 32) to 0 (stride 4), coarse to fine. The number of
            entries is the number of stages, K in the paper.
        share_stages: Whether all stages share one set of weights. They always share the closed forms and the
            reconstruction network.
        state_size: States of each channel of a scan.
        expand: Channels of a scan, as a multiple of `hidden_size`.
        window_size: Side of the windows of the small-field scan, in positions.
        sparsity_hidden_size: Channels of the network for the gradient of the residual sparsity.
        coarse_dilations: Dilations of the coarse mask's branches, in positions at stride 32.
        background_step: How a stage finds the background: `share` by a U-Net, `non_local` by similar positions of the
            image, `correction` as checkpoints without this field did.
        reconstruction_hidden_sizes: Channels of the three levels of ROBE's U-Net, finest first; multiples of 8.
        image_mean: Mean that the image processor subtracts from each channel. The closed forms need it to restore the
            image in [0, 1].
        image_std: Standard deviation by which the image processor divides each channel.
        bce_weight: Loss weight of the cross-entropy of masks.
        iou_weight: Loss weight of the soft IoU of masks.
        edge_weight: Loss weight of the Dice loss of edges.
        background_weight: Loss weight of the background's share, relative to that of the mask of its stage.
        reconstruction_weight: Loss weight of the mean squared error of reconstructions.
        ambiguity_weight: Loss weight of the final mask's ambiguity at the end of training. It rises from 0.
        stage_weight_decay: Ratio of the loss weights of a stage and the next. The last stage has weight 1.
    """

    model_type = "run_unfolding"
    keys_to_ignore_at_inference = ["loss_dict"]
    sub_configs = {"backbone_config": AutoConfig}

    num_channels: int = 3
    backbone_config: dict | PreTrainedConfig | None = None
    hidden_size: int = 64
    stage_levels: list[int] | tuple[int, ...] = (3, 2, 1, 0)
    share_stages: bool = False
    state_size: int = 16
    expand: int = 2
    window_size: int = 8
    sparsity_hidden_size: int = 32
    coarse_dilations: list[int] | tuple[int, ...] = (1, 2, 4)
    background_step: str = "share"
    reconstruction_hidden_sizes: list[int] | tuple[int, ...] = (16, 32, 64)
    image_mean: list[float | int] | tuple[float | int, ...] = (0.485, 0.456, 0.406)
    image_std: list[float | int] | tuple[float | int, ...] = (0.229, 0.224, 0.225)
    bce_weight: float | int = 1.0
    iou_weight: float | int = 1.0
    edge_weight: float | int = 1.0
    background_weight: float | int = 1.0
    reconstruction_weight: float | int = 1.0
    ambiguity_weight: float | int = 2.0
    stage_weight_decay: float | int = 0.5

    def __post_init__(self, **kwargs):
        drop_removed_switches(kwargs)
        # The default resnet of transformers is a ResNet-50.
        self.backbone_config = make_backbone_config(self.backbone_config, self.num_channels, default="resnet")
        name_labels(self, kwargs.get("num_labels"))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Build from the values of a file.

        Files of older checkpoints lack `background_step`.
        """
        if "transformers_version" in config_dict and "background_step" not in config_dict:
            config_dict = {"coarse_dilations": OLD_DILATIONS, **config_dict, "background_step": "correction"}
        return super().from_dict(config_dict, **kwargs)

    @property
    def num_stages(self) -> int:
        """Return the number of stages, K in the paper."""
        return len(self.stage_levels)

    def validate_backbone(self):
        """Reject encoders without four levels or with other channels."""
        check_backbone_config(self)

    def validate_sizes(self):
        """Reject impossible sizes and loss weights."""
        check_channels(self)
        check_at_least(self, 1, "state_size", "expand", "window_size", "sparsity_hidden_size")
        levels = list(self.stage_levels)
        if not levels or levels != sorted(levels, reverse=True) or levels[0] >= NUM_LEVELS or levels[-1] != 0:
            raise ValueError(
                f"`stage_levels`: got {levels}, expected falling levels from at most {NUM_LEVELS - 1} to 0, such as "
                "(3, 2, 1, 0)."
            )
        if self.hidden_size < 8 or self.hidden_size % 8:
            raise ValueError(f"`hidden_size`: got {self.hidden_size}, expected a multiple of 8.")
        if self.background_step not in BACKGROUND_STEPS:
            raise ValueError(
                f"`background_step`: got {self.background_step!r}, expected one of {', '.join(BACKGROUND_STEPS)}."
            )
        if min(self.coarse_dilations, default=1) < 1:
            raise ValueError(f"`coarse_dilations`: got {self.coarse_dilations}, expected positive numbers.")
        sizes = self.reconstruction_hidden_sizes
        if len(sizes) != 3 or any(size < 8 or size % 8 for size in sizes):
            raise ValueError(f"`reconstruction_hidden_sizes`: got {sizes}, expected 3 multiples of 8.")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != self.num_channels:
                raise ValueError(
                    f"`{name}`: got {values}, expected one value for each of {self.num_channels} channels."
                )
        if min(self.image_std) <= 0:
            raise ValueError(f"`image_std`: got {self.image_std}, expected values above 0.")
        check_at_least(self, 0, "bce_weight", "iou_weight", "edge_weight", "background_weight")
        check_at_least(self, 0, "reconstruction_weight", "ambiguity_weight", "stage_weight_decay")


RunConfig.register_for_auto_class()

__all__ = ["RunConfig"]
