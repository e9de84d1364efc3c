"""Turn images into `pixel_values` and `labels`, and logits into masks.

One processor serves every network. It uses Pillow and NumPy only: its numbers do not depend on torchvision. reading.py
decides how a file of any kind is read.
"""

import base64
import math
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageInput, PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .reading import is_unit, to_mask, to_rgb, to_uint8


try:
    from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
except ImportError:  # an older transformers
    SemanticSegmentationPostProcessorOutput = BatchFeature
try:  # the version of huggingface_hub decides which one is installed
    from huggingface_hub.utils import httpx
except ImportError:
    import httpx


def fetch(source: str, timeout: float | None = None) -> Image.Image:
    """Open the image of a URL, or of text in base64.

    transformers would make it RGB at once: 16-bit gray white, and hidden colors visible.

    Args:
        source: A URL, a data URI, or base64 alone.
        timeout: Seconds to wait for a URL, no limit by default.

    Raises:
        ValueError: If it is no image.
    """
    try:
        if source.startswith(("http://", "https://")):
            data = httpx.get(source, timeout=timeout, follow_redirects=True).content
        else:
            data = base64.decodebytes(source.rpartition(",")[2].encode())
        return Image.open(BytesIO(data))
    except (ValueError, OSError) as error:
        raise ValueError(f"got {source[:100]!r}, expected an image file, or the URL or base64 of an image") from error


def _as_pixels(array: np.ndarray | torch.Tensor, channels: str | None) -> np.ndarray:
    """Return an array as (H, W) or, with channels, (H, W, C).

    `channels` is "channels_first", "channels_last" or None. If None and both ends could be channels, a tensor has them
    first and an array last.
    """
    is_tensor = isinstance(array, torch.Tensor)
    if is_tensor:
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # NumPy has no bfloat16
    shape = array.shape
    if array.ndim == 3:
        first, last = shape[0] in (1, 3, 4), shape[-1] in (1, 3, 4)
        if channels is None:
            channels = "channels_first" if first and (is_tensor or not last) else "channels_last"
        if channels == "channels_first":
            array = array.transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)) or 0 in shape:
        raise ValueError(
            f"got an image of shape {tuple(shape)}, expected (H, W), or 1, 3 or 4 channels first or last; "
            "name their place with input_data_format if it is unclear"
        )
    return array[..., 0] if array.shape[2:] == (1,) else array


