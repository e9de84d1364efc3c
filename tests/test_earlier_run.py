"""A run that another one replaces."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from common import rejected

from unconceal.training.earlier_run import (
    ASIDE,
    alone_in,
    bring_back,
    check_apart,
    check_own,
    forget,
    holds_run,
    parts_of_run,
    set_aside,
)
from unconceal.training.recipe import dump_recipe, load_recipe
from unconceal.training.start import check_folder


SMOKE = Path(__file__).parents[1] / "configs/srs/smoke.yaml"
TASKS = ("reconstruction", "segmentation")


def make_run(folder, text="old"):
    for task in TASKS:
        best = folder / task / "best"
        best.mkdir(parents=True)
        (best / "model.safetensors").write_text(text)
        record = {"note": text, "digests": {"model.safetensors": ""}, "recipe": {"total_limit": 2}}
        (best / "progress.json").write_text(json.dumps(record))
    (folder / "recipe.yaml").write_text(text)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    """The lock ends with the process, also if that is killed."""
    code = f"""
import time
from unconceal.training.earlier_run import alone_in
with alone_in({str(tmp_path)!r}):
    print("locked", flush=True)
    time.sleep(600)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with rejected("another process trains in"), alone_in(tmp_path / "." / "x" / ".."):
            pass
        with alone_in(tmp_path / "another"):
            pass
    finally:
        other.kill()
        other.wait()
    with alone_in(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_run_stands_aside_and_comes_back(tmp_path):
    make_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    set_aside(tmp_path)
    assert not parts_of_run(tmp_path)
    assert (tmp_path / "notes.txt").exists()
    (tmp_path / "segmentation").mkdir()
    (tmp_path / "segmentation" / "events").write_text("log of a run without a checkpoint")
    (tmp_path / "recipe.yaml").write_text("new")
    bring_back(tmp_path)
    assert contents(tmp_path) == before
    bring_back(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("moved", [["recipe.yaml"], ["recipe.yaml", "reconstruction"]])
def test_a_kill_while_moving_loses_nothing(tmp_path, moved):
    make_run(tmp_path)
    before = contents(tmp_path)
    (tmp_path / ASIDE).mkdir()
    for name in moved:
        (tmp_path / name).rename(tmp_path / ASIDE / name)
    bring_back(tmp_path)
    assert contents(tmp_path) == before


def test_what_the_new_run_began_goes(tmp_path):
    make_run(tmp_path)
    shutil.rmtree(tmp_path / "reconstruction")
    before = contents(tmp_path)
    set_aside(tmp_path)
    make_run(tmp_path, "new")  # it failed before its first whole checkpoint
    bring_back(tmp_path)
    assert contents(tmp_path) == before


def test_forget_removes_the_earlier_run_only(tmp_path):
    make_run(tmp_path)
    set_aside(tmp_path)
    make_run(tmp_path, "new")
    forget(tmp_path)
    bring_back(tmp_path)
    assert all("new" in text for text in contents(tmp_path).values())
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_folders_without_checkpoints_are_not_of_a_run(tmp_path):
    (tmp_path / "segmentation").mkdir()
    (tmp_path / "segmentation" / "photo.png").write_text("mine")
    assert parts_of_run(tmp_path) == []
    set_aside(tmp_path)
    assert (tmp_path / "segmentation" / "photo.png").exists()


def test_what_the_new_run_reads_is_not_replaced(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run" / "segmentation")
    check_apart(tmp_path / "run", [("data.path", str(tmp_path)), ("init_from", "owner/name"), ("init_from", None)])
    for source in (tmp_path / "run" / "segmentation" / "best", tmp_path / "link" / "best"):
        with rejected("phases.segmentation.init_from is .*, a part of the run that --overwrite replaces"):
            check_apart(tmp_path / "run", [("phases.segmentation.init_from", str(source))])


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "my_finetuned/model.safetensors",
        "best/eval/results.json",
        "best/.hidden",
        "last/holiday.png",
        "last-2/model.safetensors",
        "progress.json",
        "1.5/photo.png",
    ],
)
def test_files_of_others_are_not_replaced_with_a_run(tmp_path, name):
    make_run(tmp_path)
    shutil.copytree(tmp_path / "segmentation" / "best", tmp_path / "segmentation" / "last-1")
    for own in ("log.jsonl", "samples.png", "curves.png", "events.out.tfevents.1.host", "1.5/hparams.yml"):
        (tmp_path / "segmentation" / own).parent.mkdir(exist_ok=True)
        (tmp_path / "segmentation" / own).touch()
    for own in (".last.training_state/optimizer.bin", ".0123abcd.next/model.safetensors"):  # after a kill
        (tmp_path / "segmentation" / own).parent.mkdir()
        (tmp_path / "segmentation" / own).touch()
    check_own(tmp_path, TASKS, resume=False)
    file = tmp_path / "segmentation" / name
    if name == "last-2/model.safetensors":  # a copy by hand
        shutil.copytree(file.parents[1] / "best", file.parent)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    with rejected(f"{file} was not written by a training and would be in the way of this one; move it elsewhere, or"):
        check_own(tmp_path, TASKS, resume=False)
    check_own(tmp_path, TASKS, resume=True)  # it stays where it is
    set_aside(tmp_path)
    assert not any(path in parts_of_run(tmp_path) for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["log.jsonl", "samples.png", "curves.png", "best/holiday.png", "last/config.json"])
def test_a_folder_of_somebody_else_is_no_phase(tmp_path, name):
    file = tmp_path / "segmentation" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"step": 1, "loss": 2}')
    assert not holds_run(tmp_path)
    for resume in (False, True):
        with rejected(f"{file} was not written by a training"):
            check_own(tmp_path, TASKS, resume)
        check_own(tmp_path, TASKS[:1], resume)  # no such phase
    if name == "log.jsonl":
        file.write_text('{"kind": "epoch", "step": 1}')  # of a run that ended before a checkpoint
        assert parts_of_run(tmp_path) == [file.parent]
        check_own(tmp_path, TASKS, resume=False)


def test_a_recipe_of_the_user_is_not_replaced(tmp_path):
    file, text = tmp_path / "recipe.yaml", SMOKE.read_text()
    recipe = load_recipe(SMOKE, [f"output_dir={tmp_path}"])
    whole = dump_recipe(recipe)
    for kept in (text, f"# mine\n{whole}"):
        file.write_text(kept)
        for overwrite in (False, True):
            with rejected(f"{file} was not written by a training"):
                check_folder(tmp_path, recipe, resume=False, overwrite=overwrite)
        assert file.read_text() == kept
    file.write_text(whole)
    with rejected("already holds a run"):
        check_folder(tmp_path, recipe, resume=False, overwrite=False)
    check_folder(tmp_path, recipe, resume=False, overwrite=True)
    make_run(tmp_path, "# mine")
    check_own(tmp_path, TASKS, resume=True)
    with rejected(f"{file} was not written by a training"):
        check_own(tmp_path, TASKS, resume=False)
