"""Configuration of SRS, the siamese reconstruction-segmentation network."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_unconceal import check_at_least, check_channels, name_labels


@strict
class SrsConfig(PreTrainedConfig):
    """Architecture and loss weights of both SRS networks.

    The defaults are those of the paper. One configuration describes both, because the segmentation network holds the
    encoder of the reconstruction network. Training settings belong in recipes.

    Args:
        num_channels: Image channels, of the input and of the reconstruction, always 3.
        stem_size: Channels after the stem of the segmentation network.
        hidden_sizes: Channels of its four levels, from stride 1 to stride 8.
        depths: Residual blocks in every node of a level, finest level first.
        reconstruction_stem_size: Like `stem_size`, for the reconstruction network.
        reconstruction_hidden_sizes: Like `hidden_sizes`, for the reconstruction network. The last entry is the number
            of dynamic parameters, so it must divide the last entry of `hidden_sizes`.
        reconstruction_depths: Like `depths`, for the reconstruction network.
        attention_reduction_ratio: Factor by which channel attention narrows its channels.
        bce_weight: Weight of the binary cross-entropy in the segmentation loss.
        dice_weight: Weight of the Dice loss in the segmentation loss.
        batch_dice: Compute the Dice loss over all pixels of a batch instead of over each image. It then also punishes
            what is found in an image without an object.
        reconstruction_batch_statistics: Normalize the frozen encoder with the statistics of the batch instead of the
            learned ones. The authors' release does this even in tests, as it never switches the encoder to evaluation.
            A mask then depends on the other images of the batch. Only for comparing with published checkpoints.
    """

    model_type = "srs_seg"
    keys_to_ignore_at_inference = ["loss_dict"]

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
    batch_dice: bool = False
    reconstruction_batch_statistics: bool = False

    def __post_init__(self, **kwargs):
        name_labels(self, kwargs.get("num_labels"))
        super().__post_init__(**kwargs)

    def validate_levels(self):
        """Reject impossible sizes."""
        check_channels(self)
        check_at_least(self, 1, "stem_size", "reconstruction_stem_size", "attention_reduction_ratio")
        for prefix in ("", "reconstruction_"):
            hidden_sizes, depths = getattr(self, f"{prefix}hidden_sizes"), getattr(self, f"{prefix}depths")
            if len(depths) != 4 or min(depths) < 1:
                raise ValueError(f"`{prefix}depths`: got {depths}, expected 4 entries of at least 1.")
            ratio = self.attention_reduction_ratio
            if len(hidden_sizes) != 4 or min(hidden_sizes) < ratio or any(size % 4 for size in hidden_sizes[1:]):
                raise ValueError(
                    f"`{prefix}hidden_sizes`: got {hidden_sizes}, expected 4 entries of at least "
                    f"`attention_reduction_ratio` ({ratio}), multiples of 4 from the second on."
                )
        last, guides = self.hidden_sizes[-1], self.reconstruction_hidden_sizes[-1]
        if last % guides:
            raise ValueError(
                f"`hidden_sizes[-1]`: got {last}, expected a multiple of `reconstruction_hidden_sizes[-1]` ({guides})."
            )


SrsConfig.register_for_auto_class()

__all__ = ["SrsConfig"]
