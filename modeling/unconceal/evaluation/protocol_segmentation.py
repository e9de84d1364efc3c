"""The protocol `segmentation` for binary masks of any kind.

**Input.** The prediction is a soft mask in [0, 1] at the original size of the image. Its values are not rescaled (no
min-max step). The ground truth has the same size. A pixel is predicted if the prediction is *above* the threshold
(0.5, that is logit > 0). It is object if the 8-bit mask is above 127.

**One image.** From the pixel counts tp, fp, fn, tn:

- `iou` = tp / (tp + fp + fn)
- `f1`, the Dice coefficient, = 2 tp / (2 tp + fp + fn)
- `precision` = tp / (tp + fp)
- `recall` = tp / (tp + fn)

No smoothing terms are added.

**Empty masks.** If ground truth and prediction are both empty, all four scores are 1: the prediction is right. Any
other 0 / 0 is 0: precision if nothing was predicted but there is an object, recall if something was predicted but
there is no object. So an image without object scores 1 or 0, never between.

Each image also has curves of precision, recall and F1 over 256 thresholds. Here a pixel counts as predicted if the
prediction is at or above the threshold, and 0 / 0 is 0.

**The data set.** `iou`, `f1`, `precision` and `recall` come from the counts summed over all images, so large objects
weigh more. `niou`, `mean_f1`, `mean_precision` and `mean_recall` are means over images with equal weight. `iou` and
`niou` are the IoU and nIoU of papers on infrared targets. SRS's tables report `niou` and, apart from its smoothing
terms, `mean_f1`.

The definitions are those of pysodmetrics (`FmeasureV2` with `with_binary=True`). The rule for empty masks is ours:
pysodmetrics gives 0 throughout.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from py_sod_metrics import DICEHandler, FmeasureV2, IOUHandler, PrecisionHandler, RecallHandler

from .base import MetricColumn, Protocol, check_image, mean_scores, threshold_curves, to_unit


COUNTS = ("tp", "fp", "fn", "tn")
CURVES = {"precision_curve": "precision", "recall_curve": "recall", "f1_curve": "F1"}
COLUMNS = {
    "iou": MetricColumn("IoU"),
    "niou": MetricColumn("nIoU"),
    "f1": MetricColumn("F1"),
    "mean_f1": MetricColumn("mean F1"),
    "precision": MetricColumn("precision", selects=False),
    "mean_precision": MetricColumn("mean precision", selects=False),
    "recall": MetricColumn("recall", selects=False),
    "mean_recall": MetricColumn("mean recall", selects=False),
}
_HANDLERS = {"iou": IOUHandler, "f1": DICEHandler, "precision": PrecisionHandler, "recall": RecallHandler}
_SCORES = {name: handler(with_dynamic=False, with_adaptive=False) for name, handler in _HANDLERS.items()}


def score_image(probs: np.ndarray, target: np.ndarray, threshold: float = 0.5) -> dict[str, Any]:
    """Score one image by the protocol above; arrays as for `check_image`.

    Options:
        threshold: A pixel counts as predicted if `probs` is above it.

    Returns:
        `tp`, `fp`, `fn`, `tn` (pixels), `iou`, `f1`, `precision`, `recall` (in [0, 1]), and arrays over the thresholds
        255 to 0: `precision_curve`, `recall_curve`, `f1_curve`.
    """
    check_image(probs, target)
    probs = to_unit(probs)
    num_true = int(np.count_nonzero(target))
    counts = FmeasureV2.get_statistics(probs > threshold, target, FG=num_true, BG=target.size - num_true)
    counts = {name: int(counts[name]) for name in COUNTS}
    measure = threshold_curves()
    measure.step(probs, target, normalize=False)
    curves = measure.get_results()
    return {
        **counts,
        **_scores(counts),
        "precision_curve": curves["precision"]["dynamic"],
        "recall_curve": curves["recall"]["dynamic"],
        "f1_curve": curves["f"]["dynamic"],
    }


def combine(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers of a data set."""
    means = mean_scores(rows, ("iou",), "n") | mean_scores(rows, ("f1", "precision", "recall"), "mean_")
    return total_scores(rows) | means


def total_scores(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Return the four scores of the counts summed over all images."""
    return _scores({name: sum(row[name] for row in rows) for name in COUNTS})


def _scores(counts: Mapping[str, int]) -> dict[str, float]:
    """Return the four scores of pixel counts, each in [0, 1]."""
    if counts["tp"] + counts["fp"] + counts["fn"] == 0:
        return dict.fromkeys(_SCORES, 1.0)
    return {name: float(score(**counts)) for name, score in _SCORES.items()}


PROTOCOL = Protocol("segmentation", score_image, combine, COLUMNS, ranked_by=("iou", "IoU"), curves=CURVES)
