"""The training loop, from the command line and from Python."""

import io
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from common import TWO_PROCESSES, rejected
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageSegmentation,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)
from transformers.utils import is_timm_available

from unconceal import OpdsConfig, RunForImageSegmentation, SrsConfig, SrsForImageSegmentation, SrsForReconstruction
from unconceal.__main__ import main
from unconceal.data.builders import build_synthetic
from unconceal.data.loading import contents_digest, load_splits
from unconceal.data.transforms import TrainingSet
from unconceal.data.write import make_row, write_splits
from unconceal.evaluation.protocols import PROTOCOLS
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor
from unconceal.training import loop
from unconceal.training.checkpoints import (
    Progress,
    find_checkpoint,
    next_of,
    read_progress,
    read_record,
    rotate,
)
from unconceal.training.earlier_run import alone_in, set_aside
from unconceal.training.logs import EpochMeter, RunLog
from unconceal.training.loop import train
from unconceal.training.recipe import OptimizerRecipe, ScheduleRecipe, load_recipe
from unconceal.training.saving import parse_interval
from unconceal.training.seeds import summarize_seeds, train_seeds
from unconceal.training.speed import measure_recipe
from unconceal.training.start import (
    build_config,
    build_model,
    build_processor,
    check_masks,
    check_start,
    claim_folder,
    load_backbone,
    load_data,
)
from unconceal.training.trial import try_recipe
from unconceal.utils.devices import gains_from_bfloat16
from unconceal.utils.digests import weights_digest
from unconceal.utils.errors import UserError
from unconceal.utils.files import file_sha256


pytestmark = pytest.mark.usefixtures("without_pictures")
ROOT = Path(__file__).parents[1]
TIMES = ("seconds", "total_seconds", "samples_per_second", "data_wait_share", "first_step_seconds")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Return a data set of 10 and 3 images, not multiples of a batch of 4."""
    folder = tmp_path_factory.mktemp("scenes") / "data"
    build_synthetic("ultrasound", folder, {"train": 10, "val": 3}, size=48)
    return folder


@pytest.fixture
def recipe_file(tmp_path, scenes):
    """Return a recipe that trains both phases in seconds."""
    recipe = yaml.safe_load((ROOT / "configs/srs/smoke.yaml").read_text())
    recipe |= {"output_dir": str(tmp_path / "run"), "mixed_precision": "no"}
    recipe["data"] = {"path": str(scenes), "num_workers": 0}
    recipe["processor"] = {"size": {"height": 32, "width": 32}}
    for phase in recipe["phases"].values():
        phase["batch_size"] = 4
    recipe["phases"]["reconstruction"]["epochs"] = 1
    recipe["phases"]["segmentation"]["epochs"] = 2
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def history(folder):
    """Return the epochs of a checkpoint without the times."""
    rows = json.loads((folder / "progress.json").read_text())["history"]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def run_train(*command):
    options = {"env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *map(str, command)], timeout=500, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights_of(folder):
    return AutoModel.from_pretrained(folder).state_dict()


def assert_equal_weights(folder, other):
    ours, theirs = weights_of(folder), weights_of(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def train_until(epoch, recipe):
    """Train, and stop before a phase's given epoch is finished."""
    original = loop.train_epoch

    def train_epoch(*arguments):
        if arguments[4].epoch + 1 == epoch:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_epoch", train_epoch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)


def test_two_phases_leave_checkpoints_that_auto_classes_open(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    best = train(recipe)
    run = tmp_path / "run"
    assert best == run / "segmentation" / "best"
    assert type(AutoModel.from_pretrained(run / "reconstruction" / "last")) is SrsForReconstruction
    for name in ("best", "last"):
        model = AutoModelForImageSegmentation.from_pretrained(run / "segmentation" / name)
        assert type(model) is SrsForImageSegmentation
    # Phase 2 holds the encoder of phase 1's best checkpoint, unchanged, running statistics included.
    first = SrsForReconstruction.from_pretrained(run / "reconstruction" / "best").state_dict()
    second = model.state_dict()
    names = [name for name in second if name.startswith("reconstruction_encoder.")]
    assert names and all(torch.equal(first[name], second[name]) for name in names)
    # The record beside the weights says so.
    record = read_record(best)
    assert record["recipe"] == asdict(recipe)
    assert [(one["path"], one["from_hub"], one["license"]) for one in record["data"]] == [
        (recipe.data.path, False, "apache-2.0")
    ]
    assert record["data"][0]["images"].keys() == {"train", "val"}
    assert [session["mixed_precision"] for session in record["sessions"]] == ["no"]
    assert record["weights"] == weights_digest(AutoModel.from_pretrained(best))
    start = record["start"]
    assert (start["part"], start["source"]) == ("network", str(run / "reconstruction" / "best"))
    assert 0 < start["num_random"] < len(second)
    assert start["before"] == read_record(run / "reconstruction" / "best") and start["before"]["start"] is None
    rows = history(run / "segmentation" / "last")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[0]["learning_rate"] > rows[-1]["learning_rate"] > 0
    assert {"eval_iou", "eval_niou", "eval_f1"} <= rows[-1].keys()
    assert list(run.glob("segmentation/events.out.tfevents.*")), "no TensorBoard log"


def test_resumed_run_equals_an_unbroken_one(recipe_file, scenes, tmp_path):
    build_synthetic("infrared", tmp_path / "more", {"train": 6}, size=48)
    settings = [
        f"data.path=[{scenes}, {tmp_path / 'more'}]",
        "data.weights=[1, 3]",
        "phases.segmentation.gradient_accumulation_steps=2",
        "phases.segmentation.ema_decay=0.9",
        "phases.segmentation.max_grad_norm=1.0",
        "phases.segmentation.evaluate_every=2",
        "phases.segmentation.epochs=3",
    ]
    unbroken = tmp_path / "unbroken"
    train(load_recipe(recipe_file, [*settings, f"output_dir={unbroken}"]))

    broken = load_recipe(recipe_file, [*settings, f"output_dir={tmp_path / 'broken'}"])
    train_until(2, broken)
    train(broken, resume=True)

    for phase in ("reconstruction", "segmentation"):
        assert history(tmp_path / "broken" / phase / "last") == history(unbroken / phase / "last")
    assert_equal_weights(tmp_path / "broken" / "segmentation" / "last", unbroken / "segmentation" / "last")
    assert history(unbroken / "segmentation" / "last")[-1]["eval_num_images"] == 3
    assert not list(tmp_path.glob("broken/segmentation/.*")), "something was left next to the checkpoints"


def stop_after(steps, recipe, **options):
    """Train until a step is asked for; return how many were done."""
    original, done = loop.train_step, 0

    def train_step(*arguments, **options):
        nonlocal done
        if done == steps:
            raise KeyboardInterrupt
        done += 1
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        try:
            train(recipe, **options)
        except KeyboardInterrupt:
            assert done == steps
    return done


def test_run_resumed_within_an_epoch_equals_an_unbroken_one(recipe_file, tmp_path, capsys):
    """Saved after each step of two batches; no saved batch is trained again."""
    settings = ["phases.segmentation.gradient_accumulation_steps=2", "phases.segmentation.batch_size=2"]
    settings += ["phases.segmentation.ema_decay=0.9", "save_every=1step"]
    unbroken, broken = (load_recipe(recipe_file, [*settings, f"output_dir={tmp_path / name}"]) for name in "ub")
    total = stop_after(-1, unbroken)  # 3 batches of phase 1, twice 5 of phase 2
    assert total == 13
    done = stop_after(2, broken)
    for steps in (3, 4, 3):
        done += stop_after(steps, broken, resume=True)
    capsys.readouterr()
    last = tmp_path / "b" / "segmentation" / "last"
    progress = json.loads((last / "progress.json").read_text())
    assert (progress["epoch"], progress["batches"], progress["step"]) == (1, 2, 4)
    assert len(progress["history"]) == 1 and len(progress["batch_losses"][0]) == 2
    done += stop_after(-1, broken, resume=True)
    assert "segmentation: resumed after epoch 1 and 2 batches" in capsys.readouterr().out
    assert total <= done <= total + 4  # at most one batch after each save is lost
    for phase in ("reconstruction", "segmentation"):
        assert history(tmp_path / "b" / phase / "last") == history(tmp_path / "u" / phase / "last")
        assert_equal_weights(tmp_path / "b" / phase / "last", tmp_path / "u" / phase / "last")
        names = {path.name for path in (tmp_path / "b" / phase).iterdir() if path.is_dir() and not path.name.isdigit()}
        assert {"best", "last", "last-1"} <= names and "last-2" not in names
        assert not [name for name in names if name.startswith(".")]


def test_random_layers_and_loader_processes_resume_exactly(scenes, tmp_path):
    """To start loader processes draws a random number, in an unbroken run only once."""
    backbone = {"model_type": "mscan_backbone", "hidden_sizes": [8] * 4, "depths": [1] * 4, "mlp_ratios": [2] * 4}
    recipe = {
        "network": "opds",
        "model": {
            "backbone_config": {**backbone, "drop_path_rate": 0.5},
            "decoder_hidden_sizes": [8] * 4,
            "num_bases": 2,
        },
        "data": {"path": str(scenes), "num_workers": 1},
        "processor": {"size": {"height": 32, "width": 32}},
        "phases": {"segmentation": {"epochs": 3, "batch_size": 4}},
        "save_every": "1step",
    }
    file = tmp_path / "opds.yaml"
    file.write_text(yaml.safe_dump(recipe))
    unbroken, broken = (load_recipe(file, [f"output_dir={tmp_path / name}"]) for name in "ub")
    assert stop_after(-1, unbroken) == 9
    for steps in (2, 3, -1):  # within the first epoch, and within the second
        stop_after(steps, broken, resume=True)
    last = [tmp_path / name / "segmentation" / "last" for name in "ub"]
    assert history(last[0]) == history(last[1])
    assert_equal_weights(*last)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10min", (600, "seconds")),
        ("0.5 h", (1800, "seconds")),
        ("30s", (30, "seconds")),
        ("1step", (1, "steps")),
        ("500steps", (500, "steps")),
        ("0s", None),
        ("10", None),
        ("1.5steps", None),
        ("-3s", None),
        ("soon", None),
    ],
)
def test_intervals_of_saving(text, expected, recipe_file):
    if expected:
        assert parse_interval(text) == expected
    else:
        with rejected("save_every.*expected an interval such as 10min"):
            load_recipe(recipe_file, [f"save_every={text}"])


