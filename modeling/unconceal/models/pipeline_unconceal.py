"""A pipeline that returns soft masks; `pipeline("image-segmentation")` returns hard ones, with labels."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import load_image
from transformers.pipelines.base import Pipeline
from transformers.utils import ModelOutput

from .image_processing_unconceal import to_rgb


class SoftMaskPipeline(Pipeline):
    """Pictures in, soft masks of their own size out, for every network of the project.

    Its task is "soft-image-segmentation":

        find = pipeline("soft-image-segmentation", model="owner/name", trust_remote_code=True)
        find("photo.jpg")["mask"].save("mask.png")

    Where the package is installed, `pipeline("image-segmentation", model=..., pipeline_class=SoftMaskPipeline)` runs none
    of the repository's code.
    """

    task_name = "soft-image-segmentation"
    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, inputs: Any, **kwargs) -> dict[str, Any] | list[dict[str, Any]] | Iterable[dict[str, Any]]:
        """Find the object in one picture or in many.

        Args:
            inputs: A Pillow image, a path, a URL, an array or a tensor (H, W), (H, W, C) or (C, H, W); a list, tuple or
                batch (B, ...) of them; or a generator or data set, which is read while its masks are taken.
            **kwargs: `batch_size`, the pictures that the network sees at a time, 1 by default; `num_workers`, processes
                that read ahead, none by default; `timeout`, seconds to wait for a URL, for ever by default.

        Returns:
            For a picture a dictionary: `mask`, an 8-bit grey Pillow image, and `probs`, the same as a float32 tensor
            (H, W) in [0, 1], both of the picture's upright size. For a list or batch a list of them, else an iterator.

        Raises:
            ValueError: If an input is no picture.
        """
        if isinstance(inputs, tuple) or (isinstance(inputs, (np.ndarray, torch.Tensor)) and inputs.ndim == 4):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []  # transformers looks at the first of them
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, timeout: float | None = None) -> tuple[dict, dict, dict]:
        return ({} if timeout is None else {"timeout": timeout}), {}, {}

    def preprocess(self, inputs: Any, timeout: float | None = None) -> dict[str, Any]:
        """Return `pixel_values` (1, C, H, W) of one picture and, as `target_size`, its own (height, width)."""
        if isinstance(inputs, str) and inputs.startswith(("http://", "https://")):
            inputs = load_image(inputs, timeout=timeout)
        pictures = [to_rgb(picture) for picture in self.image_processor.to_pil(inputs)]
        if len(pictures) != 1:
            raise ValueError(f"got {len(pictures)} pictures as one input; give them as a list of pictures")
        (picture,) = pictures
        model_inputs = self.image_processor(picture, return_tensors="pt").to(self.dtype)
        return {**model_inputs, "target_size": [(picture.height, picture.width)]}

    def _forward(self, model_inputs: dict[str, Any]) -> ModelOutput:
        # The logits alone: what else a network returns cannot be taken apart into pictures again.
        logits = self.model(pixel_values=model_inputs["pixel_values"]).logits
        return ModelOutput(logits=logits, target_size=model_inputs["target_size"])

    def postprocess(self, model_outputs: ModelOutput) -> dict[str, Any]:
        """Return the picture's mask, as `__call__` describes."""
        (probs,) = self.image_processor.post_process_masks(model_outputs, model_outputs["target_size"])
        mask = Image.fromarray((probs * 255).round().to(torch.uint8).numpy())
        return {"mask": mask, "probs": probs}


__all__ = ["SoftMaskPipeline"]
