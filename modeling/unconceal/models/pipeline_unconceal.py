"""A pipeline that returns soft masks; `pipeline("image-segmentation")` returns hard ones, with labels."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import load_image
from transformers.pipelines.base import Pipeline
from transformers.utils import ModelOutput

from .cutout import make_cutout, mask_to_image
from .image_processing_unconceal import to_mask, to_rgb
from .predict import predict_masks
from .refine import check_refine
from .unfolding import Unfolding, unfold


class SoftMaskPipeline(Pipeline):
    """Pictures in, soft masks of their own size out, for every network of the project.

    Its task is "soft-image-segmentation":

        find = pipeline("soft-image-segmentation", model="owner/name", trust_remote_code=True)
        find("photo.jpg")["mask"].save("mask.png")
        find("photo.jpg", cutout=True)["cutout"].save("cutout.png")

    Where the package is installed, `pipeline("image-segmentation", model=..., pipeline_class=SoftMaskPipeline)` runs none
    of the repository's code.
    """

    task_name = "soft-image-segmentation"
    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(
        self, inputs: Any, *, batch_size: int | None = None, **kwargs
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterable[dict[str, Any]]:
        """Find the object in one picture or in many.

        Options can be given here or when the pipeline is made.

        Args:
            inputs: A Pillow image, a path, a URL, an array or a tensor (H, W), (H, W, C) or (C, H, W); a list, tuple or
                batch (B, ...) of them; or a generator or data set, which is read while its masks are taken.
            batch_size: Pictures, or tiles of one, that the network sees at a time, 1 by default.
            **kwargs: `refine`, whether the edges of large pictures are looked at again, in tiles: "auto", the default,
                where a side is twice the network's or longer, "always" where one is longer at all, "never"; `cutout`,
                whether to cut the object out, False by default; `num_workers`, processes that read ahead, none by
                default; `timeout`, seconds to wait for a URL, for ever by default.

        Returns:
            For a picture a dictionary: `mask`, an 8-bit grey Pillow image, and `probs`, the same as a float32 tensor
            (H, W) in [0, 1], both of the picture's upright size; with `cutout` also `cutout`, what `cut_out` makes of
            the picture and its mask. For a list or batch a list of them, else an iterator.

        Raises:
            ValueError: If an input is no picture, or an option has no such value.
        """
        if batch_size is None:
            batch_size = 1 if self._batch_size is None else self._batch_size
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"got batch_size={batch_size!r}, expected a whole number from 1")
        if isinstance(inputs, tuple) or (isinstance(inputs, (np.ndarray, torch.Tensor)) and inputs.ndim == 4):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []  # transformers looks at the first of them
        # Under a second name, since transformers tells `_forward` nothing of the first.
        return super().__call__(inputs, batch_size=batch_size, tile_batch_size=batch_size, **kwargs)

    def cut_out(self, picture: Any, mask: Image.Image | np.ndarray | torch.Tensor) -> Image.Image:
        """Return a picture as RGBA with a mask as its opacity.

        At soft edges, where a photograph mixes object and background, the object's own colours are estimated where
        pymatting is installed; else they stay as photographed, and a line in the log says so, once.

        Args:
            picture: Any picture that the pipeline takes.
            mask: Of the picture's upright size: a Pillow image, white where the object is, or an array or tensor
                (H, W) in [0, 1].

        Raises:
            ValueError: If the mask has another size, or if either is no picture.
        """
        image, opacity = self._read(picture), _opacity(mask)
        if opacity.size != image.size:
            size, expected = (f"{width}x{height}" for width, height in (opacity.size, image.size))
            raise ValueError(f"got a mask of {size}, expected {expected}, the picture's width and height")
        return make_cutout(image, opacity)

    def unfold(self, image: Any, size: tuple[int, int] | None = None) -> Unfolding:
        """Return the maps of every stage by which a network such as RUN finds its mask.

        Args:
            image: Any image that the pipeline takes.
            size: (width, height) of the maps, by default the size of the image.

        Raises:
            ValueError: If the network has no stages, or the input is not an image.
        """
        return unfold(self.model, self.image_processor, self._read(image), size)

    def _sanitize_parameters(
        self,
        timeout: float | None = None,
        refine: str | None = None,
        cutout: bool | None = None,
        tile_batch_size: int | None = None,
    ) -> tuple[dict, dict, dict]:
        if refine is not None:
            check_refine(refine)
        if cutout not in (None, False, True):
            raise ValueError(f"got cutout={cutout!r}, expected True or False")
        options = ({"timeout": timeout}, {"refine": refine, "batch_size": tile_batch_size}, {"cutout": cutout})
        # What is left out stays as it was when the pipeline was made.
        return tuple({name: value for name, value in part.items() if value is not None} for part in options)

    def _read(self, inputs: Any, timeout: float | None = None) -> Image.Image:
        """Return one picture of any kind as people see it."""
        if isinstance(inputs, str) and inputs.startswith(("http://", "https://")):
            inputs = load_image(inputs, timeout=timeout)
        pictures = [to_rgb(picture) for picture in self.image_processor.to_pil(inputs)]
        if len(pictures) != 1:
            raise ValueError(f"got {len(pictures)} pictures as one input; give them as a list of pictures")
        return pictures[0]

    def preprocess(self, inputs: Any, timeout: float | None = None) -> dict[str, Any]:
        """Return `pixel_values` (1, C, H, W) of one picture and, as `picture`, itself."""
        picture = self._read(inputs, timeout)
        pixel_values = self.image_processor(picture, return_tensors="pt").pixel_values.to(self.dtype)
        return {"pixel_values": pixel_values, "picture": picture}

    def _forward(self, model_inputs: dict[str, Any], refine: str = "auto", batch_size: int = 1) -> ModelOutput:
        given = model_inputs["picture"]  # one image, or the list of a batch
        images = given if isinstance(given, list) else [given]
        masks = predict_masks(
            self.model, self.image_processor, images, refine, batch_size, model_inputs["pixel_values"]
        )
        # To the CPU one by one, so that an accelerator holds one large mask at a time.
        return ModelOutput(probs=[mask.cpu() for mask in masks], picture=given)

    def postprocess(self, model_outputs: ModelOutput, cutout: bool = False) -> dict[str, Any]:
        """Return the picture's mask, as `__call__` describes."""
        probs = model_outputs["probs"][0]
        found = {"mask": mask_to_image(probs.numpy()), "probs": probs}
        if cutout:
            found["cutout"] = self.cut_out(model_outputs["picture"], found["mask"])
        return found


def _opacity(mask: Any) -> Image.Image:
    """Return a mask of any kind as 8-bit grey."""
    if isinstance(mask, Image.Image):
        return to_mask(mask)
    if isinstance(mask, torch.Tensor):
        mask = mask.detach().cpu().float().numpy()  # NumPy has no bfloat16
    if not isinstance(mask, np.ndarray):
        raise ValueError(f"got a mask of {type(mask).__name__}, expected a Pillow image, an array or a tensor")
    if mask.ndim != 2 or not mask.size:
        raise ValueError(f"got a mask of shape {mask.shape}, expected (height, width)")
    if not (mask.min() >= 0 and mask.max() <= 1):  # nor NaN
        raise ValueError(f"got a mask with values from {mask.min():g} to {mask.max():g}, expected 0 to 1")
    return mask_to_image(mask)


__all__ = ["SoftMaskPipeline"]