def make_checkpoint(path, epoch, limit=3):
    path.mkdir(parents=True)
    (path / "weights").write_text(str(epoch))
    digests = {"weights": file_sha256(path / "weights")}
    progress = Progress("segmentation", epoch=epoch, digests=digests, recipe={"total_limit": limit})
    (path / "progress.json").write_text(json.dumps(asdict(progress)))


def test_checkpoints_survive_a_kill_while_they_are_moved(tmp_path):
    last = tmp_path / "last"
    make_checkpoint(last, 3)
    make_checkpoint(tmp_path / "last-1", 2)
    make_checkpoint(tmp_path / "last-2", 1)
    original = Path.rename
    for kill_at in range(5):  # before each move of the rotation
        folder = tmp_path / f"kill-{kill_at}"
        for name in ("last", "last-1", "last-2"):
            shutil.copytree(tmp_path / name, folder / name)
        make_checkpoint(next_of(folder / "last"), 4)
        moves = 0

        def rename(path, target, kill_at=kill_at):
            nonlocal moves
            if moves == kill_at:
                raise KeyboardInterrupt
            moves += 1
            return original(path, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            with suppress(KeyboardInterrupt):
                rotate(folder / "last", 3)
        path, progress = find_checkpoint(folder / "last", 3)
        assert (path, progress.epoch) == (folder / "last", 4)
        epochs = [read_progress(folder / name).epoch for name in ("last", "last-1", "last-2")]
        assert epochs == [4, 3, 2]
        assert len(list(folder.iterdir())) == 3
    assert find_checkpoint(tmp_path / "none", 3) is None


def test_saving_removes_only_what_a_training_wrote(tmp_path):
    last = tmp_path / "last"
    for number in range(2):
        make_checkpoint(tmp_path / ("last", "last-1")[number], 3 - number, limit=2)
    for number in (2, 3):
        shutil.copytree(last, tmp_path / f"last-{number}")  # by hand
    (tmp_path / "last-1" / "eval").mkdir()
    (tmp_path / "last-1" / "eval" / "results.json").write_text("mine")
    make_checkpoint(next_of(last), 4, limit=2)
    rotate(last, 2)
    epochs = [read_progress(tmp_path / name).epoch for name in ("last", "last-1", "last-2", "last-3")]
    assert epochs == [4, 3, 3, 3]
    assert (last / "eval" / "results.json").read_text() == "mine"
    for number in (2, 3):  # of an earlier, higher limit
        shutil.rmtree(tmp_path / f"last-{number}")
        make_checkpoint(tmp_path / f"last-{number}", 1, limit=4)
    make_checkpoint(next_of(last), 5, limit=2)
    rotate(last, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "last-1"]
    assert (tmp_path / "last-1" / "eval" / "results.json").read_text() == "mine"


def test_a_run_that_diverges_within_an_epoch_is_not_saved(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["save_every=1step", "phases.reconstruction.optimizer.learning_rate=1e30"])
    with rejected("the loss is .* in epoch 1"):
        train(recipe)
    last = tmp_path / "run" / "reconstruction" / "last"
    if last.exists():  # of the step before
        assert all(tensor.isfinite().all() for tensor in weights_of(last).values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_stop(number, recipe_file, tmp_path):
    """A batch system signals all processes of a job, loaders as well."""
    code = f"""
import os, psutil, subprocess, sys
from unconceal.__main__ import main
from unconceal.training import loop
original, calls = loop.train_step, []
def train_step(*args, **options):
    calls.append(1)
    if len(calls) == 2:
        job = [psutil.Process(), *psutil.Process().children()]
        assert len(job) > 1
        subprocess.run(["kill", "-{int(number)}", *(str(one.pid) for one in job)])
    return original(*args, **options)
loop.train_step = train_step
main(sys.argv[1:])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(recipe_file), "data.num_workers=1"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == 128 + number, done.stderr
    assert f"stopped by {number.name}; the run is saved, and --resume goes on with it" in done.stdout
    assert "Traceback" not in done.stderr
    progress = json.loads((tmp_path / "run" / "reconstruction" / "last" / "progress.json").read_text())
    assert progress["batches"] == 2
    stop_after(-1, load_recipe(recipe_file), resume=True)
    assert len(history(tmp_path / "run" / "segmentation" / "last")) == 2


def test_loader_processes_obey_their_parent_only():
    """The SIGTERM of a batch system reaches all processes of a job."""
    loader = torch.utils.data.DataLoader(
        range(64),
        num_workers=1,
        persistent_workers=True,
        collate_fn=lambda batch: os.getpid(),
        worker_init_fn=loop._start_worker,
    )
    pid = next(iter(loader))
    subprocess.run(["kill", "-TERM", str(pid)], check=True)
    for _ in range(3):
        assert list(loader) == [pid] * 64
    (worker,) = (process for process in multiprocessing.active_children() if process.pid == pid)
    worker.terminate()
    worker.join(100)
    assert worker.exitcode == 0


@pytest.mark.thorough  # the test before interrupts and resumes in this process
def test_interrupt_keeps_the_last_checkpoint_whole(recipe_file, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/train.py"), str(recipe_file), "phases.segmentation.epochs=1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores interrupts, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    last = tmp_path / "run" / "segmentation" / "last"
    try:
        deadline = time.monotonic() + 500
        while not (last / "progress.json").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert AutoModel.from_pretrained(last).num_parameters() > 0
    assert history(last)[0]["epoch"] == 1
    assert (last / "training_state" / "optimizer.bin").exists()


def test_reduced_precision_and_memory_under_accelerate_launch(recipe_file, tmp_path):
    settings = ["mixed_precision=bf16", "phases.segmentation.gradient_checkpointing=true"]
    epochs = "phases.segmentation.epochs=1"
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no")
    run_train(*launcher, "-m", "unconceal", "train", recipe_file, epochs, *settings)
    (reduced,) = history(tmp_path / "run" / "segmentation" / "last")
    full = train(load_recipe(recipe_file, [epochs, f"output_dir={tmp_path / 'full'}"]))
    (whole,) = history(full.parent / "last")
    assert reduced["train_loss"] != whole["train_loss"], "the precision was not reduced"
    assert reduced["train_loss"] == pytest.approx(whole["train_loss"], rel=0.05)
    weights = weights_of(tmp_path / "run" / "segmentation" / "last")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("gains", [True, False])
def test_automatic_precision_is_that_of_the_device_and_stays(recipe_file, tmp_path, monkeypatch, caplog, gains):
    recipe = load_recipe(recipe_file, ["mixed_precision=auto", "phases.segmentation.epochs=1"])
    monkeypatch.setattr("unconceal.training.start.gains_from_bfloat16", lambda device: gains)
    train_until(1, recipe)
    expected = "bf16" if gains else "no"
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["mixed_precision"] == expected
    said = ["mixed_precision: cpu is not faster in bfloat16; training in float32"]
    assert [record.message for record in caplog.records] == ([] if gains else said)
    # On another machine the run goes on as it began.
    monkeypatch.setattr("unconceal.training.start.gains_from_bfloat16", lambda device: not gains)
    train(recipe, resume=True)
    assert AcceleratorState().mixed_precision == expected
    assert any("the run goes on in it, slowly" in record.message for record in caplog.records) == gains


@pytest.mark.parametrize(
    ("capabilities", "gains"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "AMD Zen 4", "avx512_bf16": True}, True),
        ({"bf16": True}, True),
        ({"avx2": True}, False),
    ],
    ids=str,
)
def test_processors_that_are_faster_in_bfloat16(monkeypatch, capabilities, gains):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert gains_from_bfloat16(torch.device("cpu")) == gains


@pytest.mark.parametrize("name", ["polynomial", "cosine", "constant"])
def test_a_phase_can_be_all_warmup(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = loop.make_scheduler(optimizer, ScheduleRecipe(name=name, warmup_steps=3), 3)
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(3):
        optimizer.step()
        scheduler.step()
        rates += scheduler.get_last_lr()
    assert rates == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizer_in_one_kernel_equals_a_plain_one(name):
    layers = [torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    recipe = OptimizerRecipe(name, learning_rate=0.1, weight_decay=0.1)
    fused, plain = (loop.make_optimizer(layer, recipe, torch.device("cpu")) for layer in layers)
    assert fused.defaults["fused"]
    plain.param_groups[0]["fused"] = False
    for _ in range(5):
        pixel_values = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
        for layer, optimizer in zip(layers, (fused, plain), strict=True):
            optimizer.zero_grad()
            layer(pixel_values).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(*(layer.weight for layer in layers), rtol=1e-4, atol=1e-5)


def test_a_step_skipped_for_a_scaled_loss_is_seen():
    Accelerator(cpu=True)  # its optimizer asks for the state
    layer = torch.nn.Linear(2, 2)
    optimizer = loop.make_optimizer(layer, OptimizerRecipe(), torch.device("cpu"), scales_loss=True)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    scaler.scale(layer(torch.full((1, 2), torch.inf)).sum()).backward()
    optimizer.step()
    assert optimizer.step_was_skipped


def test_loader_processes_do_not_change_the_samples(recipe_file, tmp_path):
    # The processes live for the whole phase, so they have to learn of each epoch.
    for workers in (0, 2):
        settings = [f"data.num_workers={workers}", f"output_dir={tmp_path / str(workers)}"]
        train(load_recipe(recipe_file, settings))
    runs = [tmp_path / str(workers) / "segmentation" / "last" for workers in (0, 2)]
    assert history(runs[0]) == history(runs[1])


def test_missing_compiler_is_reported_before_anything_is_written(recipe_file, tmp_path, monkeypatch):
    def fail(function):
        raise RuntimeError("no g++\nfound")

    monkeypatch.setattr(torch, "compile", fail)
    with rejected(re.escape("torch cannot compile for cpu here (no g++ found); install a C++ compiler")):
        train(load_recipe(recipe_file, ["compile=true"]))
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.thorough
@pytest.mark.timeout(1800)
def test_compiled_training_keeps_names_and_losses(recipe_file, tmp_path):
    settings = ["phases.segmentation.epochs=1", "phases.segmentation.ema_decay=0.9"]
    plain = train(load_recipe(recipe_file, [*settings, f"output_dir={tmp_path / 'plain'}"])).parent / "last"
    compiled = train(load_recipe(recipe_file, [*settings, "compile=true"])).parent / "last"
    assert weights_of(compiled).keys() == weights_of(plain).keys()
    (ours,), (theirs,) = history(compiled), history(plain)
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-2)
    assert json.loads((compiled / "progress.json").read_text())["history"][0]["first_step_seconds"] > 0


def test_speed_of_a_recipe_is_measured(recipe_file):
    recipe = load_recipe(recipe_file, ["mixed_precision=bf16", "data.transforms.crop_size=32"])
    measured = measure_recipe(recipe, "reconstruction", steps=2, rounds=1)
    assert (measured["mixed_precision"], measured["batch_size"], measured["image_size"]) == ("bf16", 4, [32, 32])
    assert measured["loop_share"] == measured["loop_images_per_second"] / measured["model_images_per_second"] > 0
    assert 0 <= measured["data_wait_share"] < 1


def test_two_processes_train_and_evaluate(recipe_file, scenes, tmp_path):
    printed = run_train(*TWO_PROCESSES, ROOT / "scripts/train.py", recipe_file)
    rows = history(tmp_path / "run" / "segmentation" / "last")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[-1]["eval_num_images"] == 3
    assert printed.count("best checkpoint") == 1, "every process printed"
    # The saved model is the evaluated one: the processes' batch-norm statistics were synchronized.
    folder = tmp_path / "run" / "reconstruction" / "last"
    model, processor = AutoModel.from_pretrained(folder), UnconcealImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        losses = [model(**processor(row["image"])).loss for row in load_splits(str(scenes), ["val"])["val"]]
    assert history(folder)[-1]["eval_loss"] == pytest.approx(float(sum(losses)) / len(losses), rel=1e-6)


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    """The encoder's batch norms are frozen, and the decoder has none."""
    build_synthetic("ultrasound", tmp_path / "data", {"train": 12, "val": 2}, size=48)
    backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4}
    phase = {"epochs": 3, "batch_size": 4, "freeze_norms_epochs": 3, "max_grad_norm": 0.5, "ema_decay": 0.9}
    recipe = {
        "network": "opds",
        "model": {"backbone_config": backbone, "decoder_hidden_sizes": [8] * 4, "num_bases": 2},
        "output_dir": str(tmp_path / "run"),
        "data": {"path": str(tmp_path / "data"), "num_workers": 0, "transforms": {"brightness": 0.5}},
        "processor": {"size": {"height": 32, "width": 32}},
        "mixed_precision": "no",
        "phases": {"segmentation": {**phase, "optimizer": {"name": "sgd", "learning_rate": 0.05}}},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    one, two = (tmp_path / name / "segmentation" / "last" for name in ("one", "two"))
    train(load_recipe(file, [f"output_dir={tmp_path / 'one'}"]))
    half = [f"output_dir={tmp_path / 'two'}", "phases.segmentation.batch_size=2"]
    run_train(*TWO_PROCESSES, ROOT / "scripts/train.py", file, *half)
    losses = [[row["train_loss"] for row in history(folder)] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert max(losses[0]) - min(losses[0]) > 1e-3
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(weights_of(two)[name], weight, rtol=1e-4, atol=1e-5)


def test_metric_of_the_protocol_chooses_the_best_checkpoint(recipe_file, tmp_path):
    settings = ["protocol=cod", "best_metric=mae", "phases.segmentation.epochs=3"]
    best = train(load_recipe(recipe_file, settings))
    rows = history(tmp_path / "run" / "segmentation" / "last")
    errors = {row["epoch"]: row["eval_mae"] for row in rows}
    assert len(set(errors.values())) == 3
    assert history(best)[-1]["epoch"] == min(errors, key=errors.get)
    assert {f"eval_{name}" for name in PROTOCOLS["cod"].best_metrics} < rows[0].keys()
    numbers = [value for name, value in rows[0].items() if name != "losses"]
    assert all(isinstance(value, int | float) for value in numbers), "curves were logged"


def test_fine_tuning_starts_from_a_checkpoint(recipe_file, tmp_path):
    std = "processor.image_std=[0.5, 0.5, 0.5]"
    best = train(load_recipe(recipe_file, [std, "phases.segmentation.epochs=1"]))
    # Without settings in the recipe, network and inputs are the checkpoint's.
    segmentation = (f"init_from={best}", "epochs=1", "optimizer.learning_rate=1e-9")
    settings = [f"output_dir={tmp_path / 'tuned'}", *(f"phases.segmentation.{setting}" for setting in segmentation)]
    recipe = load_recipe(recipe_file, settings)
    recipe.model, recipe.processor = {}, {}
    tuned_folder = train(recipe)
    assert not (tmp_path / "tuned" / "reconstruction").exists(), "phase 1 was trained, too"
    assert UnconcealImageProcessor.from_pretrained(tuned_folder).image_std == (0.5, 0.5, 0.5)
    tuned, start = weights_of(tuned_folder), weights_of(best)
    for name in start:
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(tuned[name], start[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.path=nowhere", "data set nowhere does not exist"),
        ("data.eval_split=test", "has no split test; it has train, val"),
        ("model.depths=[1,1,1]", "expected 4 entries"),
        ("phases.reconstruction.init_from=nowhere", "cannot start from nowhere"),
        ("phases.reconstruction.init_from=/nowhere/x/y", "cannot start from /nowhere/x/y: no such folder"),
        ("processor.size={height: 16, width: 16}", "at least 32x32"),
        ("processor.size={height: abc, width: 32}", 'expected {"height": pixels, "width": pixels}'),
        ("model.id2label=abc", "check these values in the recipe"),
        ("processor.size=5", "recipe: processor"),
        ("processor.channel_order=xyz", "channel_order"),
        ("model.num_channels=1", "`num_channels`: got 1, expected 3"),
    ],
)
def test_mistakes_give_one_line(recipe_file, override, expected):
    with rejected(re.escape(expected)):
        train(load_recipe(recipe_file, [override]))


def test_masks_that_teach_nothing_are_refused_first(recipe_file, tmp_path):
    build_synthetic("ultrasound", tmp_path / "empty", {"train": 3, "val": 2}, size=48, empty_ratio=1.0)
    with rejected("split train of .*empty: no mask shows an object, so there is nothing to learn"):
        train(load_recipe(recipe_file, [f"data.path={tmp_path / 'empty'}"]))
    ids = np.zeros((48, 48), np.uint8)
    ids[10:20], ids[30:40] = 1, 2
    images = [io.BytesIO(), io.BytesIO()]
    Image.new("RGB", (48, 48)).save(images[0], "PNG")
    Image.fromarray(ids).save(images[1], "PNG")
    row = make_row(images[0].getvalue(), "x.png", images[1].getvalue(), "x", "y")
    write_splits(tmp_path / "ids", [("train", row), ("val", row)])
    with rejected("cannot read the data: x: a mask holds the values 0, 1, 2, a map of classes"):
        train(load_recipe(recipe_file, [f"data.path={tmp_path / 'ids'}"]))
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_output_folder_is_not_overwritten(recipe_file, tmp_path, monkeypatch):
    recipe = load_recipe(recipe_file, ["phases.segmentation.epochs=1"])
    best = train(recipe)
    with pytest.raises(UserError, match="already holds a run"):
        train(recipe)
    other = load_recipe(recipe_file, ["phases.segmentation.epochs=2"])
    with pytest.raises(UserError, match="with another phases.segmentation.epochs;"):
        train(other, resume=True)
    # A run from before a setting existed has its default.
    kept = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    del kept["data"]["split_seed"]
    kept["phases"]["segmentation"]["init_backbone_required"] = True  # a key of older runs
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(kept))
    before = (best / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="does not exist"):
        train(load_recipe(recipe_file, ["data.path=nowhere"]), overwrite=True)
    assert (best / "model.safetensors").stat().st_mtime_ns == before, "a mistake cost the old run"
    train(recipe, resume=True)
    assert (best / "model.safetensors").stat().st_mtime_ns == before, "a finished run was trained again"
    with pytest.raises(UserError, match="--resume and --overwrite; choose one"):
        train(recipe, resume=True, overwrite=True)
    with pytest.raises(UserError, match=r"init_from is .*, a part of the run that --overwrite replaces"):
        train(load_recipe(recipe_file, [f"phases.segmentation.init_from={best}"]), overwrite=True)

    # A new run that fails before its first checkpoint brings the old one back, also if it was killed.
    diverging = load_recipe(recipe_file, ["phases.reconstruction.optimizer={name: sgd, learning_rate: 1e30}"])
    for was_killed in (False, True):
        with monkeypatch.context() as patch:
            if was_killed:
                patch.setattr(loop, "bring_back", lambda folder: None)
            with pytest.raises(UserError, match="the loss is"):
                train(diverging, overwrite=True)
        assert best.exists() != was_killed
        train(recipe, resume=True)
        assert (best / "model.safetensors").stat().st_mtime_ns == before

    # A kill between moving the old run and writing the new recipe.
    set_aside(tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run"):
        train(recipe)
    train(recipe, resume=True)
    assert (best / "model.safetensors").stat().st_mtime_ns == before

    # Checkpoints without a recipe are a run, too.
    (tmp_path / "run" / "recipe.yaml").rename(tmp_path / "kept.yaml")
    with pytest.raises(UserError, match="already holds a run"):
        train(recipe)
    with pytest.raises(UserError, match="it has no recipe.yaml"):
        train(recipe, resume=True)
    (tmp_path / "run" / "recipe.yaml").write_text("network: [")
    with pytest.raises(UserError, match="recipe.yaml is damaged"):
        train(recipe, resume=True)

    train(other, overwrite=True)
    assert len(history(tmp_path / "run" / "segmentation" / "last")) == 2


def test_full_disk_and_damaged_state_keep_what_is_there(recipe_file, tmp_path, monkeypatch, caplog, capsys):
    recipe = load_recipe(recipe_file)
    best, original = tmp_path / "run" / "reconstruction" / "best", loop.train_epoch

    def train_on_a_full_disk(*args):
        if best.exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        return original(*args)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(loop, "train_epoch", train_on_a_full_disk)
    try:
        with rejected("cannot write .*run/segmentation/best: .*free space and start again"):
            train(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    train(recipe, resume=True)

    last = tmp_path / "run" / "segmentation" / "last"
    for folder, epoch in ((last, 2), (last.with_name("last-1"), 1)):
        assert len(history(folder)) == epoch
        optimizer = folder / "training_state" / "optimizer.bin"
        optimizer.write_bytes(optimizer.read_bytes()[:1000])
        if folder == last:
            shutil.copytree(best.parent.parent, tmp_path / "half")
    with rejected(
        "cannot resume: .*last-1/training_state/optimizer.bin is damaged or missing; remove .*last to train"
    ):
        train(recipe, resume=True)

    # The one before is whole: the run goes on from there, and ends as if nothing had happened.
    half = tmp_path / "half"
    caplog.clear()
    train(load_recipe(recipe_file, [f"output_dir={half}"]), resume=True)
    assert "half/segmentation/last/training_state/optimizer.bin is damaged or missing; the checkpoint" in caplog.text
    assert "segmentation: resumed after epoch 1\n" in capsys.readouterr().out
    assert history(half / "segmentation" / "last") == history(last)
    assert_equal_weights(half / "segmentation" / "last", last)


def test_images_that_do_not_fit_into_batches_are_refused_at_the_start(recipe_file, tmp_path, scenes):
    own_size = ["processor={do_resize: false}"]
    mixed = load_splits(str(scenes), ["train", "val"])
    mixed["train"] = mixed["train"].map(lambda row, i: {"image": row["image"].resize((64 + i, 64))}, with_indices=True)
    recipe = load_recipe(recipe_file, own_size)
    check_start(recipe, "reconstruction", False, {"train": mixed["val"], "val": mixed["val"]})
    with rejected("the images of split train differ in size: 64x64 and, in .*, 65x64"):
        check_start(recipe, "reconstruction", False, mixed)
    cropped = load_recipe(recipe_file, [*own_size, "data.transforms.crop_size=64"])
    check_start(cropped, "reconstruction", False, mixed)
    small = {split: rows.map(lambda row: {"image": row["image"].resize((20, 64))}) for split, rows in mixed.items()}
    with rejected("images of split train are too small: .* has 20x64, expected at least 32x32"):
        check_start(recipe, "reconstruction", False, small)
    with rejected("images of split val are too small"):
        check_start(cropped, "reconstruction", False, small)
    check_start(cropped, "segmentation", False, small)  # its evaluation pads small images


@pytest.mark.parametrize(
    ("width", "setting"), [(80, "rotate90_probability"), (64, "max_crop_ratio")], ids=["turns", "trims"]
)
def test_changes_of_the_size_are_refused_without_resizing(recipe_file, scenes, width, setting):
    settings = ["processor={do_resize: false}", "data.transforms={flip_probability: 0, rotate90_probability: 0}"]
    rows = load_splits(str(scenes), ["train"])["train"].map(
        lambda row: {name: row[name].resize((width, 64)) for name in ("image", "mask")}
    )
    splits = {"train": rows, "val": rows}
    check_start(load_recipe(recipe_file, settings), "reconstruction", False, splits)
    settings.append(f"data.transforms.{setting}=0.5")
    recipe = load_recipe(recipe_file, settings)
    with rejected(f"do_resize is false, and data.transforms.{setting} changes the size of images of {width}x64"):
        check_start(recipe, "reconstruction", False, splits)
    # It is right: such samples differ in size.
    samples = TrainingSet(rows, build_processor(recipe, None), recipe.data.transforms, seed=0)
    assert len({samples[i]["labels"].shape for i in range(len(samples))}) > 1
    for cure in ("data.transforms.crop_size=64", "phases.reconstruction.batch_size=1"):
        check_start(load_recipe(recipe_file, [*settings, cure]), "reconstruction", False, splits)


@pytest.mark.parametrize("run", [train, try_recipe])
def test_each_phase_is_tried_before_the_first_starts(recipe_file, scenes, tmp_path, run):
    def widen(row, number):
        return {name: row[name].resize((64 + number, 64)) for name in ("image", "mask")}

    for split, rows in load_splits(str(scenes), ["train", "val"]).items():
        rows.map(widen, with_indices=True).to_parquet(tmp_path / "mixed" / "data" / f"{split}-00000-of-00001.parquet")
    settings = ["processor.do_resize=false", f"data.path={tmp_path / 'mixed'}", "phases.reconstruction.batch_size=1"]
    with rejected("images of split train differ in size: 64x64 and, in train-000001, 65x64"):
        run(load_recipe(recipe_file, settings))
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_batches_of_one_image(run_recipe, recipe_file):
    small = ["processor={size: {height: 32, width: 32}}", "phases.segmentation.batch_size=1"]
    recipe = run_recipe(*small)
    with rejected("cannot train on 1 image of 32x32 pixels at a time"):
        check_start(recipe, "segmentation", False)
    # One image is no larger batch, and images that are not resized count as they are.
    splits = load_splits(str(recipe.data.path), ["train"])
    tiny = splits["train"].select([0]).map(lambda row: {"image": row["image"].resize((32, 32))})
    for settings in (small[:1], ["processor={do_resize: false}"]):
        with rejected("cannot train on 1 image of 32x32 pixels at a time"):
            check_start(run_recipe(*settings), "segmentation", False, {"train": tiny})
    # 10 images: the last one is left out of the epoch.
    best = train(load_recipe(recipe_file, ["phases.reconstruction.batch_size=9", "phases.segmentation.batch_size=9"]))
    last = best.with_name("last")
    assert json.loads((last / "progress.json").read_text())["step"] == 2  # of two epochs


def test_unwritable_output_folder_is_reported(recipe_file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        train(load_recipe(recipe_file, [f"output_dir={tmp_path / 'file' / 'run'}"]))


def test_last_group_of_batches_has_its_full_weight(recipe_file, tmp_path):
    """An epoch of one batch is one step, however many batches a step has otherwise."""
    settings = ["phases.reconstruction={epochs: 2, batch_size: 10, optimizer: {name: sgd, learning_rate: 0.1}}"]
    settings += ["phases.segmentation={epochs: 1, batch_size: 5}"]
    folders = []
    for steps in (1, 3):
        folders.append(tmp_path / str(steps))
        changed = [f"phases.reconstruction.gradient_accumulation_steps={steps}", f"output_dir={folders[-1]}"]
        train(load_recipe(recipe_file, [*settings, *changed]))
    one, three = (weights_of(folder / "reconstruction" / "last") for folder in folders)
    start = SrsForReconstruction(AutoModel.from_pretrained(folders[0] / "reconstruction" / "last").config).state_dict()
    for name, weight in one.items():
        torch.testing.assert_close(three[name], weight, rtol=1e-5, atol=1e-6)
    assert any((one[name] - start[name]).abs().max() > 1e-3 for name in start if start[name].is_floating_point())


def test_dry_run_tries_each_phase_and_writes_nothing(recipe_file, tmp_path, capsys):
    main(["train", str(recipe_file), "--dry-run"])
    said = capsys.readouterr().out
    for phase, epochs in (("reconstruction", 1), ("segmentation", 2)):
        (row,) = re.findall(rf"\| {phase} \| 10 \| {epochs} \| 4 of 32x32 \| (.+) \| (.+) \| (.+) GiB \|", said)
        rate, hours, memory = map(float, row)
        assert hours == pytest.approx(10 * epochs / rate / 3600, rel=0.1)
        assert 0.1 < memory < 20
    assert "Nothing was written." in said
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with rejected("the loss is"):
        main(
            ["train", str(recipe_file), "--dry-run", "phases.segmentation.optimizer={name: sgd, learning_rate: 1e30}"]
        )
    assert not list((tmp_path / "run").iterdir())


def test_diverging_training_stops(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["phases.reconstruction.optimizer={name: sgd, learning_rate: 1e30}"])
    with pytest.raises(
        UserError, match=r"the loss is (nan|inf) in epoch 1, batch 2 \((train-\d+(, )?){4}, saved in"
    ) as caught:
        train(recipe)
    assert not (tmp_path / "run" / "reconstruction" / "last").exists()
    batch = torch.load(tmp_path / "run" / "diverged_batch.pt", weights_only=True)
    assert all(name in str(caught.value) for name in batch["ids"])
    # The ids are those of the images: each image in the file is that of its row, turned or flipped.
    rows = {
        row["id"]: row["image"].convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        for row in load_data(recipe.data)["train"]
    }
    for name, pixels in zip(batch["ids"], batch["pixel_values"], strict=True):
        expected = build_processor(recipe, None)(rows[name]).pixel_values
        assert pixels.mean().item() == pytest.approx(expected.mean().item(), abs=1e-3)
    assert len({round(pixels.mean().item(), 4) for pixels in batch["pixel_values"]}) == 4


def test_a_full_disk_keeps_an_older_diverged_batch(tmp_path, monkeypatch):
    def save(values, file):
        Path(file).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    place = tmp_path / "diverged_batch.pt"
    place.write_text("older")
    samples = SimpleNamespace(batch_names=lambda batches, number: ["a"])
    batches = SimpleNamespace(set_epoch=lambda epoch: None, dataset=samples, batch_sampler=None)
    said = loop.describe_divergence(math.nan, {}, SimpleNamespace(batches=batches), 1, 1, place)
    assert said.startswith("the loss is nan in epoch 1, batch 1 (a); lower")
    assert place.read_text() == "older" and list(tmp_path.iterdir()) == [place]


def test_unusable_checkpoint_is_rejected(recipe_file, tmp_path):
    other = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1]))
    other.save_pretrained(tmp_path / "resnet")
    SrsForReconstruction(SrsConfig(**load_recipe(recipe_file).model)).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    model = SrsForReconstruction(SrsConfig(**load_recipe(recipe_file).model))
    next(model.parameters()).data.view(-1)[0] = math.nan
    model.save_pretrained(tmp_path / "nan")
    (tmp_path / "other" / "segmentation" / "best").mkdir(parents=True)
    shutil.copy(tmp_path / "cut" / "config.json", tmp_path / "other" / "segmentation" / "best")
    for name, expected in (
        ("resnet", "a network of type resnet, expected srs_seg"),
        ("cut", "cannot start from"),
        ("nan", r"cannot start from .*nan: 1 of its weights are not finite \(NaN or infinity\), e.g. "),
        ("other", "other: it has no config.json; did you mean .*other/segmentation/best"),
    ):
        with rejected(expected):
            train(load_recipe(recipe_file, [f"phases.reconstruction.init_from={tmp_path / name}"]))


def test_checkpoint_of_another_width_is_rejected_with_shapes(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    SrsForReconstruction(SrsConfig(**recipe.model)).save_pretrained(tmp_path)
    recipe.model = {**recipe.model, "reconstruction_hidden_sizes": [8, 12, 12, 16]}
    with pytest.raises(
        UserError, match=r"of its weights have another shape .*, e\.g\. .* expected \(.*set the recipe"
    ):
        build_model(recipe, "reconstruction", tmp_path)


def resize_mask(row):
    return {"mask": row["mask"].resize((52, 48))}


def drop_mask(row):
    return {"mask": None}


def damage_image(row):
    return {"image": {"bytes": row["image"]["bytes"][:200], "path": None}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (resize_mask, r"the mask of val-\d+ is .*, its image"),
        (drop_mask, r"val-\d+: its mask is empty"),
        (damage_image, r"val-\d+: .*truncated"),
    ],
)
def test_unusable_rows_of_val_are_named_at_the_start(recipe_file, scenes, change, message):
    splits = load_splits(str(scenes), ["train", "val"])
    features = splits["val"].features
    rows = splits["val"].cast_column("image", datasets.Image(decode=False))
    changed = rows.map(lambda row, i: change(row) if i else {}, with_indices=True)
    splits["val"] = changed.cast_column("image", datasets.Image()).cast(features)
    with rejected(f"split val: {message}"):
        check_masks(splits, load_recipe(recipe_file).data, ["segmentation"])


def test_resuming_on_other_data_is_refused(recipe_file, tmp_path):
    build_synthetic("ultrasound", tmp_path / "data", {"train": 4, "val": 2}, size=48)
    recipe = load_recipe(recipe_file, [f"data.path={tmp_path / 'data'}"])
    train_until(2, recipe)
    record = tmp_path / "run" / "reconstruction" / "last" / "progress.json"
    before = record.read_bytes()
    build_synthetic("ultrasound", tmp_path / "data", {"train": 5, "val": 2}, size=48, overwrite=True)
    with rejected("the data set .* had {'train': 4, 'val': 2} images, got {'train': 5, 'val': 2}; give it the same"):
        train(recipe, resume=True)
    # As many images, of the same names and sizes.
    build_synthetic("ultrasound", tmp_path / "data", {"train": 4, "val": 2}, size=48, seed=1, overwrite=True)
    with rejected("the data set .* had other images, masks or ids in train, val; give it the same images"):
        train(recipe, resume=True)
    assert record.read_bytes() == before


def test_digest_of_a_data_set_tells_its_contents(scenes, tmp_path):
    rows = load_splits(str(scenes), ["train"])["train"]
    digest = contents_digest(rows)
    rows.to_parquet(tmp_path / "copy" / "train.parquet")  # another place, other files
    assert contents_digest(load_splits(str(tmp_path / "copy"), ["train"])["train"]) == digest
    for other in (rows.select([1, 0, *range(2, len(rows))]), rows.select(range(1, len(rows)))):
        assert contents_digest(other) != digest
    changes = {"mask": None, "id": "x", "image": rows[0]["image"]}
    for column, value in changes.items():
        changed = rows.map(lambda row, one=column, new=value: {one: new if row["id"] == rows[3]["id"] else row[one]})
        assert contents_digest(changed) != contents_digest(rows.map(lambda row, one=column: {one: row[one]}))


@pytest.mark.parametrize(
    "change",
    [{"epoch": "3"}, {"history": None}, {"history": [1]}, {"best": "x"}, {"digests": None}, {"data": [1]}, {"new": 1}],
    ids=str,
)
def test_record_with_wrong_types_is_damaged(change, tmp_path):
    (tmp_path / "progress.json").write_text(json.dumps({"task": "segmentation"}))
    assert read_progress(tmp_path).epoch == 0
    (tmp_path / "progress.json").write_text(json.dumps({"task": "segmentation", **change}))
    with rejected(f"progress.json is damaged .*{next(iter(change))}.*; remove .* to train from scratch"):
        read_progress(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (resize_mask, r"the mask of train-\d+ is 52x48, its image 48x48"),
        (damage_image, r"^cannot read the training data: train-\d+: "),
        (drop_mask, r"^cannot read the data: train-\d+: its mask is empty; leave out such rows"),
    ],
)
def test_unusable_rows_are_named(recipe_file, scenes, tmp_path, change, message, num_workers):
    for split, rows in datasets.load_dataset(str(scenes)).items():
        rows = rows.cast_column("image", datasets.Image(decode=False))
        rows = rows.map(change) if split == "train" else rows
        rows = rows.cast_column("image", datasets.Image())
        rows.to_parquet(tmp_path / "bad" / "data" / f"{split}-00000-of-00001.parquet")
    with rejected(message):
        train(load_recipe(recipe_file, [f"data.path={tmp_path / 'bad'}", f"data.num_workers={num_workers}"]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_few_unreadable_images_are_named_and_replaced(recipe_file, scenes, tmp_path, caplog, num_workers):
    damage = {"train-000000": damage_image, "train-000004": drop_mask}
    for split, rows in datasets.load_dataset(str(scenes)).items():
        rows = rows.cast_column("image", datasets.Image(decode=False))
        rows = rows.map(lambda row: damage.get(row["id"], lambda row: {})(row), load_from_cache_file=False)
        rows.cast_column("image", datasets.Image()).to_parquet(
            tmp_path / "bad" / "data" / f"{split}-00000-of-00001.parquet"
        )
    settings = [f"data.path={tmp_path / 'bad'}", f"data.num_workers={num_workers}"]
    best = train(load_recipe(recipe_file, [*settings, "data.max_unreadable=0.2"]))
    lines = [line for line in caplog.messages if "cannot be read" in line]
    named = "2 of 10 training images cannot be read, and the next takes their place: train-000000, train-000004"
    assert lines == [named] * 2  # once in each phase
    progress = json.loads((best.with_name("last") / "progress.json").read_text())
    assert progress["unreadable"] == ["train-000000", "train-000004"]
    with rejected(r"train-00000[04]: .* \(2 of 10 images, more than data.max_unreadable allows\)"):
        few = ["data.max_unreadable=0.1", f"output_dir={tmp_path / 'few'}"]
        train(load_recipe(recipe_file, [*settings, *few]))


@pytest.mark.parametrize("streaming", [False, True])
def test_masks_that_show_no_object_are_named_once(recipe_file, scenes, tmp_path, caplog, streaming):
    def fade(row):
        dark = row["id"] in ("train-000000", "train-000004")
        width, height = row["mask"].size
        return {"mask": Image.fromarray(np.arange(height, dtype=np.uint8)[:, None].repeat(width, 1))} if dark else {}

    for split, rows in datasets.load_dataset(str(scenes)).items():
        rows.map(fade).to_parquet(tmp_path / "faint" / "data" / f"{split}-00000-of-00001.parquet")
    train(load_recipe(recipe_file, [f"data.path={tmp_path / 'faint'}", f"data.streaming={streaming}".lower()]))
    lines = [line for line in caplog.messages if "show no object" in line]
    assert len(lines) == 1 and lines[0].startswith("2 training masks hold gray levels but none above half")
    assert "train-000000" in lines[0] and "train-000004" in lines[0]


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_defects_of_the_transforms_are_not_blamed_on_the_data(recipe_file, monkeypatch, error):
    def defect(*arguments):
        raise error("no such thing")

    monkeypatch.setattr("unconceal.data.transforms.rotate", defect)
    with pytest.raises(error, match="no such thing"):
        train(load_recipe(recipe_file))


# ---- RUN: pretrained encoders, a loss that depends on the progress --------------------------------------------------


@pytest.fixture
def run_recipe(tmp_path, scenes):
    """Return a function that makes a recipe to train RUN in seconds."""
    settings = {
        "output_dir": tmp_path / "run",
        "data.path": scenes,
        "data.num_workers": 0,
        "mixed_precision": "no",
        "processor.size": "{height: 32, width: 32}",
        "phases.segmentation.epochs": 2,
        "phases.segmentation.batch_size": 4,
    }
    return lambda *more: load_recipe(
        ROOT / "configs/run/smoke.yaml", [*(f"{key}={value}" for key, value in settings.items()), *more]
    )


def save_encoder(folder, **changes):
    config = yaml.safe_load((ROOT / "configs/run/smoke.yaml").read_text())["model"]["backbone_config"]
    torch.manual_seed(5)
    classifier = ResNetForImageClassification(ResNetConfig(**{**config, **changes}))
    classifier.save_pretrained(folder)
    return classifier.resnet.state_dict()


def test_encoder_starts_from_pretrained_weights(run_recipe, tmp_path):
    weights = save_encoder(tmp_path / "encoder")
    recipe = run_recipe(f"phases.segmentation.init_backbone_from={tmp_path / 'encoder'}")
    model = build_model(recipe, "segmentation", None)
    load_backbone(model, str(tmp_path / "encoder"))
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, weights[name])


def test_unreachable_encoder_stops_before_anything_is_written(run_recipe, tmp_path):
    recipe = run_recipe("phases.segmentation.init_backbone_from=some/encoder")
    with pytest.raises(UserError, match="cannot reach the Hub for some/encoder.* or to null for random weights"):
        train(recipe, resume=True)  # without a run to resume
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    "change", ["image_mean=[0.5,0.5,0.5]", "image_mean=0.5", "image_std=0.2", "do_normalize=false", "do_rescale=false"]
)
def test_network_and_processor_must_agree_on_the_normalization(run_recipe, change):
    with pytest.raises(UserError, match="the network cannot undo its normalization"):
        check_start(run_recipe(f"processor.{change}"), "segmentation", resume=False)
    if change.startswith("image_mean=["):
        check_start(run_recipe(f"processor.{change}", f"model.{change}"), "segmentation", resume=False)


@pytest.mark.parametrize("error", [KeyError, RuntimeError])
def test_defects_of_a_network_name_their_place(run_recipe, monkeypatch, error):
    # As a function of the package: an error without `raise`.
    source = "def forward(self, x):\n    " + ("{}['oops']" if error is KeyError else "x @ x[..., :3, :]")
    scope = {"__name__": "unconceal.models.modeling_run"}
    exec(compile(source, "modeling_run.py", "exec"), scope)
    monkeypatch.setattr(RunForImageSegmentation, "forward", scope["forward"])
    words = f"recipe: model: {error.__name__} at modeling_run.py:2: .* this is a defect of the code; UNCONCEAL_DEBUG=1"
    with pytest.raises(UserError, match=words):
        check_start(run_recipe(), "segmentation", resume=False)


@pytest.mark.parametrize(
    "change", ["id2label=foo", "backbone_config.hidden_sizes=[1,2]", "backbone_config.hidden_sizes=[0,0,0,0]"]
)
def test_wrong_values_of_a_recipe_are_to_be_checked_first(run_recipe, change):
    with pytest.raises(UserError, match="check these values in the recipe; if they are right, this is a defect"):
        check_start(run_recipe(f"model.{change}"), "segmentation", resume=False)


def test_unusable_start_is_rejected_before_anything_is_removed(run_recipe, tmp_path):
    best = tmp_path / "run" / "segmentation" / "best"
    best.mkdir(parents=True)
    claim_folder(tmp_path / "run", run_recipe(), resume=False)
    save_encoder(tmp_path / "wider", embedding_size=24)
    torch.manual_seed(0)
    recipe = run_recipe()
    build_model(recipe, "segmentation", None).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    cases = [
        ("init_from", str(tmp_path / "cut"), "cannot start from"),
        ("init_backbone_from", "no/such/folder", "no/such/folder"),
        ("init_backbone_from", str(tmp_path), "cannot start the encoder"),
        ("init_backbone_from", str(tmp_path / "wider"), "cannot start the encoder from .* do not fit"),
        ("backbone_config", {"model_type": "dinov2", "hidden_size": 16, "num_attention_heads": 2}, "strides 4, 8"),
    ]
    if not is_timm_available():
        cases.append(("backbone_config", {"model_type": "timm_backbone", "backbone": "resnet18"}, "pip install timm"))
    for field, value, expected in cases:
        recipe = run_recipe()
        if field == "backbone_config":
            recipe.model[field] = value
        else:
            setattr(recipe.phases["segmentation"], field, value)
        with rejected(expected):
            train(recipe, overwrite=True)
        assert best.exists()


def test_resumed_run_with_a_pretrained_encoder_equals_an_unbroken_one(run_recipe, tmp_path, monkeypatch):
    forward, progress = RunForImageSegmentation.forward, []

    def spy(self, *args, **kwargs):
        if self.training and self.device.type != "meta":  # a trial before the start
            progress.append(self.training_progress)
        return forward(self, *args, **kwargs)

    phase = {"init_backbone_from": tmp_path / "encoder", "freeze_encoder_epochs": 1, "optimizer.encoder_lr_ratio": 0.1}
    settings = [f"phases.segmentation.{key}={value}" for key, value in phase.items()]
    weights = save_encoder(tmp_path / "encoder")
    with monkeypatch.context() as patch:
        patch.setattr(RunForImageSegmentation, "forward", spy)
        train(run_recipe(*settings, f"output_dir={tmp_path / 'unbroken'}"))
    # 10 images in batches of 4, two epochs
    assert progress == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    last = [tmp_path / name / "segmentation" / "last" for name in ("unbroken", "broken")]
    broken = run_recipe(*settings, f"output_dir={tmp_path / 'broken'}")
    train_until(2, broken)
    encoder = RunForImageSegmentation.from_pretrained(last[1]).backbone.state_dict()
    assert all(torch.equal(encoder[name], weights[name]) for name in encoder), "the encoder was not frozen"
    state = torch.load(last[1] / "training_state" / "optimizer.bin")
    rates = [group["lr"] for group in state["param_groups"]]
    assert rates == pytest.approx([1e-3, 1e-4])  # half of the cosine
    train(broken, resume=True)
    encoder = RunForImageSegmentation.from_pretrained(last[1]).backbone.state_dict()
    assert not any(torch.equal(encoder[name], weights[name]) for name in encoder), "the encoder stayed frozen"
    assert history(last[0]) == history(last[1])
    assert_equal_weights(*last)


def test_resumed_run_keeps_its_network_though_defaults_have_changed(run_recipe, tmp_path):
    train_until(2, run_recipe("model.background_step=correction"))
    last, kept = tmp_path / "run/segmentation/last", tmp_path / "run/recipe.yaml"
    started = yaml.safe_load(kept.read_text())
    del started["model"]["background_step"]  # as if it had been the default
    kept.write_text(yaml.safe_dump(started))
    train(run_recipe(), resume=True)
    assert [row["epoch"] for row in history(last)] == [1, 2]
    assert RunForImageSegmentation.from_pretrained(last).config.background_step == "correction"


@pytest.fixture
def start_phase(run_recipe):
    """Return a function that prepares the training of RUN with settings of its phase."""

    def start(**settings):
        recipe = run_recipe(*(f"phases.segmentation.{key}={value}" for key, value in settings.items()))
        phase = recipe.phases["segmentation"]
        accelerator = loop.make_accelerator(recipe, phase)
        rows = load_data(recipe.data)["train"]
        samples = TrainingSet(rows, build_processor(recipe, None), recipe.data.transforms, recipe.seed)
        network = build_model(recipe, "segmentation", None)
        return phase, accelerator, loop.prepare_phase(recipe, phase, accelerator, network, samples)

    return start


@pytest.mark.parametrize("key", ["freeze_encoder_epochs", "freeze_norms_epochs"])
def test_frozen_parts_do_not_move_in_the_first_epochs(start_phase, key):
    phase, accelerator, parts = start_phase(**{key: 1})
    batch = next(iter(parts.batches))
    norms = {
        name for name, module in parts.network.backbone.named_modules() if isinstance(module, torch.nn.BatchNorm2d)
    }
    for epoch in range(2):
        before = {name: tensor.clone() for name, tensor in parts.network.state_dict().items()}
        parts.model.train()
        parts.frozen = loop.freeze_encoder(parts.network, phase, epoch)
        loop.train_step(phase, accelerator, parts, batch)
        moved = {name for name, tensor in parts.network.state_dict().items() if not torch.equal(tensor, before[name])}
        assert any(not name.startswith("backbone.") for name in moved)
        stays = {name for name in before if name.startswith("backbone.")} - moved
        if epoch == 1:
            assert not stays
        elif key == "freeze_encoder_epochs":
            assert stays == {name for name in before if name.startswith("backbone.")}
        else:
            assert {name.removeprefix("backbone.").rpartition(".")[0] for name in stays} == norms


def test_batch_norms_that_learn_can_normalize_over_all_processes(recipe_file, checkpoint, tmp_path):
    """The frozen encoder of SRS keeps its statistics. The real thing needs two GPUs."""
    network = AutoModelForImageSegmentation.from_pretrained(checkpoint)
    names = list(network.state_dict())
    loop.share_statistics(network)
    norms = {name: type(module) for name, module in network.named_modules() if "BatchNorm" in type(module).__name__}
    shared = {name for name, kind in norms.items() if kind is torch.nn.SyncBatchNorm}
    assert shared == {name for name in norms if not name.startswith("reconstruction_encoder.")} != set(norms)
    assert list(network.state_dict()) == names
    network.save_pretrained(tmp_path / "saved")
    assert_equal_weights(tmp_path / "saved", checkpoint)
    images = torch.randn(2, 3, 40, 32)
    with torch.no_grad():
        one, other = network.eval()(images).logits, AutoModel.from_pretrained(checkpoint)(images).logits
        form = network.for_inference()
        torch.testing.assert_close(form(images).logits, one, atol=1e-4, rtol=0)
    assert torch.equal(one, other)
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in form.encoder.modules())


