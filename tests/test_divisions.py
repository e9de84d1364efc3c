"""A recipe over random divisions of its data set: what is dealt, what is run, what is kept."""

import importlib.util
import json
import subprocess
import sys
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
from test_evaluate import SCRIPT, cache, evaluate_script, make_dataset  # noqa: F401

from unconceal.data.builders import build
from unconceal.data.loading import load_splits
from unconceal.training import load_recipe
from unconceal.training.divisions import divide
from unconceal.utils.errors import UserError


spec = importlib.util.spec_from_file_location("train_script", SCRIPT.with_name("train.py"))
train_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_script)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "whole"
    (folder / "data").mkdir(parents=True)
    dataset = make_dataset(12)
    dataset.select(range(8)).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    dataset.select(range(8, 12)).to_parquet(folder / "data" / "val-00000-of-00001.parquet")
    return folder


def names(folder) -> dict[str, list[str]]:
    return {split: dataset["id"][:] for split, dataset in load_splits(str(folder), ["train", "val"]).items()}


def test_every_picture_is_dealt_once(data, tmp_path):
    whole, dealt = names(data), []
    for seed in (0, 1, 0):
        out = tmp_path / f"division-{len(dealt)}"
        divide(str(data), "train", "val", seed, out)
        dealt.append(names(out))
        assert {split: len(ids) for split, ids in dealt[-1].items()} == {"train": 8, "val": 4}
        assert sorted(sum(dealt[-1].values(), [])) == sorted(sum(whole.values(), []))
    assert dealt[0] == dealt[2] != dealt[1]
    # Each picture with its own mask, unchanged.
    before = {row["id"]: row for split in load_splits(str(data), ["train", "val"]).values() for row in split}
    for row in load_splits(str(tmp_path / "division-0"), ["val"])["val"]:
        assert row["image"].tobytes() == before[row["id"]]["image"].tobytes()
        assert row["mask"].tobytes() == before[row["id"]]["mask"].tobytes()


def test_a_division_is_that_of_the_raw_folder(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "raw" / kind).mkdir(parents=True)
    for row in make_dataset(10):
        row["image"].save(tmp_path / "raw" / "images" / f"{row['id']}.png")
        row["mask"].save(tmp_path / "raw" / "masks" / f"{row['id']}.png")
    fractions = {"train": 0.7, "val": 0.3}
    for name, seed in (("first", 5), ("second", 3)):
        build("folder", tmp_path / "raw", tmp_path / name, seed=seed, fractions=fractions)
    divide(str(tmp_path / "first"), "train", "val", 3, tmp_path / "again")
    assert names(tmp_path / "again") == names(tmp_path / "second") != names(tmp_path / "first")


def test_names_that_occur_twice_are_refused(data, tmp_path):
    make_dataset(3).to_parquet(data / "data" / "val-00000-of-00001.parquet")
    with pytest.raises(UserError, match="a name occurs twice in train and val"):
        divide(str(data), "train", "val", 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_training_and_evaluation_on_each_division(data, tmp_path, capsys, monkeypatch):
    def run(command):
        """What a process of its own would do, without its start."""
        script, *arguments = command[1:]
        (train_script if script.endswith("train.py") else evaluate_script).main(arguments)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("unconceal.training.divisions.subprocess", SimpleNamespace(run=run))
    recipe = SCRIPT.parents[1] / "configs" / "srs" / "smoke.yaml"
    overrides = [
        f"data.path={data}",
        "data.num_workers=0",
        "phases.segmentation.epochs=1",
        "protocol=lesion",
        "best_metric=mean_iou",
        "processor.size={height: 32, width: 32}",
    ]
    out = tmp_path / "divisions"
    command = ["divisions", str(recipe), *overrides, "--seeds", "0", "1", "0", "--out", str(out), "--name", "tiny"]
    evaluate_script.main(command)
    table = capsys.readouterr().out
    results = [json.loads((out / f"division-{seed}" / "results" / "results.json").read_text()) for seed in (0, 1)]
    assert [result["division_seed"] for result in results] == [0, 1]
    assert all(result["results"]["num_images"] == 4 for result in results)
    values = [result["results"]["mean_accuracy"] for result in results]
    assert "tiny (mean of 2 divisions, 4 images)" in table
    assert f"| {mean(values):.3f} ± {stdev(values):.3f} |" in table
    seeds = [load_recipe(out / f"division-{seed}" / "run" / "recipe.yaml").seed for seed in (0, 1)]
    assert seeds == [0, 1]

    # What is finished is kept: python is not even needed again.
    monkeypatch.undo()
    table = table[table.index("###") :]
    evaluate_script.main([*command, "--launcher", "absent-program"])
    assert capsys.readouterr().out == table
    for other in (["--checkpoint", "last"], ["--name", "another"], ["phases.segmentation.epochs=2"]):
        with pytest.raises(
            UserError, match="holds divisions of another (checkpoint|name|recipe); repeat that command"
        ):
            evaluate_script.main([*command, *other])
    (out / "division-1" / "results" / "results.json").unlink()
    with pytest.raises(UserError, match="the training of division 1 failed"):
        evaluate_script.main([*command, "--launcher", f"{sys.executable} -c raise\\ SystemExit(3)"])


def test_a_launcher_that_is_not_there_is_one_line(data, tmp_path):
    recipe = SCRIPT.parents[1] / "configs" / "srs" / "smoke.yaml"
    with pytest.raises(UserError, match="data set absent does not exist"):  # which nothing remembers
        evaluate_script.main(["divisions", str(recipe), "data.path=absent", "--out", str(tmp_path / "out")])
    command = ["divisions", str(recipe), f"data.path={data}", "--seeds", "0", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="cannot run absent-program"):
        evaluate_script.main([*command, "--launcher", "absent-program"])
