"""What a protocol offers to evaluation, reports, tables and training.

This file and those of the protocols travel to the Hub as they are, beside `unconceal_NAME.py`, by which `evaluate.load`
finds a protocol: they import each other by `from .sibling import name` alone, and nothing else of this package.
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
class Column:
    """How tables show a number of `Protocol.summarize`.

    Attributes:
        title: Its name in the field's tables.
        higher_is_better: Whether more of it is better.
        scale: What it is multiplied by when it is shown.
        digits: Digits after the point when it is shown.
        selects: Whether it may choose the best checkpoint of a training.
    """

    title: str
    higher_is_better: bool = True
    scale: float = 1
    digits: int = 3
    selects: bool = True

    def format(self, value: float) -> str:
        """Return a value as tables show it."""
        return f"{value * self.scale:.{self.digits}f}"


@dataclass(frozen=True)
class Protocol:
    """One way to score, by the functions of the module whose docstring states it.

    Args:
        name: As in `PROTOCOLS`, on the command line and in reports.
        score_image: Takes the prediction, the truth and, as keywords with defaults, the protocol's options; returns the
            numbers of one picture.
        summarize: Turns such rows, in any order, into the numbers of a data set.
        columns: The numbers of a data set that tables show, in their order; those that depend on an option may be absent.
        ranked_by: Key of `score_image` by which a picture is called one of the best or worst, and its title.
        curves: Keys of a row that hold arrays over the thresholds 255 to 0, and what they are: `summarize` may need them,
            a table of pictures leaves them out.
        report_options: Options that a report sets, unless told otherwise, to other values than their defaults, which are
            those of the frequent evaluations during training.
    """

    name: str
    score_image: Callable[..., dict[str, Any]]
    summarize: Callable[[Iterable[Mapping[str, Any]]], dict[str, float]]
    columns: Mapping[str, Column]
    ranked_by: tuple[str, str]
    curves: Mapping[str, str] = field(default_factory=dict)
    report_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best_metrics(self) -> dict[str, bool]:
        """The numbers that may choose the best checkpoint, and whether higher is better."""
        return {name: column.higher_is_better for name, column in self.columns.items() if column.selects}

    def options(self, **changed: Any) -> dict[str, Any]:
        """Return the options of `score_image`: its defaults, but for those `changed`.

        Raises:
            ValueError: If the protocol has no such option.
        """
        parameters = inspect.signature(self.score_image).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        for name in changed:
            if name not in defaults:
                raise ValueError(f"got option {name}, but the protocol {self.name} has only {', '.join(defaults)}")
        return {**defaults, **changed}


def check_image(probs: np.ndarray, target: np.ndarray):
    """Refuse what is not a prediction and its truth.

    Raises:
        ValueError: If the sizes differ, or if a floating `probs` leaves [0, 1] or is not a number somewhere.
        TypeError: If `target` is not boolean, or `probs` neither floating nor uint8.
    """
    if probs.shape != target.shape:
        raise ValueError(f"the prediction has size {probs.shape}, the truth {target.shape}; resize the prediction")
    if target.dtype != bool:
        raise TypeError(f"the truth has type {target.dtype}, expected bool; compare the mask with its threshold first")
    if probs.dtype == np.uint8:
        return
    if probs.dtype.kind != "f":
        raise TypeError(f"the prediction has type {probs.dtype}, expected floating in [0, 1] or uint8")
    if not (probs.min() >= 0 and probs.max() <= 1):  # NaN fails both comparisons
        raise ValueError(f"the prediction spans [{probs.min()}, {probs.max()}], expected [0, 1]")


def to_unit(probs: np.ndarray) -> np.ndarray:
    """Return a prediction as float64 in [0, 1]; 255 of uint8 is 1."""
    return probs / 255 if probs.dtype == np.uint8 else probs.astype(np.float64)


def threshold_curves(beta_squared: float = 1) -> FmeasureV2:
    """Return pysodmetrics' counter of precision, recall and F over the 256 thresholds of 8 bits.

    Its results are `precision`, `recall` and `f`, each with an array `dynamic` over the thresholds 255 to 0. A pixel
    counts as predicted where the prediction is at or above the threshold.
    """
    f = DICEHandler(True, False) if beta_squared == 1 else FmeasureHandler(True, True, beta=beta_squared)
    return FmeasureV2({"f": f, "precision": PrecisionHandler(True, False), "recall": RecallHandler(True, False)})


def check_rows(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows as a list.

    Raises:
        ValueError: If there is none.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("no picture was scored")
    return rows


def mean_scores(rows: list[Mapping[str, Any]], means: Mapping[str, str]) -> dict[str, float]:
    """Return the mean over pictures of each key of `means`, under the name that it has there."""
    return {mean: fmean(row[name] for row in rows) for name, mean in means.items()}


def mean_curve(rows: list[Mapping[str, Any]], curve: str) -> list[float]:
    """Return the mean over pictures of an array of the rows, point by point."""
    return [fsum(values) / len(rows) for values in zip(*(row[curve] for row in rows), strict=True)]


def highest_points(rows: list[Mapping[str, Any]], curves: Mapping[str, str]) -> dict[str, float]:
    """Return the highest point of the mean over pictures of each key of `curves`, under the name that it has there."""
    return {highest: max(mean_curve(rows, curve)) for curve, highest in curves.items()}
