"""The benchmark: its counts against the published figures, and that it measures what it says."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from unconceal import SrsConfig, SrsForImageSegmentation
from unconceal.evaluation.timing import (
    ENCODERS,
    MAX_BACKWARD_LENGTH,
    OPDS_POSTER_SIZE,
    RUN_RELEASE_SIZE,
    SRS_PAPER_SIZES,
    Case,
    cases_table,
    measure,
    opds_sizes,
    opds_sizes_table,
    ratios_table,
    resolutions_table,
    run_case,
    run_sizes,
    run_sizes_table,
    scan_multiply_adds,
    srs_sizes,
)
from unconceal.models.selective_scan import selective_scan
from unconceal.utils.errors import UserError


SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
benchmark_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark_script)


@pytest.fixture(scope="module")
def run_counts():
    return run_sizes()


@pytest.fixture(scope="module")
def counts():
    return srs_sizes()


def test_parameters_are_the_published_ones(counts):
    for part, (millions, _) in SRS_PAPER_SIZES.items():
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
        assert counts[part]["multiply_adds"] / 1e9 == pytest.approx(SRS_PAPER_SIZES[part][1], abs=6e-3), part
    # Two static convolutions of 256 to 256 channels at 32x32 instead of one; the little rest is the guidance.
    one = 256 * 256 * 9 * 32 * 32
    assert counts["S, dynamic convolution"]["multiply_adds"] == pytest.approx(2 * one, rel=1e-3)
    for part in ("S with its dynamic convolution", "inference: R's encoder and S"):
        assert (counts[part]["multiply_adds"] - one) / 1e9 == pytest.approx(SRS_PAPER_SIZES[part][1], abs=0.03), part


@pytest.mark.parametrize("encoder", ENCODERS)
def test_run_is_within_its_limits_with_its_scans(run_counts, encoder):
    parts = run_counts[encoder]
    beyond = parts["beyond the encoder"]
    assert beyond["parameters"] < 12e6
    assert beyond["multiply_adds"] < 40e9
    own = ("neck", "coarse head", "mask step", "background step", "stages")
    assert all(parts[part]["multiply_adds"] > 0 for part in own)
    for name in beyond:
        assert parts["whole"][name] == parts["encoder"][name] + beyond[name]
        assert beyond[name] == sum(parts[part][name] for part in own)
    # Rows, columns and back, over the whole map and over windows of 8: a side of 12 takes two of them.
    positions = sum(whole**2 + windows**2 for whole, windows in ((12, 16), (24, 24), (48, 48), (96, 96)))
    assert beyond["scan_multiply_adds"] == 4 * positions * 128 * (3 * 16 + 2)
    assert (
        parts["stages"]["multiply_adds"] > 1.3 * beyond["scan_multiply_adds"]
    )  # with the matrix products of the scans


def test_encoders_are_the_published_ones(run_counts):
    # Million parameters with a classifier of 1000 classes, as their papers count.
    for encoder, features, millions in (("ResNet-50", 2048, 25.6), ("PVTv2-B4", 512, 62.6)):
        parameters = run_counts[encoder]["encoder"]["parameters"] + 1000 * (features + 1)
        assert parameters / 1e6 == pytest.approx(millions, abs=0.06)


def test_counter_sees_one_of_the_four_multiply_adds_of_a_scan():
    # Outer products make three, a matrix product the fourth, and two more are for each channel only.
    assert scan_multiply_adds(length=5, channels=6, states=4) == 5 * 6 * (3 * 4 + 2)
    inputs = [(1, 32, 64), (1, 32, 64), (32, 8), (1, 4, 8, 64), (1, 4, 8, 64)]
    with FlopCounterMode(display=False) as counter:
        selective_scan(*(torch.empty(shape, device="meta") for shape in inputs))
    assert counter.get_total_flops() // 2 == 64 * 32 * 8


def test_opds_is_as_large_as_its_poster_says():
    counts = opds_sizes()
    millions, multiply_adds = OPDS_POSTER_SIZE
    whole = counts["OPDS"]["whole"]
    assert whole["parameters"] / 1e6 == pytest.approx(millions, rel=0.015)
    assert whole["multiply_adds"] / 1e9 == pytest.approx(multiply_adds, rel=0.015)
    for parts in counts.values():
        assert parts["encoder"]["parameters"] == 26_277_824
        assert parts["encoder"]["multiply_adds"] / 1e9 == pytest.approx(106.2, abs=0.05)
        for name in ("parameters", "multiply_adds"):
            assert parts["whole"][name] == parts["encoder"][name] + parts["decoder"][name]
    # The baseline is no cheaper than what it is compared with.
    single = counts["OPDS, single head"]["whole"]
    assert single["multiply_adds"] == pytest.approx(whole["multiply_adds"], rel=0.03)
    lines = opds_sizes_table(counts).splitlines()
    assert lines[2] == "| OPDS | whole | 28.084 M | 128.08 G |"
    assert lines[-1] == "| the poster | whole | 28 M | 129.2 G |"


def test_resolutions_stand_with_their_growth():
    results = [
        {"image_size": 1000, "dtype": "float32", "seconds": 1.0, "peak_gib": 1.0},
        {"image_size": 2000, "dtype": "float32", "seconds": 7.0, "peak_gib": 2.5},
        {"image_size": 1000, "dtype": "bfloat16", "error": "out of memory"},
    ]
    lines = resolutions_table(results).splitlines()[2:]
    assert lines[0] == "| float32 | 1000x1000 | 1000 | 1.00 GiB |  |  |"
    assert lines[1] == "| float32 | 2000x2000 | 7000 | 2.50 GiB | 2000 | 0.50 GiB |"
    assert lines[2].startswith("| bfloat16 | 1000x1000 | out of memory |")


@pytest.mark.slow
def test_a_case_in_its_own_process():
    ballast = torch.ones(2**28)  # 1 GiB, which the peak of the measured process must not contain
    result = run_case(Case("inference", 2, image_size=32, steps=1))
    assert ballast.sum() > 0
    assert 0.1 < result["peak_gib"] < 1
    assert result["images_per_second"] == pytest.approx(2 / result["seconds"])


@pytest.mark.parametrize("model", ["SRS", "RUN, ResNet-50", "OPDS"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_case(checkpointing, model):
    result = measure(Case("training", 1, image_size=64, checkpointing=checkpointing, steps=1, model=model))
    assert result["seconds"] > 0
    assert result["peak_gib"] > 0


def test_dynamic_conv_case():
    result = measure(Case("dynamic_conv", 2, image_size=32, dtype="bfloat16", steps=1))
    assert {"seconds", "seconds_ref", "seconds_backward", "seconds_backward_ref"} <= set(result)
    table = ratios_table("batch", {4: {**result, "seconds": 1.0, "seconds_ref": 1.5}, 8: {"error": "out of memory"}})
    assert "| 4 | 1.50 |" in table
    assert "| 8 | out of memory |  |" in table


@pytest.mark.parametrize("side", [4, 25])
def test_scan_case(side):
    result = measure(Case("scan", 2, image_size=side, steps=1))
    assert {"seconds", "seconds_ref"} <= set(result)
    assert ("seconds_backward_ref" in result) == (side**2 <= MAX_BACKWARD_LENGTH)
    assert ratios_table("length", {side**2: result}).splitlines()[-1].startswith(f"| {side**2} | ")


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
    lines = cases_table([{**row, "model": "RUN"} for row in rows], by_model=True).splitlines()
    assert lines[0] == "| model | task | batch | checkpointing | ms/image | relative | peak memory |"
    assert lines[2] == "| RUN | training | 8 | no | 250 | 1.00 | 2.00 GiB |"


def test_run_stands_beside_the_release(run_counts):
    lines = run_sizes_table(run_counts).splitlines()
    millions, multiply_adds = RUN_RELEASE_SIZE
    assert lines[-1] == f"| the authors' release | beyond the encoder | {millions} M | about {multiply_adds} G |  |"
    assert lines[3].startswith("| ResNet-50 | encoder | 23.508 M | ")


def test_script(tmp_path, capsys):
    file = tmp_path / "numbers.json"
    benchmark_script.main(["--only", "size", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "| R | 0.734 M | 0.734 M | 0.734 M | 5.43 G | 5.43 G |" in printed
    numbers = json.loads(file.read_text())
    assert numbers["size"]["R, encoder"]["parameters"] == 482_000
    assert numbers["command"].endswith(f"--only size --json {file}")


def test_script_for_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        benchmark_script,
        "run_case",
        lambda case: {**asdict(case), "seconds": 2.0, "seconds_ref": 3.0, "images_per_second": 0.5, "peak_gib": 1.0},
    )
    file = tmp_path / "numbers.json"
    benchmark_script.main(["run", "--only", "scan,speed", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "| 9216 | 1.50 |  |" in printed
    assert "| RUN, PVTv2-B4 | training | 1 | yes | 2000 | 1.00 | 1.00 GiB |" in printed
    numbers = json.loads(file.read_text())
    assert numbers["image_size"] == 384
    assert {result["image_size"] for result in numbers["speed"]} == {384}
    assert len(numbers["speed"]) == 6


def test_script_for_opds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        benchmark_script,
        "run_case",
        lambda case: {**asdict(case), "seconds": 2.0, "images_per_second": 0.5, "peak_gib": 1.0},
    )
    file = tmp_path / "numbers.json"
    benchmark_script.main(["opds", "--only", "resolution,speed", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "| bfloat16 | 2048x2048 | 2000 | 1.00 GiB | 0 | 0.00 GiB |" in printed
    assert "| OPDS, single head | training | 1 | yes | 2000 | 1.00 | 1.00 GiB |" in printed
    numbers = json.loads(file.read_text())
    sizes = [(case["dtype"], case["image_size"]) for case in numbers["resolution"]]
    assert sizes == [(dtype, size) for dtype in ("float32", "bfloat16") for size in (512, 1024, 2048)]


def test_an_output_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_script, "srs_sizes", lambda image_size: pytest.fail("measured"))
    (tmp_path / "file").touch()
    for file in (tmp_path / "file" / "numbers.json", tmp_path):
        with pytest.raises(UserError, match=str(tmp_path)):
            benchmark_script.main(["--only", "size", "--json", str(file)])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "size,sped"], "sped"),
        (["run", "--only", "memory"], "size,scan,speed"),
        (["--device", "nonsense"], "nonsense"),
        (["--image-size", "16"], "32"),
        (["--batch-sizes", "0"], "batch-sizes"),
        (["run", "--image-size", "63"], "64 or more.*got 63"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        benchmark_script.main(arguments)


def test_evaluation_is_measured(tmp_path, capsys):
    file = tmp_path / "numbers" / "evaluation.json"
    command = ["evaluation", "--images", "3", "--image-size", "96", "128", "--workers", "0", "1", "--json", str(file)]
    benchmark_script.main(command)
    report = json.loads(file.read_text())
    assert [each["metric_workers"] for each in report["workers"]] == [0, 1]
    assert all(each["seconds"] > 0 for each in report["workers"])
    assert report["results"]["num_images"] == 3
    assert 0 < report["results"]["f_measure_max"] < 1 and report["results"]["hce"] > 0
    assert max(report["distance"].values()) < 1e-6
    assert set(report["distance"]) == set(report["results"]) - {"num_images"}
    assert 0 < sum(each["share"] for each in report["profile"]) <= 1
    assert "| workers | time |" in capsys.readouterr().out


def test_evaluation_needs_both_folders():
    with pytest.raises(UserError, match="give both --predictions and --truth"):
        benchmark_script.main(["evaluation", "--predictions", "somewhere"])
