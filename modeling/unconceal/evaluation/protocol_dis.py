"""The protocol `dis` for dichotomous segmentation (DIS5K).

Papers on DIS5K score soft masks this way, one image at a time.

**Input.** As in the protocol `cod`, whose module states it in full: prediction and ground truth at the original size
of the image. Unless `min_max` is off, the prediction is stretched to [0, 1] and, if it is not 8-bit, rounded to 8
bits.

**One image.** The columns of DIS5K's tables:

| key | column | |
|---|---|---|
| `f_measure_max` | F_mx | F-measure, beta^2 = 0.3, over 256 thresholds |
| `weighted_f_measure` | F_w | weighted F-measure, beta^2 = 1 |
| `mae` | M | mean absolute difference between prediction and ground truth; lower is better |
| `s_measure` | S | S-measure, alpha 0.5 |
| `e_measure_mean` | E_m | E-measure, mean over 256 thresholds |
| `boundary_iou` | boundary IoU | IoU of the edges alone; a column of ours, no paper on DIS5K has it |
| `hce` | HCE | human correction effort, relax 5, epsilon 2.0; lower is better, no upper bound |

The first five are the numbers of `cod`, with its notes on empty masks.

Boundary IoU (Cheng et al., CVPR 2021, https://arxiv.org/abs/2103.16562) compares the edges only, so that a large
object does not hide a poor outline. The edge of a mask is the part of it that erosion by d pixels takes away: all
pixels of the object at most d from the background, along rows, columns and diagonals. The border of the image counts
as background. d is 0.5 percent of the image's diagonal, rounded, at least 1. That paper has 0.5 percent for the fine
masks of Cityscapes and 2 percent for COCO. The prediction is object *above* 0.5. The score is the IoU of both edges;
1 if both masks are empty, 0 if one is.

HCE counts the mouse clicks that would turn the
prediction, where it is *above* 0.5, into the ground truth. One click counts for each corner of an outline to redraw,
and for each region to remove or fill as a whole. Errors that vanish within 5 pixels of erosion are forgiven. Missed
thin parts are not: a missed part of the ground truth's skeleton always counts. So HCE depends on the size in pixels
and is only comparable at the original size. It takes seconds for a large image. So it is an option: off in the
evaluations during training, on in a report.

**The data set.** All numbers are means over images with equal weight. `hce` is present if every image has it. So is
`boundary_iou`, which older records lack. The field uses two rules for max F. IS-Net's code averages precision and
recall over the images at each threshold and takes the highest F of these two curves. pysodmetrics and BiRefNet average
the F curves of the images and take the highest point. This protocol uses the second rule, as `cod` does. The two
differ slightly, so the numbers of papers that used IS-Net's code are close to these but not equal. The overall figure
of DIS5K is the mean over its four test sets. Scoring all four as one set gives the same numbers except max F, which
then has one threshold for all.

All scores come from pysodmetrics, with the change that `cod` describes. HCE is computed on the part of the image that
holds object and prediction, with a margin wider than its relaxation: the same number in less time. IS-Net's code
counts a pixel as predicted from level 129 of 8 bits, pysodmetrics from 128.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from py_sod_metrics import HumanCorrectionEffortMeasure
from scipy.ndimage import minimum_filter1d

from .base import MetricColumn, Protocol, check_image, highest_points, mean_scores
from .protocol_cod import CURVES, prepare, score_prepared


MEANS = ("weighted_f_measure", "mae", "s_measure", "e_measure_mean")
SCORES = ("f_measure_max", *MEANS)
COLUMNS = {
    "f_measure_max": MetricColumn("max F"),
    "weighted_f_measure": MetricColumn("weighted F"),
    "mae": MetricColumn("MAE", higher_is_better=False),
    "s_measure": MetricColumn("S"),
    "e_measure_mean": MetricColumn("mean E"),
    "boundary_iou": MetricColumn("boundary IoU"),
    "hce": MetricColumn("HCE", higher_is_better=False, digits=0, selects=False),
}
EDGE_RATIO = 0.005  # of the diagonal
RELAX = 5
_HCE = HumanCorrectionEffortMeasure(relax=RELAX, epsilon=2.0)


def score_image(probs: np.ndarray, target: np.ndarray, min_max: bool = True, hce: bool = False) -> dict[str, Any]:
    """Score one image by the protocol above; arrays as for `check_image`.

    Options:
        min_max: First stretch the prediction to [0, 1] and, if it is floating, round it to 8 bits.
        hce: Compute the human correction effort; slower than all other scores together.

    Returns:
        The keys of the table above, `hce` only on request, and the curves of `protocol_cod.score_image`.
    """
    check_image(probs, target)
    probs = prepare(probs, min_max)
    row = score_prepared(probs, target)
    scores = {name: row[name] for name in (*SCORES, *CURVES)} | {"boundary_iou": boundary_iou(probs > 0.5, target)}
    if hce:
        scores["hce"] = human_correction_effort(probs, target)
    return scores


def boundary_iou(mask: np.ndarray, target: np.ndarray) -> float:
    """Return the IoU of the edges of two boolean masks (H, W)."""
    distance = max(1, round(EDGE_RATIO * np.hypot(*target.shape)))
    edges = [one & ~eroded(one, distance) for one in (mask, target)]
    union = (edges[0] | edges[1]).sum()
    return float((edges[0] & edges[1]).sum() / union) if union else 1.0


def eroded(mask: np.ndarray, distance: int) -> np.ndarray:
    """Take away what is at most `distance` pixels from the background."""
    for axis in (0, 1):  # rows, then columns: the same as a square
        mask = minimum_filter1d(mask.view(np.uint8), 2 * distance + 1, axis, mode="constant", cval=0).astype(bool)
    return mask


def human_correction_effort(probs: np.ndarray, target: np.ndarray) -> int:
    """Return pysodmetrics' HCE, computed on the relevant part of the image.

    Most of its time goes into the skeleton of the ground truth, in proportion to the number of pixels. Background
    farther than the relaxation from object and prediction changes nothing.

    The prediction is float64 in [0, 1].
    """
    marked = (probs > 0.5) | target
    rows, columns = (np.flatnonzero(marked.any(axis)) for axis in (1, 0))
    if not rows.size:
        return 0
    margin = RELAX + 3  # dilations by RELAX, then one more, and the 3x3 neighborhoods of contour and skeleton
    part = tuple(slice(max(0, span[0] - margin), span[-1] + 1 + margin) for span in (rows, columns))
    # Not `step`, which keeps the numbers of all images.
    return int(_HCE.cal_hce(np.ascontiguousarray(probs[part]), np.ascontiguousarray(target[part])))


def combine(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers of a data set."""
    means = [*MEANS, *(name for name in ("boundary_iou", "hce") if all(name in row for row in rows))]
    return highest_points(rows, ("f_measure",)) | mean_scores(rows, means)


PROTOCOL = Protocol(
    "dis", score_image, combine, COLUMNS, ("weighted_f_measure", "weighted F"), CURVES, report_options={"hce": True}
)
