"""Several data sets in one run."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
from common import rejected
from PIL import Image

from unconceal import load
from unconceal.data.builders import build_synthetic
from unconceal.data.cards import describe_set
from unconceal.data.mixing import Mixture, join_sets, load_sets
from unconceal.data.transforms import TrainingSet, TransformRecipe
from unconceal.hub.cards import Training, make_model_card
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor
from unconceal.training.checkpoints import Progress
from unconceal.training.recipe import DataRecipe, load_recipe
from unconceal.training.start import load_data


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Make three data sets: with both splits, the same with another column, without `val`."""
    folder = tmp_path_factory.mktemp("mixing")
    build_synthetic("ultrasound", folder / "a", {"train": 7, "val": 2}, size=48)
    build_synthetic("infrared", folder / "b", {"train": 4, "val": 3}, size=48)
    build_synthetic("camouflage", folder / "c", {"train": 2}, size=48)
    for split, rows in datasets.load_dataset(str(folder / "b")).items():
        rows = rows.map(lambda row: {"background": row["image"]})
        rows.to_parquet(folder / f"wider/data/{split}-00000-of-00001.parquet")
    return folder


def paths(folders, *names):
    return [str(folders / name) for name in names]


def drawn(mixture, epoch, total):
    return [mixture.row(index, epoch) for index in range(total)]


def test_splits_are_joined_in_order(folders):
    joined = load_data(DataRecipe(path=paths(folders, "a", "wider", "c")))
    alone = [load_data(DataRecipe(path=path)) for path in paths(folders, "a", "wider")]
    assert {name: len(rows) for name, rows in joined.items()} == {"train": 13, "val": 5}
    assert joined["val"]["id"][:] == [name for splits in alone for name in splits["val"]["id"][:]]
    assert joined["train"].column_names == ["image", "mask", "id", "source"]
    assert joined["train"][8]["image"].tobytes() == alone[1]["train"][1]["image"].tobytes()
    assert len(set(joined["train"]["source"][:])) == 3


def test_each_set_is_split_again_by_itself(folders):
    joined = load_data(DataRecipe(path=paths(folders, "a", "b", "c"), split_seed=4))
    alone = [load_data(DataRecipe(path=path, split_seed=4)) for path in paths(folders, "a", "b")]
    for name in ("train", "val"):
        ids = [id for splits in alone for id in splits[name]["id"][:]]
        assert joined[name]["id"][: len(ids)] == ids
    assert len(joined["train"]) == 13


def test_a_test_split_is_not_dealt_again(tmp_path):
    build_synthetic("infrared", tmp_path / "data", {"train": 3, "test": 3}, size=48)
    with rejected("would train on images of the test split test; set data.eval_split"):
        load_sets([str(tmp_path / "data")], "train", "test", split_seed=1)


def test_unusable_sets_are_one_line(folders, tmp_path):
    with rejected("none of the data sets .*a, .*c has a split test"):
        load_sets(paths(folders, "a", "c"), "train", "test")
    with rejected("data set .*c has no split val; it has train"):
        load_sets(paths(folders, "c"), "train", "val")
    with rejected("data set .*c has no split val; it has train"):
        load_sets(paths(folders, "a", "c"), "val", "train")
    picture = Image.new("RGB", (8, 8))
    for changed, message in (
        ({"mask": [1]}, "the column mask of split train of data set .* is .*, expected images"),
        ({"source": [{"b": 1}]}, "cannot join data sets: the column source of a split train is "),
    ):
        row = {"image": [picture], "mask": [picture], "id": ["a"], "source": ["b"]} | changed
        datasets.Dataset.from_dict(row).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
        with rejected(message):
            join_sets(load_sets([*paths(folders, "a"), str(tmp_path)], "train", "val"))


def test_epoch_has_the_shares_of_the_weights():
    mixture = Mixture([30, 10], [1, 3], seed=0)
    rows = Counter(drawn(mixture, 0, 40))
    assert sum(count for row, count in rows.items() if row >= 30) == 30
    assert [rows[row] for row in range(30, 40)] == [3] * 10  # three whole passes
    assert max(rows[row] for row in range(30)) == 1
    assert Mixture([30, 10], [1000, 1], seed=0).counts == [39, 1]
    assert Mixture([3, 3, 3], [1, 1, 1], seed=0).counts == [3, 3, 3]


def test_next_epoch_has_the_images_that_the_last_one_left_out():
    mixture = Mixture([30, 10], [1, 3], seed=0)
    epochs = [[row for row in drawn(mixture, epoch, 40) if row < 30] for epoch in range(6)]
    for first in (0, 3):  # 30 images, 10 an epoch
        assert sorted(sum(epochs[first : first + 3], [])) == list(range(30))
    assert epochs[0] != epochs[3]


def test_order_depends_on_the_seed_only():
    orders = [drawn(Mixture([30, 10], [1, 3], seed), epoch, 40) for seed, epoch in ((0, 2), (0, 2), (1, 2), (0, 5))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3] != orders[0]


def test_repeated_images_are_changed_differently(folders):
    rows = load_data(DataRecipe(path=paths(folders, "a", "c")))["train"]
    mixture = Mixture([7, 2], [1, 8], seed=0)
    samples = TrainingSet(rows, UnconcealImageProcessor(size=32), TransformRecipe(brightness=0.5), 0, mixture)
    samples.set_epoch(1)
    places = [index for index in range(len(samples)) if mixture.row(index, 1) == 7]
    assert len(places) == 4
    assert len({samples[index]["pixel_values"].mean().item() for index in places}) == 4


def test_card_lists_every_set(folders, checkpoint):
    data = f"data.path=[{folders / 'a'}, {folders / 'c'}, gone/absent]"
    recipe = load_recipe(ROOT / "configs/srs/smoke.yaml", [data, "data.weights=[3, 1, 1]"])
    splits = [{"train": range(7), "val": range(2)}, {"train": range(2)}, {"train": range(1)}]
    sets = [describe_set(path, held) for path, held in zip(recipe.data.paths, splits, strict=True)]
    progress = Progress("segmentation", recipe=asdict(recipe), data=sets)
    text = make_model_card(load(checkpoint, "cpu"), "org/mixed", Training(recipe, progress))
    assert "7 in `train`, 2 in `val`. Trained on `train`; the best checkpoint was chosen on `val`." in text
    assert "2 in `train`. Trained on `train`.\n" in text
    assert "A data set named `absent`: 1 in `train`. Its card was not at hand" in text
    names = [one["title"] for one in sets[:2]]
    assert f"Shares of the training samples: {names[0]} 60%, {names[1]} 20%, absent 20%." in text
    assert str(folders) not in text
