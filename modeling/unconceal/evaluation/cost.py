"""Count and measure what networks and operators cost.

Counts are parameters and multiply-adds. Measurements are seconds and peak memory, on random pixels. Each runs in a
fresh process, because the peak memory of a process never falls. Compare speeds within one run on one machine only.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.configuration_opds import OpdsConfig
from ..models.configuration_run import RunConfig
from ..models.configuration_srs import SrsConfig
from ..models.modeling_opds import OpdsForImageSegmentation
from ..models.modeling_run import RunForImageSegmentation, RunScan2d
from ..models.modeling_srs import SrsDynamicConv, SrsForImageSegmentation, SrsForReconstruction, srs_dynamic_conv_ref
from ..models.modeling_unconceal import padding_to
from ..models.selective_scan import selective_scan, selective_scan_ref


PVTV2_B4 = {"model_type": "pvt_v2", "hidden_sizes": [64, 128, 320, 512], "depths": [3, 8, 27, 3]}
# The networks that can be measured, at their default size.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "srs": lambda: SrsForImageSegmentation(SrsConfig()),
    "run": lambda: RunForImageSegmentation(RunConfig()),
    "run-pvtv2-b4": lambda: RunForImageSegmentation(RunConfig(backbone_config=PVTV2_B4)),
    "opds": lambda: OpdsForImageSegmentation(OpdsConfig()),
    "opds-single-head": lambda: OpdsForImageSegmentation(OpdsConfig(decoder_hidden_sizes=[128])),
}


@dataclass(frozen=True)
class Part:
    """The size of a part of a network."""

    name: str
    parameters: int
    multiply_adds: int  # of convolutions, matrix products and scans for one image; exponentials are not counted
    published: tuple[float | None, float | None] = (None, None)  # millions of parameters, billions of multiply-adds


def count_parts(model: str, image_size: int) -> list[Part]:
    """Count one of `MODELS` for an image of `image_size` pixels a side."""
    with torch.device("meta"):
        network = MODELS[model]()
        adds = _multiply_adds(network, image_size)
        if model == "srs":
            reconstruction = SrsForReconstruction(network.config)
            adds_of_reconstruction = _multiply_adds(reconstruction, image_size)[""]
    whole = Part("whole", network.num_parameters(), adds[""], {"opds": (28.0, 129.2)}.get(model, (None, None)))
    if model != "srs":
        encoder = Part("encoder", network.backbone.num_parameters(), adds["backbone"])
        rest = (whole.parameters - encoder.parameters, whole.multiply_adds - encoder.multiply_adds)
        return [whole, encoder, Part("without encoder", *rest, {"run": (55.65, 156)}.get(model, (None, None)))]
    guide, dynamic = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (network.reconstruction_encoder, network.dynamic_conv)
    )
    guide_adds = adds["reconstruction_encoder"]
    return [
        Part("reconstruction network", reconstruction.num_parameters(), adds_of_reconstruction, (0.734, 5.43)),
        Part("its encoder", guide, guide_adds, (0.482, 1.58)),
        Part("segmentation network", whole.parameters - guide, adds[""] - guide_adds, (9.87, 45.94)),
        Part("its dynamic convolution", dynamic, adds["dynamic_conv"], (1.18, 0.61)),
        Part("inference: encoder and segmentation", whole.parameters, adds[""], (None, 47.5)),
    ]


def scan_multiply_adds(length: int, channels: int, states: int) -> int:
    """Return the elementwise multiply-adds of a selective scan.

    Per step, channel and state: the products delta A and (delta x) B, and exp(delta A) h + .... Per step and channel:
    delta x and D x. The products C h are matrix products, which torch's counter sees.
    """
    return length * channels * (3 * states + 2)


def _multiply_adds(model: nn.Module, image_size: int) -> dict[str, int]:
    """Count the multiply-adds of the model, under "", and of its children."""
    pixel_values = torch.empty(1, model.config.num_channels, image_size, image_size, device="meta")
    scans = []

    def count_scan(scan: RunScan2d, inputs: tuple[torch.Tensor], _):
        height, width = inputs[0].shape[-2:]
        _, right, _, bottom = padding_to(scan.window_size or 1, height, width)  # windows beyond the border are scanned
        scans.append(scan_multiply_adds((height + bottom) * (width + right), 4 * scan.inner_size, scan.state_size))

    for module in model.modules():
        if isinstance(module, RunScan2d):
            module.register_forward_hook(count_scan)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(pixel_values)
    counts = {module: sum(operations.values()) // 2 for module, operations in counter.get_flop_counts().items()}
    children = {name: counts.get(f"{type(model).__name__}.{name}", 0) for name, _ in model.named_children()}
    return {"": counts["Global"] + sum(scans), **children}


@dataclass(frozen=True)
class Measurement:
    """One thing to measure."""

    task: str  # "inference", "training" (forward, backward, optimizer step), or an operator: "scan", "dynamic_conv"
    model: str = "srs"  # one of `MODELS`; operators ignore it
    batch_size: int = 1
    image_size: int = 256  # side in pixels; for the scan, side of the map
    gradient_checkpointing: bool = False
    device: str = "cpu"
    dtype: str = "float32"  # or the type for autocast
    steps: int = 3  # after one warm-up; their median counts


def run_measurement(case: Measurement) -> dict[str, Any]:
    """Measure in a fresh process.

    Returns:
        The fields of the measurement with `seconds` and `peak_gib`, and for operators `seconds_ref`; or with `error`,
        if memory did not suffice. Peak memory is that of the process on the CPU, and of tensors on an accelerator.

    Raises:
        RuntimeError: If the process fails for another reason.
    """
    command = [sys.executable, "-m", __name__, json.dumps(asdict(case))]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode == 0:
        return {**asdict(case), **json.loads(answer.stdout.splitlines()[-1])}
    # The kernel ends a process that needs too much memory with signal 9.
    words = ("OutOfMemoryError", "not enough memory", "can't allocate memory")
    if answer.returncode == -9 or any(word in answer.stderr for word in words):
        return {**asdict(case), "error": "out of memory"}
    raise RuntimeError(f"{case} failed:\n{answer.stderr}")


def measure(case: Measurement) -> dict[str, float]:
    """Measure in this process; see `run_measurement`."""
    torch.manual_seed(0)
    steps = {"dynamic_conv": _dynamic_conv, "scan": _scan}.get(case.task, _network)(case)
    seconds = {name: _median_seconds(step, case) for name, step in steps.items()}
    return {**seconds, "peak_gib": _peak_bytes(case.device) / 2**30}


def _network(case: Measurement) -> dict[str, Callable]:
    model = MODELS[case.model]().train(case.task == "training").to(case.device)
    pixel_values = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=case.device)
    if case.task == "inference":
        return {"seconds": lambda: _infer(case, model, pixel_values)}
    if case.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    labels = (torch.rand_like(pixel_values[:, 0]) < 0.1).float()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)

    def step():
        with _autocast(case):
            loss = model(pixel_values, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"seconds": step}


def _dynamic_conv(case: Measurement) -> dict[str, Callable]:
    config, side = SrsConfig(), case.image_size // 8
    channels, guides = config.hidden_sizes[-1], config.reconstruction_hidden_sizes[-1]
    conv = SrsDynamicConv(channels, guides, config.attention_reduction_ratio).to(case.device)
    inputs = [torch.randn(case.batch_size, size, side, side, device=case.device) for size in (channels, guides)]
    return {
        "seconds": lambda: _infer(case, conv, *inputs),
        "seconds_ref": lambda: _infer(case, srs_dynamic_conv_ref, conv, *inputs),
    }


def _scan(case: Measurement) -> dict[str, Callable]:
    config, batch_size, length, groups = RunConfig(), case.batch_size, case.image_size**2, 4
    channels = groups * config.expand * config.hidden_size
    x, delta = torch.randn(2, batch_size, channels, length, device=case.device)
    B, C = torch.randn(2, batch_size, groups, config.state_size, length, device=case.device)
    A = -torch.arange(1.0, config.state_size + 1, device=case.device).repeat(channels, 1)
    inputs = (x, delta.sigmoid() / 10, A, B, C, torch.ones(channels, device=case.device))
    return {
        "seconds": lambda: _infer(case, selective_scan, *inputs),
        "seconds_ref": lambda: _infer(case, selective_scan_ref, *inputs),
    }


def _infer(case: Measurement, function: Callable, *inputs):
    with torch.inference_mode(), _autocast(case):
        function(*inputs)


def _autocast(case: Measurement) -> torch.autocast:
    dtype = getattr(torch, case.dtype)
    return torch.autocast(torch.device(case.device).type, dtype, enabled=dtype != torch.float32)


def _median_seconds(step: Callable, case: Measurement) -> float:
    seconds = []
    for _ in range(case.steps + 1):
        start = time.perf_counter()
        step()
        if case.device != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _peak_bytes(device: str) -> int:
    if device != "cpu":
        return torch.get_device_module(device).max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss`: Linux passes it on from the process that started this one.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """Return the processors, accelerator, threads and torch version."""
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(Measurement(**json.loads(sys.argv[1])))))
