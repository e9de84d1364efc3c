"""The protocol `cod`: how papers on camouflaged objects and polyps score a soft map, one picture at a time.

**Input.** The soft prediction at the original size of the picture, and the truth at that size: foreground where the
8-bit mask is above 127 (pysodmetrics asks for above 128; the masks of our data sets hold 0 and 255 only). With
`min_max`, the default, the prediction is treated as RUN's and its peers' test code treats it before it is scored:
stretched so that its smallest value is 0 and its largest 1, then rounded to the 256 levels of a picture file. A
constant prediction is rounded but not stretched. One that comes in 8 bits, as a file of any method does, was rounded
when it was written: it is stretched and not rounded again, as pysodmetrics does. Without `min_max` the values are scored
as they are. Every score below sees the same prediction.

**One picture.** N is the number of pixels.

| key | |
|---|---|
| `s_measure` | S-measure, alpha 0.5 |
| `weighted_f_measure` | weighted F-measure, beta^2 = 1 |
| `f_measure_*` | F-measure, beta^2 = 0.3 |
| `e_measure_*` | E-measure; its sum is divided by N - 1, so a perfect answer is a little above 1 |
| `mae` | mean absolute difference between prediction and truth; lower is better |
| `dice_at_0.5`, `iou_at_0.5` | Dice and IoU of the pixels where the prediction is *above* 0.5 |

Beside them each picture has curves over the 256 thresholds of 8 bits, of precision, recall, F and E.

F and E come in three variants: `*_adaptive` at the threshold min(2 * mean of the prediction, 1), `*_mean` and `*_max`
over the 256 thresholds; at these a pixel counts as predicted where the prediction is *at or above* the
threshold.

**The data set.** Means over pictures, each weighing the same. Two names need care. `f_measure_max` and `e_measure_max`
are the highest point of the *mean curve*: one threshold for the whole set, not the best one of each picture, so they
are at most the mean of the pictures' own. `mean_dice_at_0.5` and `mean_iou_at_0.5` are means over *pictures* at one
threshold; papers on polyps also call "mean Dice" a mean over thresholds, which is not computed here.

**Nothing to find.** pysodmetrics' values stand; test sets of this field have an object in every picture. Where the
truth is empty, S is 1 - mean of the prediction, E is (pixels not predicted) / (N - 1), and F, weighted F, Dice and IoU
are 0 for any prediction, the right one included. A prediction that is 0 everywhere has the adaptive threshold 0, at
which all of it counts as predicted: its adaptive E is 0.

All scores are pysodmetrics' own. One is completed: where the truth lies so close to the lower or right border that its
centroid leaves no pixel beyond, the S-measure's empty quarters give not-a-number there; here they count with their
weight, 0.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from py_sod_metrics import MAE, DICEHandler, Emeasure, IOUHandler, Smeasure, WeightedFmeasure

from .base import Column, Protocol, check_image, check_rows, highest_points, mean_scores, threshold_curves, to_unit


MEANS = {
    "s_measure": "s_measure",
    "weighted_f_measure": "weighted_f_measure",
    "f_measure_adaptive": "f_measure_adaptive",
    "f_measure_mean": "f_measure_mean",
    "e_measure_adaptive": "e_measure_adaptive",
    "e_measure_mean": "e_measure_mean",
    "mae": "mae",
    "dice_at_0.5": "mean_dice_at_0.5",
    "iou_at_0.5": "mean_iou_at_0.5",
}
"""The name that each score's mean over pictures goes by."""
HIGHEST = {"f_measure_curve": "f_measure_max", "e_measure_curve": "e_measure_max"}
"""The name that the highest point of each mean curve goes by."""
CURVES = {
    "precision_curve": "precision",
    "recall_curve": "recall",
    "f_measure_curve": "F (beta^2 = 0.3)",
    "e_measure_curve": "E",
}
COLUMNS = {
    "s_measure": Column("S"),
    "weighted_f_measure": Column("weighted F"),
    "f_measure_adaptive": Column("adaptive F"),
    "f_measure_mean": Column("mean F"),
    "f_measure_max": Column("max F"),
    "e_measure_adaptive": Column("adaptive E"),
    "e_measure_mean": Column("mean E"),
    "e_measure_max": Column("max E"),
    "mae": Column("MAE", higher_is_better=False),
    "mean_dice_at_0.5": Column("mean Dice at 0.5"),
    "mean_iou_at_0.5": Column("mean IoU at 0.5"),
}