def test_common_batch_norms_on_a_cpu_are_refused_before_anything_is_written(recipe_file, tmp_path):
    state = SimpleNamespace(
        num_processes=2, device=torch.device("cpu"), is_main_process=True, main_process_first=nullcontext
    )
    with rejected("sync_batch_norm needs GPUs"):
        loop.run_phases(load_recipe(recipe_file, ["sync_batch_norm=true"]), state, False, False, None, None)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_mean_of_the_weights_follows_the_first_weights_closely(start_phase):
    *_, parts = start_phase(ema_decay=0.5)
    averaged, network = parts.averaged, parts.network
    expected = 0.0
    for steps, decay in enumerate((0, 2 / 11, 3 / 12, 4 / 13, 5 / 14)):  # then the decay of the recipe
        for parameter in network.parameters():
            parameter.data.fill_(steps)
        averaged.update_parameters(network)
        expected = decay * expected + (1 - decay) * steps
        assert next(averaged.parameters()).flatten()[0].item() == pytest.approx(expected)
    for _ in range(20):
        averaged.update_parameters(network)
    before = next(averaged.parameters()).flatten()[0].item()
    next(network.parameters()).data.fill_(before + 1)
    averaged.update_parameters(network)
    assert next(averaged.parameters()).flatten()[0].item() == pytest.approx(before + 0.5)


