"""Count and measure what networks and operators cost.

Counts are parameters and multiply-adds. Measurements are seconds and peak memory, on random pixels. Each runs in a
fresh process, because the peak memory of a process never falls. Compare speeds within one run on one machine only.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageSegmentation, SegformerConfig, SegformerForSemanticSegmentation

from ..data.synthetic import generate
from ..models import networks  # noqa: F401  registers them with the Auto classes
from ..models.configuration_opds import OpdsConfig
from ..models.configuration_run import RunConfig
from ..models.configuration_srs import SrsConfig
from ..models.image_processing_unconceal import UnconcealImageProcessor
from ..models.memory import keep_freed_memory
from ..models.modeling_opds import OpdsForImageSegmentation
from ..models.modeling_run import RunForImageSegmentation
from ..models.modeling_srs import SrsForImageSegmentation, SrsForReconstruction, srs_dynamic_conv_ref
from ..models.modeling_unconceal import padding_to
from ..models.run_layers import RunScan2d
from ..models.selective_scan import selective_scan, selective_scan_ref
from ..utils.devices import has_bfloat16
from ..utils.loading_errors import loading_explained


PVTV2_B4 = {"model_type": "pvt_v2", "hidden_sizes": [64, 128, 320, 512], "depths": [3, 8, 27, 3]}
SEGFORMER_B2 = {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 4, 6, 3], "decoder_hidden_size": 768}
# The networks that can be measured, at their default size, and a peer.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "srs": lambda: SrsForImageSegmentation(SrsConfig()),
    "run": lambda: RunForImageSegmentation(RunConfig()),
    "run-pvtv2-b4": lambda: RunForImageSegmentation(RunConfig(backbone_config=PVTV2_B4)),
    "opds": lambda: OpdsForImageSegmentation(OpdsConfig()),
    "opds-single-head": lambda: OpdsForImageSegmentation(OpdsConfig(decoder_hidden_sizes=[128])),
    "segformer-b2": lambda: SegformerForSemanticSegmentation(SegformerConfig(**SEGFORMER_B2, num_labels=1)),
}


def make_network(model: str) -> nn.Module:
    """Make one of `MODELS`, or a saved network, with random weights.

    Raises:
        UserError: If the settings of a saved network cannot be used.
    """
    if model in MODELS:
        return MODELS[model]()
    with loading_explained(f"cannot load the settings of {model}"):
        return AutoModelForImageSegmentation.from_config(AutoConfig.from_pretrained(model))


@dataclass(frozen=True)
class Part:
    """The size of a part of a network."""

    name: str
    parameters: int
    multiply_adds: int  # of convolutions, matrix products and scans for one image; exponentials are not counted
    published: tuple[float | None, float | None] = (None, None)  # millions of parameters, billions of multiply-adds


def count_parts(model: str, image_size: int) -> list[Part]:
    """Count a network for an image of `image_size` pixels a side."""
    with torch.device("meta"):
        network = make_network(model)
        adds = multiply_adds(network, image_size)
        if isinstance(network, SrsForImageSegmentation):
            reconstruction = SrsForReconstruction(network.config)
            adds_of_reconstruction = multiply_adds(reconstruction, image_size)[""]
    whole = Part("whole", network.num_parameters(), adds[""], {"opds": (28.0, 129.2)}.get(model, (None, None)))
    if hasattr(network, "backbone"):
        encoder = Part("encoder", network.backbone.num_parameters(), adds["backbone"])
        rest = (whole.parameters - encoder.parameters, whole.multiply_adds - encoder.multiply_adds)
        return [whole, encoder, Part("without encoder", *rest, {"run": (55.65, 156)}.get(model, (None, None)))]
    if not isinstance(network, SrsForImageSegmentation):
        return [whole]
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


def multiply_adds(model: nn.Module, image_size: int) -> dict[str, int]:
    """Count the multiply-adds of the model, under "", and of its children."""
    pixel_values = torch.empty(1, model.config.num_channels, image_size, image_size, device="meta")
    scans = []

    def count_scan(scan: RunScan2d, inputs: tuple[Tensor], _):
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

    # "inference", "training" (forward, backward, optimizer step), "scan", "scan-training", "recipe" (its training
    # loop), "path" (`unconceal segment` on photos) or "start" (of the same)
    task: str = "inference"
    model: str = "srs"  # one of `MODELS`, the folder of a saved network, or a recipe; scans ignore it
    # Inference: "plain", "inference" (`for_inference`), "compiled" or "onnx". Training: "plain" or "channels_last".
    # Scans: "loop" is the reference, the others are backends.
    form: str = "inference"
    batch_size: int = 1
    image_size: int = 256  # side in pixels; for the scan, side of the map
    dtype: str = "float32"  # of the inference form; for "plain" and training, the type for autocast
    keeps_pages: bool = True  # see `keep_freed_memory`
    gradient_checkpointing: bool = False
    device: str = "cpu"
    steps: int = field(default=3, compare=False)  # timed at least, after a warm-up; with 0 that one counts
    num_photos: int = field(default=8, compare=False)  # of "path"
    file: str = field(default="", compare=False)  # folder of the exported network, made if missing


def missing_mode(case: Measurement) -> str | None:
    """Return what the machine lacks for a measurement, or None."""
    device = torch.device(case.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA"
    if case.dtype == "bfloat16" and not has_bfloat16(device):
        return f"{device} has no bfloat16 of its own"
    if case.form == "compiled" and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
        return "no C++ compiler"
    packages = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "triton": ("triton",), "mamba_ssm": ("mamba_ssm",)}
    missing = [name for name in packages.get(case.form, ()) if find_spec(name) is None]
    return f"{missing[0]} is not installed" if missing else None


def run_measurement(case: Measurement) -> dict[str, Any]:
    """Measure in a fresh process.

    Returns:
        The fields of the measurement and those of `measure`; or with `skipped`, if the machine lacks a mode; or with
        `error`, if memory did not suffice or the process failed, each in one line.
    """
    if reason := missing_mode(case):
        return {**asdict(case), "skipped": reason}
    on_cuda = case.device.startswith("cuda")
    free = torch.cuda.mem_get_info(case.device)[0] if on_cuda else psutil.virtual_memory().available
    command = [sys.executable, "-m", __name__, json.dumps(asdict(case))]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode == 0:
        return {**asdict(case), **json.loads(answer.stdout.splitlines()[-1])}
    # The kernel ends a process that needs too much memory with signal 9.
    words = ("OutOfMemoryError", "not enough memory", "can't allocate memory", "MemoryError", "bad_alloc")
    error = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1][:300]
    if answer.returncode == -9 or any(word in answer.stderr for word in words):
        tried = f"{case.batch_size} of {case.image_size}x{case.image_size} pixels"
        error = f"out of memory: tried {tried}, {free / 2**30:.1f} GiB were free"
    return {**asdict(case), "error": error}


def measure(case: Measurement) -> dict[str, Any]:
    """Measure in this process.

    Returns:
        `seconds` of the fastest repetition, `first_seconds` of the warm-up, `peak_gib` of the process on the CPU or of
        the tensors on an accelerator, and `own_gib`, the peak without what was held before. Networks also give
        `images_per_second` and `ns_per_pixel`, RUN on the CPU also `scan_share`. The tasks "recipe", "path" and
        "start" have fields of their own.
    """
    torch.manual_seed(0)
    if case.keeps_pages:
        keep_freed_memory()
    if case.task in WHOLE_TASKS:
        return WHOLE_TASKS[case.task](case)
    step = STEPS[case.task](case)
    held = reset_peak(case.device)
    start = time.perf_counter()
    with _timed_scans(case) as scans:
        first, seconds = _seconds(step, case)
    scan_share = sum(scans) / (time.perf_counter() - start)
    peak = peak_bytes(case.device)
    result = {"seconds": seconds, "first_seconds": first, "peak_gib": peak / 2**30, "own_gib": (peak - held) / 2**30}
    if case.task in ("inference", "training"):
        num_pixels = case.batch_size * case.image_size**2
        result |= {"images_per_second": case.batch_size / seconds, "ns_per_pixel": 1e9 * seconds / num_pixels}
    if scans:
        result["scan_share"] = scan_share
    return result


def _inference(case: Measurement) -> Callable:
    dtype = getattr(torch, case.dtype)
    pixel_values = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=case.device)
    if case.form == "onnx":
        from ..hub.exported import open_onnx

        export_network(case)
        return partial(open_onnx(Path(case.file) / "model.onnx"), pixel_values)
    model = make_network(case.model).eval().to(case.device)
    if case.form == "plain":
        if isinstance(model, SrsForImageSegmentation):  # the published form has a kernel for each image
            model.dynamic_conv.forward = partial(srs_dynamic_conv_ref, model.dynamic_conv)
        return partial(_infer, case, model, pixel_values)
    model = model.for_inference(None if dtype == torch.float32 else dtype)
    if case.form == "compiled":
        model = torch.compile(model)
    return partial(_infer, case, model, pixel_values.to(dtype))


def _training(case: Measurement) -> Callable:
    model = make_network(case.model).train().to(case.device)
    pixel_values = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=case.device)
    if case.form == "channels_last":
        model, pixel_values = (each.to(memory_format=torch.channels_last) for each in (model, pixel_values))
    if case.gradient_checkpointing:
        model.activation_checkpointing_enable()
    labels = (torch.rand_like(pixel_values[:, 0]) < 0.1).float()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)

    def step():
        with _autocast(case):
            loss = model(pixel_values, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _scan(case: Measurement) -> Callable:
    config, batch_size, length, groups = RunConfig(), case.batch_size, case.image_size**2, 4
    channels = groups * config.expand * config.hidden_size
    x, delta = torch.randn(2, batch_size, channels, length, device=case.device)
    B, C = torch.randn(2, batch_size, groups, config.state_size, length, device=case.device)
    A = -torch.arange(1.0, config.state_size + 1, device=case.device).repeat(channels, 1)
    x, B, C = (each.to(getattr(torch, case.dtype)) for each in (x, B, C))
    inputs = [x, delta.sigmoid_().div_(10), A, B, C, torch.ones(channels, device=case.device)]
    function = selective_scan_ref if case.form == "loop" else partial(selective_scan, backend=case.form)
    if case.task == "scan":
        return partial(_infer, case, function, *inputs)
    inputs = [each.requires_grad_() for each in inputs]
    return lambda: torch.autograd.grad(function(*inputs).float().sum(), inputs)


def _infer(case: Measurement, function: Callable, *inputs):
    with torch.inference_mode(), _autocast(case):
        function(*inputs)


def _autocast(case: Measurement) -> torch.autocast:
    # The inference form and the scan have their own types.
    enabled = case.dtype != "float32" and case.form in ("plain", "channels_last")
    return torch.autocast(torch.device(case.device).type, getattr(torch, case.dtype), enabled=enabled)


def _recipe(case: Measurement) -> dict[str, Any]:
    from ..training.recipe import load_recipe
    from ..training.speed import measure_recipe

    measured = measure_recipe(load_recipe(case.model), steps=5, rounds=1)
    return {key: value for key, value in measured.items() if not hasattr(case, key)}


def _path(case: Measurement) -> dict[str, float]:
    """Segment copies of a photo of 12 megapixels, without refining."""
    photo = generate("intricate", (1500, 2000), 0, 0)[0].resize((4000, 3000), Image.Resampling.BICUBIC)
    with TemporaryDirectory() as temporary:
        model, photos, out = (Path(temporary) / name for name in ("model", "photos", "out"))
        save_network(case.model, case.image_size, model)
        photos.mkdir()
        photo.save(photos / "0.jpg", quality=92)
        for number in range(1, case.num_photos):
            shutil.copy(photos / "0.jpg", photos / f"{number}.jpg")
        seconds = _segment(photos, model, out, case)
        done = sorted(mask.stat().st_mtime for mask in out.glob("*.png"))
    steady = (len(done) - 1) / (done[-1] - done[0]) if len(done) > 1 else 0.0
    _, model_seconds = _seconds(_inference(case), case)
    return {
        "seconds": seconds,
        "command_images_per_second": len(done) / seconds,
        "steady_images_per_second": steady,  # from the first mask to the last
        "model_images_per_second": 1 / model_seconds,
        "share_of_model": steady * model_seconds,
        "peak_gib": _max_rss("RUSAGE_CHILDREN") / 2**30,
    }


# Prints when imports, loading and the first mask are done.
START = """
import sys, time
marks = [float(sys.argv[1])]
import unconceal.api
marks.append(time.time())
segmenter = unconceal.api.load(*sys.argv[2:4])
marks.append(time.time())
segmenter.segment(sys.argv[4])
print(*marks, time.time())
"""


def _start(case: Measurement) -> dict[str, float]:
    """Start `unconceal segment` for one image; the fastest start counts."""
    with TemporaryDirectory() as temporary:
        model, image = Path(temporary) / "model", Path(temporary) / "image.png"
        save_network(case.model, case.image_size, model)
        generate("intricate", case.image_size, 0, 0)[0].save(image)
        outs = [Path(temporary) / str(number) for number in range(case.steps)]
        seconds = min(_segment(image, model, out, case) for out in outs)
        command = [sys.executable, "-c", START]
        splits = []
        for _ in outs:
            printed = _run([*command, str(time.time()), str(model), case.device, str(image)])
            marks = [float(mark) for mark in printed.split()]
            splits.append([after - before for before, after in zip(marks, marks[1:], strict=False)])
    imports, loading, mask = min(splits, key=sum)
    return {"seconds": seconds, "import_seconds": imports, "loading_seconds": loading, "mask_seconds": mask}


def save_network(model: str, image_size: int, folder: Path):
    """Save a network with random weights, and its processor."""
    make_network(model).save_pretrained(folder)
    UnconcealImageProcessor(size=image_size).save_pretrained(folder)


def export_network(case: Measurement):
    """Export to ONNX unless it is done already."""
    if not Path(case.file).exists():
        with TemporaryDirectory() as model:
            save_network(case.model, case.image_size, Path(model))
            _run([*UNCONCEAL, "export", model, "--format", "onnx", "--out", case.file, "--no-check"])


def _segment(images: Path, model: Path, out: Path, case: Measurement) -> float:
    """Return the seconds of `unconceal segment`."""
    options = ["--model", str(model), "--out", str(out), "--refine", "never", "--device", case.device]
    start = time.perf_counter()
    _run([*UNCONCEAL, "segment", str(images), *options])
    return time.perf_counter() - start


def _run(command: list[str]) -> str:
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(" ".join(answer.stderr.split())[-300:] or f"exit code {answer.returncode}")
    return answer.stdout


STEPS = {
    "inference": _inference,
    "training": _training,
    "scan": _scan,
    "scan-training": _scan,
}
WHOLE_TASKS = {"recipe": _recipe, "path": _path, "start": _start}
UNCONCEAL = [sys.executable, "-m", "unconceal"]
LEAST_SECONDS = 1.0  # short steps are repeated for so long


def _seconds(step: Callable, case: Measurement) -> tuple[float, float]:
    """Return the seconds of the first call and of the fastest."""
    seconds = []
    while len(seconds) <= case.steps or (case.steps and sum(seconds[1:]) < LEAST_SECONDS):
        start = time.perf_counter()
        step()
        if case.device != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[0], min(seconds[1:] or seconds)


@contextmanager
def _timed_scans(case: Measurement) -> Iterator[list[float]]:
    """Collect the seconds of every scan of RUN."""
    seconds, scan = [], RunScan2d.scan

    def timed(*args) -> Tensor:
        start = time.perf_counter()
        result = scan(*args)
        seconds.append(time.perf_counter() - start)
        return result

    # An accelerator works on after the call, and a compiler would trace the clock.
    if case.device == "cpu" and case.task == "inference" and case.form != "compiled":
        RunScan2d.scan = timed
    try:
        yield seconds
    finally:
        RunScan2d.scan = scan


def reset_peak(device: str) -> int:
    """Forget the peak memory so far; return the bytes in use."""
    if device != "cpu":
        backend = torch.get_device_module(device)
        if device == "mps":  # it keeps no peak
            return backend.current_allocated_memory()
        backend.reset_peak_memory_stats()
        return backend.memory_allocated()
    with suppress(OSError):  # Linux can do it
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_bytes(device: str) -> int:
    """Return the peak memory of this process, or of an accelerator's tensors."""
    if device == "mps":
        return torch.mps.driver_allocated_memory()
    if device != "cpu":
        return torch.get_device_module(device).max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss`: Linux passes it on from the process that started this one.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return _max_rss("RUSAGE_SELF")


def _max_rss(who: str) -> int:
    if sys.platform == "win32":  # it has no `resource`
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(getattr(resource, who)).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine() -> dict[str, Any]:
    """Return the processors, accelerator, threads, memory and torch version."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "processor": capabilities.get("cpu_name") or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_bfloat16": has_bfloat16(torch.device("cpu")),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    with suppress(OSError):  # if memory runs out, this process ends and not the one that waits for it
        Path("/proc/self/oom_score_adj").write_text("1000")
    sys.stdout.write(json.dumps(measure(Measurement(**json.loads(sys.argv[1])))))
