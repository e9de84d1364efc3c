"""Return soft masks from a pipeline; `pipeline("image-segmentation")` returns hard ones."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.pipelines.base import Pipeline
from transformers.utils import ModelOutput

from .cutout import make_cutout, mask_to_image, soft_mask
from .image_processing_unconceal import fetch
from .memory import keep_freed_memory
from .predict import predict_masks
from .reading import to_rgb
from .refine import check_refine
from .unfolding import Unfolding, unfold


class SoftMaskPipeline(Pipeline):
    """Pipeline from images to soft masks of the same size.

    Its task is "soft-image-segmentation":

        find = pipeline("soft-image-segmentation", model="owner/name", trust_remote_code=True)
        find("photo.jpg")["mask"].save("mask.png")
        find("photo.jpg", cutout=True)["cutout"].save("cutout.png")

    With the package installed, `pipeline("image-segmentation", model=..., pipeline_class=SoftMaskPipeline)` runs no
    code of the repository.
    """

    task_name = "soft-image-segmentation"
    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False
    _load_video_processor = False  # otherwise transformers asks whether to run code of the repository
    keep_freed_memory = staticmethod(keep_freed_memory)

    def __call__(
        self, inputs: Any, *, batch_size: int | None = None, **kwargs
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterable[dict[str, Any]]:
        """Find the object in one image or in many.

        Options can be given here or when the pipeline is made.

        Args:
            inputs: A PIL image, path, URL, or an array or tensor (H, W), (H, W, C) or (C, H, W). Or many: a list,
                tuple or batch (B, ...) of them. A generator or data set is read as its masks are taken.
            batch_size: Images, or tiles of one image, in a forward pass, 1 by default.
            **kwargs: `refine`: whether the edges of large images are predicted again, in tiles: "auto" (default) for
                images that exceed the network's input by a quarter, "always" for all larger images, "never".
                `cutout`: whether to cut the object out, False by default. `num_workers`: processes that read ahead,
                none by default. `timeout`: seconds to wait for a URL, no limit by default.

        Returns:
            For one image a dictionary: `mask`, an 8-bit gray PIL image, and `probs`, a float32 tensor (H, W) in
            [0, 1]. Both have the upright size. With `cutout` also `cutout`, the result of `cut_out`. For a list or
            batch a list of them, otherwise an iterator.

        Raises:
            ValueError: If an input is not an image, or an option has an unknown value.
        """
        if batch_size is None:
            batch_size = 1 if self._batch_size is None else self._batch_size
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"got batch_size={batch_size!r}, expected a whole number from 1")
        if isinstance(inputs, tuple) or (isinstance(inputs, (np.ndarray, torch.Tensor)) and inputs.ndim == 4):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []  # transformers looks at the first of them
        # Under a second name: transformers does not pass the first on to `_forward`.
        return super().__call__(inputs, batch_size=batch_size, tile_batch_size=batch_size, **kwargs)

    @cached_property
    def network(self) -> PreTrainedModel:
        """Return the faster copy of `model` that predicts."""
        return self.model.for_inference()

    def cut_out(self, image: Any, mask: Image.Image | np.ndarray | torch.Tensor) -> Image.Image:
        """Return the object of an image as RGBA.

        Opacity is 0 up to 0.3 in the mask and 1 from 0.9 on. pymatting, if installed, estimates the colors of the
        object at soft edges. Otherwise they stay as photographed, and a line in the log says so once.

        Args:
            image: Any image that the pipeline accepts.
            mask: Mask of the upright size: a PIL image, or an array or tensor (H, W). Floats up to 1 are soft, with 1
                for object. If a mask of another kind holds a single value beside 0, that value is object. Otherwise
                255 is white.

        Raises:
            ValueError: If the mask has another size, or if either is not an image.
        """
        image, opacity = self._read(image), mask_to_image(soft_mask(mask))
        if opacity.size != image.size:
            size, expected = (f"{width}x{height}" for width, height in (opacity.size, image.size))
            raise ValueError(f"got a mask of {size}, expected {expected}, the size of the image")
        return make_cutout(image, opacity)

    def unfold(self, image: Any, size: tuple[int, int] | None = None) -> Unfolding:
        """Return the maps of every stage of RUN for one image.

        Args:
            image: Any image that the pipeline accepts.
            size: (width, height) of the maps, by default the size of the image.

        Raises:
            ValueError: If the network has no stages, or the input is not an image.
        """
        return unfold(self.network, self.image_processor, self._read(image), size)

    def _sanitize_parameters(
        self, timeout=None, refine=None, cutout=None, tile_batch_size=None
    ) -> tuple[dict, dict, dict]:
        if refine is not None:
            check_refine(refine)
        if cutout not in (None, False, True):
            raise ValueError(f"got cutout={cutout!r}, expected True or False")
        options = ({"timeout": timeout}, {"refine": refine, "batch_size": tile_batch_size}, {"cutout": cutout})
        # Options that are left out keep the values that the pipeline was made with.
        return tuple({name: value for name, value in part.items() if value is not None} for part in options)

    def _read(self, inputs: Any, timeout: float | None = None) -> Image.Image:
        if isinstance(inputs, str) and inputs.startswith(("http://", "https://")):
            inputs = fetch(inputs, timeout)
        images = [to_rgb(image) for image in self.image_processor.to_pil(inputs)]
        if len(images) != 1:
            raise ValueError(f"got {len(images)} images as one input; give them as a list of images")
        return images[0]

    def preprocess(self, inputs: Any, timeout: float | None = None) -> dict[str, Any]:
        """Return one image and its `pixel_values` (1, C, H, W)."""
        image = self._read(inputs, timeout)
        pixel_values = self.image_processor(image, return_tensors="pt").pixel_values.to(self.dtype)
        return {"pixel_values": pixel_values, "image": image}

    def _forward(self, model_inputs: dict[str, Any], refine: str = "auto", batch_size: int = 1) -> ModelOutput:
        given = model_inputs["image"]  # one image, or the list of a batch
        images = given if isinstance(given, list) else [given]
        pixel_values = model_inputs["pixel_values"]
        masks = predict_masks(self.network, self.image_processor, images, pixel_values, refine, batch_size)
        # To the CPU one by one, so that an accelerator holds one large mask at a time.
        return ModelOutput(probs=[mask.cpu() for mask in masks], image=given)

    def postprocess(self, model_outputs: ModelOutput, cutout: bool = False) -> dict[str, Any]:
        """Return the mask of an image, as `__call__` describes."""
        probs = model_outputs["probs"][0]
        found = {"mask": mask_to_image(probs.numpy()), "probs": probs}
        if cutout:
            found["cutout"] = self.cut_out(model_outputs["image"], found["mask"])
        return found
