"""Write a trained network as ONNX or as a program of torch.export.

An export runs without this package. It is a folder with the layout of optimum: `model.onnx` or `model.pt2`,
`config.json` and `preprocessor_config.json`. Input: `pixel_values` (batch, channels, height, width), normalized.
Output: `logits` (batch, 1, height, width); their sigmoid is the mask. Batch, height and width are free. Numbers are
float32, whatever the checkpoint's.

The file itself also holds what is needed to prepare an image: in ONNX's metadata, or in `metadata.json` among the
extra files of torch.export.

Before the export takes its place, it is compared with the network, at three sizes with one and three images. The
difference of a pixel is that of its logits, divided by the batch's largest logit or by 1 if that is larger. The limit
is 1e-4. Two kinds of larger differences are not a fault of the export. They are accepted and reported:

- A deep network may amplify the last bit of a number beyond this limit. Then the limit is ten times the change of the
  network's own logits when its input is rounded differently, at most 1e-2.
- RUN's closed form hardens masks at fixed probabilities, so a last bit can flip a spot of the mask. At most 1 in 100
  pixels may differ by more than is allowed.
"""

import copy
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import metadata
from importlib.util import find_spec
from io import BytesIO
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ..api import Segmenter
from ..models.networks import NETWORKS
from ..utils.errors import UserError, explained, one_line
from ..utils.files import is_folder, is_taken, make_folder, replacing, restore
from ..utils.images import size_text
from .exported import open_onnx, open_program
from .formats import FORMATS, LAST_OPSET, LEAST_OPSET, OPSET


# --overwrite replaces folders that hold only these. Beyond ONNX's 2 GB a file, weights lie in model.onnx.data.
FILES = {*FORMATS.values(), "model.onnx.data", "config.json", "preprocessor_config.json"}
TOLERANCE, LAST_TOLERANCE, ROUNDING_MARGIN = 1e-4, 1e-2, 10
STRAY_SHARE = 1e-2
BATCH_SIZES = (1, 3)


@dataclass(frozen=True)
class ExportReport:
    """Report of an export and of its check, None without a check."""

    path: Path  # the exported file
    size: tuple[int, int]  # (height, width) to which images should be resized, or of tiles
    opset: int | None  # version of ONNX's operator set
    num_bytes: int  # with external weights, if there are any
    difference: float | None = None  # largest of a pixel, see the module's docstring
    tolerance: float | None = None  # largest difference allowed
    stray_share: float | None = None  # largest share of pixels that differ by more
    eager_seconds: float | None = None  # of the network for one image of `size`, after a warm-up
    exported_seconds: float | None = None  # of the export for the same image


class LogitsAlone(nn.Module):
    """Network with its logits (B, 1, H, W) as the only output."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits of `pixel_values` (B, C, H, W)."""
        return self.model(pixel_values=pixel_values, return_dict=True).logits


def check_target(
    format: str, folder: str | Path, opset: int | None = None, overwrite: bool = False, check: bool = True
):
    """Refuse early what `export_model` cannot do; arguments are the same.

    Raises:
        UserError: If the format or opset is unknown, a package is missing, or the folder cannot be written or holds
            files that must stay.
    """
    if format not in FORMATS:
        raise UserError(f"got --format {format!r}, expected {' or '.join(FORMATS)}; choose one")
    if format != "onnx" and opset is not None:
        raise UserError(f"got --opset for {format}, which has none; leave it out, or choose --format onnx")
    if format == "onnx":
        needed = ["onnx", "onnxscript"] + ["onnxruntime"] * check
        if missing := [name for name in needed if find_spec(name) is None]:
            raise UserError(f"--format onnx needs {', '.join(missing)}; pip install 'unconceal[onnx]'")
        if opset is not None and not LEAST_OPSET <= opset <= LAST_OPSET:
            raise UserError(f"got --opset {opset}, expected {LEAST_OPSET} to {LAST_OPSET}; choose one")
    folder = Path(folder)
    restore(folder)
    if is_taken(folder) and not is_folder(folder):
        raise UserError(f"got {folder} as the output, which is not a folder; choose another")
    held = {path.name for path in folder.iterdir()} if is_folder(folder) else set()
    if held and not overwrite:
        advice = "choose another, or add --overwrite to replace an export"
        raise UserError(f"{folder} exists and is not an empty folder; {advice}")
    if held - FILES:
        raise UserError(f"{folder} holds {min(held - FILES)!r}, which no export wrote; choose another")
    if held and not _holds_our_config(folder):
        raise UserError(f"{folder} has no config.json of {', '.join(NETWORKS)}, so it is not replaced; choose another")
    make_folder(folder.parent)