def _as_image(given: Image.Image | np.ndarray) -> Image.Image:
    """Return an image, or one made of an array of `_as_pixels`."""
    if isinstance(given, Image.Image):
        return given
    pixels = to_uint8(given)  # rejects NaN, which has no minimum
    if given.ndim == 3 and given.min() < 0 and not _is_rescaled(given):
        raise ValueError(
            f"got a color image with values from {given.min():g}, expected 0 to 1 or 0 to 255; "
            "pass the image before any normalization"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


def _is_rescaled(given: Image.Image | np.ndarray) -> bool:
    """Return whether an input is an array of floats in [0, 1]."""
    return isinstance(given, np.ndarray) and given.dtype.kind == "f" and is_unit(given)


class NonFiniteLogits(ValueError):
    """NaN or infinity in the output of a network."""


class UnconcealImageProcessorKwargs(ImagesKwargs, total=False):
    """Additional options of `UnconcealImageProcessor`."""

    channel_order: Literal["rgb", "bgr"]
    mask_resample: PILImageResampling


class UnconcealImageProcessor(PilBackend):
    """Prepare images and masks for a network; return masks at image size.

    An image passes `to_rgb`. It is resized to `size` (Pillow, antialiased, without keeping the aspect ratio), then
    scaled by `rescale_factor` and normalized. A file, an array and a tensor of one image give the same `pixel_values`.
    With `do_rescale=False` values keep the range in which they are given: floats in [0, 1] as they are, all others
    from 0 to 255.

    Args:
        size: `{"height": int, "width": int}`, pixels. With `do_resize=False` images keep their size, and larger ones
            are predicted in tiles of `size`.
        resample: Pillow's filter for images.
        mask_resample: Pillow's filter for masks. The default, nearest neighbor, leaves them hard. Bilinear (2) makes
            soft labels: parts thinner than a pixel fade instead of breaking into dots.
        image_mean: One number, or one per channel in the order of `channel_order`, after rescaling.
        image_std: Like `image_mean`.
        channel_order: "rgb" or "bgr". "bgr" repeats how SRS was published for breast ultrasound: files in BGR order,
            with the ImageNet numbers in RGB order.

    Raises:
        ValueError: If an option is unusable.
    """

    _auto_class = "AutoImageProcessor"  # `save_pretrained` then copies this file and writes `auto_map`
    valid_kwargs = UnconcealImageProcessorKwargs
    model_input_names = ["pixel_values"]
    size = {"height": 256, "width": 256}
    resample = PILImageResampling.BILINEAR
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    channel_order = "rgb"
    mask_resample = PILImageResampling.NEAREST

    def _standardize_kwargs(self, channel_order: str = "rgb", mask_resample: int = 0, **kwargs) -> dict:
        kwargs = super()._standardize_kwargs(**kwargs)
        for name, way in (("mask_resample", mask_resample), ("resample", kwargs.get("resample"))):
            # Pillow 13 has more filters than Pillow 12.
            if way is not None and (isinstance(way, bool) or way not in list(PILImageResampling)):
                filters = ", ".join(f"{one.value} ({one.name.lower()})" for one in PILImageResampling)
                raise ValueError(f"got {name}={way!r}, expected one of {filters}")
        for name, counts, above, expected in (
            ("rescale_factor", (1,), 0, "a number above 0"),
            ("image_mean", (1, 3), -math.inf, "1 or 3 finite numbers"),
            ("image_std", (1, 3), 0, "1 or 3 numbers above 0"),
        ):
            given = kwargs.get(name)
            numbers = np.ravel(given).tolist()
            is_usable = all(isinstance(one, (int, float)) and above < one < math.inf for one in numbers)
            if given is not None and not (is_usable and len(numbers) in counts):
                raise ValueError(f"got {name}={given!r}, expected {expected}")
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if not isinstance(kwargs.get(name, True), bool):
                raise ValueError(f"got {name}={kwargs[name]!r}, expected true or false")
        if channel_order not in ("rgb", "bgr"):
            raise ValueError(f'got channel_order={channel_order!r}, expected "rgb" or "bgr"')
        size = kwargs.get("size")
        if not (size and all(type(side) is int and side > 0 for side in (size.height, size.width))):
            raise ValueError(f'got size={size and dict(size)}, expected {{"height": pixels, "width": pixels}}')
        if kwargs.get("data_format") not in (None, "channels_first"):
            raise ValueError(f'got data_format={kwargs["data_format"]!r}, expected "channels_first"')
        for name in ("do_center_crop", "do_pad"):  # inherited options that would be ignored silently
            if kwargs.get(name):
                raise ValueError(f"got {name}=True, expected it unset: images are resized as a whole")
        return {**kwargs, "channel_order": channel_order, "mask_resample": mask_resample}

    def preprocess(
        self,
        images: ImageInput | str | Path,
        segmentation_maps: ImageInput | str | Path | None = None,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Make a batch of images and, if given, of their masks.

        `processor(...)` does the same.

        Args:
            images: A PIL image, path or URL. Or an array or tensor (H, W), (H, W, C) or (C, H, W) of any real type,
                with 1, 3 or 4 channels. Or a list of them, or a batch of four dimensions.
            segmentation_maps: As many masks, of the same kinds. Three dimensions mean (B, H, W). 0 is background. What
                is object is decided by the rule of `to_mask`.
            return_tensors: "pt" for tensors, "np" or None for arrays.
            **kwargs: Any option of the class, for this call only.

        Returns:
            `pixel_values` (B, 3, H, W) float32 and, with `segmentation_maps`, `labels` (B, H, W) float32 in [0, 1].

        Raises:
            ValueError: If an image or mask is unusable, their counts differ, or sizes differ with `do_resize=False`.
        """
        return super().preprocess(images, segmentation_maps, return_tensors=return_tensors, **kwargs)

    def _preprocess_image_like_inputs(
        self, images, segmentation_maps, *, input_data_format, return_tensors, **options
    ) -> BatchFeature:
        size = options["size"] if options["do_resize"] else None
        pairs = [(to_rgb(_as_image(one)), _is_rescaled(one)) for one in self._each(images, input_data_format)]
        if not pairs:
            raise ValueError("got no images, expected at least one")
        images, are_rescaled = zip(*pairs, strict=True)
        pixels = _stack(images, size, options["resample"])
        data = {"pixel_values": self._normalized(pixels, np.array(are_rescaled), **options)}
        if segmentation_maps is not None:
            given = self._each(segmentation_maps, input_data_format, are_masks=True)
            masks = [to_mask(one if getattr(one, "ndim", 2) == 2 else _as_image(one)) for one in given]
            if len(masks) != len(images):
                raise ValueError(f"got {len(images)} images and {len(masks)} segmentation maps, expected one for each")
            data["labels"] = _stack(masks, size, options["mask_resample"]).astype(np.float32) / np.float32(255)
        return BatchFeature(data, tensor_type=return_tensors)

    def to_pil(self, images, channels: str | None = None) -> Iterator[Image.Image]:
        """Yield the images of any input of `preprocess`.

        Args:
            images: As for `preprocess`.
            channels: "channels_first", "channels_last" or None.

        Raises:
            ValueError: If an input is of another kind, or a file does not exist.
        """
        yield from map(_as_image, self._each(images, channels))

    def _each(self, images, channels: str | None, are_masks: bool = False) -> Iterator[Image.Image | np.ndarray]:
        """Yield images, and arrays as (H, W) or (H, W, C).

        Three dimensions of masks are (B, H, W).
        """
        if isinstance(images, (list, tuple)):
            for image in images:
                yield from self._each(image, channels, are_masks)
        elif isinstance(images, Image.Image):
            yield images
        elif isinstance(images, (np.ndarray, torch.Tensor)):
            if images.ndim == 4 or (are_masks and images.ndim == 3 and images.shape[-1] != 1):
                for image in images:
                    yield from self._each(image, channels, are_masks)
            else:
                yield _as_pixels(images, channels)
        elif isinstance(images, str) and images.startswith(("http://", "https://", "data:image/")):
            yield fetch(images)
        elif isinstance(images, (str, Path)):
            path = Path(images).expanduser()
            if not path.is_file():
                raise ValueError(f"got {str(images)!r}, which is not a file; expected an image file or a URL")
            yield Image.open(path)
        else:
            raise ValueError(f"got {type(images).__name__}, expected a PIL image, an array, a tensor or a path")

    to_rgb = staticmethod(to_rgb)  # for callers that have only the files of a checkpoint

    @staticmethod
    def _normalized(
        pixels: np.ndarray,
        are_rescaled,
        *,
        channel_order,
        do_rescale,
        rescale_factor,
        do_normalize,
        image_mean,
        image_std,
        **_,
    ) -> np.ndarray:
        """Normalize uint8 RGB (B, H, W, 3) to (B, 3, H, W)."""
        if channel_order == "bgr":
            pixels = pixels[..., ::-1]
        # Channels first: arithmetic on rows of three numbers would take ten times as long.
        pixels = pixels.transpose(0, 3, 1, 2).astype(np.float32, order="C")
        if do_rescale:
            pixels *= np.float32(rescale_factor)
        elif are_rescaled.any():
            pixels[are_rescaled] *= np.float32(1 / 255)
        if do_normalize:
            pixels -= np.asarray(image_mean, np.float32).reshape(-1, 1, 1)
            pixels /= np.asarray(image_std, np.float32).reshape(-1, 1, 1)
        return pixels

    def post_process_masks(self, outputs, target_sizes: Iterable | None = None) -> list[torch.Tensor]:
        """Return the soft mask of each image at its own size.

        To enlarge a mask its logits are interpolated, as in published evaluations: the edge stays sharp. If either
        side shrinks, the probabilities are averaged with antialiasing. Averaged logits would lose small targets.

        Args:
            outputs: Output of the network, with `logits` (B, 1, h, w) of any float type.
            target_sizes: (height, width) of each image, a list of pairs or a (B, 2) tensor. None keeps (h, w).

        Returns:
            B tensors (height, width), float32 in [0, 1], on the device of the logits.

        Raises:
            ValueError: If logits do not have one channel, or images not one target size each.
            NonFiniteLogits: If logits are not finite.
        """
        logits = outputs.logits.float()
        if logits.ndim != 4 or logits.shape[1] != 1:
            raise ValueError(f"got logits of shape {tuple(logits.shape)}, expected (B, 1, H, W)")
        if not logits.isfinite().all():
            raise NonFiniteLogits(
                "the output of the network is not finite (NaN or infinity); use float32, or check its weights"
            )
        if target_sizes is None:
            return list(logits.sigmoid().squeeze(1))
        if len(target_sizes) != len(logits):
            raise ValueError(f"got {len(target_sizes)} target sizes for {len(logits)} images, expected one for each")
        masks = []
        for image_logits, target_size in zip(logits.split(1), target_sizes, strict=True):
            height, width = (int(side) for side in target_size)
            if height < logits.shape[-2] or width < logits.shape[-1]:
                probs = F.interpolate(image_logits.sigmoid(), (height, width), mode="bilinear", antialias=True)
                probs.clamp_(0, 1)  # rounding can lift an antialiased sum above 1
            else:
                probs = F.interpolate(image_logits, (height, width), mode="bilinear", align_corners=False).sigmoid_()
            masks.append(probs[0, 0])
        return masks

    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes: Iterable | None = None,
        threshold: float = 0.5,
        return_segmentation_scores: bool = False,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """Return the class ids of each image: 0 background, 1 object.

        `pipeline("image-segmentation")` calls this. Arguments and errors are those of `post_process_masks`. A pixel is
        object if its probability is above `threshold`.

        Returns:
            B tensors (height, width), int64. With `return_segmentation_scores` B objects with this `segmentation` and
            `segmentation_scores`, the probabilities of background and object, (2, height, width).
        """
        masks = self.post_process_masks(outputs, target_sizes)
        maps = [(mask > threshold).long() for mask in masks]
        if not return_segmentation_scores:
            return maps
        return [
            SemanticSegmentationPostProcessorOutput(
                {"segmentation": ids, "segmentation_scores": torch.stack([1 - mask, mask])}
            )
            for ids, mask in zip(maps, masks, strict=True)
        ]


def _stack(images: Iterable[Image.Image], size, resample: int) -> np.ndarray:
    """Make one array of images, resized if there is a `size`."""
    if size:
        images = [image.resize((size.width, size.height), resample) for image in images]
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        got = ", ".join(f"{width}x{height}" for width, height in sizes)
        raise ValueError(f"got images of {got}, expected one size; set do_resize=True")
    return np.stack([np.asarray(image) for image in images])
