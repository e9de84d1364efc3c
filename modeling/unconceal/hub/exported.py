"""Run an exported folder in the place of a network."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_outputs import SemanticSegmenterOutput

from ..models.image_processing_unconceal import UnconcealImageProcessor
from ..utils.devices import choose_device, choose_dtype
from ..utils.errors import UserError, one_line
from ..utils.loading_errors import loading_explained
from .formats import FORMATS


def exported_file(folder: str | Path) -> Path | None:
    """Return the exported file of a folder without weights."""
    folder = Path(folder).expanduser()
    if any(any(folder.glob(weights)) for weights in ("*.safetensors", "pytorch_model*.bin")):
        return None
    return next((folder / name for name in FORMATS.values() if (folder / name).is_file()), None)


def refuse_exported(folder: str | Path, what: str):
    """Raise `UserError` for an export; `what` needs a network."""
    if file := exported_file(folder):
        raise UserError(f"got the export {file}, but {what} needs the network; give the checkpoint it was made from")


class ExportedNetwork:
    """An exported file that predicts like a network. It computes in float32.

    Attributes:
        path: The file.
        config: Configuration of the network that was exported.
        device: Where tensors are expected and returned: always the CPU.
        num_stages: 0, because the file has no output but the logits.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    num_stages = 0

    def __init__(self, path: Path, config: PreTrainedConfig, run: Callable[[torch.Tensor], torch.Tensor]):
        self.path, self.config, self._run = path, config, run

    def __call__(self, pixel_values: torch.Tensor) -> SemanticSegmenterOutput:
        """Return the logits of `pixel_values` (B, C, H, W)."""
        try:
            return SemanticSegmenterOutput(logits=self._run(pixel_values))
        except Exception as error:  # onnxruntime has classes of its own, and none for memory
            if "alloc" in str(error):
                raise torch.OutOfMemoryError(one_line(error)) from error
            raise

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the bytes of the file, so that results can name it."""
        files = sorted(self.path.parent.glob(f"{self.path.name}*"))  # weights of large networks lie beside it
        return {file.name: torch.from_numpy(np.fromfile(file, np.uint8)) for file in files}


def load_exported(
    path: Path, device: str | torch.device | None, dtype: str | torch.dtype | None, compile: bool = False
) -> tuple[ExportedNetwork, UnconcealImageProcessor]:
    """Load an exported file and its image processor.

    Raises:
        UserError: If a package, the device or the type is missing, the file is damaged, or it should be compiled.
    """
    device = choose_device(device or "cpu")
    dtype = choose_dtype(dtype, device)
    if compile:
        raise UserError(f"got --compile for {path}, which is no network; leave it out, or give the checkpoint")
    if dtype not in (None, torch.float32):
        raise UserError(f"got the dtype {dtype}, but {path} computes in float32; leave it out, or give the checkpoint")
    with loading_explained(f"cannot load the settings of {path}"):
        config = AutoConfig.from_pretrained(path.parent)
        processor = UnconcealImageProcessor.from_pretrained(path.parent)
    try:
        run = (open_onnx if path.suffix == ".onnx" else open_program)(path, device)
    except UserError:
        raise
    except Exception as error:  # onnxruntime's own classes, or any from the archive
        raise UserError(f"cannot run {path}: {one_line(error)}; export the checkpoint again") from error
    return ExportedNetwork(path, config, run), processor


def open_onnx(path: Path, device: torch.device = ExportedNetwork.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from pixel values to logits, both on the CPU."""
    if find_spec("onnxruntime") is None:
        raise UserError(f"{path} needs onnxruntime; pip install 'unconceal[onnx]'")
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    if device.type != "cpu":
        if device.type != "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UserError(
                f"got the device {device}, but this onnxruntime has no CUDA provider; install onnxruntime-gpu, or use "
                "the device cpu"
            )
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised, too
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    return lambda images: torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])


def open_program(path: Path, device: torch.device = ExportedNetwork.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a program of torch.export, from pixel values to logits."""
    if device.type != "cpu":
        raise UserError(f"got the device {device}, but {path} runs on the CPU; use the device cpu")
    return torch.export.load(path).module()
