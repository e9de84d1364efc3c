"""Losses of the networks. All take logits, reckon in float32 and return a scalar."""

import math

import torch
import torch.nn.functional as F


def dice_loss(logits: torch.Tensor, labels: torch.Tensor, smooth: float = 1e-5) -> torch.Tensor:
    """One minus the soft Dice coefficient of each image, averaged over the batch.

    Args:
        logits: (B, 1, H, W), pre-sigmoid.
        labels: (B, 1, H, W), in [0, 1].
        smooth: Added above and below the fraction, so that an empty mask met by an empty prediction costs nothing.
    """
    probs, labels = logits.float().sigmoid().flatten(1), labels.float().flatten(1)  # (B, H * W)
    dice = (2 * (probs * labels).sum(1) + smooth) / (probs.sum(1) + labels.sum(1) + smooth)
    return 1 - dice.mean()


def bce_dice_loss(
    logits: torch.Tensor, labels: torch.Tensor, bce_weight: float = 0.5, dice_weight: float = 1.0
) -> torch.Tensor:
    """Weighted sum of binary cross-entropy (mean over pixels) and `dice_loss`; the loss of SRS's second phase.

    Args:
        logits: (B, 1, H, W), pre-sigmoid.
        labels: (B, 1, H, W), in [0, 1].
        bce_weight: Weight of the cross-entropy.
        dice_weight: Weight of the Dice loss.
    """
    bce = F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    return bce_weight * bce + dice_weight * dice_loss(logits, labels)


def contour_weights(labels: torch.Tensor) -> torch.Tensor:
    """Return 1 + 5 |mean of the 31x31 labels around a pixel - its label| for masks (B, 1, H, W), in [1, 6].

    Source: F3Net, AAAI 2020, section 3.4.
    """
    labels = labels.float()
    # A mean over a square is a mean over rows of means over columns, at a fifteenth of the work.
    near = F.avg_pool2d(labels, (31, 1), stride=1, padding=(15, 0))
    near = F.avg_pool2d(near, (1, 31), stride=1, padding=(0, 15))
    return 1 + 5 * (near - labels).abs()


def structure_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    bce_weight: float = 1.0,
    iou_weight: float = 1.0,
) -> torch.Tensor:
    """Cross-entropy plus soft IoU, both weighted pixel by pixel; RUN's mask loss with `contour_weights`.

    RUN's release asks PyTorch for `reduce="none"`, which is read as true, so its cross-entropy is a plain mean; here it
    is weighted as it was meant to be.

    Args:
        logits: (B, 1, H, W), pre-sigmoid.
        labels: (B, 1, H, W), in [0, 1].
        weights: (B, 1, H, W), positive.
        bce_weight: Weight of the cross-entropy.
        iou_weight: Weight of the soft IoU.
    """
    logits, labels = logits.float(), labels.float()
    bce = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    bce = (weights * bce).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3))
    probs = logits.sigmoid()
    both = (weights * probs * labels).sum(dim=(1, 2, 3))
    either = (weights * (probs + labels)).sum(dim=(1, 2, 3)) - both
    iou = (both + 1) / (either + 1)
    return (bce_weight * bce + iou_weight * (1 - iou)).mean()


def mask_edges(labels: torch.Tensor) -> torch.Tensor:
    """Return the contour of masks (B, 1, H, W), two pixels wide: where a 3x3 neighbourhood is neither all 0 nor all 1.

    The soft edge of soft labels is the range of values in the neighbourhood, in [0, 1].
    """
    # Max-pooling pads with minus infinity, so a mask that is cut by the border has no contour there.
    return F.max_pool2d(labels, 3, stride=1, padding=1) + F.max_pool2d(-labels, 3, stride=1, padding=1)


def edge_dice_loss(logits: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """One minus the Dice coefficient with squares in the denominator, smoothed by 1, averaged over the batch.

    Args:
        logits: (B, 1, H, W), pre-sigmoid.
        edges: (B, 1, H, W), in [0, 1].
    """
    probs, edges = logits.float().sigmoid().flatten(1), edges.float().flatten(1)  # (B, H * W)
    both = (probs * edges).sum(1)
    return (1 - (2 * both + 1) / (probs.square().sum(1) + edges.square().sum(1) + 1)).mean()


def ambiguity_loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - (2p - 1)^2 over the pixels: 1 where the mask is undecided, 0 where it is sure (ZoomNet's UAL).

    Args:
        logits: (B, 1, H, W), pre-sigmoid.
    """
    return (1 - (2 * logits.float().sigmoid() - 1).square()).mean()


def ambiguity_coefficient(progress: float) -> float:
    """Weight of `ambiguity_loss`, rising from 0 to 1 along a half cosine, at `progress` through training, in [0, 1].

    RUN's release counts the progress within an epoch, so that its weight falls back to 0 at the start of each.
    """
    return (1 - math.cos(math.pi * progress)) / 2
