"""The benchmark: counts against the published figures, and measurements that measure what they say."""

import json
from dataclasses import asdict

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from unconceal import SrsConfig, SrsForImageSegmentation
from unconceal.__main__ import main
from unconceal.commands.benchmark import DEFAULTS
from unconceal.evaluation import cost
from unconceal.evaluation.cost import (
    MAX_BACKWARD_LENGTH,
    MODELS,
    Measurement,
    count_parts,
    measure,
    run_measurement,
    scan_multiply_adds,
)
from unconceal.models.selective_scan import selective_scan
from unconceal.utils.errors import UserError


def test_the_command_lists_the_models_that_can_be_measured():
    assert list(DEFAULTS) == list(MODELS)


def test_srs_has_the_published_size():
    parts = {part.name: part for part in count_parts("srs", 256)}
    for part in parts.values():
        if part.published[0] is not None:
            assert part.parameters / 1e6 == pytest.approx(part.published[0], abs=6e-3), part.name
    assert parts["inference: encoder and segmentation"].parameters == (
        SrsForImageSegmentation(SrsConfig()).num_parameters()
    )
    for name in ("reconstruction network", "its encoder"):
        assert parts[name].multiply_adds / 1e9 == pytest.approx(parts[name].published[1], abs=6e-3), name
    # Two static convolutions of 256 to 256 channels at 32x32 instead of one. The small rest is the guidance.
    one = 256 * 256 * 9 * 32 * 32
    assert parts["its dynamic convolution"].multiply_adds == pytest.approx(2 * one, rel=1e-3)
    for name in ("segmentation network", "inference: encoder and segmentation"):
        part = parts[name]
        assert (part.multiply_adds - one) / 1e9 == pytest.approx(part.published[1], abs=0.03), name


def test_opds_has_the_published_size():
    whole, encoder, decoder = count_parts("opds", 1024)
    assert whole.parameters / 1e6 == pytest.approx(whole.published[0], rel=0.015)
    assert whole.multiply_adds / 1e9 == pytest.approx(whole.published[1], rel=0.015)
    assert encoder.parameters == 26_277_824
    assert whole.multiply_adds == encoder.multiply_adds + decoder.multiply_adds
    # The baseline is no cheaper than the network it is compared with.
    assert count_parts("opds-single-head", 1024)[0].multiply_adds == pytest.approx(whole.multiply_adds, rel=0.03)


@pytest.mark.parametrize(("model", "features", "millions"), [("run", 2048, 25.6), ("run-pvtv2-b4", 512, 62.6)])
def test_encoders_of_run_have_the_published_size(model, features, millions):
    encoder = count_parts(model, 384)[1]
    # Papers count the classifier of 1000 classes, too.
    assert (encoder.parameters + 1000 * (features + 1)) / 1e6 == pytest.approx(millions, abs=0.06)


def test_multiply_adds_of_run_include_its_scans(monkeypatch):
    with_scans = count_parts("run", 384)[0].multiply_adds
    monkeypatch.setattr(cost, "scan_multiply_adds", lambda *_: 0)
    # Over the whole map and over windows of 8, in four directions. A side of 12 takes two windows.
    positions = sum(whole**2 + windows**2 for whole, windows in ((12, 16), (24, 24), (48, 48), (96, 96)))
    assert with_scans - count_parts("run", 384)[0].multiply_adds == 4 * positions * 128 * (3 * 16 + 2)


def test_counter_sees_one_of_the_four_multiply_adds_of_a_scan():
    assert scan_multiply_adds(length=5, channels=6, states=4) == 5 * 6 * (3 * 4 + 2)
    inputs = [(1, 32, 64), (1, 32, 64), (32, 8), (1, 4, 8, 64), (1, 4, 8, 64)]
    with FlopCounterMode(display=False) as counter:
        selective_scan(*(torch.empty(shape, device="meta") for shape in inputs))
    assert counter.get_total_flops() // 2 == 64 * 32 * 8


@pytest.mark.slow
def test_peak_memory_is_that_of_the_measured_process():
    ballast = torch.ones(2**28)  # 1 GiB in this process
    result = run_measurement(Measurement("inference", batch_size=2, image_size=32, steps=1))
    assert ballast.sum() > 0
    assert 0.1 < result["peak_gib"] < 1
    assert result["seconds"] > 0


@pytest.mark.parametrize("model", ["srs", "run", "opds"])
def test_training_is_measured(model):
    result = measure(Measurement("training", model, image_size=64, gradient_checkpointing=model == "srs", steps=1))
    assert result.keys() == {"seconds", "peak_gib"}


@pytest.mark.parametrize(("task", "side"), [("dynamic_conv", 32), ("scan", 4), ("scan", 25)])
def test_operators_are_measured_with_their_reference(task, side):
    result = measure(Measurement(task, batch_size=2, image_size=side, steps=1))
    assert {"seconds", "seconds_ref"} <= result.keys()
    assert ("seconds_backward_ref" in result) == (task == "dynamic_conv" or side**2 <= MAX_BACKWARD_LENGTH)


def test_the_command_prints_tables_and_writes_json(tmp_path, monkeypatch, capsys):
    def pretend(case: Measurement) -> dict:
        if case.batch_size == 64:
            return {**asdict(case), "error": "out of memory"}
        return {**asdict(case), "seconds": 0.5 * case.batch_size, "seconds_ref": 1.0, "peak_gib": 1.0}

    monkeypatch.setattr(cost, "run_measurement", pretend)
    file = tmp_path / "numbers.json"
    main(["benchmark", "srs", "--batch-sizes", "1", "64", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "| srs | reconstruction network | 0.734 M | 5.43 G | 0.734 M | 5.43 G |" in printed
    assert "| srs | 256x256 | training, gradient checkpointing | 1 | 500 | 1.00 | 1.00 GiB |" in printed
    assert "| srs | 256x256 | inference | 64 | out of memory |  |  |" in printed
    assert "| selective scan, length 576 | 2.00 |  |" in printed
    numbers = json.loads(file.read_text())
    assert len(numbers["networks"]) == 6
    assert numbers["command"] == f"unconceal benchmark srs --batch-sizes 1 64 --json {file}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sars"], "sars.*expected some of srs"),
        (["--device", "nonsense"], "nonsense"),
        (["--image-size", "16"], "at least 128"),
        (["--json", "."], "give a file"),
    ],
)
def test_bad_arguments_are_rejected_before_the_work(arguments, message, capsys):
    with pytest.raises(UserError, match=message):
        main(["benchmark", *arguments])
    assert capsys.readouterr().out == ""