def test_changes_of_a_checkpoint_are_checked_before_training(tmp_path):
    tiny = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "mlp_ratios": [1, 1, 1, 1]}
    config = OpdsConfig(backbone_config={"model_type": "mscan_backbone", **tiny}, decoder_hidden_sizes=[8, 8, 8, 8])
    config.save_pretrained(tmp_path)
    recipe = load_recipe(ROOT / "configs/opds/dis5k.yaml", ["data.path=x"])
    assert build_config(recipe, tmp_path).backbone_config.hidden_sizes == [8, 8, 8, 8]
    for change, words in (({"level_weights": [1.0]}, "expected 4 numbers"), ({"bce_weight": -1.0}, "0 or more")):
        recipe.model = change
        with pytest.raises(UserError, match=f"cannot start from.*{words}"):
            build_config(recipe, tmp_path)
    recipe.model = {"level_weights": [1.0, 0.0, 0.0, 0.0]}
    assert build_config(recipe, tmp_path).level_weights == [1.0, 0.0, 0.0, 0.0]


# ---- random splits --------------------------------------------------------------------------------------------------


def test_split_seed_splits_the_images_again(recipe_file):
    def names(*overrides):
        return {split: rows["id"][:] for split, rows in load_data(load_recipe(recipe_file, overrides).data).items()}

    whole, split = names(), names("data.split_seed=0")
    assert sorted(sum(split.values(), [])) == sorted(sum(whole.values(), []))
    assert names("data.split_seed=0") == split != names("data.split_seed=1")


