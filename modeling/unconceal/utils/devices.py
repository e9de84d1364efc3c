"""Choose devices and number types."""

import logging

import torch

from .errors import UserError


logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
# What processors call their instructions for bfloat16.
CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return a device by name; by default the accelerator, otherwise the CPU.

    Raises:
        UserError: If torch cannot use it here.
    """
    if device is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(device)
        torch.empty(1, device=device).item()  # meta has no values
    # torch raises AssertionError if built without CUDA, NotImplementedError or ImportError without another backend.
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"got the device {str(device)!r}, which torch cannot use here; try cpu") from error
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16 by instructions of its own."""
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return any(capabilities.get(name) for name in CPU_BFLOAT16)
    if device.type == "cuda":
        with torch.cuda.device(device):  # it answers for the current device
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def gains_from_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes faster in bfloat16 than in float32.

    Intel's processors need AMX for that. With AVX-512 alone they take as long as in float32, or longer.
    """
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        if "Intel" in str(capabilities.get("cpu_name")):
            return bool(capabilities.get("amx_bf16"))
    return has_bfloat16(device)


def choose_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """Return a number type by name, None for None.

    A device without bfloat16 gets float32 instead. A line in the log says so, or that bfloat16 is not faster here.

    Raises:
        UserError: If the name is unknown.
    """
    if name is None:
        return None
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"got the dtype {name!r}, expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    if name == "bfloat16" and not has_bfloat16(device):
        logger.warning("%s has no bfloat16 of its own; float32 is used", device)
        name = "float32"
    elif name == "bfloat16" and not gains_from_bfloat16(device):
        logger.warning("%s is not faster in bfloat16 than in float32", device)
    return getattr(torch, name)
