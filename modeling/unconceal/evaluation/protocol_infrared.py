"""The protocol `infrared`: how papers on small infrared targets score, by pixels and by targets.

**Input.** The soft prediction in [0, 1] at the original size of the picture, nothing rescaled (no min-max step), and the
truth at that size. A pixel is predicted where the prediction is *above* the threshold (0.5, that is logit > 0), and true
where the 8-bit mask is above 127.

**One picture, by pixels.** The counts, scores and curves of the protocol `segmentation`, and its rule for pictures with
nothing to find.

**One picture, by targets.** A target is a component of the truth, a blob one of the prediction, both 8-connected. Each
target, in the order of rows, takes the first blob in the order of rows that no other target has taken and whose centroid
lies less than `max_distance` (3 pixels) from its own. `num_targets`, `num_detected` and `num_false_blobs` count targets,
targets that took a blob and blobs that none took; `false_pixels` are the pixels of the latter.

| key of the data set | |
|---|---|
| `iou`, `niou` | IoU from the counts of all pixels; mean over pictures |
| `f1`, `mean_f1` | likewise; SRS's tables show `niou` and `mean_f1` |
| `pd` | probability of detection: detected targets / targets of all pictures |
| `fa` | false-alarm rate: false pixels / pixels of all pictures; tables show it in 1e-6; lower is better |

Where no picture has a target, `pd` is 1: none was missed.

**Two ways to find false alarms.** The evaluation code that goes around in this field (from DNANet on) looks for the
blobs that no target took by their *area*: a false blob with as many pixels as a blob that was taken in the same picture
is not counted. Here blobs are told apart by themselves. `by_area` counts as that code does, to compare with numbers
that it produced; its `fa` is never higher.

Pd depends on pixels: score at the original size, not at the network's. pyirstdmetrics, which has the same rules, does not
install beside numpy 2, so components come from scikit-image and the matching is written here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from skimage.measure import label, regionprops

from .base import Column, Protocol, check_rows, to_unit
from .protocol_segmentation import CURVES
from .protocol_segmentation import score_image as score_pixels
from .protocol_segmentation import summarize as summarize_pixels


COLUMNS = {
    "iou": Column("IoU"),
    "niou": Column("nIoU"),
    "f1": Column("F1"),
    "mean_f1": Column("mean F1"),
    "pd": Column("Pd"),
    "fa": Column("Fa (1e-6)", higher_is_better=False, scale=1e6, digits=2),
}


def score_image(
    probs: np.ndarray, target: np.ndarray, threshold: float = 0.5, max_distance: float = 3, by_area: bool = False
) -> dict[str, Any]:
    """Score one picture by the protocol above.

    Args:
        probs: Prediction, (height, width), floating in [0, 1] or uint8.
        target: Truth, (height, width), boolean.
        threshold: A pixel counts as predicted where `probs` is above it.
        max_distance: Centroids of a target and its blob are less than this apart, in pixels.
        by_area: Find false blobs by their area, with the flaw of the field's common code.

    Returns:
        What `protocol_segmentation.score_image` returns, `num_targets`, `num_detected`, `num_false_blobs` and `false_pixels`.

    Raises:
        ValueError: If the sizes differ, or if a floating `probs` leaves [0, 1] or is not a number somewhere.
        TypeError: If `target` is not boolean, or `probs` neither floating nor uint8.
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


def summarize(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Put the rows of `score_image` together to the numbers of a data set, by the protocol above.

    The result does not depend on the order of the rows, to the last digit.

    Raises:
        ValueError: If there is no row.
    """
    rows = check_rows(rows)
    summary = summarize_pixels(rows)
    num_targets = sum(row["num_targets"] for row in rows)
    num_pixels = sum(row[count] for row in rows for count in ("tp", "fp", "fn", "tn"))
    summary["pd"] = sum(row["num_detected"] for row in rows) / num_targets if num_targets else 1.0
    summary["fa"] = sum(row["false_pixels"] for row in rows) / num_pixels
    return {**{name: summary[name] for name in COLUMNS}, "num_images": len(rows)}


PROTOCOL = Protocol(
    name="infrared",
    score_image=score_image,
    summarize=summarize,
    columns=COLUMNS,
    ranked_by=("iou", "IoU"),
    curves=CURVES,
)
