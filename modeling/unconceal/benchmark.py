"""What SRS costs: parameters, multiply-adds, pictures a second, memory. scripts/benchmark.py prints it.

Each speed and each peak of memory comes from a fresh process, because a process's peak never falls. Speeds are of the
network alone on random pixels; compare them within one run, on one machine, only.
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
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .models.configuration_srs import SrsConfig
from .models.modeling_srs import (
    SrsDynamicConv,
    SrsForImageSegmentation,
    SrsForReconstruction,
    srs_dynamic_conv_ref,
)


# Of the published networks, counted without what they hold and never use: (million parameters, GMAC at 256x256).
PAPER_SIZES = {
    "R": (0.734, 5.43),
    "R, encoder": (0.482, 1.58),
    "S with its dynamic convolution": (9.87, 45.94),
    "S, dynamic convolution": (1.18, 0.61),
    "inference: R's encoder and S": (None, 47.5),
}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        task: A forward pass, a training step (forward, backward, SGD), or the dynamic convolution alone.
        batch_size: Pictures at a time.
        image_size: Side in pixels.
        checkpointing: Whether activations are computed again in the backward pass instead of kept.
        device: As torch names it.
        dtype: "float32", or the type that autocast computes in.
        steps: Timed repetitions, of which the median counts; one more goes before as warm-up.
    """

    task: Literal["inference", "training", "dynamic_conv"]
    batch_size: int
    image_size: int = 256
    checkpointing: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    steps: int = 3


def sizes(image_size: int = 256) -> dict[str, dict[str, float]]:
    """Count the parameters and multiply-adds of the default SRS, without computing anything.

    Multiply-adds are those of convolutions and matrix products for one picture, which is what torch's `FlopCounterMode`
    counts, two operations each. Norms, activations, pooling, attention scales and interpolation are left out.

    Returns:
        Part -> `parameters`, `trainable` (in that part, in the phase that trains it) and `multiply_adds`.
    """
    with torch.device("meta"):
        config = SrsConfig()
        reconstruction, segmentation = SrsForReconstruction(config), SrsForImageSegmentation(config)
        pixel_values = torch.empty(1, config.num_channels, image_size, image_size)
    r, s = _multiply_adds(reconstruction, pixel_values), _multiply_adds(segmentation, pixel_values)
    guide = "reconstruction_encoder"
    own = [module for name, module in segmentation.named_children() if name != guide]
    dynamic = segmentation.dynamic_conv
    return {
        "R": _size([reconstruction], r[""]),
        "R, encoder": _size([reconstruction.reconstruction_encoder], r[guide]),
        "S with its dynamic convolution": _size(own, s[""] - s[guide]),
        "S without it": _size(
            [module for module in own if module is not dynamic], s[""] - s[guide] - s["dynamic_conv"]
        ),
        "S, dynamic convolution": _size([dynamic], s["dynamic_conv"]),
        "inference: R's encoder and S": _size([segmentation], s[""]),
    }


def _size(modules: list[nn.Module], multiply_adds: int) -> dict[str, float]:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "multiply_adds": multiply_adds,
    }


