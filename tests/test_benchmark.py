"""The benchmark: its counts against the published figures, and that it measures what it says."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from unconceal import SrsConfig, SrsForImageSegmentation
from unconceal.benchmark import PAPER_SIZES, Case, cases_table, dynamic_conv_table, measure, run_case, sizes
from unconceal.errors import UserError


SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
benchmark_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark_script)


@pytest.fixture(scope="module")
def counts():
    return sizes()


def test_parameters_are_the_published_ones(counts):
    for part, (millions, _) in PAPER_SIZES.items():
        if millions is not None:
            assert counts[part]["parameters"] / 1e6 == pytest.approx(millions, abs=6e-3), part
    assert counts["S, dynamic convolution"]["parameters"] == 1_184_930
    assert counts["R, encoder"]["parameters"] == 482_000
    total = counts["inference: R's encoder and S"]
    assert total["parameters"] - total["trainable"] == 482_000  # R's encoder is frozen
    model = SrsForImageSegmentation(SrsConfig())
    assert total["parameters"] == model.num_parameters()


def test_multiply_adds_are_the_published_ones_but_for_the_identity(counts):
    for part in ("R", "R, encoder"):
        assert counts[part]["multiply_adds"] / 1e9 == pytest.approx(PAPER_SIZES[part][1], abs=6e-3), part
    # Two static convolutions of 256 to 256 channels at 32x32 instead of one; the little rest is the guidance.
    one = 256 * 256 * 9 * 32 * 32
    assert counts["S, dynamic convolution"]["multiply_adds"] == pytest.approx(2 * one, rel=1e-3)
    for part in ("S with its dynamic convolution", "inference: R's encoder and S"):
        assert (counts[part]["multiply_adds"] - one) / 1e9 == pytest.approx(PAPER_SIZES[part][1], abs=0.03), part


@pytest.mark.slow
def test_a_case_in_its_own_process():
    ballast = torch.ones(2**28)  # 1 GiB, which the peak of the measured process must not contain
    result = run_case(Case("inference", 2, image_size=32, steps=1))
    assert ballast.sum() > 0
    assert 0.1 < result["peak_gib"] < 1
    assert result["images_per_second"] == pytest.approx(2 / result["seconds"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_case(checkpointing):
    result = measure(Case("training", 1, image_size=32, checkpointing=checkpointing, steps=1))
    assert result["seconds"] > 0
    assert result["peak_gib"] > 0


def test_dynamic_conv_case():
    result = measure(Case("dynamic_conv", 2, image_size=32, dtype="bfloat16", steps=1))
    assert {"seconds", "seconds_ref", "seconds_backward", "seconds_backward_ref"} <= set(result)
    table = dynamic_conv_table([{"batch_size": 4, **result, "seconds": 1.0, "seconds_ref": 1.5}])
    assert "| 4 | 1.50 |" in table


def test_speeds_stand_relative_to_the_first_of_their_task():
    case = {"task": "training", "batch_size": 8, "checkpointing": False}
    rows = [
        {**case, "images_per_second": 4.0, "peak_gib": 2.0},
        {**case, "images_per_second": 3.0, "peak_gib": 1.0, "checkpointing": True},
        {**case, "batch_size": 64, "error": "out of memory"},
    ]
    lines = cases_table(rows).splitlines()[2:]
    assert lines[0] == "| training | 8 | no | 4.00 | 1.00 | 2.00 GiB |"
    assert lines[1] == "| training | 8 | yes | 3.00 | 0.75 | 1.00 GiB |"
    assert "out of memory" in lines[2]


def test_script(tmp_path, capsys):
    file = tmp_path / "numbers.json"
    benchmark_script.main(["--only", "size", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "| R | 0.734 M | 0.734 M | 0.734 M | 5.43 G | 5.43 G |" in printed
    numbers = json.loads(file.read_text())
    assert numbers["size"]["R, encoder"]["parameters"] == 482_000
    assert numbers["command"].endswith(f"--only size --json {file}")


def test_an_output_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_script, "sizes", lambda image_size: pytest.fail("measured"))
    (tmp_path / "file").touch()
    for file in (tmp_path / "file" / "numbers.json", tmp_path):
        with pytest.raises(UserError, match=str(tmp_path)):
            benchmark_script.main(["--only", "size", "--json", str(file)])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "size,sped"], "sped"),
        (["--device", "nonsense"], "nonsense"),
        (["--image-size", "16"], "32"),
        (["--batch-sizes", "0"], "batch-sizes"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        benchmark_script.main(arguments)
