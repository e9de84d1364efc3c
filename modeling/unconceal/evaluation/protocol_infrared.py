"""The protocol `infrared` for small infrared targets.

Papers on small infrared targets score binary masks this way, by pixels and by targets.

**Input.** The prediction is a soft mask in [0, 1] at the original size of the image. Its values are not rescaled (no
min-max step). The ground truth has the same size. A pixel is predicted if the prediction is *above* the threshold
(0.5, that is logit > 0). It is object if the 8-bit mask is above 127.

**One image, by pixels.** Counts, scores and curves as in the protocol `segmentation`, with its rule for empty masks.

**One image, by targets.** A target is a component of the ground truth. A blob is a component of the prediction. Both
are 8-connected. Targets are matched in the order of rows. Each takes the first free blob, also in the order of rows,
with a centroid less than `max_distance` (3 pixels) from its own. `num_targets` counts targets, `num_detected` targets
with a blob, `num_false_blobs` blobs without a target. `false_pixels` counts the pixels of these false blobs.

| key of the data set | |
|---|---|
| `iou`, `niou` | IoU of all pixels of the set; mean over images |
| `f1`, `mean_f1` | the same for F1; SRS's tables report `niou` and `mean_f1` |
| `pd` | probability of detection: detected targets / targets of all images |
| `fa` | false-alarm rate: false pixels / pixels of all images; tables show it in 1e-6; lower is better |

If no image has a target, `pd` is 1: no target was missed.

**Two ways to find false alarms.** The common code of this field (since DNANet) finds false blobs by their *area*. It
does not count a false blob that has as many pixels as a matched blob of the same image. This protocol identifies each
blob itself. `by_area` counts like the common code, for comparison with its numbers; its `fa` is never higher.

Pd depends on pixels: score at the original size, not at the network's. pyirstdmetrics has the same rules but cannot be
installed together with numpy 2. So components come from scikit-image, and the matching is written here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from skimage.measure import label, regionprops

from .base import MetricColumn, Protocol, to_unit
from .protocol_segmentation import CURVES
from .protocol_segmentation import combine as combine_pixels
from .protocol_segmentation import score_image as score_pixels


COLUMNS = {
    "iou": MetricColumn("IoU"),
    "niou": MetricColumn("nIoU"),
    "f1": MetricColumn("F1"),
    "mean_f1": MetricColumn("mean F1"),
    "pd": MetricColumn("Pd"),
    "fa": MetricColumn("Fa (1e-6)", higher_is_better=False, scale=1e6, digits=2),
}


def score_image(
    probs: np.ndarray, target: np.ndarray, threshold: float = 0.5, max_distance: float = 3, by_area: bool = False
) -> dict[str, Any]:
    """Score one image by the protocol above; arrays as for `check_image`.

    Options:
        threshold: A pixel counts as predicted if `probs` is above it.
        max_distance: Limit on the distance between the centroids of a target and its blob, in pixels.
        by_area: Find false blobs by their area, with the flaw of the common code.

    Returns:
        The keys of `protocol_segmentation.score_image`, `num_targets`, `num_detected`, `num_false_blobs`,
        `false_pixels`.
    """
    row = score_pixels(probs, target, threshold)
    targets, blobs = (regionprops(label(mask, connectivity=2)) for mask in (target, to_unit(probs) > threshold))
    taken = set()
    for wanted in targets:
        for index, blob in enumerate(blobs):
            distance = np.linalg.norm(np.subtract(blob.centroid, wanted.centroid))
            if index not in taken and distance < max_distance:
                taken.add(index)
                break
    false_areas = [int(blob.num_pixels) for index, blob in enumerate(blobs) if index not in taken]
    if by_area:
        taken_areas = {int(blobs[index].num_pixels) for index in taken}
        false_areas = [area for area in false_areas if area not in taken_areas]
    return {
        **row,
        "num_targets": len(targets),
        "num_detected": len(taken),
        "num_false_blobs": len(false_areas),
        "false_pixels": sum(false_areas),
    }


def combine(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers of a data set."""
    num_targets = sum(row["num_targets"] for row in rows)
    num_pixels = sum(row[count] for row in rows for count in ("tp", "fp", "fn", "tn"))
    pd = sum(row["num_detected"] for row in rows) / num_targets if num_targets else 1.0
    return {**combine_pixels(rows), "pd": pd, "fa": sum(row["false_pixels"] for row in rows) / num_pixels}


PROTOCOL = Protocol("infrared", score_image, combine, COLUMNS, ranked_by=("iou", "IoU"), curves=CURVES)