def score_image(probs: np.ndarray, target: np.ndarray, min_max: bool = True) -> dict[str, Any]:
    """Score one picture by the protocol above.

    Args:
        probs: Prediction, (height, width), floating in [0, 1] or uint8.
        target: Truth, (height, width), boolean.
        min_max: Stretch the prediction to [0, 1] and, where it is floating, round it to 8 bits first.

    Returns:
        The keys of the table above, and arrays over the thresholds 255 to 0: `precision_curve`, `recall_curve`,
        `f_measure_curve` and `e_measure_curve`.

    Raises:
        ValueError: If the sizes differ, or if a floating `probs` leaves [0, 1] or is not a number somewhere.
        TypeError: If `target` is not boolean, or `probs` neither floating nor uint8.
    """
    check_image(probs, target)
    return score_prepared(prepare(probs, min_max), target)


def prepare(probs: np.ndarray, min_max: bool) -> np.ndarray:
    """Return the prediction as it is scored: float64, stretched and, where it was floating, rounded if `min_max`."""
    prepared = to_unit(probs)
    if min_max:
        low, high = prepared.min(), prepared.max()
        if high > low and (low, high) != (0, 1):
            prepared = (prepared - low) / (high - low)
        if probs.dtype != np.uint8:
            prepared = np.rint(255 * prepared) / 255
    return prepared


def score_prepared(probs: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    """Return what `score_image` does, for a prediction from `prepare`."""
    counted = threshold_curves(beta_squared=0.3)
    counted.add_handler("dice", DICEHandler(False, False, with_binary=True))
    counted.add_handler("iou", IOUHandler(False, False, with_binary=True))
    # Measures collect pictures, so each picture has its own.
    measures = (_Smeasure(alpha=0.5), WeightedFmeasure(beta=1), Emeasure(), MAE(), counted)
    for measure in measures:
        measure.step(probs, target, normalize=False)
    s, weighted_f, e, mae, counted = (measure.get_results() for measure in measures)
    f_curve, e_curve = counted["f"]["dynamic"], e["em"]["curve"]
    scores = {
        "s_measure": s["sm"],
        "weighted_f_measure": weighted_f["wfm"],
        "f_measure_adaptive": counted["f"]["adaptive"],
        "f_measure_mean": f_curve.mean(),
        "f_measure_max": f_curve.max(),
        "e_measure_adaptive": e["em"]["adp"],
        "e_measure_mean": e_curve.mean(),
        "e_measure_max": e_curve.max(),
        "mae": mae["mae"],
        "dice_at_0.5": counted["dice"]["binary"],
        "iou_at_0.5": counted["iou"]["binary"],
    }
    return {
        **{name: float(score) for name, score in scores.items()},
        "precision_curve": counted["precision"]["dynamic"],
        "recall_curve": counted["recall"]["dynamic"],
        "f_measure_curve": f_curve,
        "e_measure_curve": e_curve,
    }


def summarize(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Put the rows of `score_image` together to the numbers of a data set, by the protocol above.

    The result does not depend on the order of the rows, to the last digit.

    Raises:
        ValueError: If there is no row.
    """
    rows = check_rows(rows)
    summary = {**mean_scores(rows, MEANS), **highest_points(rows, HIGHEST)}
    return {**{name: summary[name] for name in COLUMNS}, "num_images": len(rows)}


class _Smeasure(Smeasure):
    """The S-measure, without not-a-number where a quarter of the picture is empty."""

    def ssim(self, pred: np.ndarray, gt: np.ndarray) -> float:
        # DEVIATION: pysodmetrics multiplies the mean of no pixel, not-a-number, by the weight 0.
        return super().ssim(pred, gt) if pred.size else 0.0


PROTOCOL = Protocol(
    name="cod",
    score_image=score_image,
    summarize=summarize,
    columns=COLUMNS,
    ranked_by=("s_measure", "S"),
    curves=CURVES,
)
