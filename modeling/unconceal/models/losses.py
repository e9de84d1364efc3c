"""Losses of the networks. All take logits, reckon in float32 and return a scalar."""

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
