"""Define the interface of protocols, and scores that they share.

`evaluate.load` copies this file and those of the protocols flat into one folder. So they import each other only as
`from .sibling import name`, and nothing else of this package.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import fsum
from statistics import fmean
from typing import Any

import numpy as np
from py_sod_metrics import DICEHandler, FmeasureHandler, FmeasureV2, PrecisionHandler, RecallHandler


THRESHOLDS = range(255, -1, -1)  # of the curves, in their order


@dataclass(frozen=True)
class MetricColumn:
    """Column of a results table, for one number of `Protocol.summarize`."""

    title: str  # name in the field's tables
    higher_is_better: bool = True
    scale: float = 1  # factor for display
    digits: int = 3  # after the point
    selects: bool = True  # whether it may select the best checkpoint of a training

    def format(self, value: float) -> str:
        """Format a value for a table."""
        return f"{value * self.scale:.{self.digits}f}"


@dataclass(frozen=True)
class Protocol:
    """One way to score; its module's docstring is the written protocol.

    Args:
        name: Key of `PROTOCOLS`, also used on the command line and in reports.
        score_image: Takes a prediction, its ground truth and the protocol's options (keywords with defaults). Returns
            the numbers of one image. Shapes, types and errors of the arrays are those of `check_image`.
        combine: Turns a list of such rows, in any order, into the numbers of a data set.
        columns: The numbers of a data set, in the order of tables. Some are present only with an option.
        ranked_by: Key of `score_image` that ranks images from worst to best, and its title.
        curves: Keys of a row that hold arrays over the thresholds 255 to 0, and their titles. `combine` may need
            these arrays. Tables of images omit them.
        report_options: Default options of a report, where they differ from those of the evaluations during training.
    """

    name: str
    score_image: Callable[..., dict[str, Any]]
    combine: Callable[[list[Mapping[str, Any]]], dict[str, float]]
    columns: Mapping[str, MetricColumn]
    ranked_by: tuple[str, str]
    curves: Mapping[str, str] = field(default_factory=dict)
    report_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best_metrics(self) -> dict[str, bool]:
        """Metrics for checkpoint selection -> whether higher is better."""
        return {name: column.higher_is_better for name, column in self.columns.items() if column.selects}

    def summarize(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Return the numbers of a data set, from rows in any order.

        Raises:
            ValueError: If there are no rows.
        """
        rows = list(rows)
        if not rows:
            raise ValueError("no image was scored")
        numbers = self.combine(rows)
        return {**{name: numbers[name] for name in self.columns if name in numbers}, "num_images": len(rows)}

    def options(self, **changed: Any) -> dict[str, Any]:
        """Return the options of `score_image`: its defaults, then those `changed`.

        Raises:
            ValueError: If the protocol has no such option.
        """
        parameters = inspect.signature(self.score_image).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        for name in changed.keys() - defaults.keys():
            known = ", ".join(defaults)
            raise ValueError(f"got option {name}, but the protocol {self.name} has only {known}; leave it out")
        return {**defaults, **changed}


def check_image(probs: np.ndarray, target: np.ndarray):
    """Check sizes, types and range of a prediction and its ground truth.

    Args:
        probs: Prediction, (height, width), floating in [0, 1] or uint8 with 255 for 1.
        target: Ground truth, (height, width), boolean.

    Raises:
        ValueError: If the sizes differ, or if floating `probs` are outside [0, 1] or NaN.
        TypeError: If `target` is not boolean, or `probs` are not floating or uint8.
    """
    if probs.shape != target.shape:
        got, expected = ("x".join(map(str, array.shape[::-1])) for array in (probs, target))
        raise ValueError(f"got a prediction of size {got}, but a ground truth of {expected}; resize the prediction")
    if target.dtype != bool:
        raise TypeError(f"got a ground truth of type {target.dtype}, expected bool; apply its threshold first")
    if probs.dtype.kind != "f" and probs.dtype != np.uint8:
        raise TypeError(f"got a prediction of type {probs.dtype}, expected floating in [0, 1] or uint8; convert it")
    if probs.dtype != np.uint8 and not (probs.min() >= 0 and probs.max() <= 1):  # NaN fails both comparisons
        got = f"a prediction with values from {probs.min()} to {probs.max()}"
        raise ValueError(f"got {got}, expected [0, 1]; apply sigmoid, or scale it")


def to_unit(probs: np.ndarray) -> np.ndarray:
    """Return a prediction as float64 in [0, 1]; uint8 255 becomes 1."""
    return probs / 255 if probs.dtype == np.uint8 else probs.astype(np.float64)


def threshold_curves(beta_squared: float = 1) -> FmeasureV2:
    """Return a measure of precision, recall and F over 256 thresholds.

    Its results `precision`, `recall` and `f` each hold an array `dynamic` over the thresholds 255 to 0. A pixel counts
    as predicted if the prediction is at or above the threshold.
    """
    f = DICEHandler(True, False) if beta_squared == 1 else FmeasureHandler(True, True, beta=beta_squared)
    return FmeasureV2({"f": f, "precision": PrecisionHandler(True, False), "recall": RecallHandler(True, False)})


def mean_scores(rows: list[Mapping[str, Any]], names: Iterable[str], prefix: str = "") -> dict[str, float]:
    """Return the mean of each score over images, as `prefix` + name."""
    return {f"{prefix}{name}": fmean(row[name] for row in rows) for name in names}


def mean_curve(rows: list[Mapping[str, Any]], curve: str) -> list[float]:
    """Return the mean over images of a curve, point by point."""
    return [fsum(values) / len(rows) for values in zip(*(row[curve] for row in rows), strict=True)]


def highest_points(rows: list[Mapping[str, Any]], names: Iterable[str]) -> dict[str, float]:
    """Return `NAME_max`, the highest point of each mean curve `NAME_curve`."""
    return {f"{name}_max": max(mean_curve(rows, f"{name}_curve")) for name in names}