def _multiply_adds(model: nn.Module, pixel_values: torch.Tensor) -> dict[str, int]:
    """Multiply-adds of the model, under "", and of each of its children."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(pixel_values)
    counts = {module: sum(operations.values()) // 2 for module, operations in counter.get_flop_counts().items()}
    name = type(model).__name__
    return {"": counts["Global"], **{child: counts.get(f"{name}.{child}", 0) for child, _ in model.named_children()}}


def run_case(case: Case) -> dict[str, Any]:
    """Measure `case` in a fresh process.

    Returns:
        The case's fields with `seconds` (median of a step), `images_per_second` and `peak_gib` (of the process on the CPU,
        libraries included; of torch's tensors on an accelerator); for the dynamic convolution also `seconds_ref` and
        `seconds_backward`, `seconds_backward_ref`, of `srs_dynamic_conv_ref` and of forward with backward. Or with
        `error`, if memory did not suffice.
    """
    command = [sys.executable, "-m", __name__, json.dumps(asdict(case))]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode == 0:
        return {**asdict(case), **json.loads(answer.stdout.splitlines()[-1])}
    # The kernel ends a process that needs too much with signal 9.
    words = ("OutOfMemoryError", "not enough memory", "can't allocate memory")
    if answer.returncode == -9 or any(word in answer.stderr for word in words):
        return {**asdict(case), "error": "out of memory"}
    raise RuntimeError(f"{case} failed:\n{answer.stderr}")


def measure(case: Case) -> dict[str, float]:
    """Measure `case` in this process; see `run_case`."""
    torch.manual_seed(0)
    task = {"inference": _inference, "training": _training, "dynamic_conv": _dynamic_conv}[case.task]
    steps = task(case)
    times = {name: _median_seconds(step, case) for name, step in steps.items()}
    if "seconds" in times:
        times["images_per_second"] = case.batch_size / times["seconds"]
    return {**times, "peak_gib": _peak_bytes(case.device) / 2**30}


def _inference(case: Case) -> dict[str, Callable]:
    model = SrsForImageSegmentation(SrsConfig()).eval().to(case.device)
    pixel_values = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=case.device)

    def step():
        with torch.inference_mode(), _autocast(case):
            model(pixel_values)

    return {"seconds": step}


def _training(case: Case) -> dict[str, Callable]:
    model = SrsForImageSegmentation(SrsConfig()).train().to(case.device)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    pixel_values = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=case.device)
    labels = (torch.rand_like(pixel_values[:, 0]) < 0.1).float()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def step():
        with _autocast(case):
            loss = model(pixel_values, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"seconds": step}


def _dynamic_conv(case: Case) -> dict[str, Callable]:
    config = SrsConfig()
    channels, guides = config.hidden_sizes[-1], config.reconstruction_hidden_sizes[-1]
    conv = SrsDynamicConv(channels, guides, config.attention_reduction_ratio).to(case.device)
    side = case.image_size // 8
    hidden_states = torch.randn(case.batch_size, channels, side, side, device=case.device, requires_grad=True)
    guidance = torch.randn(case.batch_size, guides, side, side, device=case.device)

    def forward(function):
        with torch.inference_mode(), _autocast(case):
            function(hidden_states, guidance)

    def backward(function):
        with _autocast(case):
            output = function(hidden_states, guidance)
        output.sum().backward()

    def reference(*inputs):
        return srs_dynamic_conv_ref(conv, *inputs)

    return {
        "seconds": lambda: forward(conv),
        "seconds_ref": lambda: forward(reference),
        "seconds_backward": lambda: backward(conv),
        "seconds_backward_ref": lambda: backward(reference),
    }


def _autocast(case: Case):
    dtype = getattr(torch, case.dtype)
    return torch.autocast(torch.device(case.device).type, dtype=dtype, enabled=dtype != torch.float32)


def _median_seconds(step: Callable, case: Case) -> float:
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
        # Not `ru_maxrss`: Linux hands that on from the process that started this one.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """Return what the numbers depend on beside the code: processors, accelerator, threads, torch."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": name,
        "torch": torch.__version__,
    }


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def sizes_table(counts: dict[str, dict[str, float]]) -> str:
    """Return `sizes` at 256x256 beside the published networks' figures, as Markdown."""
    rows = []
    for part, count in counts.items():
        parameters, multiply_adds = PAPER_SIZES.get(part, (None, None))
        rows.append(
            [
                part,
                f"{count['parameters'] / 1e6:.3f} M",
                f"{count['trainable'] / 1e6:.3f} M",
                "" if parameters is None else f"{parameters:g} M",
                f"{count['multiply_adds'] / 1e9:.2f} G",
                "" if multiply_adds is None else f"{multiply_adds:g} G",
            ]
        )
    header = ["part", "parameters", "trainable", "published", "multiply-adds", "published"]
    return markdown_table(header, rows)


def cases_table(results: list[dict[str, Any]]) -> str:
    """Return inference and training results as Markdown; speeds also relative to the first of the same task."""
    rows, first = [], {}
    for result in results:
        cells = [result["task"], str(result["batch_size"]), "yes" if result["checkpointing"] else "no"]
        if "error" in result:
            rows.append([*cells, result["error"], "", ""])
            continue
        speed = result["images_per_second"]
        ratio = speed / first.setdefault(result["task"], speed)
        rows.append([*cells, f"{speed:.2f}", f"{ratio:.2f}", f"{result['peak_gib']:.2f} GiB"])
    return markdown_table(["task", "batch", "checkpointing", "images/s", "relative", "peak memory"], rows)


def dynamic_conv_table(results: list[dict[str, Any]]) -> str:
    """Return the speed of the identity relative to building the kernels of every picture, as Markdown; above 1 is faster."""
    rows = [
        [str(result["batch_size"]), result["error"], ""]
        if "error" in result
        else [
            str(result["batch_size"]),
            f"{result['seconds_ref'] / result['seconds']:.2f}",
            f"{result['seconds_backward_ref'] / result['seconds_backward']:.2f}",
        ]
        for result in results
    ]
    return markdown_table(["batch", "forward, relative speed", "forward and backward, relative speed"], rows)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
