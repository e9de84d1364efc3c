"""The protocol `cod` for camouflaged objects and polyps.

Papers on camouflaged objects and polyps score soft masks this way, one image at a time.

**Input.** The prediction is a soft mask at the original size of the image. The ground truth has the same size: object
is where the 8-bit mask is above 127. pysodmetrics uses above 128, but the masks of our data sets hold 0 and 255 only.

With `min_max`, the default, the prediction is stretched first: its smallest value becomes 0 and its largest 1. Then it
is rounded to the 256 levels of an image file. The test code of RUN and its peers does the same. A constant prediction
is rounded but not stretched. An 8-bit prediction, such as a file of any method, was already rounded: it is stretched
and not rounded again, as in pysodmetrics. Without `min_max` the values are scored unchanged. All scores below use the
same prediction.

**One image.** N is the number of pixels.

| key | |
|---|---|
| `s_measure` | S-measure, alpha 0.5 |
| `weighted_f_measure` | weighted F-measure, beta^2 = 1 |
| `f_measure_*` | F-measure, beta^2 = 0.3 |
| `e_measure_*` | E-measure; its sum is divided by N - 1, so a perfect prediction scores a little above 1 |
| `mae` | mean absolute difference between prediction and ground truth; lower is better |
| `dice_at_0.5`, `iou_at_0.5` | Dice and IoU of the pixels where the prediction is *above* 0.5 |

F and E have three variants. `*_adaptive` uses the threshold min(2 * mean of the prediction, 1). `*_mean` and `*_max`
are over 256 thresholds; here a pixel counts as predicted if the prediction is *at or above* the threshold.

Each image also has curves of precision, recall, F and E over these 256 thresholds.

**The data set.** All numbers are means over images with equal weight. Two names need care:

- `f_measure_max` and `e_measure_max` are the highest point of the *mean curve*. There is one threshold for the whole
  set, not the best one of each image. So they are at most the mean of the images' own maxima.
- `mean_dice_at_0.5` and `mean_iou_at_0.5` are means over *images* at one threshold. Papers on polyps also use "mean
  Dice" for a mean over thresholds. That is not computed here.

**Empty masks.** The values of pysodmetrics are kept; the test sets of this field have an object in every image. If the
ground truth is empty, S is 1 - mean of the prediction. E is (pixels not predicted) / (N - 1). F, weighted F, Dice and
IoU are 0 for any prediction, even for the right one. A prediction that is 0 everywhere has the adaptive threshold 0,
so all its pixels count as predicted: its adaptive E is 0.

All scores come from pysodmetrics, with one change. If the object lies close to the lower or right border, there may be
no pixel beyond its centroid. Then the empty quarters of the S-measure are NaN in pysodmetrics. Here they count with
their weight, 0.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from py_sod_metrics import MAE, DICEHandler, Emeasure, IOUHandler, Smeasure, WeightedFmeasure

from .base import MetricColumn, Protocol, check_image, highest_points, mean_scores, threshold_curves, to_unit


MEANS = (
    *("s_measure", "weighted_f_measure", "mae"),
    *("f_measure_adaptive", "f_measure_mean", "e_measure_adaptive", "e_measure_mean"),
)
CURVES = {
    "precision_curve": "precision",
    "recall_curve": "recall",
    "f_measure_curve": "F (beta^2 = 0.3)",
    "e_measure_curve": "E",
}
COLUMNS = {
    "s_measure": MetricColumn("S"),
    "weighted_f_measure": MetricColumn("weighted F"),
    "f_measure_adaptive": MetricColumn("adaptive F"),
    "f_measure_mean": MetricColumn("mean F"),
    "f_measure_max": MetricColumn("max F"),
    "e_measure_adaptive": MetricColumn("adaptive E"),
    "e_measure_mean": MetricColumn("mean E"),
    "e_measure_max": MetricColumn("max E"),
    "mae": MetricColumn("MAE", higher_is_better=False),
    "mean_dice_at_0.5": MetricColumn("mean Dice at 0.5"),
    "mean_iou_at_0.5": MetricColumn("mean IoU at 0.5"),
}


def score_image(probs: np.ndarray, target: np.ndarray, min_max: bool = True) -> dict[str, Any]:
    """Score one image by the protocol above; arrays as for `check_image`.

    Options:
        min_max: First stretch the prediction to [0, 1] and, if it is floating, round it to 8 bits.

    Returns:
        The keys of the table above, and arrays over the thresholds 255 to 0: `precision_curve`, `recall_curve`,
        `f_measure_curve` and `e_measure_curve`.
    """
    check_image(probs, target)
    return score_prepared(prepare(probs, min_max), target)


def prepare(probs: np.ndarray, min_max: bool) -> np.ndarray:
    """Return the prediction as float64, stretched and rounded if `min_max`."""
    prepared = to_unit(probs)
    if min_max:
        low, high = prepared.min(), prepared.max()
        if high > low and (low, high) != (0, 1):
            prepared = (prepared - low) / (high - low)
        if probs.dtype != np.uint8:
            prepared = np.rint(255 * prepared) / 255
    return prepared


def score_prepared(probs: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    """Score a prediction that `prepare` returned."""
    counted = threshold_curves(beta_squared=0.3)
    counted.add_handler("dice", DICEHandler(False, False, with_binary=True))
    counted.add_handler("iou", IOUHandler(False, False, with_binary=True))
    # Measures collect images, so each image needs new ones.
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


def combine(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers of a data set."""
    means = mean_scores(rows, MEANS) | mean_scores(rows, ("dice_at_0.5", "iou_at_0.5"), "mean_")
    return means | highest_points(rows, ("f_measure", "e_measure"))


class _Smeasure(Smeasure):
    """S-measure without NaN for empty quarters of the image."""

    def ssim(self, pred: np.ndarray, gt: np.ndarray) -> float:
        # DEVIATION: pysodmetrics multiplies the mean of no pixel, NaN, by the weight 0.
        return super().ssim(pred, gt) if pred.size else 0.0


PROTOCOL = Protocol("cod", score_image, combine, COLUMNS, ranked_by=("s_measure", "S"), curves=CURVES)
