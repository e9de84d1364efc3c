"""Use a trained network from Python: load it, segment, explain, draw."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import IOBase
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForImageSegmentation, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # see models/networks.py

from .data.image_files import read_image
from .drawing.layout import checked_mask, overlay
from .hub.exported import exported_file, load_exported
from .hub.shipped import resolve
from .models import networks  # noqa: F401  registers them with the Auto classes
from .models.cutout import make_cutout, mask_to_image
from .models.image_processing_unconceal import NonFiniteLogits, UnconcealImageProcessor
from .models.inference import make_inference_form
from .models.predict import predict_masks
from .models.reading import to_rgb
from .models.refine import check_refine
from .models.unfolding import Unfolding, unfold
from .utils.devices import choose_device, choose_dtype
from .utils.digests import weights_digest
from .utils.errors import UserError
from .utils.files import is_hub_id, with_home
from .utils.images import MAX_PIXELS, size_text
from .utils.loading_errors import loading_explained
from .video import SMOOTHING, SegmentedFrame, UnusableVideo, open_video, segment_frames


ImageSource = Image.Image | str | Path


class PreparedImage(NamedTuple):
    """Image with the network's input made of it, (1, 3, H, W)."""

    image: Image.Image
    pixel_values: torch.Tensor


@dataclass(frozen=True)
class Segmenter:
    """Network in evaluation mode with its processor; `load` makes one.

    Attributes:
        model: The network as it was saved.
        processor: Its image processor.
        dtype: Type of the arithmetic. None is the type of `model`.
    """

    model: PreTrainedModel
    processor: UnconcealImageProcessor
    dtype: torch.dtype | None = None

    @cached_property
    def network(self) -> PreTrainedModel:
        """Return the faster copy of `model` that predicts."""
        is_export = not isinstance(self.model, torch.nn.Module)
        return self.model if is_export else make_inference_form(self.model, self.dtype)

    def segment(
        self, images: ImageSource | Iterable[ImageSource], batch_size: int = 1, refine: str = "auto"
    ) -> np.ndarray | list[np.ndarray]:
        """Return the soft mask of each image.

        Args:
            images: A PIL image or a path, or many of them.
            batch_size: Images, or tiles of one image, in a forward pass.
            refine: Whether the edges of large images are predicted again, in tiles: "auto" for images that exceed the
                network's input by a quarter, "always" for all larger images, or "never".

        Returns:
            (height, width) as displayed, float32 in [0, 1]. One mask for one image, otherwise a list.

        Raises:
            UserError: If memory runs out, a file cannot be read, the output is not finite, or `refine` is unknown.
        """
        if isinstance(images, ImageSource):
            return next(self.stream([images], batch_size, refine))
        return list(self.stream(images, batch_size, refine))

    def prepare(self, image: ImageSource) -> PreparedImage:
        """Open an image and make the network's input; safe in threads."""
        image = opened(image)
        return PreparedImage(image, self.processor(image).pixel_values)

    def stream(
        self,
        images: Iterable[ImageSource | PreparedImage],
        batch_size: int = 1,
        refine: str = "auto",
        network: Any | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield the masks of `segment`, with `batch_size` images in memory.

        `network` takes the place of this object's own, such as one that counts its time.
        """
        if batch_size < 1:
            raise UserError(f"got batch_size={batch_size}, expected at least 1")
        try:
            check_refine(refine)
        except ValueError as error:
            raise UserError(str(error)) from error
        network = network or self.network
        images = (image if isinstance(image, PreparedImage) else self.prepare(image) for image in images)
        for batch in batches_of_one_size(images, batch_size):
            batch, pixel_values = zip(*batch, strict=True)
            with self._explained(batch):
                pixel_values = torch.cat(pixel_values).to(network.device, network.dtype)
                for mask in predict_masks(network, self.processor, batch, pixel_values, refine, batch_size):
                    yield mask.cpu().numpy()

    def segment_video(
        self,
        path: str | Path,
        batch_size: int = 1,
        refine: str = "never",
        smoothing: float = SMOOTHING,
        max_pixels: int = MAX_PIXELS,
    ) -> Iterator[SegmentedFrame]:
        """Yield the frames of a video with their masks.

        Memory holds a few frames at a time. PyAV reads the file: `pip install unconceal[video]`.

        Args:
            path: A video file.
            batch_size: Frames in a forward pass.
            refine: As for `segment`; "auto" takes much longer for large frames.
            smoothing: Weight of the previous mask where the picture stays the same, from 0 to below 1.
            max_pixels: Largest width times height of a frame.

        Yields:
            `image`, upright RGB, `mask`, (height, width), float32 in [0, 1], and `time` in seconds.

        Raises:
            UserError: If the file cannot be read to its end, or PyAV is missing, and as for `segment`.
        """
        try:
            with open_video(path, max_pixels) as video:
                yield from segment_frames(self, video, batch_size, refine, smoothing)
        except UnusableVideo as error:
            raise UserError(f"cannot read {path}: {error}") from error

    def unfold(self, image: ImageSource, size: tuple[int, int] | None = None) -> Unfolding:
        """Return the maps of every stage of RUN for one image.

        Args:
            image: A PIL image or a path.
            size: (width, height) of the maps, by default of the displayed image. Large maps take much memory.

        Raises:
            UserError: If the network has no stages, memory runs out, or the output is not finite.
        """
        image = opened(image)
        if not self.model.num_stages:
            raise UserError(
                f"got {type(self.model).__name__}, which has no stages; expected a network that unfolds, such as RUN"
            )
        with self._explained([image]):
            return unfold(self.network, self.processor, image, size)

    def explain(self, image: ImageSource) -> Image.Image:
        """Draw how the network finds its mask, a row for each stage.

        Argument and errors are those of `unfold`.
        """
        from .drawing.explain import draw_unfolding, map_size

        image = opened(image)
        return draw_unfolding(image, self.unfold(image, map_size(image.size)))

    @contextmanager
    def _explained(self, images: Sequence[Image.Image]) -> Iterator[None]:
        """Turn too little memory and output without numbers into a `UserError`."""
        try:
            yield
        except NonFiniteLogits as error:
            raise UserError(str(error)) from error
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
            largest = max((image.size for image in images), key=math.prod)
            raise UserError(
                f"{self.model.device} ran out of memory with {len(images)} image(s) at a time, the largest "
                f"{size_text(largest)}; lower the batch size or --max-pixels"
            ) from error


def batches_of_one_size(images: Iterable[PreparedImage], batch_size: int) -> Iterator[list[PreparedImage]]:
    """Yield the images in order, in batches of one size."""
    for _, group in groupby(images, key=lambda prepared: prepared.pixel_values.shape):
        while batch := list(islice(group, batch_size)):
            yield batch


def opened(image: ImageSource | BinaryIO, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """Return an image or an image file as RGB, upright.

    Raises:
        UserError: If the file cannot be read; the message gives its path, or `name`.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not isinstance(image, (str, Path, IOBase)):
        raise UserError(f"got {type(image).__name__}, expected a PIL image or a path; use Image.fromarray for arrays")
    image = with_home(image) if isinstance(image, str) else image
    try:
        return read_image(image, max_pixels)
    except UserError as error:
        raise UserError(f"cannot read {name or image}: {error}") from error


def load(
    model_id_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    compile: bool = False,
) -> Segmenter:
    """Load a segmentation network and its processor.

    Args:
        model_id_or_path: Folder that `save_pretrained`, training or `unconceal export` wrote, "owner/name" on the Hub,
            or the name of a network that ships with the package, such as "polyp".
        device: As torch names it. None is the accelerator if there is one, otherwise the CPU. For an export it is the
            CPU.
        dtype: Type of the arithmetic: "float32", "bfloat16", "float16" or torch's own. None keeps the checkpoint's. A
            device without bfloat16 uses float32, and a line in the log says so.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run the code that comes with the checkpoint. Networks of this package do not need it.
        compile: Compile the network by torch.compile. The first batch takes minutes; the log says how long.

    Raises:
        UserError: If there is no such checkpoint, device or dtype, if it is damaged or of an unknown kind, or does not
            segment.
    """
    model_id_or_path = resolve(model_id_or_path)
    if exported := exported_file(model_id_or_path):
        return Segmenter(*load_exported(exported, device, dtype, compile))
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    name = str(model_id_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        name = str(path)
        if not (path / "config.json").is_file():
            raise UserError(f"got the folder {name} without config.json; give a folder that save_pretrained wrote")
    elif path.exists() or not is_hub_id(name):
        raise UserError(
            f"got the model {name!r}, which is not a folder; give a model's folder or its id on the Hub, owner/name"
        )
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with loading_explained(f"cannot load {name} as a segmentation network"):
        try:
            # Other shapes are reported below; the loader's own error points at a table that it logs.
            model, report = AutoModelForImageSegmentation.from_pretrained(
                name, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except SafetensorError as error:
            raise UserError(
                f"the weights of {name} are damaged or incomplete ({error}); save or download them again"
            ) from error
        except ValueError as error:
            if trust_remote_code or "trust_remote_code" not in str(error):
                raise
            raise UserError(
                f"{name} is not a network of this package and would run its own code; read that code, then pass "
                "trust_remote_code"
            ) from error
    unfilled = report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]}
    if unfilled:
        # transformers fills these with random numbers and only warns.
        saved_as = ", ".join(getattr(model.config, "architectures", None) or ["an unknown class"])
        raise UserError(
            f"{name} was saved as {saved_as}; {len(unfilled)} weights of {type(model).__name__} are missing or have "
            f"other shapes, such as {min(unfilled)}; give a checkpoint trained to segment"
        )
    damaged = [key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if damaged:
        raise UserError(
            f"{name} holds weights that are not finite (NaN or infinity): {len(damaged)} in all, such as "
            f"{damaged[0]}; give another checkpoint"
        )
    with loading_explained(f"{name} has no usable preprocessor_config.json"):
        processor = AutoImageProcessor.from_pretrained(name, **options)
        if not hasattr(processor, "post_process_masks"):
            raise UserError(
                f"{name} has the processor {type(processor).__name__}, expected UnconcealImageProcessor; "
                "give a checkpoint of this project"
            )
        model.check_pixel_values(processor(Image.new("RGB", (64, 64))).pixel_values)
    segmenter = Segmenter(model.to(device).eval(), processor, dtype)
    if compile:
        from .utils.compiling import compile_forward  # slow to import

        compile_forward(segmenter.network)
    return segmenter


def cutout(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Return the object of an image as RGBA.

    At soft edges opacity and colors of the object are estimated (see `make_cutout` and `object_colors`).

    Args:
        image: Any image.
        mask: (H, W) of the displayed image, as for `checked_mask`.

    Raises:
        UserError: If the mask has another size, or values that do not tell what is object.
    """
    image = to_rgb(image)
    return make_cutout(image, mask_to_image(checked_mask(mask, image)))


__all__ = ["Segmenter", "choose_device", "cutout", "load", "opened", "overlay", "weights_digest"]
