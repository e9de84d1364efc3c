"""The protocol `lesion` for breast lesions in ultrasound.

SRS (TIP 2025) and papers on ultrasound score binary masks this way, one image at a time.

**Input.** The prediction is a soft mask in [0, 1] at the original size of the image. Its values are not rescaled (no
min-max step). The ground truth has the same size. A pixel is predicted if the prediction is *above* the threshold
(0.5, that is logit > 0). It is object if the 8-bit mask is above 127.

**One image.** From the pixel counts tp, fp, fn, tn:

- `iou` = tp / (tp + fp + fn)
- `f1`, the Dice coefficient, = 2 tp / (2 tp + fp + fn)
- `sensitivity` = tp / (tp + fn)
- `precision` = tp / (tp + fp)
- `accuracy` = (tp + tn) / all

The curves are those of the protocol `segmentation`.

**Empty masks.** As in `segmentation`: if ground truth and prediction are both empty, each score is 1; any other 0 / 0
is 0. So a healthy image scores 1 if nothing is predicted. If a single pixel is predicted, it scores 0, except
accuracy.

**The data set.** `mean_iou`, `mean_f1`, `mean_sensitivity`, `mean_precision` and `mean_accuracy` are means over images
with equal weight. SRS's tables report the first two. `iou` is the IoU of all pixels of the set, so large lesions weigh
more.

SRS's own code differs in two points. It adds 1e-5 to the numerator and the denominator of IoU, and 1e-6 to the
denominators of the other scores. This changes the scores of an image with an object by less than 0.0001. And it reads
the highest value of a mask as object, so an empty mask becomes one that is all object. Here an empty mask is empty.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from py_sod_metrics import OverallAccuracyHandler

from .base import MetricColumn, Protocol, mean_scores
from .protocol_segmentation import COUNTS, CURVES, total_scores
from .protocol_segmentation import score_image as score_pixels


SCORES = ("iou", "f1", "sensitivity", "precision", "accuracy")
COLUMNS = {
    "mean_iou": MetricColumn("mean IoU"),
    "mean_f1": MetricColumn("mean F1"),
    "mean_sensitivity": MetricColumn("mean SE", selects=False),
    "mean_precision": MetricColumn("mean PC", selects=False),
    "mean_accuracy": MetricColumn("mean ACC", selects=False),
    "iou": MetricColumn("IoU of all pixels"),
}
_ACCURACY = OverallAccuracyHandler(with_dynamic=False, with_adaptive=False)


def score_image(probs: np.ndarray, target: np.ndarray, threshold: float = 0.5) -> dict[str, Any]:
    """Score one image by the protocol above; arrays as for `check_image`.

    Options:
        threshold: A pixel counts as predicted if `probs` is above it.

    Returns:
        `tp`, `fp`, `fn`, `tn` (pixels), `iou`, `f1`, `sensitivity`, `precision`, `accuracy` (in [0, 1]), and the
        curves of `protocol_segmentation.score_image`.
    """
    row = score_pixels(probs, target, threshold)
    row["sensitivity"] = row["recall"]
    row["accuracy"] = float(_ACCURACY(**{name: row[name] for name in COUNTS}))
    return {name: row[name] for name in (*COUNTS, *SCORES, *CURVES)}


def combine(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers of a data set."""
    return {**mean_scores(rows, SCORES, "mean_"), "iou": total_scores(rows)["iou"]}


PROTOCOL = Protocol("lesion", score_image, combine, COLUMNS, ranked_by=("iou", "IoU"), curves=CURVES)
