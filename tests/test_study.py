"""Variants of RUN in scripts/study_run.py."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


spec = importlib.util.spec_from_file_location("study_run", Path(__file__).parents[1] / "scripts/study_run.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)

SMALL = {
    "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4},
    "hidden_size": 8,
    "state_size": 2,
    "window_size": 4,
    "sparsity_hidden_size": 4,
    "reconstruction_hidden_sizes": (8, 8, 8),
}


@pytest.mark.parametrize("name", study.VARIANTS)
def test_every_variant_trains_a_step(name):
    torch.manual_seed(0)
    model = study.make_variant(name, **SMALL)
    images, labels = torch.randn(2, 3, 64, 64), (torch.rand(2, 64, 64) > 0.7).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        output = model(images, labels=labels, output_stages=True)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[1] < losses[0]
    assert len(output.mask_logits) == model.num_stages + 1
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_masks_of_a_plain_decoder_ignore_the_unfolding():
    model = study.make_variant("plain", **SMALL)
    assert not any(key.startswith(("mask_step", "background_step")) for key, _ in model.named_parameters())
    output = model(torch.randn(1, 3, 64, 64), output_stages=True)
    enlarged = torch.nn.functional.interpolate(output.mask_logits[-1], scale_factor=4, mode="bilinear")
    torch.testing.assert_close(output.logits, enlarged)
    assert output.share_logits == ()


def test_table_pairs_seeds(tmp_path, monkeypatch, capsys):
    """Both seeds of RUN are 0.1 better on every image."""
    monkeypatch.setattr(study, "LABELS", {100: (10, 2)})
    for name in study.VARIANTS:
        for seed in range(2):
            for rate in study.LEARNING_RATES:
                dice = 0.5 + 0.1 * seed + 0.1 * (name == "share") - rate
                rows = [[dice, 0.5, 0.1], [dice + 0.2, 0.5, 0.1]]
                result = {"job": [name, 100, seed, rate], "parameters": 1e6, "multiply_adds": 2e9}
                result |= {"held_out_images": rows, "validation_images": rows, "held_out_stages": {"M_0": 0.25}}
                study.result_path(tmp_path, (name, 100, seed, rate)).write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["study_run.py", "table", "--out", str(tmp_path)])
    study.main()
    lines = capsys.readouterr().out.splitlines()
    assert study.chosen_rate(tmp_path, "gates", 100) == min(study.LEARNING_RATES)
    row = next(line for line in lines if line.startswith("| RUN, taught background |"))
    assert "+0.100 ± 0.000" in row
    assert "2.00 G" in row
    assert sum("0.2500" in line for line in lines) == len(study.VARIANTS)
    assert np.isclose(float(row.split("|")[4]), 0.7 + 0.05 - min(study.LEARNING_RATES), atol=1e-3)
