"""The protocol `lesion`: how SRS (TIP 2025) and papers on ultrasound score a binary map, one picture at a time.

**Input.** The soft prediction in [0, 1] at the original size of the picture, nothing rescaled (no min-max step), and the
truth at that size. A pixel is predicted where the prediction is *above* the threshold (0.5, that is logit > 0), and true
where the 8-bit mask is above 127.

**One picture.** From the counts of pixels tp, fp, fn, tn: iou = tp / (tp + fp + fn), f1 (the Dice coefficient)
= 2 tp / (2 tp + fp + fn), sensitivity = tp / (tp + fn), precision = tp / (tp + fp), accuracy = (tp + tn) / all. The
curves are those of the protocol `segmentation`.

**Nothing to find.** The rule of `segmentation`: where truth and prediction are both empty, each score is 1; any other
0 / 0 is 0. So a healthy picture scores 1 when nothing is predicted and, but for accuracy, 0 when a single pixel is.

**The data set.** `mean_iou`, `mean_f1`, `mean_sensitivity`, `mean_precision` and `mean_accuracy` are means over
pictures, each weighing the same; SRS's tables show the first two. `iou` is the IoU of all pixels of the set, where large
lesions weigh more.

SRS's own code differs in two points. It adds 1e-5 to both sides of IoU's fraction and 1e-6 below the others, which moves
the scores of a picture with an object by less than 0.0001. And it takes the highest value of a mask for foreground, so
that it reads an empty mask as one that is all object; here that is nothing to find.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from py_sod_metrics import OverallAccuracyHandler

from .base import Column, Protocol, check_rows, mean_scores
from .protocol_segmentation import COUNTS, CURVES, total_scores
from .protocol_segmentation import score_image as score_pixels


SCORES = ("iou", "f1", "sensitivity", "precision", "accuracy")
COLUMNS = {
    "mean_iou": Column("mean IoU"),
    "mean_f1": Column("mean F1"),
    "mean_sensitivity": Column("mean SE", selects=False),
    "mean_precision": Column("mean PC", selects=False),
    "mean_accuracy": Column("mean ACC", selects=False),
    "iou": Column("IoU of all pixels"),
}
_ACCURACY = OverallAccuracyHandler(with_dynamic=False, with_adaptive=False)


def score_image(probs: np.ndarray, target: np.ndarray, threshold: float = 0.5) -> dict[str, Any]:
    """Score one picture by the protocol above.

    Args:
        probs: Prediction, (height, width), floating in [0, 1] or uint8.
        target: Truth, (height, width), boolean.
        threshold: A pixel counts as predicted where `probs` is above it.

    Returns:
        `tp`, `fp`, `fn`, `tn` (pixels), `iou`, `f1`, `sensitivity`, `precision`, `accuracy` (in [0, 1]), and the curves
        of `protocol_segmentation.score_image`.

    Raises:
        ValueError: If the sizes differ, or if a floating `probs` leaves [0, 1] or is not a number somewhere.
        TypeError: If `target` is not boolean, or `probs` neither floating nor uint8.
    """
    row = score_pixels(probs, target, threshold)
    row["sensitivity"] = row["recall"]
    row["accuracy"] = float(_ACCURACY(**{name: row[name] for name in COUNTS}))
    return {name: row[name] for name in (*COUNTS, *SCORES, *CURVES)}


def summarize(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Put the rows of `score_image` together to the numbers of a data set, by the protocol above.

    The result does not depend on the order of the rows, to the last digit.

    Raises:
        ValueError: If there is no row.
    """
    rows = check_rows(rows)
    means = mean_scores(rows, {name: f"mean_{name}" for name in SCORES})
    return {**means, "iou": total_scores(rows)["iou"], "num_images": len(rows)}


PROTOCOL = Protocol(
    name="lesion",
    score_image=score_image,
    summarize=summarize,
    columns=COLUMNS,
    ranked_by=("iou", "IoU"),
    curves=CURVES,
)
