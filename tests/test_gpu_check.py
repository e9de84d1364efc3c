"""`scripts/gpu_check.sh`, at tiny sizes on the CPU."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[1]


@pytest.fixture
def module():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts/gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(part="scan", out=tmp_path, device=torch.device("cpu"), quick=True)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "gpu_check.jsonl").read_text().splitlines()]


@pytest.mark.thorough
def test_every_part_runs_and_reports(module, tmp_path):
    command = [ROOT / "scripts/gpu_check.sh", "--device", "cpu", "--quick", tmp_path]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert [part for part in module.PARTS if part in {row["part"] for row in rows}] == list(module.PARTS)
    ran = {row["part"] for row in rows if row["status"] == "ok"}
    assert ran >= set(module.PARTS) - {"tests"}
    assert {row["status"] for row in rows} == {"ok", "skipped"}
    assert rows_by_check(rows)["srs, fp16"]["measured"] == "needs CUDA"
    expected = "ok" if importlib.util.find_spec("triton") else "skipped"
    assert rows_by_check(rows)["triton, length 21, float32"]["status"] == expected
    table = (tmp_path / "gpu_check.md").read_text()
    assert all(f"## {part}\n" in table for part in module.PARTS)
    assert table.removeprefix("# GPU check\n\n").strip() in done.stdout


def rows_by_check(rows):
    return {row["check"]: row for row in rows}


@pytest.mark.parametrize(
    ("code", "seconds", "reason"),
    [
        ("raise SystemExit(3)", 60, "the process ended with code 3"),
        ("import time; time.sleep(600)", 0.2, "stopped after"),
    ],
)
def test_a_part_that_breaks_or_hangs_is_a_failure(module, args, monkeypatch, tmp_path, code, seconds, reason):
    program = tmp_path / "part.py"
    program.write_text(code)
    monkeypatch.setattr(module, "__file__", str(program))
    module.run_part(args, seconds)
    (row,) = rows_of(tmp_path)
    assert (row["part"], row["status"]) == ("scan", "failed") and row["measured"].startswith(reason)


def test_wrong_numbers_fail_and_other_checks_go_on(module, args, monkeypatch, capsys):
    monkeypatch.setattr(
        module.scan, "selective_scan", lambda *inputs, backend: 2 * module.scan.selective_scan_ref(*inputs)
    )
    monkeypatch.setattr(module, "measure", lambda case: 1 / 0)
    module.run_scan(args)
    rows = rows_by_check(rows_of(args.out))
    assert rows["torch, length 21, float32"]["status"] == "failed"
    assert rows["scan, loop, length 4"]["measured"] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(("error", "expected"), [(1e-3, "ok"), (1e-2, "failed"), (float("nan"), "failed")])
def test_masks_are_compared_with_the_yardstick(module, error, expected):
    row = {}
    exact = torch.full((2, 1, 4, 4), 0.5)
    module.compare(row, exact + error, exact, yardstick=1e-3)
    assert row["status"] == expected


def test_every_target_is_measured_and_a_missed_one_is_no_failure(module, args, monkeypatch):
    numbers = {"images_per_second": 399.0, "own_gib": 1.0, "first_seconds": 1.0}
    monkeypatch.setattr(module, "measure", lambda case: dict(numbers))
    monkeypatch.setattr(module, "missing_mode", lambda case: None)
    monkeypatch.setattr(module.scan, "BACKEND", None)
    args.part, args.quick = "speed", False
    module.run_speed(args)
    rows = rows_by_check(rows_of(args.out))
    for form in ("inference", "compiled"):
        assert rows[f"opds 1024x1024, batch 8, inference, {form}"]["status"] == "ok"
        assert rows[f"run 384x384, batch 8, inference, {form}"]["status"] == "missed"
        assert rows[f"srs 256x256, batch 16, inference, {form}"]["wanted"] == "at least 800 images/s"
    assert rows["run 384x384, batch 8, inference, inference, scan by triton"]["status"] == "skipped"
