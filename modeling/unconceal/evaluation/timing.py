"""What the networks cost: parameters, multiply-adds, pictures a second, memory. scripts/benchmark.py prints it.

Each speed and each peak of memory comes from a fresh process, because a process's peak never falls. Speeds are of the
network alone on random pixels; compare them within one run, on one machine, only.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.configuration_opds import OpdsConfig
from ..models.configuration_run import RunConfig
from ..models.configuration_srs import SrsConfig
from ..models.modeling_opds import OpdsForImageSegmentation
from ..models.modeling_run import RunForImageSegmentation, RunScan2d
from ..models.modeling_srs import (
    SrsDynamicConv,
    SrsForImageSegmentation,
    SrsForReconstruction,
    srs_dynamic_conv_ref,
)
from ..models.modeling_unconceal import padding_to
from ..models.selective_scan import selective_scan, selective_scan_ref
from ..utils.markdown import markdown_table


# Of RUN.
ENCODERS = {
    "ResNet-50": {"model_type": "resnet"},
    "PVTv2-B4": {"model_type": "pvt_v2", "hidden_sizes": [64, 128, 320, 512], "depths": [3, 8, 27, 3]},
}
# What a case can measure, each in its default size.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "SRS": lambda: SrsForImageSegmentation(SrsConfig()),
    **{
        f"RUN, {name}": lambda encoder=encoder: RunForImageSegmentation(RunConfig(backbone_config=encoder))
        for name, encoder in ENCODERS.items()
    },
    "OPDS": lambda: OpdsForImageSegmentation(OpdsConfig()),
    # As many multiply-adds as the progressive decoder, with a tenth of its parameters.
    "OPDS, single head": lambda: OpdsForImageSegmentation(OpdsConfig(decoder_hidden_sizes=[128])),
}
# Of SRS as published, counted without what they hold and never use: (million parameters, GMAC at 256x256).
SRS_PAPER_SIZES = {
    "R": (0.734, 5.43),
    "R, encoder": (0.482, 1.58),
    "S with its dynamic convolution": (9.87, 45.94),
    "S, dynamic convolution": (1.18, 0.61),
    "inference: R's encoder and S": (None, 47.5),
}
# Of what RUN's authors released, beyond the encoder: (million parameters, GMAC at 384x384).
RUN_RELEASE_SIZE = (55.65, 156)
# Of OPDS by its poster: (million parameters, GMAC at 1024x1024).
OPDS_POSTER_SIZE = (28.0, 129.2)
# Longest scan whose backward pass is compared: that of the reference takes time by the square of the length, as every step
# it picks out has a gradient as long as the sequence.
MAX_BACKWARD_LENGTH = 576


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        task: A forward pass, a training step (forward, backward, SGD for SRS and else Adam), or an operator alone: SRS's
            dynamic convolution, RUN's selective scan.
        batch_size: Pictures at a time.
        image_size: Side in pixels; for the scan, of the map it runs over.
        checkpointing: Whether activations are computed again in the backward pass instead of kept.
        device: As torch names it.
        dtype: "float32", or the type that autocast computes in.
        steps: Timed repetitions, of which the median counts; one more goes before as warm-up.
        model: Key of `MODELS`.
    """

    task: Literal["inference", "training", "dynamic_conv", "scan"]
    batch_size: int
    image_size: int = 256
    checkpointing: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    steps: int = 3
    model: str = "SRS"


def srs_sizes(image_size: int = 256) -> dict[str, dict[str, float]]:
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


def run_sizes(image_size: int = 384) -> dict[str, dict[str, dict[str, float]]]:
    """Count the parameters and multiply-adds of the default RUN on each of `ENCODERS`, without computing anything.

    Multiply-adds are those that `srs_sizes` counts and those of the scans.

    Returns:
        Encoder -> part -> `parameters`, `trainable`, `multiply_adds` and, of these, `scan_multiply_adds` outside matrix
        products.
    """
    return {name: _run_sizes(MODELS[f"RUN, {name}"], image_size) for name in ENCODERS}


def _run_sizes(build: Callable[[], nn.Module], image_size: int) -> dict[str, dict[str, float]]:
    with torch.device("meta"):
        model = build()
        pixel_values = torch.empty(1, model.config.num_channels, image_size, image_size)
    scans = Counter()
    for name, module in model.named_modules():
        if isinstance(module, RunScan2d):
            part = name.split(".")[0]
            module.register_forward_hook(
                lambda scan, inputs, _, part=part: scans.update({part: _scan2d_multiply_adds(scan, inputs[0])})
            )
    counts = _multiply_adds(model, pixel_values)
    beyond = [name for name in counts if name not in ("", "backbone")]
    parts = {"whole": ["backbone", *beyond], "encoder": ["backbone"], "beyond the encoder": beyond}
    parts |= {name.replace("_", " "): [name] for name in beyond}
    result = {}
    for part, names in parts.items():
        scan = sum(scans[name] for name in names)
        modules = [model.get_submodule(name) for name in names]
        size = _size(modules, sum(counts[name] for name in names) + scan)
        result[part] = {**size, "scan_multiply_adds": scan}
    return result


