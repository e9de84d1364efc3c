"""Configuration of RUN, the reversible unfolding network."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .backbones import NUM_LEVELS, check_backbone_config, make_backbone_config
from .configuration_unconceal import name_labels


@strict
class RunConfig(PreTrainedConfig):
    """Architecture and loss weights of RUN. The defaults are the network on a ResNet-50.

    Training settings live in recipes, never here.

    Args:
        num_channels: Image channels.
        backbone_config: Configuration of the encoder, any backbone of transformers with features at strides 4, 8, 16 and
            32; ResNet-50 by default. Where it does not say which features it returns, its last four levels are taken.
        hidden_size: Channels of the neck and of every stage; a multiple of 8.
        stage_levels: Level of the encoder on which each stage works, from 3 (stride 32) to 0 (stride 4), the coarse ones
            first. The number of entries is the number of stages, K in the paper.
        share_stages: Whether all stages share one set of weights. The closed forms and the reconstruction network are
            shared in any case.
        use_unfolding: Whether closed forms and backgrounds steer the stages; else they are a plain decoder, the baseline to
            compare with.
        use_state_space: Whether masks come from Reversible State Space blocks; else from convolutions of like size.
        use_background: Whether backgrounds come from ROBE; else each is the image with the mask cut out.
        use_residual_sparsity: Whether the closed form of the mask has the residual sparsity term.
        state_size: States of each channel of a scan.
        expand: Channels of a scan as a multiple of `hidden_size`.
        window_size: Side, in positions, of the windows within which the small-field scan runs.
        sparsity_hidden_size: Channels of the network that learns the gradient of the residual sparsity.
        reconstruction_hidden_sizes: Channels of the reconstruction U-Net's three levels, finest first; multiples of 8.
        image_mean: Mean that the image processor subtracts, a value for each channel. The closed forms need it to see
            the image in [0, 1].
        image_std: Standard deviation that the image processor divides by, a value for each channel.
        bce_weight: Weight of the cross-entropy in the mask loss.
        iou_weight: Weight of the soft IoU in the mask loss.
        edge_weight: Weight of the edges' Dice loss.
        reconstruction_weight: Weight of the reconstruction's mean squared error.
        ambiguity_weight: Weight of the final mask's ambiguity at the end of training; it rises from 0.
        stage_weight_decay: Factor between the loss weights of a stage and the one after it; the last stage's is 1.
    """

    model_type = "run_unfolding"
    sub_configs = {"backbone_config": AutoConfig}

    num_channels: int = 3
    backbone_config: dict | PreTrainedConfig | None = None
    hidden_size: int = 64
    stage_levels: list[int] | tuple[int, ...] = (3, 2, 1, 0)
    share_stages: bool = False
    use_unfolding: bool = True
    use_state_space: bool = True
    use_background: bool = True
    use_residual_sparsity: bool = True
    state_size: int = 16
    expand: int = 2
    window_size: int = 8
    sparsity_hidden_size: int = 32
    reconstruction_hidden_sizes: list[int] | tuple[int, ...] = (16, 32, 64)
    image_mean: list[float | int] | tuple[float | int, ...] = (0.485, 0.456, 0.406)
    image_std: list[float | int] | tuple[float | int, ...] = (0.229, 0.224, 0.225)
    bce_weight: float | int = 1.0
    iou_weight: float | int = 1.0
    edge_weight: float | int = 1.0
    reconstruction_weight: float | int = 1.0
    ambiguity_weight: float | int = 2.0
    stage_weight_decay: float | int = 0.5

    def __post_init__(self, **kwargs):
        self.backbone_config = make_backbone_config(
            self.backbone_config, self.num_channels, default="resnet"
        )  # ResNet-50
        name_labels(self, kwargs.get("num_labels"))
        super().__post_init__(**kwargs)

    @property
    def num_stages(self) -> int:
        """Number of unfolded stages, K in the paper."""
        return len(self.stage_levels)

    def validate_backbone(self):
        """Reject encoders that do not return four levels of the image's channels."""
        check_backbone_config(self)

    def validate_sizes(self):
        """Reject sizes that cannot be built or wired together."""
        positive = ("num_channels", "state_size", "expand", "window_size", "sparsity_hidden_size")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        levels = list(self.stage_levels)
        if not levels or levels != sorted(levels, reverse=True) or levels[0] >= NUM_LEVELS or levels[-1] != 0:
            raise ValueError(
                f"`stage_levels` must fall from at most {NUM_LEVELS - 1} to 0, such as (3, 2, 1, 0), got {levels}."
            )
        if len(self.reconstruction_hidden_sizes) != 3:
            raise ValueError(f"`reconstruction_hidden_sizes` needs 3 entries, got {self.reconstruction_hidden_sizes}.")
        for name in ("hidden_size", "reconstruction_hidden_sizes"):
            sizes = getattr(self, name)
            if any(size < 8 or size % 8 for size in ([sizes] if isinstance(sizes, int) else sizes)):
                raise ValueError(f"`{name}` must be multiples of 8, got {sizes}.")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != self.num_channels:
                raise ValueError(
                    f"`{name}` needs a value for each of {self.num_channels} channels, got {getattr(self, name)}."
                )
        if min(self.image_std) <= 0:
            raise ValueError(f"`image_std` must be above 0, got {self.image_std}.")

    def validate_loss_weights(self):
        """Reject weights that would reward errors."""
        for name in (
            *("bce_weight", "iou_weight", "edge_weight"),
            *("reconstruction_weight", "ambiguity_weight", "stage_weight_decay"),
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")


RunConfig.register_for_auto_class()

__all__ = ["RunConfig"]
