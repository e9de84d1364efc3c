"""Offer the protocols to the library `evaluate`.

Example: `evaluate.load("modeling/unconceal/evaluation/unconceal_dis.py")`.
"""

import logging
import sys
from abc import ABC, abstractmethod

import datasets
import evaluate
import numpy as np
from PIL import Image

from .base import Protocol
from .reading import (
    ONE_DARK_VALUE,
    gray_mask,
    has_one_dark_value,
    mask_levels,
    prediction_levels,
    scaled,
    white_of_predictions,
)


logger = logging.getLogger(__name__)
CITATION = """\
@misc{pysodmetrics,
  title = {PySODMetrics: a simple and efficient implementation of SOD metrics},
  author = {Pang, Youwei},
  url = {https://github.com/lartpang/PySODMetrics},
  year = {2020}
}"""
INPUTS = """
Args:
    predictions: Soft masks (height, width): arrays or tensors of float32 or float64 in [0, 1], bool, or uint8 with 255
        for object. Or images, or paths of these. If all of them hold one value beside 0, that value is object.
    references: Ground truth masks of the same sizes, also arrays, tensors, images or paths: bool, 0 and 1, or 8-bit
        gray with object above 127. If one holds one value beside 0, that value is object.
{options}

Returns:
    A dictionary: {results}, and num_images.
"""


class ProtocolMetric(evaluate.Metric, ABC):
    """A protocol as a metric of `evaluate`.

    `compute` holds all images in memory at once, as in every metric of that library. For large sets use
    `unconceal evaluate`, which holds one at a time.
    """

    # Abstract, so that `evaluate.load` finds the subclass of a protocol, not this class.
    @property
    @abstractmethod
    def protocol(self) -> Protocol:
        """The protocol to score with."""

    def _info(self) -> evaluate.MetricInfo:
        options = self.protocol.options(**self.protocol.report_options)
        lines = (f"    {name}: Option of the protocol ({value})." for name, value in options.items())
        return evaluate.MetricInfo(
            description=sys.modules[self.protocol.score_image.__module__].__doc__,
            citation=CITATION,
            inputs_description=INPUTS.format(options="\n".join(lines), results=", ".join(self.protocol.columns)),
            # Arrays become images without loss, except float64, which becomes float32.
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(self, predictions: list[Image.Image], references: list[Image.Image], **options) -> dict[str, float]:
        options = self.protocol.options(**{**self.protocol.report_options, **options})
        levels = [prediction_levels(image) for image in predictions]
        whites = {
            kind: white_of_predictions(one for one in levels if one.dtype == kind) for kind in (np.uint8, np.int32)
        }
        if num_dark := sum(has_one_dark_value(one, whites.get(one.dtype.type, 1)) for one in levels):
            logger.warning(ONE_DARK_VALUE, num_dark)
        rows = (
            self.protocol.score_image(
                scaled(probs, whites.get(probs.dtype.type, 1)), read_reference(target), **options
            )
            for probs, target in zip(levels, references, strict=True)
        )
        return self.protocol.summarize(rows)


def read_reference(image: Image.Image) -> np.ndarray:
    """Return a ground truth mask as booleans.

    Raises:
        ValueError: If its values do not tell what is object, or if none is above half.
    """
    values, has_ids = mask_levels(image)
    mask = np.asarray(gray_mask(values, has_ids))
    if values.any() and not (mask > 127).any():
        got = f"values from {values.min():g} to {values.max():g}, none above half of white"
        raise ValueError(f"got a reference with {got}, expected object and background; stretch it")
    return mask > 127