def _scan2d_multiply_adds(scan: RunScan2d, hidden_states: torch.Tensor) -> int:
    """Multiply-adds of the four scans of one picture that the counter does not see."""
    # Windows beyond the border are scanned as well.
    height, width = hidden_states.shape[-2:]
    _, right, _, bottom = padding_to(scan.window_size or 1, height, width)
    return scan_multiply_adds((height + bottom) * (width + right), 4 * scan.inner_size, scan.state_size)


def scan_multiply_adds(length: int, channels: int, states: int) -> int:
    """Return the multiply-adds of a selective scan outside matrix products.

    A step takes for each channel and state the products delta A and (delta x) B and the multiply-add exp(delta A) h + ...,
    and for each channel delta x and D x; a lone product counts as one. The products C h are matrix products, one more for
    each channel and state. The exponentials, as many as these, are left out, and so is what an implementation computes
    twice.
    """
    return length * channels * (3 * states + 2)


def opds_sizes(image_size: int = 1024) -> dict[str, dict[str, dict[str, float]]]:
    """Count the parameters and multiply-adds of the default OPDS and of its single head, without computing anything.

    Multiply-adds are those that `srs_sizes` counts; the matrix factorisations are among them.

    Returns:
        Key of `MODELS` -> `whole`, `encoder`, `decoder` -> `parameters`, `trainable`, `multiply_adds`.
    """
    result = {}
    for name in ("OPDS", "OPDS, single head"):
        with torch.device("meta"):
            model = MODELS[name]()
            pixel_values = torch.empty(1, model.config.num_channels, image_size, image_size)
        counts = _multiply_adds(model, pixel_values)
        result[name] = {
            "whole": _size([model], counts[""]),
            "encoder": _size([model.backbone], counts["backbone"]),
            "decoder": _size([model.levels], counts["levels"]),
        }
    return result


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

    def count(name: str, module: nn.Module) -> int:
        # A list is not called itself.
        if isinstance(module, nn.ModuleList):
            return sum(count(f"{name}.{index}", child) for index, child in module.named_children())
        return counts.get(name, 0)

    name = type(model).__name__
    return {
        "": counts["Global"],
        **{child: count(f"{name}.{child}", module) for child, module in model.named_children()},
    }


def run_case(case: Case) -> dict[str, Any]:
    """Measure `case` in a fresh process.

    Returns:
        The case's fields with `seconds` (median of a step), `images_per_second` and `peak_gib` (of the process on the CPU,
        libraries included; of torch's tensors on an accelerator); for an operator also `seconds_ref` and
        `seconds_backward`, `seconds_backward_ref`, of its `_ref` and of forward with backward, the latter for scans up to
        `MAX_BACKWARD_LENGTH` only. Or with `error`, if memory did not suffice.
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
    task = {"inference": _inference, "training": _training, "dynamic_conv": _dynamic_conv, "scan": _scan}[case.task]
    steps = task(case)
    times = {name: _median_seconds(step, case) for name, step in steps.items()}
    if "seconds" in times:
        times["images_per_second"] = case.batch_size / times["seconds"]
    return {**times, "peak_gib": _peak_bytes(case.device) / 2**30}


def _inference(case: Case) -> dict[str, Callable]:
    model = MODELS[case.model]().eval().to(case.device)
    pixel_values = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=case.device)

    def step():
        with torch.inference_mode(), _autocast(case):
            model(pixel_values)

    return {"seconds": step}


def _training(case: Case) -> dict[str, Callable]:
    model = MODELS[case.model]().train().to(case.device)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    pixel_values = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=case.device)
    labels = (torch.rand_like(pixel_values[:, 0]) < 0.1).float()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if case.model == "SRS":
        optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    else:
        optimizer = torch.optim.Adam(trained, lr=1e-4)

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

    def reference(*inputs):
        return srs_dynamic_conv_ref(conv, *inputs)

    return _compare(conv, reference, (hidden_states, guidance), case)


def _scan(case: Case) -> dict[str, Callable]:
    config = RunConfig()
    groups, length = 4, case.image_size**2
    channels = groups * config.expand * config.hidden_size
    x, delta = torch.randn(2, case.batch_size, channels, length, device=case.device)
    B, C = torch.randn(2, case.batch_size, groups, config.state_size, length, device=case.device)
    A = -torch.arange(1.0, config.state_size + 1, device=case.device).repeat(channels, 1)
    D = torch.ones(channels, device=case.device)
    inputs = [z.requires_grad_() for z in (x, delta.sigmoid() / 10, A, B, C, D)]
    steps = _compare(selective_scan, selective_scan_ref, inputs, case)
    if length > MAX_BACKWARD_LENGTH:
        steps = {name: step for name, step in steps.items() if "backward" not in name}
    return steps


def _compare(
    function: Callable, reference: Callable, inputs: Sequence[torch.Tensor], case: Case
) -> dict[str, Callable]:
    """Return the steps of an operator and of its reference, forward and forward with backward."""

    def forward(function):
        with torch.inference_mode(), _autocast(case):
            function(*inputs)

    def backward(function):
        with _autocast(case):
            output = function(*inputs)
        output.sum().backward()

    return {
        "seconds": lambda: forward(function),
        "seconds_ref": lambda: forward(reference),
        "seconds_backward": lambda: backward(function),
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


def srs_sizes_table(counts: dict[str, dict[str, float]]) -> str:
    """Return `srs_sizes` at 256x256 beside the published networks' figures, as Markdown."""
    rows = []
    for part, count in counts.items():
        parameters, multiply_adds = SRS_PAPER_SIZES.get(part, (None, None))
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


