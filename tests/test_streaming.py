"""Training on a data set that is read as a stream."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from common import TWO_PROCESSES, rejected
from datasets import Dataset, load_dataset
from hub_server import HubServer
from test_training import assert_equal_weights, history, run_train, stop_after

from unconceal.data import streaming
from unconceal.data.builders import build_synthetic
from unconceal.data.streaming import Stream, StreamBatches, StreamedTrainingSet, open_streams
from unconceal.data.transforms import TransformRecipe
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor
from unconceal.training import start
from unconceal.training.loop import train
from unconceal.training.recipe import load_recipe


pytestmark = pytest.mark.usefixtures("without_pictures")
ROOT = Path(__file__).parents[1]
UNCHANGED = TransformRecipe(rotate90_probability=0, flip_probability=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a data set of 11 images in three files, and 3 for evaluation."""
    folder = tmp_path_factory.mktemp("stream") / "data"
    build_synthetic("ultrasound", folder, {"train": 11, "val": 3}, size=48)
    (path,) = (folder / "data").glob("train-*")
    rows = load_dataset("parquet", data_files=str(path), split="train")
    path.unlink()
    for number, part in enumerate(([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10])):
        rows.select(part).to_parquet(folder / "data" / f"train-{number:05d}-of-00003.parquet")
    return folder


@pytest.fixture
def recipe_file(tmp_path, folder):
    recipe = yaml.safe_load((ROOT / "configs/srs/smoke.yaml").read_text())
    recipe |= {"output_dir": str(tmp_path / "run"), "mixed_precision": "no"}
    recipe["data"] = {"path": str(folder), "num_workers": 0, "streaming": True, "shuffle_buffer": 4}
    recipe["processor"] = {"size": {"height": 32, "width": 32}}
    for phase, epochs in zip(recipe["phases"].values(), (1, 2), strict=True):
        phase |= {"batch_size": 4, "epochs": epochs}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def opened(folder):
    return open_streams(str(folder), "train", "val")["train"]


def ids(batches, epoch):
    batches.set_epoch(epoch)
    return [[row["id"] for _, row in batch] for batch in batches]


def test_an_epoch_has_each_row_once_in_an_order_of_its_own(folder):
    stream = opened(folder)
    assert len(stream) == 11 and len(stream.head) == 11
    batches = StreamBatches(stream, 4, buffer_size=4, seed=0)
    first, second, again = (ids(batches, epoch) for epoch in (0, 1, 0))
    assert [len(batch) for batch in first] == [4, 4, 3] and len(batches) == 3
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == sorted(stream.head["id"])
    assert first == again != second
    assert first != ids(StreamBatches(stream, 4, buffer_size=4, seed=1), 0)


def test_processes_read_files_of_their_own_and_have_equally_many_batches(folder):
    shares = [StreamBatches(opened(folder), 2, 4, 0, rank, 3) for rank in range(3)]
    found = [sum(ids(one, 0), []) for one in shares]
    assert [len(one) for one in shares] == [2, 2, 2] and [len(one) for one in found] == [4, 4, 4]
    assert len(set(sum(found, []))) == 11
    positions = [position for one in shares for batch in one for position, _ in batch]
    assert len(set(positions)) == 12  # each has random changes of its own