def test_seeds_train_on_random_splits_and_print_mean_and_deviation(recipe_file, tmp_path, capsys):
    override = "phases.segmentation.epochs=1"
    main(["train", str(recipe_file), override, "--seeds", "3", "5"])
    printed = capsys.readouterr().out
    recipe, folders = load_recipe(recipe_file, [override]), []
    for seed in (3, 5):
        run = load_recipe(tmp_path / "run" / f"seed-{seed}" / "recipe.yaml")
        assert run.seed == run.data.split_seed == seed
        folders.append(tmp_path / "run" / f"seed-{seed}" / "segmentation" / "best")
    values = [history(folder)[-1]["eval_iou"] for folder in folders]
    assert f"| iou | {mean(values):.4g} | {stdev(values):.4g} |" in printed
    assert summarize_seeds(folders) in printed
    assert "| mean of 1 seed |" in summarize_seeds(folders[:1])

    # Finished runs are kept, of the same recipe only.
    before = [(folder / "model.safetensors").stat().st_mtime_ns for folder in folders]
    assert train_seeds(recipe, [3, 5]) == folders
    assert [(folder / "model.safetensors").stat().st_mtime_ns for folder in folders] == before
    with pytest.raises(UserError, match="with another phases.segmentation.batch_size;"):
        train_seeds(load_recipe(recipe_file, [override, "phases.segmentation.batch_size=2"]), [3])
    with pytest.raises(UserError, match="expected different ones"):
        train_seeds(recipe, [3, 3])
    with rejected("got seed 4294967296, expected one below 2\\^32"):
        train_seeds(recipe, [2**32])


