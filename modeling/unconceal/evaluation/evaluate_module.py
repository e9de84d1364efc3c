"""Offer the protocols to the library `evaluate`.

Example: `evaluate.load("modeling/unconceal/evaluation/unconceal_dis.py")`.
"""

import sys
from abc import ABC, abstractmethod

import datasets
import evaluate
import numpy as np
from PIL import Image

from .base import Protocol


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
        for object. Or 8-bit gray images, or paths of these.
    references: Ground truth masks of the same sizes, also arrays, tensors, images or paths: bool, 0 and 1, or 8-bit
        gray with object above 127.
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
        rows = (
            self.protocol.score_image(read_prediction(probs), read_reference(target), **options)
            for probs, target in zip(predictions, references, strict=True)
        )
        return self.protocol.summarize(rows)


def read_prediction(image: Image.Image) -> np.ndarray:
    """Return a prediction as floating or uint8.

    Raises:
        ValueError: If the image is not 8-bit gray, bool or float.
    """
    if image.mode not in ("1", "L", "F"):
        expected = "an array of float in [0, 1], bool or uint8, or an image in 8-bit gray (L)"
        raise ValueError(f"got a prediction of mode {image.mode}, expected {expected}")
    return np.asarray(image.convert("L") if image.mode == "1" else image)


def read_reference(image: Image.Image) -> np.ndarray:
    """Return a ground truth mask as booleans.

    Object is above 127, or above 0 if no value exceeds 1.

    Raises:
        ValueError: If the image is not gray, or holds other values than a mask.
    """
    values = np.asarray(image)
    soft = image.mode == "F" and not np.isin(values, (0, 1)).all()
    if values.ndim != 2 or image.mode == "P" or soft or values.min() < 0 or values.max() > 255:
        got = f"mode {image.mode} with values from {values.min()} to {values.max()}"
        expected = "an array of bool, of 0 and 1 or of uint8, or an image in 8-bit gray (L)"
        raise ValueError(f"got a reference of {got}, expected {expected}")
    return values > (127 if values.max() > 1 else 0)