def _holds_our_config(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config["model_type"] in [network.config_class.model_type for network in NETWORKS.values()]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def export_model(
    segmenter: Segmenter,
    format: str,
    folder: str | Path,
    opset: int | None = None,
    size: Sequence[int] | None = None,
    overwrite: bool = False,
    check: bool = True,
) -> ExportReport:
    """Export a network and its settings: everything or nothing.

    Args:
        segmenter: Result of `unconceal.load`; it stays as it is.
        format: A key of `FORMATS`.
        folder: Folder to make.
        opset: Version of ONNX's operator set; None is `OPSET`.
        size: (height, width) to which users of the file should resize images; None is the processor's own.
        overwrite: Whether to replace an earlier export.
        check: Whether to compare the export with the network.

    Raises:
        UserError: If `check_target` refuses, the size is too small, the network cannot be exported, or the export
            differs from it.
    """
    check_target(format, folder, opset, overwrite, check)
    processor = copy.deepcopy(segmenter.processor)
    smallest, channels = segmenter.model.min_image_size, segmenter.model.config.num_channels
    if size:
        processor.size = {"height": size[0], "width": size[1]}
    size = (processor.size["height"], processor.size["width"])
    if min(size) < smallest:
        got = size_text(size[::-1])
        raise UserError(f"got the size {got}, expected at least {smallest}x{smallest}; choose a larger one")
    # Frozen, because torch's loops cannot become ONNX otherwise.
    model = copy.deepcopy(segmenter.model).cpu().float().eval().requires_grad_(False)
    network = LogitsAlone(model).eval()
    if format == "onnx":
        opset = opset or OPSET
    about = describe(model, processor, opset)
    with torch.no_grad(), replacing(folder) as new_folder:
        new_folder.mkdir()
        path = new_folder / FORMATS[format]
        try:
            with _quiet():
                program = _trace(network, channels, smallest)
                if format == "onnx":
                    _save_onnx(program, path, opset, about)
                else:
                    _save_program(program, path, smallest, about)
        # Tracing runs any backbone's code, which may raise any class.
        except Exception as error:
            if explained(error):
                raise
            what = f"cannot export {type(model).__name__} as {format}: {type(error).__name__}: {one_line(error)}"
            advice = "the input is not the cause, UNCONCEAL_DEBUG=1 shows where it failed"
            raise UserError(f"{what}; {advice}") from error
        figures = {}
        if check:
            with _quiet():
                run = (open_onnx if format == "onnx" else open_program)(path)
            figures = _compare(run, network, channels, check_sizes(size, smallest))
            image = _images(1, channels, size)
            figures |= {"eager_seconds": _seconds(network, image), "exported_seconds": _seconds(run, image)}
        num_bytes = sum(file.stat().st_size for file in new_folder.iterdir())
        _write_configs(model, processor, new_folder)
    return ExportReport(Path(folder) / FORMATS[format], size, opset, num_bytes, **figures)


def describe(model: nn.Module, processor, opset: int | None) -> dict[str, str]:
    """Return the metadata for users without this package: name -> text.

    All but texts are JSON. `image_mean` and `image_std` are in the order of `channel_order`. If `do_resize` is false,
    images keep their size, and larger ones than `tile_size` are predicted in overlapping tiles of it.
    """
    path, package = Path(model.name_or_path), metadata("unconceal")
    names = {network.config_class.model_type: name for name, network in NETWORKS.items()}
    about = {
        # For a local folder keep the name only; never leak the path.
        "name": path.name if is_folder(path) else model.name_or_path,
        "network": names.get(model.config.model_type, model.config.model_type),
        "do_resize": processor.do_resize,
        "image_size" if processor.do_resize else "tile_size": [processor.size["height"], processor.size["width"]],
        "min_image_size": model.min_image_size,
        "resample": Image.Resampling(processor.resample).name.lower(),
        "channel_order": processor.channel_order,
        "rescale_factor": processor.rescale_factor if processor.do_rescale else 1.0,
        "image_mean": processor.image_mean if processor.do_normalize else 0.0,
        "image_std": processor.image_std if processor.do_normalize else 1.0,
        "output": "logits; their sigmoid is the mask",
        "code_license": package["License-Expression"],
        "unconceal_version": package["Version"],
    }
    if opset is not None:
        about["opset"] = opset
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}


