"""Losses of the networks, from logits, in float32, as scalars."""

import math

import torch.nn.functional as F
from torch import Tensor


def add_terms(terms: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of scalars, and the scalars without gradients."""
    return sum(terms.values()), {name: term.detach() for name, term in terms.items()}


def dice_loss(logits: Tensor, labels: Tensor, smooth: float = 1e-5, over_batch: bool = False) -> Tensor:
    """Return one minus the soft Dice coefficient, averaged over images.

    Args:
        logits: (B, 1, H, W), pre-sigmoid.
        labels: (B, 1, H, W), in [0, 1].
        smooth: Added to numerator and denominator, so that an empty prediction of an empty mask has no loss.
        over_batch: Whether all pixels of the batch give one coefficient. What is found in an image without an object
            then has a gradient. Averaged over images, it has none.
    """
    first = 0 if over_batch else 1
    probs, labels = logits.float().sigmoid().flatten(first), labels.float().flatten(first)  # ([B,] H * W)
    dice = (2 * (probs * labels).sum(-1) + smooth) / (probs.sum(-1) + labels.sum(-1) + smooth)
    return 1 - dice.mean()


def bce_dice_terms(
    logits: Tensor, labels: Tensor, bce_weight: float = 0.5, dice_weight: float = 1.0, batch_dice: bool = False
) -> dict[str, Tensor]:
    """Return weighted cross-entropy and `dice_loss` by name; shapes as there."""
    bce = F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    return {"cross_entropy": bce_weight * bce, "dice": dice_weight * dice_loss(logits, labels, over_batch=batch_dice)}


def contour_weights(labels: Tensor) -> Tensor:
    """Return pixel weights in [1, 6], larger near contours.

    The weight is 1 + 5 |mean of the labels around a pixel - its label|, in a window of 31x31 pixels for 352x352.
    Windows of other sizes are as large a part of the shorter side.
    Source: F3Net, AAAI 2020, section 3.4.
    """
    labels = labels.float()
    reach = max(1, round(15 / 352 * min(labels.shape[-2:])))
    side = 2 * reach + 1
    # The mean over columns, then over rows, needs a fifteenth of the work of a mean over squares.
    near = F.avg_pool2d(labels, (side, 1), stride=1, padding=(reach, 0))
    near = F.avg_pool2d(near, (1, side), stride=1, padding=(0, reach))
    return 1 + 5 * (near - labels).abs()


def structure_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, bce_weight: float = 1.0, iou_weight: float = 1.0
) -> Tensor:
    """Return cross-entropy plus soft IoU loss, both weighted by pixel.

    The release of RUN passes `reduce="none"`, which PyTorch takes for true. So its cross-entropy is a plain mean; here
    it is weighted, as intended.

    Args:
        logits: (B, 1, H, W), pre-sigmoid.
        labels: (B, 1, H, W), in [0, 1].
        weights: (B, 1, H, W), positive.
        bce_weight: Factor of the cross-entropy.
        iou_weight: Factor of the soft IoU.
    """
    logits, labels = logits.float(), labels.float()
    bce = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    bce = (weights * bce).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3))
    probs = logits.sigmoid()
    both = (weights * probs * labels).sum(dim=(1, 2, 3))
    either = (weights * (probs + labels)).sum(dim=(1, 2, 3)) - both
    iou = (both + 1) / (either + 1)
    return (bce_weight * bce + iou_weight * (1 - iou)).mean()


def mask_edges(labels: Tensor) -> Tensor:
    """Return the contour of masks (B, 1, H, W), two pixels wide.

    It is the range of values in the 3x3 pixels around each pixel, in [0, 1]. Soft labels have soft edges.
    """
    # Max pooling pads with minus infinity, so there is no contour along the border of the image.
    return F.max_pool2d(labels, 3, stride=1, padding=1) + F.max_pool2d(-labels, 3, stride=1, padding=1)


def edge_dice_loss(logits: Tensor, edges: Tensor) -> Tensor:
    """Return one minus the Dice coefficient of edges, averaged over images.

    Shapes as in `dice_loss`. The denominator has squares, and the fraction is smoothed by 1.
    """
    probs, edges = logits.float().sigmoid().flatten(1), edges.float().flatten(1)  # (B, H * W)
    both = (probs * edges).sum(1)
    return (1 - (2 * both + 1) / (probs.square().sum(1) + edges.square().sum(1) + 1)).mean()


def ambiguity_loss(logits: Tensor) -> Tensor:
    """Return the mean of 1 - (2p - 1)^2 (UAL of ZoomNet)."""
    return (1 - (2 * logits.float().sigmoid() - 1).square()).mean()


def ambiguity_coefficient(progress: float) -> float:
    """Return the weight of `ambiguity_loss`, a half cosine from 0 to 1.

    `progress` is the share of the training that is done. In the release of RUN the weight falls back to 0 at the start
    of each epoch.
    """
    return (1 - math.cos(math.pi * progress)) / 2
