"""A run that another one replaces."""

import shutil
import subprocess
import sys

import pytest
from common import rejected

from unconceal.training.earlier_run import ASIDE, alone_in, bring_back, check_apart, forget, parts_of_run, set_aside


def make_run(folder, text="old"):
    for task in ("reconstruction", "segmentation"):
        (folder / task / "best").mkdir(parents=True)
        (folder / task / "best" / "model.safetensors").write_text(text)
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
    assert set(contents(tmp_path).values()) == {"new"}
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
