"""Base class of all networks: saving with code, and input checks."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES

from .configuration_unconceal import check_labels
from .inference import make_inference_form


# The Auto class of every network that segments.
SEGMENTATION = "AutoModelForImageSegmentation"


class UnconcealPreTrainedModel(PreTrainedModel):
    """Base class of every network: saving with code, input checks, training hooks.

    Attributes:
        auto_classes: Auto model classes that open a checkpoint of this class.
        min_image_size: Smallest side of an image, in pixels.
        num_stages: Number of unfolding stages, 0 without unfolding.
        has_backbone: Whether the encoder is a backbone, which `load_backbone` fills.
        training_progress: Share of the training that is done, in [0, 1]. The training loop sets it before each step.
        is_inference_form: Whether `for_inference` made this network.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    auto_classes = ("AutoModel", SEGMENTATION, "AutoModelForSemanticSegmentation")
    min_image_size = 32
    num_stages: int = 0
    has_backbone = False
    training_progress: float = 1.0
    is_inference_form = False
    # Once set, `save_pretrained` copies the code of the model next to the weights.
    _auto_class = "AutoModel"
    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # older names, as in transformers 5.17
        activation_checkpointing_enable = PreTrainedModel.gradient_checkpointing_enable
        activation_checkpointing_disable = PreTrainedModel.gradient_checkpointing_disable

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if SEGMENTATION in self.auto_classes:
            check_labels(config)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__name__.endswith("ForImageSegmentation"):
            # `pipeline("image-segmentation")` logs an error for models that are missing from this table.
            MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES[cls.config_class.model_type] = cls.__name__

    def denormalize(self, pixel_values: Tensor) -> Tensor | None:
        """Return the image in [0, 1], or None if not needed."""
        return None

    def load_backbone(self, source: str):
        """Raise `ValueError`, as this network has no backbone to load."""
        raise ValueError(
            f"got backbone {source}, but {type(self).__name__} has no backbone; train it from random weights."
        )

    def for_inference(self, dtype: torch.dtype | None = None) -> "UnconcealPreTrainedModel":
        """Return a faster copy for inference.

        The copy is frozen, in evaluation mode, on the same device. In float32 its outputs are equal within 1e-4. It
        cannot be saved: save the network that it came from. A network that Accelerate spread over several places is
        returned as it is.

        Args:
            dtype: Type of the weights and the arithmetic. None keeps this network's.
        """
        return make_inference_form(self, dtype)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save weights, config and code. See `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: If this is a copy for inference.
        """
        if self.is_inference_form:
            raise ValueError("got a copy for inference, expected the network that it came from; save that one.")
        # Imported late, because only saving needs it. transformers copies late imports, too.
        from .pipeline_unconceal import SoftMaskPipeline

        # transformers would record only the Auto class that was registered last.
        self.config.auto_map = {
            "AutoConfig": _reference(type(self.config)),
            **{auto_class: _reference(type(self)) for auto_class in self.auto_classes},
        }
        if SEGMENTATION in self.auto_classes:
            task = {"impl": _reference(SoftMaskPipeline), "pt": [SEGMENTATION], "type": "image"}
            self.config.custom_pipelines = {SoftMaskPipeline.task_name: task}
        else:  # the configuration may come from a network that segments
            vars(self.config).pop("custom_pipelines", None)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialize convolutions as PyTorch does, the rest as transformers does."""
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(self, *args, **kwargs):
        super()._set_gradient_checkpointing(*args, **kwargs)
        for layer in self.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                # A closure could not be copied or pickled with the model.
                layer._gradient_checkpointing_func = partial(_checkpoint, layer, layer._gradient_checkpointing_func)

    def keep_hidden_states(
        self, output_hidden_states: bool | None, hidden_states: Iterable[Tensor]
    ) -> tuple[Tensor, ...] | None:
        """Return `hidden_states` if requested; with None the configuration decides."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return tuple(hidden_states) if output_hidden_states else None

    def check_pixel_values(self, pixel_values: Tensor):
        """Raise `ValueError` unless `pixel_values` is (B, C, H, W), large enough."""
        channels, smallest = self.config.num_channels, self.min_image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"`pixel_values`: got {tuple(pixel_values.shape)}, expected (batch, {channels}, height, width); "
                "use the image processor of the model."
            )
        if pixel_values.shape[2] < smallest or pixel_values.shape[3] < smallest:
            raise ValueError(
                f"`pixel_values`: got {pixel_values.shape[3]}x{pixel_values.shape[2]} pixels, expected at least "
                f"{smallest}x{smallest}; resize or pad the image."
            )

    @staticmethod
    def match_labels(labels: Tensor, logits: Tensor) -> Tensor:
        """Return `labels` as floats in the shape of `logits`.

        Raises:
            ValueError: If labels are neither (B, H, W) nor (B, 1, H, W), or outside [0, 1].
        """
        matched = labels.unsqueeze(1) if labels.ndim == 3 else labels
        if matched.shape != logits.shape:
            raise ValueError(
                f"`labels`: got {tuple(labels.shape)}, expected (batch, height, width) or (batch, 1, height, width) "
                f"in the size of the logits {tuple(logits.shape)}; resize the labels."
            )
        if matched.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (value.item() for value in matched.aminmax())
            if not 0 <= low <= high <= 1:  # also refuses NaN
                raise ValueError(
                    f"`labels`: got values from {low:g} to {high:g}, expected 0 to 1; pass masks to the image "
                    "processor as `segmentation_maps`."
                )
            return matched.to(logits.device, torch.float32)
        # Reading a number from an accelerator would stop it at every step. There such labels make the loss NaN.
        matched = matched.to(logits.device, torch.float32)
        return matched.where((matched >= 0) & (matched <= 1), math.nan)


def _reference(kind: type) -> str:
    """Return FILE.CLASS, the name of a class in `config.json`."""
    return f"{kind.__module__.split('.')[-1]}.{kind.__name__}"


def _checkpoint(layer: nn.Module, checkpoint: Callable, forward: Callable, *args):
    """Run a layer under `checkpoint`; recomputing does not update batch norms again."""
    momenta = [(m, m.momentum) for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    has_run = False

    def run(*args):
        nonlocal has_run
        for norm, momentum in momenta:
            norm.momentum = 0.0 if has_run else momentum
        has_run = True
        try:
            return forward(*args)
        finally:
            for norm, momentum in momenta:
                norm.momentum = momentum

    return checkpoint(run, *args)


@torch.no_grad()
def init_by_fan_out(conv: nn.Conv2d):
    """Initialize a convolution from N(0, 2 / fan-out), its bias with 0."""
    fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
    init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    if conv.bias is not None:
        init.zeros_(conv.bias)


def drop_path(branch: Tensor, rate: float, training: bool) -> Tensor:
    """Drop the branch (B, C, H, W) of random images in training."""
    if not training or rate == 0:
        return branch
    return branch * F.dropout(branch.new_ones(branch.shape[0], 1, 1, 1), rate)


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def upsample(hidden_states: Tensor, factor: int) -> Tensor:
    """Enlarge (B, C, H, W) by a whole factor, bilinearly."""
    if factor == 1:
        return hidden_states
    # Sizes instead of the factor, which the compiler may take for a variable that bilinear kernels reject.
    size = [side * factor for side in hidden_states.shape[-2:]]
    return F.interpolate(hidden_states, size=size, mode="bilinear", align_corners=False)


def padding_to(multiple: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return padding at the right and bottom up to multiples, for `F.pad`."""
    # In an exported network `-size % multiple` would make the symbolic sizes grow with every layer.
    right, bottom = ((side + multiple - 1) // multiple * multiple - side for side in (width, height))
    return 0, right, 0, bottom


def pad_edges(pixel_values: Tensor, multiple: int) -> tuple[Tensor, list[int]]:
    """Repeat the last row and column up to multiples.

    Returns the padded (B, C, H, W), and the negative padding with which `F.pad` crops it again. A slice would tie an
    exported network to a size.
    """
    padding = padding_to(multiple, *pixel_values.shape[-2:])
    return F.pad(pixel_values, padding, mode="replicate"), [-side for side in padding]


def without_autocast(device_type: str) -> AbstractContextManager:
    """Return a context without autocast, for arithmetic in float32."""
    # The context would add a node to an exported program. Meta tensors have no autocast.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
