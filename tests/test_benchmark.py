"""The benchmark: counts against the published figures, and measurements that measure what they say."""

import json
from dataclasses import asdict

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from unconceal.__main__ import main
from unconceal.commands.benchmark import DEFAULTS
from unconceal.evaluation import cost
from unconceal.evaluation.cost import MODELS, Measurement, Part, count_parts, measure, run_measurement
from unconceal.models.selective_scan import selective_scan
from unconceal.utils.errors import UserError


def test_the_command_lists_the_models_that_can_be_measured():
    assert list(DEFAULTS) == list(MODELS)


def test_srs_has_the_published_size():
    parts = {part.name: part for part in count_parts("srs", 256)}
    parameters = [part.parameters for part in parts.values()]
    assert parameters == [734_250, 482_000, 9_874_220, 1_184_930, 482_000 + 9_874_220]
    for part in parts.values():
        # Two static convolutions of 256 to 256 channels at 32x32 instead of one. The small rest is the guidance.
        second = 0 if part.name in ("reconstruction network", "its encoder") else 256 * 256 * 9 * 32 * 32
        assert (part.multiply_adds - second) / 1e9 == pytest.approx(part.published[1], abs=0.03), part.name


def test_opds_has_the_published_size():
    whole, encoder, decoder = count_parts("opds", 1024)
    assert whole.parameters / 1e6 == pytest.approx(whole.published[0], rel=0.015)
    assert whole.multiply_adds / 1e9 == pytest.approx(whole.published[1], rel=0.015)
    assert encoder.parameters == 26_277_824
    assert whole.multiply_adds == encoder.multiply_adds + decoder.multiply_adds
    # The baseline is no cheaper than the network it is compared with.
    assert count_parts("opds-single-head", 1024)[0].multiply_adds == pytest.approx(whole.multiply_adds, rel=0.03)


@pytest.mark.parametrize(("model", "features", "millions"), [("run", 2048, 25.6), ("run-pvtv2-b4", 512, 62.6)])
def test_encoders_and_scans_of_run_are_counted(model, features, millions, monkeypatch):
    scans = []
    monkeypatch.setattr(cost, "scan_multiply_adds", lambda length, *_: scans.append(length) or 0)
    encoder = count_parts(model, 384)[1]
    # Papers count the classifier of 1000 classes, too.
    assert (encoder.parameters + 1000 * (features + 1)) / 1e6 == pytest.approx(millions, abs=0.06)
    # Over windows of 8 and over the whole map. A side of 12 takes two windows.
    assert scans == [side**2 for side in (16, 12, 24, 24, 48, 48, 96, 96)]


def test_counter_sees_one_of_the_four_multiply_adds_of_a_scan():
    assert cost.scan_multiply_adds(length=5, channels=6, states=4) == 5 * 6 * (3 * 4 + 2)
    inputs = [(1, 32, 64), (1, 32, 64), (32, 8), (1, 4, 8, 64), (1, 4, 8, 64)]
    with FlopCounterMode(display=False) as counter:
        selective_scan(*(torch.empty(shape, device="meta") for shape in inputs))
    assert counter.get_total_flops() // 2 == 64 * 32 * 8


def test_peak_memory_is_that_of_the_measured_process():
    ballast = torch.ones(2**28)  # 1 GiB in this process
    result = run_measurement(Measurement("scan", image_size=4, steps=1))
    assert ballast.sum() > 0
    assert 0.1 < result["peak_gib"] < 1
    assert result["seconds"] > 0


@pytest.mark.parametrize(
    "case",
    [
        Measurement("training", image_size=64, gradient_checkpointing=True, steps=1),
        Measurement("inference", "opds", image_size=64, dtype="bfloat16", steps=1),
        Measurement("dynamic_conv", batch_size=2, image_size=32, steps=1),
        Measurement("scan", image_size=4, steps=1),
    ],
    ids=lambda case: case.task,
)
def test_networks_and_operators_are_measured(case):
    is_operator = case.task in ("dynamic_conv", "scan")
    assert measure(case).keys() == {"seconds", "peak_gib", *(["seconds_ref"] if is_operator else [])}


def test_the_command_prints_tables_and_writes_json(tmp_path, monkeypatch, capsys):
    def pretend(case: Measurement) -> dict:
        if case.batch_size == 64:
            return {**asdict(case), "error": "out of memory"}
        return {**asdict(case), "seconds": 0.5 * case.batch_size, "seconds_ref": 1.0, "peak_gib": 1.0}

    monkeypatch.setattr(cost, "run_measurement", pretend)
    monkeypatch.setattr(cost, "count_parts", lambda *_: [Part("encoder", 482_000, 1_580_000_000, (0.482, 1.58))])
    file = tmp_path / "numbers.json"
    main(["benchmark", "srs", "--batch-sizes", "1", "64", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "| srs | encoder | 0.482 M | 1.58 G | 0.482 M | 1.58 G |" in printed
    assert "| srs | 256x256 | training, gradient checkpointing | 1 | 500 | 1.00 | 1.00 GiB |" in printed
    assert "| srs | 256x256 | inference | 64 | out of memory |  |  |" in printed
    assert "| selective scan, length 576 | 2.00 |" in printed
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
