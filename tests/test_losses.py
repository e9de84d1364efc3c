"""Test the losses against cases computed by hand."""

import math

import pytest
import torch

from unconceal.models.losses import (
    add_terms,
    ambiguity_coefficient,
    ambiguity_loss,
    bce_dice_terms,
    contour_weights,
    dice_loss,
    edge_dice_loss,
    mask_edges,
    structure_loss,
)
from unconceal.models.modeling_unconceal import UnconcealPreTrainedModel


SURE = 40.0  # a logit whose sigmoid is 0 or 1 in float32


def mask(*values: float) -> torch.Tensor:
    """One image of one row, (1, 1, 1, W)."""
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)


def bce_dice_loss(*args) -> torch.Tensor:
    """Add both terms."""
    return add_terms(bce_dice_terms(*args))[0]


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
    loss = dice_loss(mask(*logits), mask(*labels))
    torch.testing.assert_close(loss, torch.tensor(float(expected)), atol=2e-5, rtol=0)


def test_smoothing_is_added_to_numerator_and_denominator():
    assert dice_loss(mask(-SURE, -SURE, -SURE), mask(0, 0, 0)) < 1e-6
    assert dice_loss(mask(SURE, SURE, SURE), mask(0, 0, 0)) > 0.999
    # (2 * 0 + 1) / (2 + 1 + 1): one predicted pixel and two other labeled ones.
    torch.testing.assert_close(dice_loss(mask(SURE, -SURE, -SURE), mask(0, 1, 1), smooth=1.0), torch.tensor(0.75))


def test_dice_over_a_batch_pushes_finds_in_an_empty_image_down():
    labels = torch.stack([torch.ones(1, 4, 4), torch.zeros(1, 4, 4)])
    gradients = {}
    for over_batch in (False, True):
        logits = torch.full((2, 1, 4, 4), 3.0, requires_grad=True)
        loss = dice_loss(logits, labels, over_batch=over_batch)
        loss.backward()
        gradients[over_batch] = logits.grad[1].mean().item()
    # 16 pixels of object; both images are marked with p: 1 - 2 * 16 p / (32 p + 16).
    p = torch.tensor(3.0).sigmoid()
    torch.testing.assert_close(loss.detach(), 1 - 32 * p / (32 * p + 16))
    assert gradients[True] > 100 * abs(gradients[False])


def test_dice_is_a_mean_over_images():
    # Loss 0 on a large object, 2/3 on a small one. Over all pixels it would be 2/11.
    logits = torch.cat([mask(SURE, SURE, SURE, SURE), mask(0.0, 0.0, 0.0, 0.0)])
    labels = torch.cat([mask(1.0, 1.0, 1.0, 1.0), mask(1.0, 0.0, 0.0, 0.0)])
    torch.testing.assert_close(dice_loss(logits, labels), torch.tensor(1 / 3), atol=2e-5, rtol=0)


def test_cross_entropy_and_weights():
    # Logit log 3 is probability 3/4: -log(3/4) on the object, -log(1/4) outside. Dice: 1 - 2 * 0.75 / (1.5 + 1).
    logits, labels = mask(math.log(3), math.log(3)), mask(1.0, 0.0)
    bce, dice = (math.log(4 / 3) + math.log(4)) / 2, 0.4
    for weights in ((1, 0), (0, 1), (3, 5)):
        expected = torch.tensor(weights[0] * bce + weights[1] * dice)
        torch.testing.assert_close(bce_dice_loss(logits, labels, *weights), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(bce_dice_loss(logits, labels), torch.tensor(0.5 * bce + dice), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    # The number of object pixels, 300 * 300, exceeds float16, and bfloat16 cannot count so far.
    logits = torch.randn(1, 1, 300, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.ones(1, 1, 300, 300, dtype=dtype)
    loss = bce_dice_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, bce_dice_loss(logits.float(), labels.float()))


# ---- RUN ------------------------------------------------------------------------------------------------------------


def half_plane(size: int = 64) -> torch.Tensor:
    """Make a square whose right half is object."""
    labels = torch.zeros(1, 1, size, size)
    labels[..., size // 2 :] = 1
    return labels


@pytest.mark.parametrize(("size", "side"), [((352, 400), 31), ((500, 176), 15), ((88, 88), 9), ((10, 12), 3)])
def test_contour_weights_are_a_mean_over_a_part_of_the_image(size, side):
    labels = (torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0)) > 0.7).float()
    near = torch.nn.functional.avg_pool2d(labels, side, stride=1, padding=side // 2)
    torch.testing.assert_close(contour_weights(labels), 1 + 5 * (near - labels).abs())


def test_both_terms_of_the_structure_loss_are_weighted():
    # Logit log 3 is probability 3/4; weights are 3 on an object pixel and 1 on another.
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


def test_edges_are_both_sides_of_the_contour_without_the_border():
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


def test_ambiguity_is_1_at_probability_half_and_0_for_certain_masks():
    torch.testing.assert_close(ambiguity_loss(mask(0, SURE, -SURE, 0)), torch.tensor(0.5))
    torch.testing.assert_close(ambiguity_loss(mask(math.log(3))), torch.tensor(0.75))  # 1 - (2 * 3/4 - 1)^2


def test_ambiguity_weight_rises_from_0_to_1():
    values = [ambiguity_coefficient(step / 100) for step in range(101)]
    assert values == sorted(values)
    assert (values[0], values[50], values[100]) == (0, pytest.approx(0.5), 1)


@pytest.mark.parametrize("value", [-0.1, 1.5, 255, math.nan])
def test_labels_out_of_range_make_the_loss_nan_where_reading_them_is_slow(value, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on an accelerator: no number is read
    logits, labels = torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8)
    assert bce_dice_loss(logits, UnconcealPreTrainedModel.match_labels(labels, logits)).isfinite()
    labels[0, 3, 4] = value
    assert bce_dice_loss(logits, UnconcealPreTrainedModel.match_labels(labels, logits)).isnan()
