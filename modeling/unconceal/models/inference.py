"""Inference form of a network: equal results in fewer passes over memory.

Batch norms are folded into convolutions. On a CPU, activations and sums run inside the convolution (oneDNN). On other
devices, and in compiled or exported programs, the same layers run as plain operations.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


# Builds without oneDNN lack it.
fused_convolution = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "gelu": F.gelu}
ONEDNN_ACTIVATIONS = {"relu6": ("hardtanh", [0.0, 6.0])}  # of other names or with numbers
# Layers that follow each other in a module of transformers, such as its ResNet.
LAYERS_IN_ORDER = ("convolution", "normalization", "activation")


def make_inference_form(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of a network that is only for inference.

    A module with layers in order can name them in `layers_in_order`, a tuple of tuples of attributes. A module with a
    method `prepare_for_inference` changes itself. A network that Accelerate spread over several places stays as it is
    and is returned. See also `UnconcealPreTrainedModel.for_inference`.
    """
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return model.eval()
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    copied.is_inference_form = True
    dtype = dtype or model.dtype
    if copied.dtype in (torch.float16, torch.bfloat16):
        copied.float()  # folding needs the precision
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if type(child) is nn.SyncBatchNorm:  # of a training on several GPUs
                setattr(module, name, plain_norm(child))
    for module in list(copied.modules()):
        vars(module).pop("forward", None)  # a wrapper of Accelerate would call the original
        if isinstance(module, nn.Sequential):
            fuse_layers(module, list(module._modules))
        for names in getattr(module, "layers_in_order", (LAYERS_IN_ORDER,)):
            fuse_layers(module, [name for name in names if name in module._modules])
        if hasattr(module, "prepare_for_inference"):
            module.prepare_for_inference()
    copied.eval().requires_grad_(False)
    kept = getattr(copied, "_keep_in_fp32_modules_strict", None) or ()
    for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
        if tensor.is_floating_point() and not any(part in name.split(".") for part in kept):
            tensor.data = tensor.data.to(dtype)
    return copied.to(memory_format=torch.channels_last)


def plain_norm(norm: nn.SyncBatchNorm) -> nn.BatchNorm2d:
    """Return a batch norm of one process with the same statistics."""
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    plain.load_state_dict(norm.state_dict())
    return plain.to(norm.running_mean.device).eval()


def fuse_layers(module: nn.Module, names: list[str]):
    """Fuse a convolution with the batch norm and the activation after it.

    Args:
        module: Changed in place. Layers that are no longer needed become `nn.Identity`.
        names: Attributes of layers that run one after the other.
    """
    for first, second in zip(names, names[1:], strict=False):
        conv, norm = getattr(module, first), getattr(module, second)
        if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.track_running_stats:
            setattr(module, first, fuse_conv_bn_eval(conv, norm))
            setattr(module, second, nn.Identity())
    names = [name for name in names if type(getattr(module, name)) is not nn.Identity]
    for first, second in zip(names, names[1:], strict=False):
        conv, activation = getattr(module, first), name_of(getattr(module, second))
        if type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and activation:
            setattr(module, first, FusedConv2d(conv, activation))
            setattr(module, second, nn.Identity())


def name_of(layer: nn.Module) -> str | None:
    """Return the name of an activation, None for other layers."""
    if type(layer) is nn.GELU:
        return "gelu" if layer.approximate == "none" else None
    return {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(layer))


def fold_norm_before(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Fold a batch norm into the convolution after it, in place.

    The convolution must not pad. Returns the scale and the shift of the norm, each (channels,).
    """
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    conv.bias.add_(torch.einsum("oikl,i->o", conv.weight, shift))
    conv.weight.mul_(scale[:, None, None])
    return scale, shift


def scale_outputs(conv: nn.Conv2d, scale: Tensor):
    """Multiply the output channels of a convolution by `scale`, in place."""
    conv.weight.mul_(scale[:, None, None, None])
    conv.bias.mul_(scale)


class FusedConv2d(nn.Conv2d):
    """Convolution with what follows it: an activation, a sum or a product.

    `conv` gives the weights, `activation` is a key of `ACTIVATIONS`.
    """

    def __init__(self, conv: nn.Conv2d, activation: str = "none"):
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation
        super().__init__(*sizes, conv.groups, bias=False, device="meta")
        self.weight, self.bias, self.activation = conv.weight, conv.bias, activation

    def forward(self, hidden_states: Tensor, plus: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """Return act(conv(x)), or conv(x) + `plus`, or conv(x) * `times`."""
        other = times if plus is None else plus
        if not _has_fused_convolutions(hidden_states):
            outputs = ACTIVATIONS[self.activation](super().forward(hidden_states))
            return outputs if other is None else outputs + other if times is None else outputs * other
        how = self.padding, self.stride, self.dilation, self.groups
        if other is None:
            name, limits = ONEDNN_ACTIVATIONS.get(self.activation, (self.activation, []))
            return fused_convolution(hidden_states, self.weight, self.bias, *how, name, limits, "none")
        kind = "mul" if plus is None else "add"
        return fused_convolution.binary(hidden_states, other, self.weight, self.bias, *how, kind, None, None, [], None)


def channel_mean(hidden_states: Tensor) -> Tensor:
    """Return the mean over the channels, (B, 1, H, W)."""
    if not _is_slow_elementwise(hidden_states):
        return hidden_states.mean(dim=1, keepdim=True)
    channels = hidden_states.shape[1]
    return F.conv2d(hidden_states, hidden_states.new_full((1, channels, 1, 1), 1 / channels))


def scale_pixels(hidden_states: Tensor, weights: Tensor) -> Tensor:
    """Multiply (B, C, H, W) by pixel weights, (B, 1, H, W)."""
    if not _is_slow_elementwise(hidden_states):
        return hidden_states * weights
    ones = hidden_states.new_ones(hidden_states.shape[1], 1, 1, 1)
    height, width = weights.shape[-2:]
    weights = weights.as_strided(weights.shape, (height * width, 1, width, 1))  # tells that it is channels-last
    return fused_convolution.binary(
        weights, hidden_states, ones, None, [0, 0], [1, 1], [1, 1], 1, "mul", None, None, [], None
    )


def _is_slow_elementwise(tensor: Tensor) -> bool:
    # PyTorch's own loops over few channels in bfloat16 take several times as long as a convolution.
    return tensor.dtype == torch.bfloat16 and not tensor.requires_grad and _has_fused_convolutions(tensor)


def _has_fused_convolutions(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.bfloat16)
        and fused_convolution is not None
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")  # it would not convert the weights
    )


__all__ = [
    "FusedConv2d",
    "channel_mean",
    "fold_norm_before",
    "fuse_layers",
    "make_inference_form",
    "scale_outputs",
    "scale_pixels",
]
