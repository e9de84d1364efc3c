"""The protocol `segmentation`: how well a binary map covers the hidden objects, in one picture and over a data set.

**Input.** The soft prediction in [0, 1] at the original size of the picture, nothing rescaled (no min-max step), and the
truth at that size. A pixel is predicted foreground where the prediction is *above* the threshold (0.5, that is logit > 0),
and true foreground where the 8-bit mask is above 127.

**One picture.** Counts tp, fp, fn, tn of pixels, and from them iou = tp / (tp + fp + fn), f1 (the Dice coefficient)
= 2 tp / (2 tp + fp + fn), precision = tp / (tp + fp), recall = tp / (tp + fn). No smoothing terms are added.

**Nothing to find.** Where truth and prediction are both empty, all four scores are 1: the answer is right. Any other
0 / 0 is 0: precision where nothing was predicted though something is there, recall where something was predicted though
nothing is there. So a picture without object scores 1 or 0, never between.

Beside them each picture has curves of precision, recall and F1 over the 256 thresholds of 8 bits, where a pixel counts as
predicted at or above the threshold, and where 0 / 0 is 0.

**The data set.** `iou`, `f1`, `precision` and `recall` come from the counts summed over all pictures, so large objects
weigh more; `niou`, `mean_f1`, `mean_precision` and `mean_recall` are means over pictures, each weighing the same. `iou` and
`niou` are the IoU and nIoU of the infrared papers; SRS's tables show `niou` and, but for its smoothing terms, `mean_f1`.

The definitions are pysodmetrics' (`FmeasureV2` with `with_binary=True`), the rule for empty pictures is ours: there
pysodmetrics gives 0 throughout.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from py_sod_metrics import DICEHandler, FmeasureV2, IOUHandler, PrecisionHandler, RecallHandler

from .base import Column, Protocol, check_image, check_rows, mean_scores, threshold_curves, to_unit


COUNTS = ("tp", "fp", "fn", "tn")
MEANS = {"iou": "niou", "f1": "mean_f1", "precision": "mean_precision", "recall": "mean_recall"}
"""The name that each score's mean over pictures goes by."""
CURVES = {"precision_curve": "precision", "recall_curve": "recall", "f1_curve": "F1"}
COLUMNS = {
    "iou": Column("IoU"),
    "niou": Column("nIoU"),
    "f1": Column("F1"),
    "mean_f1": Column("mean F1"),
    "precision": Column("precision", selects=False),
    "mean_precision": Column("mean precision", selects=False),
    "recall": Column("recall", selects=False),
    "mean_recall": Column("mean recall", selects=False),
}
_SCORES = {
    "iou": IOUHandler(with_dynamic=False, with_adaptive=False),
    "f1": DICEHandler(with_dynamic=False, with_adaptive=False),
    "precision": PrecisionHandler(with_dynamic=False, with_adaptive=False),
    "recall": RecallHandler(with_dynamic=False, with_adaptive=False),
}


def score_image(probs: np.ndarray, target: np.ndarray, threshold: float = 0.5) -> dict[str, Any]:
    """Count and score one picture by the protocol above.

    Args:
        probs: Prediction, (height, width), floating in [0, 1] or uint8.
        target: Truth, (height, width), boolean.
        threshold: A pixel counts as predicted where `probs` is above it.

    Returns:
        `tp`, `fp`, `fn`, `tn` (pixels), `iou`, `f1`, `precision`, `recall` (in [0, 1]), and arrays over the thresholds
        255 to 0: `precision_curve`, `recall_curve`, `f1_curve`.

    Raises:
        ValueError: If the sizes differ, or if a floating `probs` leaves [0, 1] or is not a number somewhere.
        TypeError: If `target` is not boolean, or `probs` neither floating nor uint8.
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


def summarize(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Put the rows of `score_image` together to the numbers of a data set, by the protocol above.

    The result does not depend on the order of the rows, to the last digit.

    Raises:
        ValueError: If there is no row.
    """
    rows = check_rows(rows)
    summary = {**total_scores(rows), **mean_scores(rows, MEANS)}
    return {**{name: summary[name] for name in COLUMNS}, "num_images": len(rows)}


def total_scores(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Return the four scores of the counts summed over all pictures."""
    return _scores({name: sum(row[name] for row in rows) for name in COUNTS})


def _scores(counts: Mapping[str, int]) -> dict[str, float]:
    """The four scores of one set of counts (pixels), each in [0, 1]."""
    if counts["tp"] + counts["fp"] + counts["fn"] == 0:
        return dict.fromkeys(_SCORES, 1.0)
    return {name: float(score(**counts)) for name, score in _SCORES.items()}


PROTOCOL = Protocol(
    name="segmentation",
    score_image=score_image,
    summarize=summarize,
    columns=COLUMNS,
    ranked_by=("iou", "IoU"),
    curves=CURVES,
)