def test_unfinished_seed_is_resumed_on_request_only(recipe_file, tmp_path, monkeypatch):
    recipe = load_recipe(recipe_file, [f"output_dir={tmp_path / 'seeds'}"])
    seed_1 = [f"output_dir={tmp_path / 'seeds/seed-1'}", "seed=1", "data.split_seed=1"]
    train_until(2, load_recipe(recipe_file, seed_1))
    with pytest.raises(UserError, match="seed-1 already holds a run; add --resume"):
        train_seeds(recipe, [0, 1])
    assert not (tmp_path / "seeds" / "seed-0" / "recipe.yaml").exists(), "a run began before all folders were checked"
    with monkeypatch.context() as patch, alone_in(tmp_path / "seeds" / "seed-1"):
        patch.setattr("unconceal.training.seeds.check_folder", lambda *arguments: pytest.fail("not alone"))
        with rejected("another process trains in"):
            train_seeds(recipe, [1], overwrite=True)
    train_seeds(recipe, [1], resume=True)
    assert len(history(tmp_path / "seeds" / "seed-1" / "segmentation" / "last")) == 2


@pytest.mark.parametrize("option", ["--num_processes 2", "--num-processes=2"])
def test_one_process_instead_of_several_is_reported(monkeypatch, caplog, option):
    words = ["python", "accelerate", "launch", "--cpu", *option.split(), "train.py"]
    monkeypatch.setattr("psutil.Process.cmdline", lambda self: words)
    loop.report_processes(SimpleNamespace(num_processes=2))
    assert not caplog.text
    loop.report_processes(SimpleNamespace(num_processes=1))
    assert "one process trains, not 2: on a CPU, start them with torchrun --nproc-per-node 2" in caplog.text