def run_sizes_table(counts: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return `run_sizes` at 384x384 above the figures of the authors' release, as Markdown."""
    rows = [
        [
            encoder,
            part,
            f"{count['parameters'] / 1e6:.3f} M",
            f"{count['multiply_adds'] / 1e9:.2f} G",
            f"{count['scan_multiply_adds'] / 1e9:.2f} G",
        ]
        for encoder, parts in counts.items()
        for part, count in parts.items()
    ]
    parameters, multiply_adds = RUN_RELEASE_SIZE
    rows.append(["the authors' release", "beyond the encoder", f"{parameters:g} M", f"about {multiply_adds:g} G", ""])
    return markdown_table(["encoder", "part", "parameters", "multiply-adds", "of these elementwise in scans"], rows)


def opds_sizes_table(counts: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return `opds_sizes` at 1024x1024 above the figures of the poster, as Markdown."""
    rows = [
        [model, part, f"{count['parameters'] / 1e6:.3f} M", f"{count['multiply_adds'] / 1e9:.2f} G"]
        for model, parts in counts.items()
        for part, count in parts.items()
    ]
    parameters, multiply_adds = OPDS_POSTER_SIZE
    rows.append(["the poster", "whole", f"{parameters:g} M", f"{multiply_adds:g} G"])
    return markdown_table(["network", "part", "parameters", "multiply-adds"], rows)


def resolutions_table(results: list[dict[str, Any]]) -> str:
    """Return results of one picture at growing sizes as Markdown, with what each further megapixel costs.

    Args:
        results: Of `run_case`; of each dtype from the smallest size on.
    """
    rows, before = [], {}
    for result in results:
        size, dtype = result["image_size"], result["dtype"]
        cells = [dtype, f"{size}x{size}"]
        if "error" in result:
            rows.append([*cells, result["error"], "", "", ""])
            continue
        cells += [f"{1000 * result['seconds']:.0f}", f"{result['peak_gib']:.2f} GiB"]
        growth = ["", ""]
        if dtype in before:
            megapixels = (size**2 - before[dtype]["image_size"] ** 2) / 1e6
            seconds, gib = (result[name] - before[dtype][name] for name in ("seconds", "peak_gib"))
            growth = [f"{1000 * seconds / megapixels:.0f}", f"{gib / megapixels:.2f} GiB"]
        rows.append([*cells, *growth])
        before[dtype] = result
    header = ["dtype", "picture", "ms", "peak memory", "ms a further megapixel", "memory a further megapixel"]
    return markdown_table(header, rows)


def cases_table(results: list[dict[str, Any]], by_model: bool = False) -> str:
    """Return inference and training results as Markdown; speeds also relative to the first of the same task.

    Args:
        results: Of `run_case`.
        by_model: Whether each row begins with the model and gives the time of an image instead of images a second.
    """
    rows, first = [], {}
    for result in results:
        cells = [result["task"], str(result["batch_size"]), "yes" if result["checkpointing"] else "no"]
        if by_model:
            cells.insert(0, result["model"])
        if "error" in result:
            rows.append([*cells, result["error"], "", ""])
            continue
        speed = result["images_per_second"]
        ratio = speed / first.setdefault(result["task"], speed)
        pace = f"{1000 / speed:.0f}" if by_model else f"{speed:.2f}"
        rows.append([*cells, pace, f"{ratio:.2f}", f"{result['peak_gib']:.2f} GiB"])
    header = ["task", "batch", "checkpointing", "ms/image" if by_model else "images/s", "relative", "peak memory"]
    return markdown_table(["model", *header] if by_model else header, rows)


def ratios_table(name: str, results: dict[int, dict[str, Any]]) -> str:
    """Return the speed of an operator relative to its reference, as Markdown; above 1 the operator is faster.

    Args:
        name: What the keys of `results` are.
        results: What varies -> result of `run_case`.
    """
    rows = []
    for value, result in results.items():
        ratios = [result.get("error", ""), ""]
        for column, task in enumerate(("seconds", "seconds_backward")):
            if task in result:
                ratios[column] = f"{result[f'{task}_ref'] / result[task]:.2f}"
        rows.append([str(value), *ratios])
    return markdown_table([name, "forward, relative speed", "forward and backward, relative speed"], rows)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
