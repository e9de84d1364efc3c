"""Variants of RUN in scripts/study_run.py, and of SRS in scripts/study_srs.py."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from common import SMALLEST_SRS

from unconceal import SrsConfig, SrsForImageSegmentation
from unconceal.data.builders import build_synthetic


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


study, study_srs = load_script("study_run"), load_script("study_srs")

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


def write_results(folder, dice_of):
    """Write results of all jobs, with two images each; `dice_of` gives the mean Dice of a job."""
    for name in study.VARIANTS:
        for seed in range(2):
            for rate in study.LEARNING_RATES:
                job = (name, 100, seed, rate)
                rows = [[dice_of(*job) + change, 0.5, 0.1] for change in (-0.1, 0.1)]
                result = {"job": job, "parameters": 1e6, "multiply_adds": 2e9}
                result |= {"held_out_images": rows, "validation_images": rows}
                maps = ("M_{k-1}", "1 - s_{k-1}", "M^_k", "M_k")
                result["held_out_stages"] = {f"1 {key}": 0.25 for key in maps}
                study.result_path(folder, job).write_text(json.dumps(result))


@pytest.fixture
def small_study(monkeypatch):
    monkeypatch.setattr(study, "LABELS", {100: (10, 2)})
    monkeypatch.setattr(study, "TUNING_SEEDS", {100: 1})


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["study_run.py", *map(str, arguments)])
    study.main()


def test_table_pairs_seeds(small_study, tmp_path, monkeypatch, capsys):
    """RUN is 0.05 better with one seed and 0.15 with the other."""
    best = study.LEARNING_RATES[1]
    write_results(tmp_path, lambda name, _, seed, rate: 0.5 + (0.05 + 0.1 * seed) * (name == "share") + (rate == best))
    assert {job[3] for job in study.final_jobs(tmp_path, 100)} == {best}
    run(monkeypatch, "table", "--out", tmp_path, "--validation")
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("| RUN, taught background |"))
    # Student's t of one degree of freedom is 12.706, the standard error 0.05; both images gain as much.
    assert "| +0.100 ± 0.635 | ± 0.000 |" in row
    assert "| 2.00 G | 1.600 |" in row
    assert sum("0.2500" in line for line in lines) == len(study.VARIANTS)


def test_validation_images_are_scored_when_all_runs_are_done(small_study, tmp_path, monkeypatch, capsys):
    write_results(tmp_path, lambda *_: 0.5)
    study.result_path(tmp_path, study.final_jobs(tmp_path, 100)[-1]).unlink()
    run(monkeypatch, "table", "--out", tmp_path)
    assert "1 runs are missing" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="when no run is missing"):
        run(monkeypatch, "table", "--out", tmp_path, "--validation")


def test_a_failed_job_can_be_run_again(small_study, tmp_path, monkeypatch):
    jobs, calls = [("share", 100, 0, 0.1)], []

    def train(*job):
        calls.append(job)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return {"held_out_images": [[0.5, 0.5, 0.1]], "seconds": 1}

    monkeypatch.setattr(study, "train_variant", train)
    with pytest.raises(KeyboardInterrupt):
        study.run_jobs(tmp_path, jobs)
    for _ in range(2):
        study.run_jobs(tmp_path, jobs)
    assert len(calls) == 2
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


# SRS


def test_variants_of_srs_differ_in_their_guidance_alone():
    images, logits = torch.randn(2, 3, 32, 32), {}
    for name in study_srs.VARIANTS:
        torch.manual_seed(0)
        with study_srs.variant_networks(name):
            model = SrsForImageSegmentation(SrsConfig(**SMALLEST_SRS)).eval()
        conv = model.dynamic_conv
        torch.nn.init.normal_(conv.project.bias)
        logits[name] = model(images).logits
        features = torch.ones(2, conv.static_conv.in_channels, 4, 4)
        one, other = conv(features, torch.rand(2, conv.project.in_channels, 4, 4))
        assert torch.equal(one, other) == (name in ("constant", "plain"))
    assert torch.equal(logits["trained"], logits["random"])  # one network; only R's training differs
    assert not torch.equal(logits["trained"], logits["constant"])
    assert not torch.equal(logits["constant"], logits["plain"])
    assert study_srs.modeling_srs.SrsDynamicConv is study_srs.SrsDynamicConv  # as before


@pytest.mark.usefixtures("without_pictures")
def test_study_of_srs_from_recipe_to_table(tmp_path, capsys, monkeypatch):
    build_synthetic("infrared", tmp_path / "data", {"train": 4, "val": 3}, size=32)
    recipe = {
        "network": "srs",
        "model": SMALLEST_SRS,
        "data": {"path": str(tmp_path / "data"), "num_workers": 0},
        "processor": {"size": {"height": 32, "width": 32}},
        "phases": {name: {"epochs": 1, "batch_size": 2} for name in ("reconstruction", "segmentation")},
        "protocol": "infrared",
    }
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(recipe))

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["study_srs.py", *words])
        capsys.readouterr()
        study_srs.main()
        return capsys.readouterr().out

    assert run("run", str(file), "--seeds", "0", "1", "--out", str(out)).count("'iou'") == 8
    assert run("run", str(file), "--seeds", "0", "--out", str(out)) == ""  # done
    table = run("table", "--out", str(out))
    for title in ("R trained", "R trained, mean guidance", "R random, other guidance", "plain convolution"):
        assert f"| {title} | 2 |" in table
    result, random = (json.loads((out / f"{name}-0.json").read_text()) for name in ("trained", "random"))
    plain = [json.loads((out / f"plain-{seed}.json").read_text())["images"] for seed in (0, 1)]
    trained = [json.loads((out / f"trained-{seed}.json").read_text())["images"] for seed in (0, 1)]
    assert np.shape(trained) == (2, 3)
    assert f"| {study_srs.difference(np.mean(trained, axis=0) - np.mean(plain, axis=0))} |" in table
    assert 0 <= result["variation"] <= 1.5
    assert random["variation"] != result["variation"]
    assert (out / "r-0" / "reconstruction" / "best").is_dir()

    best = str(out / "trained-0" / "segmentation" / "best")
    again = json.loads(run("network", best, "--data", str(tmp_path / "data"), "--protocol", "infrared"))
    assert again == {key: result[key] for key in again}
    assert {"scores", "variation", "mean guidance", "other guidance"} < set(again)


def test_kernels_vary_as_far_as_their_scales():
    conv = study_srs.SrsDynamicConv(8, 4, 2)
    torch.nn.init.ones_(conv.static_conv.weight)
    torch.nn.init.ones_(conv.scaled_conv.weight)
    scales = torch.tensor([[0.0], [2.0]]).expand(2, 4)  # kernels of 1 and 3, so 2 +- 1
    assert study_srs.kernel_variation(conv, scales) == pytest.approx(0.5)
    assert study_srs.kernel_variation(conv, scales[:1]) == 0
