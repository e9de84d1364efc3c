"""The losses against cases reckoned by hand."""

import math

import pytest
import torch

from unconceal.models.losses import (
    ambiguity_coefficient,
    ambiguity_loss,
    bce_dice_loss,
    contour_weights,
    dice_loss,
    edge_dice_loss,
    mask_edges,
    structure_loss,
)


SURE = 40.0  # a logit whose sigmoid is 0 or 1 in float32


def mask(*values: float) -> torch.Tensor:
    """One image of one row, (1, 1, 1, W)."""
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        ((SURE, SURE, -SURE, -SURE), (1, 1, 0, 0), 0),
        ((-SURE, -SURE, SURE, SURE), (1, 1, 0, 0), 1),
        ((SURE, -SURE, SURE, -SURE), (1, 1, 0, 0), 1 / 2),  # 2 * 1 / (2 + 2)
        ((0, 0, 0, 0), (1, 0, 0, 0), 2 / 3),  # 2 * 0.5 / (2 + 1)
        ((0, 0), (1, 0.5), 2 / 5),  # soft labels: 2 * (0.5 + 0.25) / (1 + 1.5)
    ],
)
def test_dice(logits, labels, expected):
    torch.testing.assert_close(
        dice_loss(mask(*logits), mask(*labels)), torch.tensor(float(expected)), atol=2e-5, rtol=0
    )


def test_empty_mask():
    empty = mask(0.0, 0.0, 0.0)
    assert dice_loss(mask(-SURE, -SURE, -SURE), empty) < 1e-6
    assert dice_loss(mask(SURE, SURE, SURE), empty) > 0.999
    logits = torch.zeros(1, 1, 1, 3, requires_grad=True)
    bce_dice_loss(logits, empty).backward()
    assert logits.grad.isfinite().all()


def test_smoothing_weighs_above_and_below():
    # (2 * 0 + 1) / (2 + 1 + 1): one predicted pixel beside two labelled ones.
    torch.testing.assert_close(dice_loss(mask(SURE, -SURE, -SURE), mask(0, 1, 1), smooth=1.0), torch.tensor(0.75))


def test_dice_is_reckoned_for_each_image():
    # Loss 0 on a large object, 2/3 on a small one; pixels thrown together would give 2/11.
    logits = torch.cat([mask(SURE, SURE, SURE, SURE), mask(0.0, 0.0, 0.0, 0.0)])
    labels = torch.cat([mask(1.0, 1.0, 1.0, 1.0), mask(1.0, 0.0, 0.0, 0.0)])
    torch.testing.assert_close(dice_loss(logits, labels), torch.tensor(1 / 3), atol=2e-5, rtol=0)