@pytest.mark.parametrize("number", [2, 3])
def test_uneven_files_are_read_by_all_processes_and_no_row_is_left_out(folder, number):
    """Three files are of 4, 4 and 3 rows. An epoch of two or three processes has 12 samples."""
    stream = opened(folder)
    shares = [StreamBatches(stream, 2, 4, 0, rank, number) for rank in range(number)]
    assert not any(one.has_own_files for one in shares)
    for epoch in range(3):
        found = [sum(ids(one, epoch), []) for one in shares]
        assert [len(one) for one in found] == [12 // number] * number
        assert len(set(sum(found, []))) == 11


def test_even_files_are_read_by_one_process_each(folder, monkeypatch):
    stream = opened(folder)
    stream.counts, read = [4, 4, 4], []
    monkeypatch.setattr(Stream, "read", lambda self, file: read.append(file) or iter([{"id": file}] * 4))
    shares = [StreamBatches(stream, 2, 4, 0, rank, 3) for rank in range(3)]
    for one in shares:
        list(one)
    assert sorted(read) == [0, 1, 2]


def test_a_last_batch_of_one_is_left_out(folder):
    assert [len(batch) for batch in ids(StreamBatches(opened(folder), 5, 4, 0), 0)] == [5, 5]


def test_samples_equal_those_of_the_loaded_data_set(folder):
    stream = opened(folder)
    processor = UnconcealImageProcessor(size=32)
    samples = StreamedTrainingSet(stream, processor, UNCHANGED, seed=0)
    loaded = {row["id"]: row for row in load_dataset(str(folder), split="train")}
    for batch in samples.batches(4, 0, 1):
        for (_, row), sample in zip(batch, samples.__getitems__(batch), strict=True):
            pair = loaded[row["id"]]
            expected = processor(images=pair["image"], segmentation_maps=pair["mask"], return_tensors="pt")
            assert torch.equal(sample["pixel_values"], expected["pixel_values"][0])
            assert torch.equal(sample["labels"], expected["labels"][0])


def test_a_resumed_run_equals_an_unbroken_one(recipe_file, tmp_path):
    settings = ["save_every=1step", "phases.segmentation.batch_size=2"]
    unbroken, broken = (load_recipe(recipe_file, [*settings, f"output_dir={tmp_path / name}"]) for name in "ub")
    total = stop_after(-1, unbroken)
    assert total == 3 + 2 * 5  # 11 images in batches of 2, without the last one
    stop_after(5, broken)
    stop_after(4, broken, resume=True)
    stop_after(-1, broken, resume=True)
    for phase in ("reconstruction", "segmentation"):
        assert history(tmp_path / "b" / phase / "last") == history(tmp_path / "u" / phase / "last")
        assert_equal_weights(tmp_path / "b" / phase / "last", tmp_path / "u" / phase / "last")


def test_loader_processes_change_nothing(recipe_file, tmp_path):
    for number in (0, 2):
        train(load_recipe(recipe_file, [f"output_dir={tmp_path / str(number)}", f"data.num_workers={number}"]))
    assert history(tmp_path / "0/segmentation/last") == history(tmp_path / "2/segmentation/last")
    assert_equal_weights(tmp_path / "0/segmentation/last", tmp_path / "2/segmentation/last")


@pytest.fixture
def damaged(folder, tmp_path):
    """Return the data set with one image that cannot be read."""
    rows = [dict(row) for row in load_dataset(str(folder), split="train", streaming=True).decode(False)]
    rows[5]["image"] = {"bytes": b"no image", "path": "x.png"}
    features = load_dataset(str(folder), split="train").features
    Dataset.from_list(rows, features).to_parquet(tmp_path / "damaged/data/train-00000-of-00001.parquet")
    (val,) = (folder / "data").glob("val-*")
    (tmp_path / "damaged/data" / val.name).write_bytes(val.read_bytes())
    return tmp_path / "damaged", rows[5]["id"]


@pytest.mark.parametrize(("num_workers", "batch_size"), [(0, 4), (1, 4), (0, 1)])
def test_unreadable_images_are_named_and_replaced(damaged, recipe_file, tmp_path, caplog, num_workers, batch_size):
    path, name = damaged
    settings = [f"data.path={path}", f"data.num_workers={num_workers}", "phases.segmentation.epochs=1"]
    settings += [f"phases.{phase}.batch_size={batch_size}" for phase in ("reconstruction", "segmentation")]
    train(load_recipe(recipe_file, [*settings, "data.max_unreadable=0.1"]))
    assert f"1 of 11 training images cannot be read, and the next takes their place: {name}" in caplog.text
    progress = json.loads((tmp_path / "run/segmentation/last/progress.json").read_text())
    assert progress["unreadable"] == [name]
    with rejected(f"cannot read the training data: {name}: "):
        train(load_recipe(recipe_file, [*settings, "data.max_unreadable=0", f"output_dir={tmp_path / 'strict'}"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.path=[a, b]"], r"data.path is \['a', 'b'\], expected one data set with data.streaming"),
        (["data.split_seed=1"], "data.split_seed is 1, expected null with data.streaming"),
        (["data.transforms.paste_probability=0.5"], "paste_probability is 0.5, expected 0 with data.streaming"),
        (["data.shuffle_buffer=0"], "data.shuffle_buffer is 0, expected more than 0"),
    ],
)
def test_settings_that_a_stream_does_not_have(recipe_file, settings, words):
    with rejected(words):
        load_recipe(recipe_file, settings)


def test_data_that_cannot_be_streamed(recipe_file, tmp_path):
    for path, split, words in (
        ("absent", "train", "data set absent does not exist"),
        (None, "training", "has no split training; it has train, val"),
    ):
        settings = [f"data.path={path}"] if path else []
        with rejected(words):
            train(load_recipe(recipe_file, [*settings, f"data.train_split={split}"]))
    (tmp_path / "images/train").mkdir(parents=True)
    for number in range(2):
        from PIL import Image

        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / f"images/train/{number}.png")
    with rejected("is not stored as Parquet files; set data.streaming=false"):
        train(load_recipe(recipe_file, [f"data.path={tmp_path / 'images'}"]))


def test_a_lost_connection_ends_in_one_line(recipe_file, monkeypatch):
    calls = []

    def read_rows(file, columns):
        if len(calls) > 3:  # the first rows come before training
            raise ConnectionError("Server Disconnected")
        calls.append(file)
        yield from original(file, columns)

    original = streaming.read_rows
    monkeypatch.setattr(streaming, "read_rows", read_rows)
    with rejected("cannot read .*: Server Disconnected; --resume goes on from the last checkpoint"):
        train(load_recipe(recipe_file))


def test_first_rows_without_an_object_are_only_a_warning(folder, recipe_file, tmp_path, caplog):
    rows = load_dataset(str(folder), split="train")
    empty = rows.map(lambda row: {"mask": row["mask"].point(lambda value: 0)})
    copied = Path(shutil.copytree(folder, tmp_path / "empty"))
    for path in (copied / "data").glob("train-*"):
        path.unlink()
    empty.to_parquet(copied / "data" / "train-00000-of-00001.parquet")
    (copied / "README.md").unlink()
    recipe = load_recipe(recipe_file, [f"data.path={copied}", "phases.segmentation.epochs=1"])
    start.check_masks(start.load_data(recipe.data), recipe.data, ["segmentation"])
    assert "the first 11 rows: no mask shows an object" in caplog.text


def test_types_of_the_card_hold_and_missing_splits_are_named(folder, tmp_path):
    """A file can hold images as plain bytes; the card says that they are images."""
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    for path in (plain / "data").glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({}), path)
    assert opened(plain).head[0]["image"].size == (48, 48)
    (plain / "README.md").unlink()
    with rejected("has no split validation; it has train, val"):
        open_streams(str(plain), "train", "validation")


