"""Use a trained network on pictures: load it, segment, and draw what it found."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from transformers import AutoModelForImageSegmentation, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # see __init__.py of this package

from .models.cutout import make_cutout, mask_to_image
from .models.image_processing_unconceal import UnconcealImageProcessor, to_rgb
from .models.predict import predict_masks
from .models.refine import check_refine
from .models.unfolding import Unfolding, unfold
from .utils.errors import UserError, one_line
from .utils.files import is_hub_id
from .utils.images import MAX_PIXELS, open_image


# What transformers' loaders raise, having no error class of their own. First absent and damaged files, missing packages
# and unknown types; then wrong values in a configuration, which reach all kinds of code unchecked, and code that is cut short.
LOADING_ERRORS = (
    *(OSError, SafetensorError, ImportError, LookupError, RuntimeError, ValueError),
    *(StrictDataclassError, ArithmeticError, AttributeError, TypeError, SyntaxError),
)


@dataclass(frozen=True)
class Segmenter:
    """A network in evaluation mode with the processor that was saved beside it. `load` makes one."""

    model: PreTrainedModel
    processor: UnconcealImageProcessor

    def segment(self, images: Iterable[Image.Image], batch_size: int = 1, refine: str = "auto") -> list[np.ndarray]:
        """Return the soft mask of each picture: (height, width) as displayed, float32 in [0, 1].

        Args:
            images: Any pictures.
            batch_size: Pictures, or tiles of one, that the network sees at a time.
            refine: Whether the edges of large pictures are looked at again, in tiles (see `unconceal.models.refine`):
                "auto" where a side is twice the network's or longer, "always" where one is longer at all, "never".

        Raises:
            UserError: If memory runs out, or if `refine` is none of these.
        """
        return list(self.stream(images, batch_size, refine))

    def stream(self, images: Iterable[Image.Image], batch_size: int = 1, refine: str = "auto") -> Iterator[np.ndarray]:
        """Yield what `segment` returns, one by one; `batch_size` images and one mask are held at a time."""
        try:
            check_refine(refine)
        except ValueError as error:
            raise UserError(str(error)) from error
        images = iter(images)
        while batch := [to_rgb(image) for image in islice(images, batch_size)]:
            with self.memory_explained(batch):
                for mask in predict_masks(self.model, self.processor, batch, refine, batch_size):
                    yield mask.cpu().numpy()

    def unfold(self, image: Image.Image, size: tuple[int, int] | None = None) -> Unfolding:
        """Return the maps of every stage by which a network such as RUN finds its mask.

        Args:
            image: Any image.
            size: (width, height) of the maps, by default of the displayed image. Large maps take much memory.

        Raises:
            UserError: If the network has no stages, or memory runs out.
        """
        image = to_rgb(image)
        if not self.model.num_stages:
            raise UserError(
                f"got {type(self.model).__name__}, which has no stages to show; expected a network that unfolds, such "
                "as RUN"
            )
        with self.memory_explained([image]):
            return unfold(self.model, self.processor, image, size)

    @contextmanager
    def memory_explained(self, images: list[Image.Image]) -> Iterator[None]:
        """Turn running out of memory with these pictures into a `UserError`."""
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
            width, height = max((image.size for image in images), key=math.prod)
            raise UserError(
                f"{self.model.device} ran out of memory with {len(images)} picture(s) at a time, the largest of "
                f"{width}x{height}; lower the batch size or max-pixels"
            ) from None


def load(
    model_id_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Segmenter:
    """Load a segmentation network and its processor from a folder or from the Hub.

    Args:
        model_id_or_path: Folder that `save_pretrained` or training wrote, or "owner/name" on the Hub.
        device: As torch names it. None is the accelerator where there is one, else the CPU.
        dtype: "float32", "bfloat16", "float16" or torch's own. None keeps the checkpoint's.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run the code kept with the checkpoint. Networks of this package do not need it.

    Raises:
        UserError: If there is no such checkpoint, it is damaged, of an unknown kind, or does not segment, or if the
            device or the dtype does not exist here.
    """
    device, dtype = choose_device(device), _dtype(dtype)
    name = str(model_id_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        name = str(path)
        if not (path / "config.json").is_file():
            raise UserError(f"got the folder {name} without config.json; give a folder that save_pretrained wrote")
    elif path.exists() or not is_hub_id(name):
        raise UserError(
            f"got {name!r} as the model, which is no folder; give a model's folder or its id on the Hub, owner/name"
        )
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        # Other shapes are reported below; the loader's own error points at a table that it logs.
        model, report = AutoModelForImageSegmentation.from_pretrained(
            name, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except SafetensorError as error:
        raise UserError(
            f"the weights of {name} are damaged or cut short ({error}); save or download them again"
        ) from None
    except LOADING_ERRORS as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UserError(
                f"{name} is no network of this package and would run code of its own; read that, then pass trust_remote_code"
            ) from None
        raise UserError(f"cannot load {name} as a segmentation network: {one_line(error)}") from None
    unfilled = report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]}
    if unfilled:
        # transformers fills these with random numbers and only warns.
        saved_as = ", ".join(getattr(model.config, "architectures", None) or ["an unknown class"])
        raise UserError(
            f"{name} was saved as {saved_as} and lacks {len(unfilled)} weights of {type(model).__name__} or has them in "
            f"other shapes, such as {min(unfilled)}; give a checkpoint trained to segment"
        )
    try:
        processor = AutoImageProcessor.from_pretrained(name, **options)
    except LOADING_ERRORS as error:
        raise UserError(f"{name} has no usable preprocessor_config.json: {one_line(error)}") from None
    if not hasattr(processor, "post_process_masks"):
        raise UserError(
            f"{name} has the processor {type(processor).__name__}, expected UnconcealImageProcessor; "
            "give a checkpoint of this project"
        )
    return Segmenter(model.to(device).eval(), processor)


def weights_digest(model: PreTrainedModel) -> str:
    """Return the SHA-256 of a model's weights, by which a result is known to be of this model and no other."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device of that name, or the accelerator where there is one, else the CPU.

    Raises:
        UserError: If torch cannot use it here.
    """
    if device is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    # torch says AssertionError for a build without CUDA, NotImplementedError for one without the backend.
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"got the device {str(device)!r}, which torch cannot use here; try cpu") from None
    return device


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"got the dtype {name!r}, expected float32, bfloat16 or float16")
    return None if dtype is None else getattr(torch, name)


def read_image(source: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file of any kind as it is displayed (see `to_rgb`).

    Args:
        source: A path, or a file open for reading bytes.
        max_pixels: Width times height above which the file is refused before it is decoded.

    Returns:
        An RGB picture; the file is closed.

    Raises:
        UserError: With the reason alone, without the file's name.
    """
    try:
        with open_image(source, max_pixels) as image:
            return to_rgb(image)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError("not an image file that Pillow can read") from None
    except OSError as error:
        raise UserError(error.strerror or str(error)) from None
    # Pillow's decoders raise nearly any class on damaged files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise UserError(f"damaged or unsupported image ({error})") from None


