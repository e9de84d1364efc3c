"""What a protocol offers to evaluation, reports and training."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import fsum
from statistics import fmean
from typing import Any

import numpy as np

from ..errors import UserError


@dataclass(frozen=True)
class Protocol:
    """One way to score, by the functions of the module whose docstring states it.

    Args:
        name: As in `PROTOCOLS`, on the command line and in reports.
        score_image: Takes the soft prediction, the truth and, as keywords with defaults, the protocol's options;
            returns the numbers of one picture.
        summarize: Turns such rows, in any order, into the numbers of a data set.
        format_table: Turns those into a Markdown table.
        best_metrics: The numbers that may choose the best checkpoint, and whether higher is better.
        curves: Keys of a row that hold arrays: `summarize` needs them, a table of pictures leaves them out.
        report_options: Options that a report sets, unless told otherwise, to other values than their defaults, which are
            those of the frequent evaluations during training.
    """

    name: str
    score_image: Callable[..., dict[str, Any]]
    summarize: Callable[[Iterable[Mapping[str, Any]]], dict[str, float]]
    format_table: Callable[[Mapping[str, float]], str]
    best_metrics: Mapping[str, bool]
    curves: tuple[str, ...] = ()
    report_options: Mapping[str, Any] = field(default_factory=dict)

    def options(self, **changed: Any) -> dict[str, Any]:
        """Return the options of `score_image`: its defaults, but for those `changed`.

        Raises:
            UserError: If the protocol has no such option.
        """
        parameters = inspect.signature(self.score_image).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        for name in changed:
            if name not in defaults:
                raise UserError(f"got option {name}, but the protocol {self.name} has only {', '.join(defaults)}")
        return {**defaults, **changed}


def check_image(probs: np.ndarray, target: np.ndarray):
    """Refuse what is not a soft prediction and its truth.

    Raises:
        ValueError: If the sizes differ, or if `probs` leaves [0, 1] or is not a number somewhere.
        TypeError: If `target` is not boolean.
    """
    if probs.shape != target.shape:
        raise ValueError(f"the prediction has size {probs.shape}, the truth {target.shape}; resize the prediction")
    if target.dtype != bool:
        raise TypeError(f"the truth has type {target.dtype}, expected bool; compare the mask with its threshold first")
    if not (probs.min() >= 0 and probs.max() <= 1):  # NaN fails both comparisons
        raise ValueError(f"the prediction spans [{probs.min()}, {probs.max()}], expected [0, 1]")


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


def highest_points(rows: list[Mapping[str, Any]], curves: Mapping[str, str]) -> dict[str, float]:
    """Return the highest point of the mean over pictures of each key of `curves`, under the name that it has there."""
    return {
        highest: max(fsum(values) for values in zip(*(row[curve] for row in rows), strict=True)) / len(rows)
        for curve, highest in curves.items()
    }
