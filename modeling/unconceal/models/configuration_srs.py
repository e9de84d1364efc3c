"""Configuration of SRS, the siamese reconstruction-segmentation network."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_unconceal import name_labels


@strict
class SrsConfig(PreTrainedConfig):
    """Architecture and loss weights of both SRS networks. The defaults are the paper's network.

    Training settings live in recipes, never here. One configuration describes the pair, because the segmentation
    network holds the encoder of the reconstruction network.

    Args:
        num_channels: Image channels, of the input and of the reconstruction.
        stem_size: Channels after the stem of the segmentation network.
        hidden_sizes: Channels of its four levels, finest (stride 1) first; the coarsest has stride 8.
        depths: Residual blocks in every node of a level, finest level first.
        reconstruction_stem_size: As `stem_size`, for the reconstruction network.
        reconstruction_hidden_sizes: As `hidden_sizes`, for the reconstruction network. The last entry is the number of
            scalars that steer the dynamic convolution, so it must divide the last entry of `hidden_sizes`.
        reconstruction_depths: As `depths`, for the reconstruction network.
        attention_reduction_ratio: Factor by which channel attention narrows its channels.
        bce_weight: Weight of the binary cross-entropy in the segmentation loss.
        dice_weight: Weight of the Dice loss in the segmentation loss.
        reconstruction_batch_statistics: Normalise the frozen encoder with the statistics of the present batch instead
            of the learned ones. The authors' release does this at test time too, by never switching it to evaluation;
            an image's mask then depends on the images beside it. Only for comparing with published checkpoints.
    """

    model_type = "srs_seg"

    num_channels: int = 3
    stem_size: int = 8
    hidden_sizes: list[int] | tuple[int, ...] = (16, 64, 128, 256)
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    reconstruction_stem_size: int = 16
    reconstruction_hidden_sizes: list[int] | tuple[int, ...] = (8, 16, 32, 64)
    reconstruction_depths: list[int] | tuple[int, ...] = (5, 5, 5, 5)
    attention_reduction_ratio: int = 8
    bce_weight: float | int = 0.5
    dice_weight: float | int = 1.0
    reconstruction_batch_statistics: bool = False

    def __post_init__(self, **kwargs):
        name_labels(self, kwargs.get("num_labels"))
        super().__post_init__(**kwargs)

    def validate_levels(self):
        """Reject configurations whose levels cannot be wired together."""
        for name in ("num_channels", "stem_size", "reconstruction_stem_size", "attention_reduction_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for prefix in ("", "reconstruction_"):
            hidden_sizes, depths = getattr(self, f"{prefix}hidden_sizes"), getattr(self, f"{prefix}depths")
            if len(hidden_sizes) != 4 or len(depths) != 4:
                raise ValueError(
                    f"`{prefix}hidden_sizes` and `{prefix}depths` need 4 entries, got {hidden_sizes} and {depths}."
                )
            if min(depths) < 1:
                raise ValueError(f"`{prefix}depths` must be at least 1 each, got {depths}.")
            if any(size % 4 for size in hidden_sizes[1:]):
                raise ValueError(f"`{prefix}hidden_sizes[1:]` must be multiples of 4, got {hidden_sizes}.")
            if min(hidden_sizes) < self.attention_reduction_ratio:
                raise ValueError(
                    f"`{prefix}hidden_sizes` must be at least `attention_reduction_ratio` "
                    f"({self.attention_reduction_ratio}), got {hidden_sizes}."
                )
        if self.hidden_sizes[-1] % self.reconstruction_hidden_sizes[-1]:
            raise ValueError(
                "`hidden_sizes[-1]` must be a multiple of `reconstruction_hidden_sizes[-1]`, "
                f"got {self.hidden_sizes[-1]} and {self.reconstruction_hidden_sizes[-1]}."
            )


SrsConfig.register_for_auto_class()

__all__ = ["SrsConfig"]