def overlay(
    image: Image.Image, mask: np.ndarray, color: tuple[int, int, int] = (255, 0, 80), alpha: float = 0.6
) -> Image.Image:
    """Tint what the mask holds.

    Args:
        image: Any picture.
        mask: (H, W) of the displayed picture, in [0, 1].
        color: RGB, 0 to 255.
        alpha: Share of `color` where the mask is 1, in [0, 1].

    Returns:
        An RGB picture of the displayed size.

    Raises:
        UserError: If the mask has another size.
    """
    image = _checked_rgb(image, mask)
    pixels = np.asarray(image, np.float32)
    weight = alpha * np.asarray(mask, np.float32)[..., None]  # (H, W, 1)
    return Image.fromarray(np.rint(pixels + weight * (np.asarray(color, np.float32) - pixels)).astype(np.uint8))


def cutout(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Return the picture as RGBA with the mask (H, W), in [0, 1], as its opacity.

    At soft edges, where a photograph mixes object and background, the object's own colours are estimated (see
    `object_colors`), so that no fringe of the old background shows on a new one. All others stay as they are.

    Raises:
        UserError: If the mask has another size than the displayed picture.
    """
    return make_cutout(_checked_rgb(image, mask), mask_to_image(mask))


def _checked_rgb(image: Image.Image, mask: np.ndarray) -> Image.Image:
    image = to_rgb(image)
    if mask.shape != (image.height, image.width):
        raise UserError(f"got a mask of {mask.shape}, expected {(image.height, image.width)}, the picture's size")
    return image
