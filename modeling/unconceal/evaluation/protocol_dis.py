"""The protocol `dis`: how papers on dichotomous segmentation (DIS5K) score a soft map, one picture at a time.

**Input.** As in the protocol `cod`, whose module states it in full: the soft prediction and the truth at the original
size of the picture, the prediction stretched to [0, 1] and, where it is not 8-bit already, rounded to 8 bits unless
`min_max` is off.

**One picture.** The columns of DIS5K's tables.

| key | column | |
|---|---|---|
| `f_measure_max` | F_mx | F-measure, beta^2 = 0.3, over 256 thresholds |
| `weighted_f_measure` | F_w | weighted F-measure, beta^2 = 1 |
| `mae` | M | mean absolute difference between prediction and truth; lower is better |
| `s_measure` | S | S-measure, alpha 0.5 |
| `e_measure_mean` | E_m | E-measure, mean over 256 thresholds |
| `hce` | HCE | human correction effort, relax 5, epsilon 2.0; lower is better, no upper bound |

The first five are `cod`'s own numbers, its notes on empty pictures included. HCE counts the mouse clicks that would turn
the prediction, where it is *above* 0.5, into the truth: corners of the outlines that have to be drawn anew, and one click
for each region that can be removed or filled as a whole. Errors that vanish within 5 pixels of erosion are forgiven, but
for missed thin parts: what is missed of the truth's skeleton always counts. So HCE depends on the size in pixels: it is
only comparable at the original size. It takes seconds for a large picture, so it is an option: off in the evaluations
during training, on in a report.

**The data set.** Means over pictures, each weighing the same; `hce` is there if every picture has it. Max F goes by two
rules in the field. IS-Net's code averages precision and recall over the pictures at each threshold and takes the highest
F of these two curves; pysodmetrics and BiRefNet average the pictures' F curves and take the highest point. Here it is the
latter: it is pysodmetrics' own and the rule of `cod`. The two differ slightly, so numbers of papers that used IS-Net's
code are near to these, not equal. DIS5K's overall figure is the mean of the figures of its four test sets; all four
scored as one set give the same but for max F, whose threshold is then one for all.

All scores are pysodmetrics' own, with the completion that `cod` names. HCE is computed on the part of the picture that
holds the object and the prediction, with a margin wider than its relaxation: the same number, in less time. IS-Net's
code takes a pixel as predicted from level 129 of 8 bits, pysodmetrics from 128.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from py_sod_metrics import HumanCorrectionEffortMeasure

from .base import Column, Protocol, check_image, check_rows, highest_points, mean_scores
from .protocol_cod import CURVES, prepare, score_prepared


MEANS = ("weighted_f_measure", "mae", "s_measure", "e_measure_mean")
HIGHEST = {"f_measure_curve": "f_measure_max"}
"""The name that the highest point of each mean curve goes by."""
SCORES = ("f_measure_max", *MEANS)
COLUMNS = {
    "f_measure_max": Column("max F"),
    "weighted_f_measure": Column("weighted F"),
    "mae": Column("MAE", higher_is_better=False),
    "s_measure": Column("S"),
    "e_measure_mean": Column("mean E"),
    "hce": Column("HCE", higher_is_better=False, digits=0, selects=False),
}
RELAX = 5
_HCE = HumanCorrectionEffortMeasure(relax=RELAX, epsilon=2.0)


def score_image(probs: np.ndarray, target: np.ndarray, min_max: bool = True, hce: bool = False) -> dict[str, Any]:
    """Score one picture by the protocol above.

    Args:
        probs: Prediction, (height, width), floating in [0, 1] or uint8.
        target: Truth, (height, width), boolean.
        min_max: Stretch the prediction to [0, 1] and, where it is floating, round it to 8 bits first.
        hce: Count the human correction effort, which takes longer than all the rest.

    Returns:
        The keys of the table above, `hce` only if asked for, and the curves of `protocol_cod.score_image`.

    Raises:
        ValueError: If the sizes differ, or if a floating `probs` leaves [0, 1] or is not a number somewhere.
        TypeError: If `target` is not boolean, or `probs` neither floating nor uint8.
    """
    check_image(probs, target)
    probs = prepare(probs, min_max)
    row = score_prepared(probs, target)
    scores = {name: row[name] for name in (*SCORES, *CURVES)}
    if hce:
        scores["hce"] = human_correction_effort(probs, target)
    return scores


def human_correction_effort(probs: np.ndarray, target: np.ndarray) -> int:
    """Return pysodmetrics' HCE, computed on the part of the picture that can matter.

    Nearly all its time goes into the skeleton of the truth, and that is proportional to the pixels looked at. Background
    farther than the relaxation from object and prediction changes nothing.

    Args:
        probs: Prediction, (height, width), float64 in [0, 1].
        target: Truth, (height, width), boolean.
    """
    marked = (probs > 0.5) | target
    rows, columns = (np.flatnonzero(marked.any(axis)) for axis in (1, 0))
    if not rows.size:
        return 0
    margin = RELAX + 3  # dilations by RELAX, then one more, and the 3x3 neighbourhoods of contour and skeleton
    part = tuple(slice(max(0, span[0] - margin), span[-1] + 1 + margin) for span in (rows, columns))
    # Not `step`, which keeps the numbers of all pictures.
    return int(_HCE.cal_hce(np.ascontiguousarray(probs[part]), np.ascontiguousarray(target[part])))


def summarize(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Put the rows of `score_image` together to the numbers of a data set, by the protocol above.

    The result does not depend on the order of the rows, to the last digit.

    Raises:
        ValueError: If there is no row.
    """
    rows = check_rows(rows)
    means = (*MEANS, "hce") if all("hce" in row for row in rows) else MEANS
    summary = {**highest_points(rows, HIGHEST), **mean_scores(rows, {name: name for name in means})}
    return {**summary, "num_images": len(rows)}


PROTOCOL = Protocol(
    name="dis",
    score_image=score_image,
    summarize=summarize,
    columns=COLUMNS,
    ranked_by=("weighted_f_measure", "weighted F"),
    curves=CURVES,
    report_options={"hce": True},
)