def check_sizes(size: tuple[int, int], smallest: int) -> list[tuple[int, int]]:
    """Return three sizes (height, width) for the check: own, odd, smaller."""
    height, width = size
    odd = max(height // 2, smallest) | 1, max(3 * width // 4, smallest + 14) | 1
    return [size, odd, (max(height // 2, smallest), max(width // 2, smallest))]


def _trace(network: nn.Module, channels: int, smallest: int) -> torch.export.ExportedProgram:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # A convolution chooses a memory format by strides, which would tie the program to sizes above 1.
            module.register_forward_pre_hook(lambda _, inputs: tuple(images.contiguous() for images in inputs))
    free = torch.export.Dim.DYNAMIC
    # Odd, and so large that no side is 1 at any level: the program would keep such facts of the example. The size
    # costs nothing, because no number is computed.
    example = torch.zeros(2, channels, 18 * smallest + 25, 26 * smallest + 19)
    # Without this, lengths that may be 1 are assumed to be larger.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        return torch.export.export(network, (example,), dynamic_shapes={"pixel_values": {0: free, 2: free, 3: free}})


def _save_onnx(program: torch.export.ExportedProgram, path: Path, opset: int, about: dict[str, str]):
    axes = {"pixel_values": {0: "batch", 2: "height", 3: "width"}}
    names = {"input_names": ["pixel_values"], "output_names": ["logits"], "dynamic_shapes": axes}
    onnx = torch.onnx.export(program, opset_version=opset, dynamo=True, verbose=False, **names)
    model = onnx.model
    for graph in model.graphs():
        for node in graph:
            node.metadata_props.clear()  # traces that hold local paths
    model.metadata_props.update(about)
    onnx.save(path)


def _save_program(program: torch.export.ExportedProgram, path: Path, smallest: int, about: dict[str, str]):
    # The other guards refuse sides and batches of 1, where strides are ambiguous; `_compare` runs these.
    program._guards_code = [guard for guard in program._guards_code if guard.endswith(f">= {smallest}")]
    program.example_inputs = None  # megabytes of zeros
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                node.meta.pop(key, None)  # local paths
    # torch ends the process if it cannot write a file.
    content = BytesIO()
    torch.export.save(program, content, extra_files={"metadata.json": json.dumps(about, indent=2)})
    path.write_bytes(content.getbuffer())


def _images(batch_size: int, channels: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(batch_size, channels, *size, generator=torch.Generator().manual_seed(0))


def _compare(run: Callable, network: Callable, channels: int, sizes: list[tuple[int, int]]) -> dict[str, float]:
    """Return the largest difference, tolerance and share of strays."""
    largest, tolerance, stray_share = 0.0, TOLERANCE, 0.0
    for size, batch_size in product(sizes, BATCH_SIZES):
        images = _images(batch_size, channels, size)
        where = f"for {batch_size} image(s) of {size_text(size[::-1])}"
        expected = network(images)
        try:
            got = run(images)
        except Exception as error:  # onnxruntime has many classes of its own
            advice = "nothing is written, UNCONCEAL_DEBUG=1 shows where"
            raise UserError(f"the export fails {where}: {one_line(error)}; {advice}") from error
        if got.shape != expected.shape:
            what = f"the export gives logits of {tuple(got.shape)} {where}, expected {tuple(expected.shape)}"
            raise UserError(f"{what}; nothing is written")
        differences = _differences(got, expected)
        if not (differences <= tolerance).all():
            tolerance = max(tolerance, _tolerance(network, images, expected))
        strays = 1 - (differences <= tolerance).float().mean().item()  # counts NaN as stray
        if strays > STRAY_SHARE:
            what = f"the export's logits differ by up to {differences.max():.1e} {where}"
            share = f"by more than the allowed {tolerance:.1e} in {strays:.1%} of the pixels"
            raise UserError(f"{what}, {share}; nothing is written")
        largest, stray_share = max(largest, differences.max().item()), max(stray_share, strays)
    return {"difference": largest, "tolerance": tolerance, "stray_share": stray_share}


def _differences(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (logits - expected).abs() / expected.abs().max().clamp(min=1)


def _tolerance(network: Callable, images: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how much rounding alone may change the logits `expected`."""
    nudged = torch.nextafter(images, torch.zeros_like(images))
    own = _differences(network(nudged), expected).max().item()
    return max(TOLERANCE, min(ROUNDING_MARGIN * own, LAST_TOLERANCE))


def _seconds(run: Callable, images: torch.Tensor) -> float:
    run(images)
    start = time.perf_counter()
    run(images)
    return time.perf_counter() - start


def _write_configs(model: nn.Module, processor, folder: Path):
    # Not by `save_pretrained`, which would add code that an export does not need.
    for part, name in ((model.config, "config.json"), (processor, "preprocessor_config.json")):
        unused = ("auto_map", "custom_pipelines")
        fields = {field: value for field, value in json.loads(part.to_json_string()).items() if field not in unused}
        if part is model.config:
            fields["dtype"] = "float32"
        (folder / name).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of torch's exporters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
