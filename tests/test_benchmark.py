"""The benchmark: counts against the published figures, and measurements that measure what they say."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace

import pytest
import torch
from common import rejected
from torch.utils.flop_counter import FlopCounterMode

from unconceal.__main__ import main
from unconceal.commands.benchmark import DEFAULTS, PARTS
from unconceal.evaluation import cost
from unconceal.evaluation.cost import MODELS, Measurement, Part, count_parts, measure, run_measurement
from unconceal.models.modeling_run import RunScan2d
from unconceal.models.selective_scan import selective_scan


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
    result = run_measurement(Measurement("scan", form="torch", image_size=4, steps=1))
    assert ballast.sum() > 0
    assert 0.1 < result["peak_gib"] < 1 and 0 <= result["own_gib"] < 0.1
    assert 0 < result["seconds"] <= result["first_seconds"]


@pytest.fixture
def hasty(monkeypatch, checkpoint):
    """Measure few steps of the smallest SRS; return its folder."""
    monkeypatch.setattr(cost, "LEAST_SECONDS", 0)
    monkeypatch.setattr(cost, "keep_freed_memory", lambda: None)  # would hold for the whole test process
    return str(checkpoint)


@pytest.mark.parametrize(
    "case",
    [
        Measurement("training", form="channels_last", image_size=32, gradient_checkpointing=True, steps=1),
        Measurement("training", form="plain", image_size=32, dtype="bfloat16", steps=1),
        Measurement("inference", form="plain", batch_size=2, image_size=32, steps=1),
        Measurement("inference", image_size=32, dtype="bfloat16", steps=1),
        *(Measurement(task, form="loop", image_size=4, steps=1) for task in ("scan", "scan-training")),
        Measurement("scan-training", form="torch", image_size=4, dtype="bfloat16", steps=1),
    ],
    ids=lambda case: f"{case.task}-{case.form}",
)
def test_networks_and_operators_are_measured(case, hasty):
    result = measure(replace(case, model=hasty))
    is_network = case.task in ("inference", "training")
    per_image = {"images_per_second", "ns_per_pixel"} if is_network else set()
    assert result.keys() - {"scan_share"} == {"seconds", "first_seconds", "peak_gib", "own_gib"} | per_image


def test_scans_of_run_are_timed(hasty):
    result = measure(Measurement("inference", "run", image_size=32, steps=1))
    assert 0 < result["scan_share"] < 1
    assert RunScan2d.scan.__name__ == "scan"


def test_plain_form_of_srs_has_the_arithmetic_of_the_paper(hasty, monkeypatch):
    images = []
    monkeypatch.setattr(cost, "srs_dynamic_conv_ref", lambda _, hidden, guidance: images.append(len(hidden)) or hidden)
    measure(Measurement("inference", hasty, "plain", batch_size=2, image_size=32, steps=1))
    assert images == [2, 2]
    measure(Measurement("inference", hasty, "inference", batch_size=2, image_size=32, steps=1))
    assert images == [2, 2]


@pytest.mark.slow
def test_photos_are_segmented_by_the_command(hasty):
    result = measure(Measurement("path", hasty, image_size=32, steps=1, num_photos=2))
    assert result["share_of_model"] > 0
    assert result["command_images_per_second"] == pytest.approx(2 / result["seconds"])


@pytest.mark.slow
def test_start_is_split(hasty):
    result = measure(Measurement("start", hasty, image_size=32, steps=1))
    assert min(result.values()) > 0
    assert result.keys() == {"seconds", "import_seconds", "loading_seconds", "mask_seconds"}


def test_memory_that_does_not_suffice_is_reported():
    error = run_measurement(Measurement("scan", form="torch", batch_size=2**20, image_size=2**14))["error"]
    assert re.fullmatch(r"out of memory: tried 1048576 of 16384x16384 pixels, [\d.]+ GiB were free", error)


@pytest.mark.parametrize(
    ("code", "stderr", "error"),
    [
        (-9, "", "out of memory: tried 1 of 256x256"),
        (1, "Traceback:\n  in f\nValueError: broken\n", "ValueError: broken"),
    ],
)
def test_failing_process_is_reported_in_one_line(code, stderr, error, monkeypatch):
    monkeypatch.setattr(cost.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, "", stderr))
    assert run_measurement(Measurement())["error"].startswith(error)


def test_missing_modes_are_named(monkeypatch):
    monkeypatch.setattr(cost, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(cost, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    skipped = [
        run_measurement(Measurement(**options))["skipped"]
        for options in ({"dtype": "bfloat16"}, {"form": "onnx"}, {"form": "triton"}, {"device": "cuda"})
    ]
    assert skipped == ["cpu has no bfloat16 of its own", "onnx is not installed", "triton is not installed", "no CUDA"]


@pytest.fixture
def pretended(monkeypatch):
    """Let every measurement have a time of its own."""
    seconds = {("plain", "float32"): 1.0, ("inference", "float32"): 0.3, ("inference", "bfloat16"): 0.3}
    asked = []

    def pretend(case: Measurement) -> dict:
        asked.append(case)
        if case.batch_size == 64:
            return {**asdict(case), "error": "out of memory"}
        if case.form == "onnx":
            return {**asdict(case), "skipped": "onnx is not installed"}
        time = seconds.get((case.form, case.dtype), 1.0) * case.batch_size / asked.count(case)
        measured = {"seconds": time, "first_seconds": 9.0, "peak_gib": 1.0, "own_gib": 0.5, "ns_per_pixel": 1.0}
        return {**asdict(case), **measured, "loop_share": 0.8, "data_wait_share": 0.0, "share_of_model": 0.9}

    monkeypatch.setattr(cost, "run_measurement", pretend)
    monkeypatch.setattr(cost, "count_parts", lambda *_: [Part("encoder", 482_000, 1_580_000_000, (0.482, 1.58))])
    return asked


def test_the_command_prints_tables_and_writes_json(tmp_path, pretended, capsys):
    file = tmp_path / "numbers.json"
    arguments = ["srs", "--batch-sizes", "8", "64", "--onnx", "--json", str(file), "--records", str(tmp_path / "cost")]
    assert main(["benchmark", *arguments]) == 1, "a measurement failed"
    printed = capsys.readouterr().out
    assert "| srs | 256x256 | encoder | 0.482 M | 0.482 M | 1.58 G | 1.58 G |" in printed
    assert "| srs | 256x256 | 8 | as trained, pages given back | 1000 | 1.00 | 9.0 s | 1.00 GiB |" in printed
    assert "| srs | 256x256 | 8 | for inference, bfloat16 | 300 | 0.30 | 9.0 s | 1.00 GiB |" in printed
    assert "| srs | 256x256 | 64 | for inference | out of memory |" in printed
    assert "| srs | 256x256 | 8 | ONNX | skipped: onnx is not installed |" in printed
    assert "| srs, batch 8, float32: time of the plain form | at most 0.4 | 0.3 | yes |" in printed
    assert "| srs, batch 8, bfloat16: time of the plain form | at most 0.27 | 0.3 | no |" in printed
    assert "| scan: memory of the loop | at most 0.333 | 1 | no |" in printed
    numbers = json.loads(file.read_text())
    assert numbers["command"].startswith("unconceal benchmark srs --batch-sizes 8 64")
    assert len(numbers["measurements"]) == len(pretended)
    record = json.loads((tmp_path / "cost-targets.json").read_text())
    assert record["numbers"] == numbers["targets"] and record["commit"] and record["hardware"]
    assert main(["benchmark", *arguments]) == 1, "its own files are not replaced"


def test_published_size_is_only_shown_for_the_published_network(pretended, checkpoint, capsys):
    main(["benchmark", str(checkpoint), "--only", "size"])
    assert "| encoder | 0.482 M | 1.58 G |" in capsys.readouterr().out


def test_failed_row_comes_first_and_empty_table_is_left_out(pretended, capsys):
    assert main(["benchmark", "segformer-b2", "--only", "inference", "growth", "--batch-sizes", "64", "8"]) == 1
    printed = capsys.readouterr().out
    assert "| segformer-b2 | 1024x1024 | 64 | as trained | out of memory |  |  |  |" in printed
    assert "| segformer-b2 | 1024x1024 | 8 | as trained | 1000 | 1.00 | " in printed
    assert "Growth" not in printed


def test_every_part_has_a_table_and_the_fastest_round_counts(tmp_path, pretended, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.touch()
    arguments = ["opds", "--rounds", "2", "--compile", "--recipes", str(recipe), "--only", *PARTS]
    assert main(["benchmark", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n## ") == len(PARTS) + 1
    assert "| opds | 1024x1024 | 1 | as trained, pages given back | 500 | 1.00 |" in printed
    assert "| mine: rate of the loop, share of the network's | at least 0.9 | 0.8 | no |" in printed
    assert {case.form for case in pretended} >= {"plain", "inference", "compiled", "channels_last", "loop", "torch"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sars"], "sars.*expected some of srs"),
        (["--device", "nonsense"], "nonsense"),
        (["--image-size", "16"], "at least 128"),
        (["--json", "."], "give another file"),
        (["--only", "recipes"], "give files of recipes"),
        (["--records", "mine"], "mine-growth.json is no record; give another prefix"),
        (["damaged"], "cannot load the settings of damaged"),
    ],
)
def test_bad_arguments_are_rejected_before_the_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine-growth.json").write_text('{"title": "of a user"}')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "preprocessor_config.json").write_text("[]")
    with rejected(message):
        main(["benchmark", *arguments])
    assert capsys.readouterr().out == ""
    assert (tmp_path / "mine-growth.json").read_text() == '{"title": "of a user"}'


def test_damaged_settings_of_a_network_are_one_line(checkpoint, tmp_path):
    shutil.copy(checkpoint / "preprocessor_config.json", tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with rejected("cannot load the settings of"):
        main(["benchmark", str(tmp_path), "--only", "size", "--image-size", "128"])