@pytest.mark.thorough
def test_a_run_that_loses_a_process_ends_with_one_line(recipe_file, tmp_path):
    """The second process is killed in its fourth step."""
    code = """
import os, signal, sys
from unconceal.training import loop
original, calls = loop.train_step, []
def train_step(*args, **options):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)
loop.train_step = train_step
from unconceal.__main__ import entry
sys.argv[0] = "unconceal"
entry()
"""
    (tmp_path / "dying.py").write_text(code)
    command = [sys.executable, *TWO_PROCESSES, tmp_path / "dying.py", "train", recipe_file]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode not in (0, 2)
    lines = [line for line in done.stderr.splitlines() if "another process of this run ended" in line]
    assert len(lines) == 1 and lines[0].endswith("--resume goes on from the last checkpoint"), done.stderr
    assert "loop.py" not in done.stderr  # no traceback of ours
    assert (tmp_path / "run" / "reconstruction" / "last").is_dir()


# ---- what a run tells -----------------------------------------------------------------------------------------------


def log_of(folder, kind):
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def test_log_tells_losses_by_term_speed_and_memory(recipe_file, tmp_path):
    train(load_recipe(recipe_file, ["log_every=2"]))
    folder = tmp_path / "run" / "segmentation"
    epochs, steps = log_of(folder, "epoch"), log_of(folder, "steps")
    record = json.loads((folder / "last" / "progress.json").read_text())["history"]
    assert [{key: row[key] for key in record[0]} for row in epochs] == record
    assert [row["step"] for row in epochs] == [3, 6] and [row["step"] for row in steps] == [2, 5]
    for row in [*epochs, *steps]:
        assert row["losses"].keys() == {"cross_entropy", "dice"}
        assert sum(row["losses"].values()) == pytest.approx(row.get("loss", row.get("train_loss")), abs=1e-5)
    assert all(row["samples_per_second"] > 0 and 0.1 < row["memory_gib"] < 100 for row in steps)
    assert steps[0]["learning_rate"] > steps[1]["learning_rate"] > 0
    assert not log_of(tmp_path / "run" / "reconstruction", "epoch")[0]["losses"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_bar_is_for_terminals(monkeypatch, is_terminal):
    """In a file, each refresh would be a part of one endless line."""
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    accelerator = SimpleNamespace(process_index=0, device="cpu", is_local_main_process=True)
    EpochMeter(accelerator, Progress("segmentation"), num_batches=2, num_epochs=3).bar.close()
    assert ("epoch 1/3" in stream.getvalue()) == is_terminal


def test_resumed_log_keeps_lines_of_others(tmp_path):
    rows = [{"kind": "steps", "step": 1}, {"note": "mine"}, [5], {"kind": "steps", "step": 3}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    RunLog(tmp_path, SimpleNamespace(is_main_process=True), step=2)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == rows[:2]


@pytest.mark.pictures
def test_trackers_get_losses_by_term_and_sample_images(recipe_file, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(load_recipe(recipe_file, ["log_every=1"]))
    folder = tmp_path / "run" / "segmentation"
    events = event_accumulator.EventAccumulator(str(folder.parent / "segmentation")).Reload()
    scalars = events.Tags()["scalars"]
    assert {"losses/dice", "steps/loss", "steps/losses/cross_entropy", "eval_iou", "steps/memory_gib"} <= set(scalars)
    assert len(events.Scalars("steps/loss")) == 6 and len(events.Scalars("train_loss")) == 2
    assert [image.step for image in events.Images("samples")] == [3, 6]
    with Image.open(folder / "samples.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 3 * 320  # rows of three images


def test_resumed_log_has_each_step_once(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["log_every=1", "save_every=2steps"])
    stop_after(3 + 3 + 2, recipe)  # two steps into the second epoch, saved after the first of them
    log = tmp_path / "run" / "segmentation" / "log.jsonl"
    log.write_text(log.read_text() + '{"kind": "st')  # a kill can leave half a line
    train(recipe, resume=True)
    folder = tmp_path / "run" / "segmentation"
    assert [row["step"] for row in log_of(folder, "steps")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in log_of(folder, "epoch")] == [3, 6]


def test_log_that_cannot_be_written_does_not_end_the_run(recipe_file, tmp_path, monkeypatch, caplog):
    (tmp_path / "run" / "segmentation").mkdir(parents=True)
    log = tmp_path / "run" / "segmentation" / "log.jsonl"
    original = Path.open

    def open_file(path, *args, **kwargs):
        if path == log:
            raise OSError(28, "No space left on device")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_file)
    assert train(load_recipe(recipe_file)).is_dir()
    assert caplog.text.count(f"cannot write {log}") == 1 and not log.exists()
    assert list(log.parent.glob("events.*"))  # the trackers go on


@pytest.mark.pictures
def test_report_has_the_numbers_of_the_record(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    train(recipe, command="unconceal train RECIPE")
    folder = tmp_path / "run"
    progress = json.loads((folder / "segmentation" / "last" / "progress.json").read_text())
    text = (folder / "report.md").read_text()
    best = next(row for row in progress["history"] if row["eval_iou"] == progress["best"])
    assert f"| segmentation | 2 of 2 | 6 | {sum(r['total_seconds'] for r in progress['history']) / 60:.1f} |" in text
    assert (
        f"| iou {progress['best']:.4f} | {best['epoch']} |" in text
        and f"| niou | {round(best['eval_niou'], 4)} |" in text
    )
    assert f"| dice | {progress['history'][-1]['losses']['dice']:.4f} |" in text
    assert "`unconceal train RECIPE`" in text and "10 in `train`, 3 in `val`" in text
    shown = re.findall(r"\]\((.*?\.png)\)", text)
    assert shown == ["reconstruction/curves.png", "segmentation/curves.png", "segmentation/samples.png"]
    for name in shown:
        with Image.open(folder / name) as image:
            assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 4


@pytest.mark.pictures
def test_report_of_somebody_else_stays_and_that_of_an_old_run_goes(recipe_file, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "report.md").write_text("my thoughts\n")
    recipe = load_recipe(recipe_file, ["phases.segmentation.epochs=1"])
    train(recipe)
    assert (folder / "report.md").read_text() == "my thoughts\n"
    assert "report.md was not written by a training and stays" in caplog.text
    (folder / "report.md").unlink()
    train(recipe, overwrite=True)
    assert (folder / "report.md").read_text().startswith("# Training of SRS: run")
    stop_after(1, recipe, overwrite=True)
    assert (folder / "report.md").is_file()  # it came back with its run
    stop_after(4, recipe, overwrite=True)
    assert not (folder / "report.md").exists()  # of another run than the one in the folder


@pytest.mark.pictures
def test_report_after_resuming_a_run_of_an_older_version(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    train_until(2, recipe)
    path = tmp_path / "run" / "segmentation" / "last" / "progress.json"
    progress = json.loads(path.read_text())
    for row in progress["history"]:
        del row["losses"]
    del progress["batch_terms"]
    path.write_text(json.dumps(progress))
    train(recipe, resume=True)
    assert "| dice |" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.pictures
def test_report_without_matplotlib_says_so(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train(load_recipe(recipe_file))
    text = (tmp_path / "run" / "report.md").read_text()
    assert text.count("No curves: curves need matplotlib") == 2 and "| iou |" in text