def test_cross_entropy_and_weights():
    # Logit log 3 is probability 3/4: -log(3/4) on the object, -log(1/4) beside it. Dice: 1 - 2 * 0.75 / (1.5 + 1).
    logits, labels = mask(math.log(3), math.log(3)), mask(1.0, 0.0)
    bce, dice = (math.log(4 / 3) + math.log(4)) / 2, 0.4
    for weights in ((1, 0), (0, 1), (3, 5)):
        expected = torch.tensor(weights[0] * bce + weights[1] * dice)
        torch.testing.assert_close(bce_dice_loss(logits, labels, *weights), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(bce_dice_loss(logits, labels), torch.tensor(0.5 * bce + dice), atol=2e-5, rtol=0)


def test_cross_entropy_of_soft_labels():
    # At probability 1/2 each pixel costs log 2, whatever its label.
    loss = bce_dice_loss(mask(0, 0), mask(0.25, 0.9), bce_weight=1, dice_weight=0)
    torch.testing.assert_close(loss, torch.tensor(math.log(2)))


@pytest.mark.parametrize("weights", [(1, 0), (0, 1)])
def test_gradient_raises_the_object_and_lowers_the_rest(weights):
    logits = mask(0.3, -0.2, 0.1, -0.4).requires_grad_()
    bce_dice_loss(logits, mask(1.0, 1.0, 0.0, 0.0), *weights).backward()
    assert logits.grad.flatten().sign().tolist() == [-1, -1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_reckoned_in_single(dtype):
    # 300 x 300 object pixels: beyond the largest float16, and beyond what bfloat16 can count.
    logits = torch.randn(1, 1, 300, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.ones(1, 1, 300, 300, dtype=dtype)
    loss = bce_dice_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, bce_dice_loss(logits.float(), labels.float()))


# ---- RUN ------------------------------------------------------------------------------------------------------------


def half_plane(size: int = 64) -> torch.Tensor:
    """The right half of a square is object."""
    labels = torch.zeros(1, 1, size, size)
    labels[..., size // 2 :] = 1
    return labels


def test_pixels_weigh_by_the_other_label_around_them():
    weights = contour_weights(half_plane())
    # In the middle row: 15 of the 31 columns around column 31 are object, columns 32 to 46; around column 32 it is 16.
    torch.testing.assert_close(weights[0, 0, 32, 31], torch.tensor(1 + 5 * 15 / 31))
    torch.testing.assert_close(weights[0, 0, 32, 32], torch.tensor(1 + 5 * 15 / 31))
    # Far from the contour nothing is added; beyond the border everything counts as background.
    torch.testing.assert_close(weights[0, 0, 32, 10], torch.tensor(1.0))
    torch.testing.assert_close(weights[0, 0, 32, 63], torch.tensor(1 + 5 * 15 / 31))
    assert weights.max() <= 6


def test_contour_weights_are_a_31x31_mean():
    labels = (torch.rand(2, 1, 50, 70, generator=torch.Generator().manual_seed(0)) > 0.7).float()
    near = torch.nn.functional.avg_pool2d(labels, 31, stride=1, padding=15)
    torch.testing.assert_close(contour_weights(labels), 1 + 5 * (near - labels).abs())


def test_both_terms_of_the_structure_loss_are_weighted():
    # Logit log 3 is probability 3/4; weights 3 and 1 on an object pixel and one beside it.
    logits, labels, weights = mask(math.log(3), math.log(3)), mask(1.0, 0.0), mask(3.0, 1.0)
    bce = (3 * math.log(4 / 3) + math.log(4)) / 4
    both, either = 3 * 0.75, 3 * 1.75 + 0.75 - 3 * 0.75
    iou = 1 - (both + 1) / (either + 1)
    for factors in ((1.0, 0.0), (0.0, 1.0), (2.0, 3.0)):
        expected = torch.tensor(factors[0] * bce + factors[1] * iou)
        torch.testing.assert_close(structure_loss(logits, labels, weights, *factors), expected)


def test_structure_loss_is_a_mean_over_images():
    logits, labels = torch.randn(2, 1, 40, 40), torch.cat([half_plane(40), 1 - half_plane(40)])
    weights = contour_weights(labels)
    parts = [structure_loss(logits[i : i + 1], labels[i : i + 1], weights[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(structure_loss(logits, labels, weights), sum(parts) / 2)
    assert structure_loss(80 * labels - SURE, labels, weights) < 1e-5


def test_edges_are_both_sides_of_the_contour_but_not_the_border():
    edges = mask_edges(half_plane(8))
    assert edges[0, 0, 3].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert mask_edges(torch.ones(1, 1, 8, 8)).sum() == 0
    assert mask_edges(torch.zeros(1, 1, 8, 8)).sum() == 0


@pytest.mark.parametrize(
    ("logits", "edges", "expected"),
    [
        ((SURE, -SURE), (1, 0), 0),  # (2 + 1) / (1 + 1 + 1)
        ((-SURE, SURE), (1, 0), 2 / 3),  # (0 + 1) / (1 + 1 + 1)
        ((0, 0), (1, 0), 1 / 5),  # (1 + 1) / (0.5 + 1 + 1)
        ((-SURE, -SURE), (0, 0), 0),
    ],
)
def test_edge_dice(logits, edges, expected):
    torch.testing.assert_close(edge_dice_loss(mask(*logits), mask(*edges)), torch.tensor(float(expected)))


def test_ambiguity_is_one_at_a_half_and_zero_when_sure():
    torch.testing.assert_close(ambiguity_loss(mask(0, SURE, -SURE, 0)), torch.tensor(0.5))
    torch.testing.assert_close(ambiguity_loss(mask(math.log(3))), torch.tensor(0.75))  # 1 - (2 * 3/4 - 1)^2


def test_ambiguity_rises_once_over_the_training():
    values = [ambiguity_coefficient(step / 100) for step in range(101)]
    assert values == sorted(values)
    assert (values[0], values[50], values[100]) == (0, pytest.approx(0.5), 1)
