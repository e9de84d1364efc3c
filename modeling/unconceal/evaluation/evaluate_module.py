"""The protocols as modules of the `evaluate` library: `evaluate.load("modeling/unconceal/metrics/unconceal_dis.py")`.

Nothing of this package imports this file, for where scripts/ is on Python's path, as in each script there, the name
`evaluate` is scripts/evaluate.py.
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
    predictions: Soft masks, each (height, width): arrays or tensors, float32 or float64 in [0, 1], bool, or uint8 with 255
        for object; 8-bit grey pictures; or paths of such.
    references: True masks of the same sizes, likewise: bool, 0 and 1, or 8-bit grey with object above 127.
{options}

Returns:
    A dictionary: {results}, and num_images.
"""


class ProtocolMetric(evaluate.Metric, ABC):
    """A protocol for `evaluate.load`: predictions and references in, the numbers of the data set out.

    All pictures of a `compute` are in memory at once, as in every module of that library. For large sets there is
    scripts/evaluate.py, which takes one at a time.
    """

    # Abstract, so that `evaluate.load` takes a protocol's own class for the module and not this one.
    @property
    @abstractmethod
    def protocol(self) -> Protocol:
        """The protocol to score by."""

    def _info(self) -> evaluate.MetricInfo:
        options = self.protocol.options(**self.protocol.report_options)
        lines = (f"    {name}: As the protocol states it ({value})." for name, value in options.items())
        return evaluate.MetricInfo(
            description=sys.modules[self.protocol.score_image.__module__].__doc__,
            citation=CITATION,
            inputs_description=INPUTS.format(options="\n".join(lines), results=", ".join(self.protocol.columns)),
            # An array becomes a picture without loss: float64 as float32, all others as they are.
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(self, predictions: list[Image.Image], references: list[Image.Image], **options) -> dict[str, float]:
        """Score the pictures.

        Raises:
            ValueError: If there is no picture, the sizes of a pair differ, a prediction leaves [0, 1], a picture is of
                another kind than named above, or the protocol has no such option.
        """
        options = self.protocol.options(**{**self.protocol.report_options, **options})
        rows = (
            self.protocol.score_image(read_prediction(probs), read_reference(target), **options)
            for probs, target in zip(predictions, references, strict=True)
        )
        return self.protocol.summarize(rows)


def read_prediction(picture: Image.Image) -> np.ndarray:
    """Return a prediction as floating or uint8.

    Raises:
        ValueError: If the picture is neither grey of 8 bits, nor of bool, nor of floats.
    """
    if picture.mode not in ("1", "L", "F"):
        raise ValueError(
            f"got a prediction of mode {picture.mode}, expected an array of float in [0, 1], bool or uint8, or a picture "
            "in 8-bit grey (L)"
        )
    return np.asarray(picture.convert("L") if picture.mode == "1" else picture)


def read_reference(picture: Image.Image) -> np.ndarray:
    """Return a true mask as booleans: above 127, or above 0 where no value exceeds 1.

    Raises:
        ValueError: If the picture is not grey, or its values are not those of a mask.
    """
    values = np.asarray(picture)
    soft = picture.mode == "F" and not np.isin(values, (0, 1)).all()
    if values.ndim != 2 or picture.mode == "P" or soft or values.min() < 0 or values.max() > 255:
        raise ValueError(
            f"got a reference of mode {picture.mode} with values from {values.min()} to {values.max()}, expected an array "
            "of bool, of 0 and 1 or of uint8, or a picture in 8-bit grey (L)"
        )
    return values > (127 if values.max() > 1 else 0)