@pytest.mark.thorough
def test_two_processes_stream(recipe_file, tmp_path):
    run_train(*TWO_PROCESSES, "-m", "unconceal", "train", recipe_file, "phases.segmentation.batch_size=2")
    last = json.loads((tmp_path / "run/segmentation/last/progress.json").read_text())
    assert (last["num_processes"], last["step"]) == (2, 2 * 3)


@pytest.mark.slow
def test_a_stream_from_the_hub_downloads_only_the_evaluation_split(recipe_file, folder, tmp_path):
    hub = HubServer()
    hub.start()
    upload = (
        "import sys; from huggingface_hub import HfApi; api = HfApi(); "
        "api.create_repo('org/scenes', repo_type='dataset'); "
        "api.upload_folder(repo_id='org/scenes', repo_type='dataset', folder_path=sys.argv[1])"
    )
    command = [sys.executable, "-m", "unconceal", "train", str(recipe_file), "data.path=org/scenes"]
    options = {"env": hub.environment(tmp_path / "home"), "cwd": tmp_path, "capture_output": True, "text": True}
    try:
        sent = subprocess.run([sys.executable, "-c", upload, str(folder)], **options)
        done = subprocess.run(command, **options)
    finally:
        hub.stop()
    assert done.returncode == 0, sent.stderr + done.stderr
    fetched = [path.name for path in (tmp_path / "home").rglob("*.parquet")]
    assert fetched and all(name.startswith("val-") for name in fetched), fetched
    train(load_recipe(recipe_file, [f"output_dir={tmp_path / 'local'}"]))
    assert history(tmp_path / "local/segmentation/last") == history(tmp_path / "run/segmentation/last")
