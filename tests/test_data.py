import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from common import rejected
from datasets import ClassLabel, Dataset, load_dataset
from huggingface_hub import DatasetCard
from PIL import Image

from unconceal.__main__ import main
from unconceal.data import write as data_write
from unconceal.data.builders import build, build_synthetic
from unconceal.data.cards import describe_set
from unconceal.data.finders import FINDERS
from unconceal.data.loading import UnreadableSample, load_splits, only_value, with_names
from unconceal.data.masks import UnusablePair, is_object, read_mask
from unconceal.data.names import find_images
from unconceal.data.pairs import Pair, load_pair
from unconceal.data.sources import SOURCES, TILE_CLASSES
from unconceal.data.splits import (
    difference_hash,
    find_groups,
    join_near_copies,
    split_at_random,
    split_datasets_at_random,
)
from unconceal.data.streaming import item_name
from unconceal.data.synthetic import generate
from unconceal.data.transforms import (
    TrainingSet,
    TransformRecipe,
    crop,
    flip_and_trim,
    jitter_colors,
    rotate,
    turn_and_flip,
)
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor
from unconceal.models.reading import to_mask
from unconceal.segmenting_data import shards_of_data
from unconceal.utils.errors import UserError, run_main
from unconceal.utils.images import MAX_PIXELS


ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("UNCONCEAL_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def run(capsys):
    """Run `unconceal prepare` in this process; return exit code, output and errors."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            run_main(lambda: main(["prepare", *map(str, arguments)]))
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call


@pytest.fixture
def prepare(run):
    """Run `unconceal prepare` without an error; return its output."""

    def call(*arguments):
        code, text, errors = run(*arguments)
        assert code == 0, errors
        return text

    return call


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def load(tmp_path):
    return lambda folder: load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))


def write_image(path, size=(40, 36), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path, **options)


def write_mask(path, size=(40, 36), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).random((size[1], size[0])) > 0.7
    Image.fromarray(values.astype(np.uint8) * 255).save(path)


def write_pairs(
    root, names=("a", "b", "c", "d"), image_suffix=".png", mask_suffix=".png", images="images", masks="masks", seed=0
):
    for i, name in enumerate(names, start=seed):
        write_image(root / images / f"{name}{image_suffix}", seed=i)
        write_mask(root / masks / f"{name}{mask_suffix}", seed=i)
    return root


@pytest.fixture
def sirst(tmp_path):
    root = write_pairs(tmp_path / "raw", [f"Misc_{i}" for i in range(1, 9)], mask_suffix="_pixels0.png")
    (root / "idx_427").mkdir()
    (root / "idx_427" / "train.txt").write_text("Misc_1\nMisc_2\nMisc_3\nMisc_4")  # no newline at the end
    (root / "idx_427" / "val.txt").write_text("Misc_5\r\nMisc_6\r\n\r\n")
    return root


@pytest.fixture
def busi(tmp_path):
    root = tmp_path / "raw" / "Dataset_BUSI_with_GT"
    for place, (label, count) in enumerate((("benign", 10), ("malignant", 5), ("normal", 5))):
        for i in range(1, count + 1):
            write_image(root / label / f"{label} ({i}).png", seed=100 * place + i)
            values = np.zeros((36, 40), dtype=bool)
            values[:10, :10] = label != "normal"
            Image.fromarray(values).save(root / label / f"{label} ({i})_mask.png")
    second = np.zeros((36, 40, 4), dtype=np.uint8)
    second[..., 3] = 255
    second[20:30, 20:30, :3] = 255
    Image.fromarray(second).save(root / "benign" / "benign (1)_mask_1.png")
    return tmp_path / "raw"


def sizes(report):
    return {split: done.num_examples for split, done in report.splits.items()}


def stored_ids(out):
    return sorted(id for path in (out / "data").iterdir() for id in pq.read_table(path)["id"].to_pylist())


def assert_one_error(result, out, *words):
    code, _, errors = result
    assert code == 2
    assert errors.count("error:") == 1
    assert "Traceback" not in errors
    line = next(line for line in errors.splitlines() if "error:" in line)
    for word in words:
        assert word in line
    assert not out.exists()
    if out.parent.is_dir():
        assert [path for path in out.parent.iterdir() if path.name.startswith(".")] == []


# Layouts


def test_sirst_lists_and_files_are_kept(sirst, prepare, load, out):
    text = prepare("sirst", "--source", sirst, "--out", out)
    assert "left out: 0 unusable, 2 in no list" in text
    assert "train 4, val 2" in text
    assert {path.name for path in (out / "data").iterdir()} == {
        f"{s}-00000-of-00001.parquet" for s in ("train", "val")
    }
    loaded = load(out)
    assert loaded["train"]["id"][:] == ["Misc_1", "Misc_2", "Misc_3", "Misc_4"]
    assert loaded["val"]["id"][:] == ["Misc_5", "Misc_6"]
    assert loaded["train"].features == data_write.FEATURES
    assert set(loaded["train"]["source"]) == {"sirst"}
    for row in (row for split in loaded.values() for row in split):
        assert row["mask"].mode == "L"
        np.testing.assert_array_equal(row["mask"], Image.open(sirst / "masks" / f"{row['id']}_pixels0.png"))
    for row in pq.read_table(out / "data" / "val-00000-of-00001.parquet").to_pylist():
        assert row["image"]["bytes"] == (sirst / "images" / f"{row['id']}.png").read_bytes()


def test_card_names_command_counts_and_left_out_pairs(sirst, run, out):
    write_mask(sirst / "masks" / "Misc_5_pixels0.png", size=(30, 36))
    run("sirst", "--source", sirst, "--out", out, "--skip-unusable")
    card = DatasetCard.load(out / "README.md")
    assert card.data.license == "other"
    assert [split["num_examples"] for split in card.data.dataset_info["splits"]] == [4, 1]
    assert f"    unconceal prepare sirst --source {sirst} --out {out} --skip-unusable\n" in card.text
    assert "`Misc_5`: mask Misc_5_pixels0.png is 30x36 but image Misc_5.png is 40x36" in card.text
    assert "2 name(s) are in no list" in card.text


def test_busi_joins_masks_and_keeps_the_share_of_classes(busi, load, out):
    report = build("busi", busi, out)
    assert sizes(report) == {"train": 16, "val": 4}
    assert report.num_empty_masks == 5
    loaded = load(out)
    for split, counts in (("train", (8, 4, 4)), ("val", (2, 1, 1))):
        sources = loaded[split]["source"][:]
        assert tuple(sources.count(f"busi/{label}") for label in ("benign", "malignant", "normal")) == counts
    rows = {row["id"]: row for split in loaded.values() for row in split}
    assert (np.asarray(rows["benign (1)"]["mask"]) > 0).sum() == 200
    assert (np.asarray(rows["normal (1)"]["mask"]) > 0).sum() == 0


@pytest.mark.parametrize(
    ("name", "inner", "suffix", "ids", "split"),
    [
        ("bus", "", ".png", "case{:04d}", {"train": 7, "val": 3}),
        ("kbt", "", ".bmp", "{}", {"train": 7, "val": 3}),
        ("kvasir", "Kvasir-SEG", ".jpg", "cju{}", {"train": 9, "val": 1}),
    ],
)
def test_sets_with_and_without_lists(name, inner, suffix, ids, split, tmp_path):
    raw = tmp_path / "raw"
    root = write_pairs(raw / inner, [ids.format(i) for i in range(10)], suffix, suffix)
    (root / "kavsir_bboxes.json").write_text("{}")  # the makers' spelling
    assert sizes(build(name, raw, tmp_path / "random", seed=1)) == split
    (root / "train.txt").write_text("\n".join(ids.format(i) for i in range(6)))
    (root / "val.txt").write_text("\n".join(ids.format(i) for i in range(6, 10)))
    assert sizes(build(name, root, tmp_path / "listed")) == {"train": 6, "val": 4}
    build(name, raw, tmp_path / "again", seed=1, random_split=True)
    first, again = (pq.read_table(tmp_path / out / "data")["id"].to_pylist() for out in ("random", "again"))
    assert first == again


def test_kvasir_in_folders(tmp_path, load):
    root = tmp_path / "raw"
    write_pairs(root / "train", ["0", "1", "2"], ".jpg", ".jpg")
    write_pairs(root / "validation", ["0", "1"], ".jpg", ".jpg", seed=50)  # other images of the same names
    report = build("kvasir", root, tmp_path / "out")
    assert sizes(report) == {"train": 3, "val": 2}
    assert not report.repeats
    assert report.num_changed_masks == 5  # JPEG leaves other values than 0 and 255
    loaded = load(tmp_path / "out")
    assert loaded["train"]["id"][:] == ["train/0", "train/1", "train/2"]
    assert loaded["val"]["id"][:] == ["validation/0", "validation/1"]
    for row in loaded["val"]:
        raw = np.asarray(Image.open(root / "validation" / "masks" / f"{Path(row['id']).name}.jpg"))
        np.testing.assert_array_equal(np.asarray(row["mask"]), np.where(raw > 127, 255, 0))


COD_TRAIN = ["COD10K-CAM-1-Aquatic-1-BatFish-1", "camourflage_00001", "other"]


@pytest.mark.parametrize(("images", "masks"), [("Imgs", "GT"), ("Image", "Mask"), ("images", "MASKS")])
def test_cod_folders_in_all_spellings(images, masks, tmp_path, load):
    root = tmp_path / "raw"
    train = write_pairs(root / "TrainDataset", COD_TRAIN, ".jpg", ".png", images, masks)
    write_mask(train / "Edge" / "camourflage_00001.png")
    for place, (name, file) in enumerate((("NC4K", "1"), ("CAMO", "camourflage_00001"), ("chameleon", "animal-1"))):
        write_pairs(root / "TestDataset" / name, [file], ".jpg", ".png", images, masks, seed=10 + place)
    report = build("cod", root, tmp_path / "out")
    assert sizes(report) == {"train": 3, "CHAMELEON": 1, "CAMO": 1, "NC4K": 1}
    loaded = load(tmp_path / "out")
    assert loaded["train"]["id"][:] == [f"train/{name}" for name in COD_TRAIN]
    assert loaded["train"]["source"][:] == ["cod/COD10K", "cod/CAMO", "cod"]
    assert loaded["CAMO"]["id"][:] == ["CAMO/camourflage_00001"]  # a name of the training set may come again
    for split in ("CHAMELEON", "CAMO", "NC4K"):
        assert loaded[split]["source"][:] == [f"cod/{split}"]


def test_cod_with_one_half_only(tmp_path, caplog):
    write_pairs(tmp_path / "train" / "TrainDataset", COD_TRAIN, ".jpg", ".png", "Imgs", "GT")
    assert sizes(build("cod", tmp_path / "train", tmp_path / "one")) == {"train": 3}
    for name in ("CAMO", "CPD1K"):
        write_pairs(tmp_path / "test" / "TestDataset" / name, ["a"], ".jpg", ".png", "Imgs", "GT")
    assert sizes(build("cod", tmp_path / "test", tmp_path / "two")) == {"CAMO": 1}
    assert "1 folders are left out (CPD1K); expected only CHAMELEON, CAMO, COD10K, NC4K" in caplog.text


def test_cod_without_official_splits(tmp_path, run, load):
    root = write_pairs(tmp_path / "raw", COD_TRAIN, ".jpg", ".png", "Imgs", "GT")
    assert run("cod", "--source", root, "--out", tmp_path / "one")[0] == 0
    assert load(tmp_path / "one")["train"]["id"][:] == COD_TRAIN
    assert run("cod", "--source", root, "--out", tmp_path / "two", "--fractions", "CAMO=1")[0] == 0
    assert load(tmp_path / "two")["CAMO"]["source"][:] == ["cod/COD10K", "cod/CAMO", "cod"]


def test_cod_images_without_a_mask_are_named(tmp_path, run, prepare, caplog, out):
    root = write_pairs(tmp_path / "raw" / "TrainDataset", COD_TRAIN, ".jpg", ".png", "Imgs", "GT")
    bare = "COD10K-NonCAM-1-Aquatic-1-BatFish-1"
    write_image(root / "Imgs" / f"{bare}.jpg")
    arguments = ["cod", "--source", root.parent, "--out", out]
    assert_one_error(run(*arguments), out, "1 of 4 pairs", "--skip-unusable")
    assert f"unusable: train/{bare}: no mask GT/{bare}.*" in caplog.text
    text = prepare(*arguments, "--skip-unusable")
    assert "left out: 1 unusable" in text
    assert "train 3" in text


def test_cod_without_its_folders_is_an_error(tmp_path, run, out):
    (tmp_path / "raw" / "TestDataset" / "CPD1K").mkdir(parents=True)
    assert_one_error(run("cod", "--source", tmp_path / "raw", "--out", out), out, "no pairs", "TrainDataset", "NC4K")
    (tmp_path / "raw" / "TestDataset" / "NC4K").mkdir()
    assert_one_error(run("cod", "--source", tmp_path / "raw", "--out", out), out, "NC4K/Imgs", "folder of images")
    write_image(tmp_path / "pack" / "Imgs" / "a.jpg")
    assert_one_error(run("cod", "--source", tmp_path / "pack", "--out", out), out, "pack/GT", "folder of images")


DIS5K = ("DIS-TR", "DIS-VD", "DIS-TE1", "DIS-TE2", "DIS-TE3", "DIS-TE4")
DIS5K_NAME = "1#Accessories#1#Bag#2339506821_83cf9f1d22_o"


@pytest.mark.parametrize("inner", ["", "DIS5K"])
def test_dis5k_splits(inner, tmp_path, prepare, load):
    root = tmp_path / "raw"
    for place, name in enumerate(DIS5K):
        write_pairs(root / inner / name, [DIS5K_NAME], ".jpg", ".png", "im", "gt", seed=place)
    (root / inner / "DIS-TE4" / "gt" / "notes.txt").write_text("not an image")
    soft = np.zeros((36, 40), np.uint8)
    soft[:, 10:], soft[:, 9] = 255, 128
    Image.fromarray(soft).save(root / inner / "DIS-VD" / "gt" / f"{DIS5K_NAME}.png")
    text = prepare("dis5k", "--source", root, "--out", tmp_path / "out")
    assert "masks: 1 changed by the rule" in text
    loaded = load(tmp_path / "out")
    splits = ["train", "val", "DIS_TE1", "DIS_TE2", "DIS_TE3", "DIS_TE4"]
    assert list(loaded) == splits
    for split, name in zip(splits, DIS5K, strict=True):
        assert loaded[split]["id"][:] == [f"{split}/{DIS5K_NAME}"]
        assert loaded[split]["source"][:] == [f"dis5k/{name}"]
    np.testing.assert_array_equal(np.asarray(loaded["val"][0]["mask"]) > 0, soft > 127)


def test_dis5k_with_some_folders_only(tmp_path, run, out):
    (tmp_path / "raw").mkdir()
    assert_one_error(run("dis5k", "--source", tmp_path / "raw", "--out", out), out, "no pairs", "DIS-TR", "DIS-TE4")
    for name in ("DIS-TE3", "DIS-VD"):
        write_pairs(tmp_path / "raw" / name, ["a", "b"], ".jpg", ".png", "im", "gt")
    assert sizes(build("dis5k", tmp_path / "raw", out)) == {"val": 2, "DIS_TE3": 2}
    card = (out / "README.md").read_text()
    assert "license: other" in card
    assert "non-commercial" in card


def test_people_masks_are_resized(tmp_path, run, prepare, load, caplog, out):
    root = tmp_path / "raw"
    mask_sizes = {"same": (40, 36), "half": (20, 18), "rounded": (13, 12), "larger": (81, 73), "other": (40, 20)}
    for place, (name, size) in enumerate(mask_sizes.items()):
        write_image(root / "Training_Images" / f"{name}.jpg", seed=place)
        values = np.zeros(size[::-1], np.uint8)
        values[:, size[0] // 2 :] = 255
        (root / "Ground_Truth").mkdir(exist_ok=True)
        Image.fromarray(values).save(root / "Ground_Truth" / f"{name}.png")
    arguments = ["people", "--source", root, "--out", out]
    assert_one_error(run(*arguments), out, "1 of 5 pairs", "--skip-unusable")
    reason = "unusable: other: mask other.png is 40x20 but image other.jpg is 40x36, of another aspect"
    assert reason in caplog.text
    text = prepare(*arguments, "--skip-unusable")
    assert "masks: 0 changed by the rule, 3 resized to their image" in text
    assert "3 mask(s) had another size" in (out / "README.md").read_text()
    for row in (row for split in load(out).values() for row in split):
        assert row["mask"].size == row["image"].size == (40, 36)
        edge = np.asarray(row["mask"]).argmax(axis=1)  # still upright, and at the place that the file has
        width = mask_sizes[row["id"]][0]
        assert (edge == round(width // 2 * 40 / width)).all()


@pytest.fixture
def tiles(tmp_path):
    """Return a folder with five tiles of each class, each under six exposures."""
    root = tmp_path / "raw"
    for place, label in enumerate(TILE_CLASSES):
        names = [f"exp{i % 6 + 1}_num_{1000 * (place + 1) + 10 * i}" for i in range(30)]
        write_pairs(root / label, names, ".jpg", ".png", "Imgs", "Imgs", seed=100 * place)
    return root


def test_photos_of_a_tile_are_in_one_split(tiles, load, out, tmp_path):
    (tiles / "MT_Free" / "Imgs" / "exp1_num_5000.png").unlink()
    report = build("magnetic_tiles", tiles, out)
    assert sizes(report) == {"train": 144, "val": 36}
    assert report.num_empty_masks == 1
    assert "equal in each class. All photos of a tile are in one split." in (out / "README.md").read_text()
    loaded = load(out)
    for splits in (loaded, split_datasets_at_random(loaded, seed=5)):
        groups = {split: set(find_groups(rows["id"][:], rows["source"][:])) for split, rows in splits.items()}
        assert groups["train"].isdisjoint(groups["val"])
        assert set(Counter(splits["val"]["source"][:]).values()) == {6}  # one of five tiles of each class
    uneven = build("magnetic_tiles", tiles, tmp_path / "uneven", fractions={"a": 0.35, "b": 0.65})
    assert sizes(uneven) == {"a": 72, "b": 108}  # two and three tiles of each class


def test_where_a_tile_ends():
    tiles = {
        "MT_Break": [["exp1_num_100", "exp2_num_110", "exp4_num_310"], ["exp4_num_320"], ["exp5_num_521"]],
        "MT_Free": [["exp3_num_900"], ["exp3_num_9000"]],  # by number, not by text
    }
    rows = [(f"{label}/{id}", label, tile) for label, its in tiles.items() for tile in its for id in tile]
    # A photo of the first tile whose defect was not seen.
    rows.append(("MT_Free/exp3_num_200", "MT_Free", tiles["MT_Break"][0]))
    rows.append(("exp1_num_105", "busi/benign", ["another set"]))
    ids, labels, expected = zip(*rows, strict=True)
    groups = find_groups(ids, [label if "/" in label else f"magnetic_tiles/{label}" for label in labels])
    assert [groups.index(group) for group in groups] == [expected.index(tile) for tile in expected]


def test_unusable_tiles_are_named(tiles, tmp_path, run, caplog, out):
    for name in ("MT_Free/Imgs/exp1_num_5000.jpg", "MT_Break/Imgs/exp1_num_2000.png"):
        (tiles / name).unlink()
    write_image(tiles / "MT_Crack" / "Imgs" / "photo.jpg")
    arguments = ["magnetic_tiles", "--source", tiles, "--out", out]
    assert_one_error(run(*arguments), out, "3 of 181 pairs", "--skip-unusable")
    assert "unusable: MT_Free/exp1_num_5000: no image MT_Free/Imgs/exp1_num_5000.jpg" in caplog.text
    assert "unusable: MT_Break/exp1_num_2000: no mask MT_Break/Imgs/exp1_num_2000.png" in caplog.text
    assert "unusable: MT_Crack/photo: the name is not expE_num_N" in caplog.text
    arguments[2] = tmp_path / "empty"
    arguments[2].mkdir()
    assert_one_error(run(*arguments), out, "no pairs", "MT_Blowhole", "MT_Uneven")


def test_masks_of_other_sources_are_not_resized(tmp_path, run, caplog, out):
    root = write_pairs(tmp_path / "raw")
    write_mask(root / "masks" / "a.png", size=(20, 18))
    assert_one_error(run("folder", "--source", root, "--out", out), out, "1 of 4 pairs")
    assert "unusable: a: mask a.png is 20x18 but image a.png is 40x36" in caplog.text
    build("folder", root, out, skip_unusable=True)
    assert "another size" not in (out / "README.md").read_text()


# Names in upper and lower case


def official_raw(name: str, root: Path) -> Path:
    """Write a raw folder with official splits: train, perhaps val, and test splits."""
    if name == "sirst":
        write_pairs(root, [f"Misc_{i}" for i in range(16)], mask_suffix="_pixels0.png")
        (root / "idx_427").mkdir()
        for split, numbers in (("train", range(10)), ("val", range(10, 12)), ("test", range(12, 15))):
            (root / "idx_427" / f"{split}.txt").write_text("\n".join(f"Misc_{i}" for i in numbers))
        return root
    packs = {"cod": ["TrainDataset", "TestDataset/CAMO", "TestDataset/NC4K"], "dis5k": ["DIS-TR", "DIS-VD", "DIS-TE2"]}
    folders = {"cod": ("Imgs", "GT"), "dis5k": ("im", "gt")}[name]
    for place, pack in enumerate(packs[name]):
        names = [f"{pack[-4:]}{i}" for i in range(3 if place else 10)]
        write_pairs(root / pack, names, ".jpg", ".png", *folders, 20 * place)
    return root


@pytest.mark.parametrize("name", ["cod", "dis5k", "sirst"])
@pytest.mark.parametrize("options", [{"fractions": {"train": 0.8, "val": 0.2}}, {"random_split": True}])
def test_official_test_splits_are_not_dealt(name, options, tmp_path, load):
    raw = official_raw(name, tmp_path / "raw")
    build(name, raw, tmp_path / "official")
    report = build(name, raw, tmp_path / "dealt", seed=1, **options)
    official, dealt = load(tmp_path / "official"), load(tmp_path / "dealt")
    tests = set(SOURCES[name].test_splits) & official.keys()
    assert tests and {"train", *tests} <= dealt.keys()
    for split in tests:
        assert dealt[split]["id"][:] == official[split]["id"][:]
        assert split in report.split_rule
    others, again = ({id for split in each.keys() - tests for id in each[split]["id"]} for each in (official, dealt))
    assert others == again
    if "fractions" in options:
        assert len(dealt["val"]) == round(0.2 * len(others))


def test_shares_of_unnamed_official_splits(tmp_path, load):
    raw = official_raw("dis5k", tmp_path / "raw")
    build("dis5k", raw, tmp_path / "out", fractions={"train": 0.8, "holdout": 0.2})
    dealt = load(tmp_path / "out")
    assert {split: len(rows) for split, rows in dealt.items()} == {"train": 8, "holdout": 2, "val": 3, "DIS_TE2": 3}
    assert all(id.startswith("train/") for split in ("train", "holdout") for id in dealt[split]["id"])
    for fractions, words in (
        ({"train": 0.9, "DIS_TE2": 0.1}, "a share for DIS_TE2, an official test split, which stays"),
        ({"train": 0.99, "holdout": 0.01}, "holdout would be empty: 10 pairs are too few"),
    ):
        with rejected(words):
            build("dis5k", raw, tmp_path / "no", fractions=fractions)
    shutil.rmtree(raw / "DIS-TR")
    with rejected("has only the official splits DIS_TE2, val; none can be dealt"):
        build("dis5k", raw, tmp_path / "no", fractions={"train": 1.0})


@pytest.mark.parametrize(
    ("name", "images", "masks", "ending", "options"),
    [
        ("sirst", "images", "masks", "_PIXELS0", {}),
        ("bus", "images", "masks", "", {}),
        ("kvasir", "images", "masks", "", {}),
        ("cod", "Imgs", "GT", "", {}),
        ("dis5k", "DIS-TR/im", "DIS-TR/gt", "", {}),
        ("people", "Training_Images", "Ground_Truth", "", {}),
        ("folder", "images", "masks", "_Mask", {"mask_suffix": "_mask"}),
    ],
)
def test_names_may_differ_in_case_and_suffix(name, images, masks, ending, options, tmp_path, caplog):
    root, one = tmp_path / "raw", {"fractions": {"train": 1.0}}
    for place, (image, its_mask) in enumerate((("Aa.JPG", "aA"), ("b.jpeg", "B"), ("C.png", "C"))):
        write_image(root / images / image, seed=place)
        write_mask(root / masks / f"{its_mask}{ending}.PNG")
    build(name, root, tmp_path / "out", **one, **options)
    assert [id.split("/")[-1] for id in stored_ids(tmp_path / "out")] == ["Aa", "C", "b"]
    write_mask(root / masks / f"AA{ending}.png")
    report = build(name, root, tmp_path / "again", skip_unusable=True, **one, **options)
    (left_out,) = report.problems
    assert left_out[0].endswith("Aa")
    assert left_out[1] == f"2 masks: AA{ending}.png, aA{ending}.PNG"


def test_busi_names_may_differ_in_case(busi, tmp_path):
    root = busi / "Dataset_BUSI_with_GT" / "benign"
    (root / "benign (1)_mask_1.png").rename(root / "Benign (1)_Mask_1.PNG")
    (root / "benign (2).png").rename(root / "BENIGN (2).png")
    report = build("busi", busi, tmp_path / "out")
    assert sizes(report) == {"train": 16, "val": 4}
    assert {"benign (1)", "BENIGN (2)"} <= set(stored_ids(tmp_path / "out"))
    write_mask(root / "Benign (3)_mask.png")
    report = build("busi", busi, tmp_path / "again", skip_unusable=True)
    assert report.problems == [("benign (3)", "2 masks: Benign (3)_mask.png, benign (3)_mask.png")]


def test_listed_names_may_differ_in_case(sirst, tmp_path):
    (sirst / "idx_427" / "train.txt").write_text("MISC_1\nmisc_2")
    (sirst / "masks" / "Misc_2_pixels0.png").rename(sirst / "masks" / "misc_2_pixels0.png")
    report = build("sirst", sirst, tmp_path / "out")
    assert stored_ids(tmp_path / "out") == ["Misc_1", "Misc_2", "Misc_5", "Misc_6"]  # as the image files have them
    assert sorted(report.unlisted) == ["Misc_3", "Misc_4", "Misc_7", "Misc_8"]
    (sirst / "idx_427" / "val.txt").write_text("misc_1")
    report = build("sirst", sirst, tmp_path / "again", skip_unusable=True)
    assert report.problems == [("Misc_1", "the name occurs 2 times: Misc_1.png in train, Misc_1.png in val")]
    (sirst / "names.txt").write_text("MISC_1.png\nmisc_3\n")
    build("folder", sirst, tmp_path / "folder", list_file=sirst / "names.txt", mask_suffix="_pixels0")
    assert stored_ids(tmp_path / "folder") == ["Misc_1", "Misc_3"]


def test_complete_pairs_that_differ_in_case_are_two(tmp_path):
    root = write_pairs(tmp_path / "raw", ["a", "A", "b"])
    if len(list((root / "images").iterdir())) < 3:
        pytest.skip("this disk ignores case")
    (root / "names.txt").write_text("A\nb\n")
    build("folder", root, tmp_path / "all")
    assert stored_ids(tmp_path / "all") == ["A", "a", "b"]
    build("folder", root, tmp_path / "listed", list_file=root / "names.txt")
    assert stored_ids(tmp_path / "listed") == ["A", "b"]


# Large images and many of them

MEMORY = """
import resource, sys
from unconceal.data import write
from unconceal.data.builders import build

write.GROUP_BYTES = 2**21
peaks = []
for folder in sys.argv[1:]:
    build("folder", folder, folder + "-out")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss counts in kB only on Linux")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    size, counts = (500, 500), {"few": 10, "many": 60}
    write_image(tmp_path / "image.png", size=size)  # noise: 0.75 MB, and 1 MB when decoded
    write_mask(tmp_path / "mask.png", size=size)
    for name, count in counts.items():
        for kind in ("image", "mask"):
            (tmp_path / name / f"{kind}s").mkdir(parents=True)
            for i in range(count):
                (tmp_path / name / f"{kind}s" / f"{i}.png").symlink_to(tmp_path / f"{kind}.png")
    command = [sys.executable, "-c", MEMORY, *(tmp_path / name for name in counts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    few, many = (int(peak) / 1024 for peak in done.stdout.split())
    assert many - few < 20, f"{few} MB for {counts['few']} pairs, {many} MB for {counts['many']}"


@pytest.mark.filterwarnings("error")
def test_images_over_the_limit_are_refused(tmp_path, run, prepare, caplog, out):
    root = write_pairs(tmp_path / "raw")
    limit = 1000 * 1000
    large = {"images/a": (1001, 1000), "images/c": (5000, 1000), "masks/d": (1001, 1000)}
    for name, size in (large | {"images/b": (1000, 1000), "masks/b": (1000, 1000)}).items():
        Image.new("1", size).save(root / f"{name}.png")
    arguments = ["folder", "--source", root, "--out", out, "--max-pixels"]
    assert_one_error(run(*arguments, limit), out, "3 of 4 pairs", "--skip-unusable")
    for name, size in (("a", "1001x1000"), ("c", "5000x1000"), ("d", "1001x1000")):
        reason = f"got {size}, expected at most {limit} pixels"
        assert f"unusable: {name}: {name}.png cannot be read: {reason}" in caplog.text
    text = prepare(*arguments, limit, "--skip-unusable")
    assert "train 1" in text
    assert_one_error(run(*arguments, 0), tmp_path / "none", "--max-pixels", "got '0'")


def test_folder_with_two_folders(tmp_path, prepare, load, out):
    root = write_pairs(tmp_path / "raw", mask_suffix="_mask.png", image_suffix=".jpg")
    where = ["--images", root / "images", "--masks", root / "masks", "--mask-suffix", "_mask"]
    prepare("folder", *where, "--out", out, "--fractions", "train=0.5", "val=0.25", "test=0.25")
    assert {split: len(rows) for split, rows in load(out).items()} == {"train": 2, "val": 1, "test": 1}


def test_folder_with_a_list(tmp_path):
    root = write_pairs(tmp_path / "raw", ["a", "b c", "d"])
    write_image(root / "images" / "e.1.ppm")  # any kind of file that `segment` finds
    write_mask(root / "masks" / "e.1.png")
    where = {"images": root / "images", "masks": root / "masks"}
    for place, (text, source, folders, expected) in enumerate(
        [
            ("images/a.png masks/a.png\nimages/b c.png\tmasks/b c.png\n", None, {}, ["images/a", "images/b c"]),
            ("b c\nd", None, where, ["b c", "d"]),
            ("b c\nd", root, {}, ["b c", "d"]),
            ("a.png\nb c.PNG\nd\ne.1", root, {}, ["a", "b c", "d", "e.1"]),
        ]
    ):
        (root / "list.txt").write_text(text)
        build("folder", source, tmp_path / str(place), list_file=root / "list.txt", **folders)
        assert stored_ids(tmp_path / str(place)) == expected


def test_synthetic_data_set_holds_the_generated_scenes(prepare, load, out):
    counts = ["--train", 3, "--val", 2]
    prepare("synthetic", "--kind", "infrared", "--size", 32, *counts, "--seed", 5, "--out", out)
    loaded = load(out)
    assert loaded["val"]["id"][:] == ["val-000000", "val-000001"]
    expected, expected_mask = generate("infrared", 32, 5, 1)
    assert loaded["train"][1]["image"].convert("RGB").tobytes() == expected.tobytes()
    assert loaded["train"][1]["mask"].tobytes() == expected_mask.tobytes()
    train, val = ({row["image"].tobytes() for row in loaded[split]} for split in ("train", "val"))
    assert train.isdisjoint(val)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_has_a_finder_and_its_own_help(name, prepare):
    assert set(FINDERS) == set(SOURCES)
    text = prepare(name, "--help")
    for words in (SOURCES[name].title, SOURCES[name].layout, f"(default: {MAX_PIXELS})"):
        assert "".join(words.split()) in "".join(text.split())


# Splits


def test_random_splits_follow_the_seed():
    pairs = [Pair(f"{label}{i}", label) for label in "xy" for i in range(20)]
    shares = {"train": 0.7, "val": 0.1, "test": 0.2}
    dealt = split_at_random(pairs, shares, 0, {})
    assert dealt == split_at_random(pairs[::-1], shares, 0, {})
    assert dealt != split_at_random(pairs, shares, 1, {})
    assert sorted(pair.id for pair in dealt) == sorted(pair.id for pair in pairs)
    assert [sum(p.split == split and p.source == "x" for p in dealt) for split in shares] == [14, 2, 4]


def smooth_photo(seed, size=(90, 70)):
    """Draw an image of large blots, whose hash bears small changes."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (7, 9), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def test_near_copies_are_in_one_split(tmp_path, load):
    """Every image comes twice: as filed by the makers, and smaller, brighter and with a caliper."""
    root, more = tmp_path / "raw" / "benign", tmp_path / "more"
    for folder in (root, more / "images", more / "masks"):
        folder.mkdir(parents=True)
    for number, label in enumerate(("malignant", "normal")):
        (tmp_path / "raw" / label).mkdir()
        for suffix in ("", "_mask"):
            smooth_photo(100 + number).save(tmp_path / "raw" / label / f"{label} (1){suffix}.png")
    for number in range(20):
        photo = smooth_photo(number)
        photo.save(root / f"benign ({number}).png")
        Image.new("L", photo.size).save(root / f"benign ({number})_mask.png")
        copy = photo.resize((60, 47)).point(lambda value: min(255, value + 20))
        copy.paste(255, (5, 5, 8, 8))
        copy.save(more / "images" / f"benign ({100 + number}).png")
        Image.new("L", copy.size).save(more / "masks" / f"benign ({100 + number}).png")
    build("busi", tmp_path / "raw", tmp_path / "out", more=str(more), fractions={"train": 0.5, "val": 0.5})
    splits = load(tmp_path / "out")
    for dealt in (splits, split_datasets_at_random(splits, seed=3)):
        benign = {split: [id for id in rows["id"][:] if id.startswith("benign")] for split, rows in dealt.items()}
        names = {split: {int(id[8:-1]) % 100 for id in ids} for split, ids in benign.items()}
        assert sum(map(len, names.values())) == 20
        assert min(map(len, names.values())) >= 8
        assert not names["train"] & names["val"]


def test_what_looks_the_same():
    photos = [smooth_photo(seed) for seed in range(6)]
    hashes = {row: difference_hash(photo) for row, photo in enumerate(photos)}
    names = [f"image{row}" for row in hashes]
    assert join_near_copies(names, hashes) == names
    chain = np.zeros((3, 256), dtype=bool)  # the first and the last differ in 24 places, the middle in 12 from both
    chain[1, :12] = chain[2, :24] = True
    assert join_near_copies(["a", "b", "c"], dict(enumerate(chain))) == ["a", "a", "a"]
    assert join_near_copies(["a", "b", "c"], {0: chain[0], 2: chain[2]}) == ["a", "b", "c"]
    assert join_near_copies(["a"], {}) == ["a"]


def test_more_cases_of_busi(busi, tmp_path, load, out):
    write_pairs(tmp_path / "more", ["malignant (9)", "normal (8)"])
    report = build("busi", busi, out, more=str(tmp_path / "more"))
    assert sum(sizes(report).values()) == 22
    rows = {row["id"]: row["source"] for split in load(out).values() for row in split}
    assert rows["malignant (9)"] == "busi/malignant"
    assert rows["normal (8)"] == "busi/normal"
    write_pairs(tmp_path / "other", ["case1"])
    with pytest.raises(UserError, match="expected it to begin with benign"):
        build("busi", busi, tmp_path / "again", more=str(tmp_path / "other"))
    with pytest.raises(UserError, match="not a folder"):
        build("busi", busi, tmp_path / "again", more=str(tmp_path / "missing"))


def test_prepared_splits_can_be_split_again(tmp_path, load):
    root = write_pairs(tmp_path / "raw", [f"image{i}" for i in range(10)])
    for name, seed in (("first", 5), ("second", 3)):
        build("folder", root, tmp_path / name, seed=seed, fractions={"train": 0.7, "val": 0.3})
    first, second = (load(tmp_path / name) for name in ("first", "second"))
    again = split_datasets_at_random(first, seed=3)
    dealt, expected = ({split: rows["id"][:] for split, rows in each.items()} for each in (again, second))
    assert dealt == expected
    for row, expected in zip(again["val"], second["val"], strict=True):  # each image with its own mask
        assert row["image"].tobytes() == expected["image"].tobytes()
        assert row["mask"].tobytes() == expected["mask"].tobytes()
    with pytest.raises(UserError, match="the name .* occurs twice"):
        split_datasets_at_random({"train": first["train"], "val": first["train"]}, seed=3)


def test_equal_images_in_two_splits_are_reported(sirst, tmp_path, caplog):
    Image.open(sirst / "images" / "Misc_1.png").save(sirst / "images" / "Misc_5.png", compress_level=1)
    report = build("sirst", sirst, tmp_path / "out")
    assert report.repeats == [("train/Misc_1", "val/Misc_5")]
    assert "1 images are in more than one split" in caplog.text


# What counts as object


def make_noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (36, 40, 3), dtype=np.uint8))


BOX = np.zeros((36, 40), np.uint8)
BOX[10:20, 10:30] = 1
IDS = BOX.copy()
IDS[:5] = 2
MASKS = [BOX, BOX * 2, BOX.astype(bool), IDS, BOX * 0, BOX * 0 + 255]
UNCHANGED = TransformRecipe(rotate90_probability=0, flip_probability=0)


def palette_image(*colors):
    image = Image.new("P", (len(colors), 1))
    image.putpalette(sum(colors, ()))
    image.putdata(range(len(colors)))
    return image


@pytest.mark.parametrize(
    ("image", "expected", "changed"),
    [
        (Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)), [False, False, True, True], True),
        (Image.fromarray(np.array([[0, 2]], np.uint8)), [False, True], True),
        (Image.fromarray(np.array([[0, 300]], np.uint16)), [False, True], True),
        (Image.fromarray(np.array([[0, 255]], np.uint8)), [False, True], False),
        (Image.fromarray(np.array([[0, 1]], np.uint8)), [False, True], True),
        (Image.fromarray(np.array([[False, True]])), [False, True], False),
        (Image.fromarray(np.array([[0, 32767, 32768, 65535]], np.uint16)), [False, False, True, True], True),
        (Image.fromarray(np.array([[0, 255]], np.uint16)), [False, True], False),
        (Image.fromarray(np.array([[[0, 0, 0], [255, 0, 0]]], np.uint8)), [False, True], False),
        (Image.fromarray(np.array([[[255] * 3 + [0], [255] * 4]], np.uint8)), [False, True], False),
        (Image.fromarray(np.array([[[180] * 3 + [120], [180] * 3 + [190]]], np.uint8)), [False, True], True),
        (Image.fromarray(np.zeros((1, 2), np.uint8)), [False, False], False),
        (palette_image((255, 255, 255), (0, 0, 0)), [True, False], False),
        (palette_image((0, 0, 0), (64, 0, 0)), [False, True], False),
    ],
)
def test_what_counts_as_object(image, expected, changed, tmp_path):
    image.save(tmp_path / "mask.png")
    read = read_mask(tmp_path / "mask.png")
    assert read.mask.tolist() == [expected]
    assert read.is_changed == changed
    assert is_object(to_mask(Image.open(tmp_path / "mask.png"))).tolist() == [expected]


def test_cutouts_and_maps_of_classes_with_a_palette(tmp_path):
    photo = palette_image(*((2 * i, 120, 255 - 2 * i) for i in range(100)))
    photo.save(tmp_path / "cutout.png", transparency=bytes([0] * 40 + [255] * 60))
    assert read_mask(tmp_path / "cutout.png").mask.tolist() == [[False] * 40 + [True] * 60]
    for number in (3, 12, 40):
        classes = palette_image(*((6 * i, 0, 250 - 6 * i) for i in range(number)))
        classes.save(tmp_path / "classes.png", transparency=0)  # a clear background
        mask = read_mask(tmp_path / "classes.png", foreground=[2]).mask
        assert mask.tolist() == [[False, False, True] + [False] * (number - 3)]
        with pytest.raises(UnusablePair, match="a map of classes"):
            read_mask(tmp_path / "classes.png")


def write_levels(root, levels):
    """Write images with masks of these values, each for a part of the mask."""
    for i, values in enumerate(levels):
        write_image(root / "images" / f"{i}.png", seed=i)
        (root / "masks").mkdir(exist_ok=True)
        mask = np.zeros((36, 40), np.uint16 if max(values) > 255 else np.uint8)
        for part, value in enumerate(values):
            mask[5 * part : 5 * part + 5, :20] = value
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    return root


@pytest.mark.parametrize("value", [1, 2, 38, 100, 300])
def test_masks_of_one_value_are_kept(value, tmp_path, run, load, out):
    write_levels(tmp_path / "raw", [[value]] * 4)
    code, text, _ = run("folder", "--source", tmp_path / "raw", "--out", out)
    assert code == 0
    assert "masks: 4 changed by the rule, 0 resized to their image, 0 empty" in text
    for split in load(out).values():
        for row in split:
            mask = np.asarray(row["mask"])
            assert np.unique(mask).tolist() == [0, 255]
            assert (mask == 255).sum() == 100


def test_maps_of_classes_need_a_choice(tmp_path, run, load, out, caplog):
    source = write_levels(tmp_path / "raw", [[1, 2], [1], [2], [1, 2, 4]])
    result = run("folder", "--source", source, "--out", out)
    assert_one_error(result, out, "2 of 4 pairs are unusable")
    assert "unusable: 0: 0.png: a mask holds the values 0, 1, 2, a map of classes, expected one object" in caplog.text
    for choice, shares in (("1", [100, 100, 0, 100]), ("1,2", [200, 100, 100, 200]), ("any", [200, 100, 100, 300])):
        code, *_ = run("folder", "--source", source, "--out", out, "--foreground", choice, "--overwrite")
        assert code == 0
        rows = {row["id"]: np.asarray(row["mask"]) for split in load(out).values() for row in split}
        assert [int((rows[id] == 255).sum()) for id in sorted(rows)] == shares
        assert f"The object is the classes {choice} of the mask files" in (out / "README.md").read_text()
        shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(out)
    assert_one_error(
        run("folder", "--source", source, "--out", out, "--foreground", "7"), out, "no mask holds a class"
    )
    assert_one_error(run("folder", "--source", source, "--out", out, "--foreground", "one"), out, "got 'one'")


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([[0]] * 4, "no mask shows an object"),
        ([[255], [255], [255], list(range(1, 8)) * 1], None),
        ([[1], [2], [1], [2]], "the object has the value 1, 2, one in each mask; for a map of classes"),
        ([[255], [255], [1], [255]], "the object has the value 1, 255, one in each mask; for a map of classes"),
    ],
)
def test_what_the_rule_does_to_a_whole_set_is_named(levels, message, tmp_path, caplog):
    source = write_levels(tmp_path / "raw", levels)
    if message is None:  # dark, with more values than classes
        dark = np.tile(np.arange(40, dtype=np.uint8), (36, 1))
        Image.fromarray(dark).save(source / "masks" / "3.png")
        message = "1 masks hold gray levels but none above half, so they show no object (3)"
    report = build("folder", source, tmp_path / "out")
    assert [text for text in caplog.messages if text.startswith(message)]
    assert len(report.vanished) == ("gray" in message)


def test_training_data_follows_the_rule(tmp_path):
    rows = [{"image": make_noise(), "mask": Image.fromarray(mask), "id": "x", "source": "y"} for mask in MASKS]
    dataset = Dataset.from_list(rows)
    samples = TrainingSet(dataset, UnconcealImageProcessor(do_resize=False), UNCHANGED, seed=0)
    for index in range(3):
        assert samples[index]["labels"].unique().tolist() == [0, 1]
        assert samples[index]["labels"].sum() == 200
    with pytest.raises(UnreadableSample, match="x: a mask holds the values 0, 1, 2, a map of classes"):
        samples[3]
    assert only_value(dataset.select([0])) is None
    assert only_value(dataset.select([4])) == "no mask shows an object"
    assert only_value(dataset.select([5, 5])) == "every pixel of every mask is object"
    assert only_value(dataset.select([4, 5])) is None
    with pytest.raises(UserError, match="cannot read the data: x: a mask holds the values 0, 1, 2"):
        only_value(dataset.select([4, 3]))


def test_soft_masks_stay_soft_in_training():
    ramp = np.tile(np.arange(40, dtype=np.uint8), (36, 1)) * 6
    ramp[:18] = 0
    rows = [{"image": make_noise(), "mask": Image.fromarray(ramp), "id": "x", "source": "y"}]
    processor = UnconcealImageProcessor(do_resize=False)
    trim = TransformRecipe(rotate90_probability=0, flip_probability=0, max_crop_ratio=0.9)
    for seed in range(5):  # a part may hold few levels
        labels = TrainingSet(Dataset.from_list(rows), processor, trim, seed=seed)[0]["labels"]
        assert set((labels * 255).round().int().unique().tolist()) <= set(ramp.ravel().tolist())
        assert labels.max() < 1


def test_sizes_are_compared_after_the_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "image.jpg", size=(40, 30), exif=exif)
    write_mask(tmp_path / "upright.png", size=(30, 40))
    write_mask(tmp_path / "stored.png", size=(40, 30))
    loaded = load_pair(Pair("x", "test", tmp_path / "image.jpg", (tmp_path / "upright.png",)))
    assert loaded.mask.shape == (40, 30)
    with pytest.raises(UnusablePair, match="40x30 but image image.jpg is 30x40 after its EXIF orientation"):
        load_pair(Pair("x", "test", tmp_path / "image.jpg", (tmp_path / "stored.png",)))


# What users do wrong


def test_every_unusable_pair_is_named(sirst, run, caplog, out):
    (sirst / "masks" / "Misc_1_pixels0.png").unlink()
    (sirst / "images" / "Misc_2.png").unlink()
    write_mask(sirst / "masks" / "Misc_3_pixels0.png", size=(20, 20))
    whole = (sirst / "images" / "Misc_4.png").read_bytes()
    (sirst / "images" / "Misc_4.png").write_bytes(whole[: len(whole) // 2])
    (sirst / "masks" / "Misc_5_pixels0.png").write_text("not an image")
    with (sirst / "idx_427" / "val.txt").open("a") as file:
        file.write("Misc_404\nMisc_6\n")
    assert_one_error(run("sirst", "--source", sirst, "--out", out), out, "7 of 8 pairs", "--skip-unusable")
    reported = [record.getMessage() for record in caplog.records if record.getMessage().startswith("unusable")]
    for name, reason in (
        ("Misc_1", "no mask masks/Misc_1_pixels0.*"),
        ("Misc_2", "no image images/Misc_2.*"),
        ("Misc_3", "is 20x20 but image Misc_3.png is 40x36"),
        ("Misc_4", "Misc_4.png cannot be read"),
        ("Misc_5", "Misc_5_pixels0.png cannot be read: not an image"),
        ("Misc_6", "occurs 2 times"),
        ("Misc_404", "no image"),
    ):
        assert [line for line in reported if f": {name}: " in line and reason in line], (name, reported)


def test_unusable_sources_are_errors(sirst, tmp_path, run, out):
    (tmp_path / "empty").mkdir()
    assert_one_error(run("sirst", "--source", tmp_path / "nowhere", "--out", out), out, "nowhere")
    assert_one_error(run("sirst", "--source", tmp_path / "empty", "--out", out), out, "empty", "images")
    (tmp_path / "empty" / "images").mkdir()
    assert_one_error(run("sirst", "--source", tmp_path / "empty", "--out", out), out, "images", "no images")
    (sirst / "idx_427" / "val.txt").write_bytes(b"\xff\xfe\x00bad\xff")
    assert_one_error(run("sirst", "--source", sirst, "--out", out), out, "val.txt", "UTF-8")
    (sirst / "idx_427" / "val.txt").write_text("")
    assert_one_error(run("sirst", "--source", sirst, "--out", out), out, "val.txt", "empty")


def test_wrong_lists_and_shares_are_errors(tmp_path, run, out):
    root = write_pairs(tmp_path / "raw")
    (root / "list.txt").write_text("one two three\n")
    assert_one_error(run("folder", "--out", out), out, "--images")
    assert_one_error(run("folder", "--list", root / "list.txt", "--out", out), out, "3 entries")
    assert_one_error(run("folder", "--list", root / "none.txt", "--out", out), out, "none.txt")
    (root / "list.txt").write_text(f"{'a' * 300}.png masks/a.png\n")
    assert_one_error(run("folder", "--list", root / "list.txt", "--out", out), out, "cannot open", "name too long")
    (root / "list.txt").write_text("images/a.png masks/absent.png\n")
    assert_one_error(run("folder", "--list", root / "list.txt", "--out", out), out, "1 of 1 pairs")
    source = ["folder", "--source", root, "--out", out, "--fractions"]
    assert_one_error(run(*source, "train=0.5"), out, "0.5", "expected 1")
    assert_one_error(run(*source, "train=1.5", "val=-0.5"), out, "val", "-0.5")
    assert_one_error(run(*source, "tr/ain=1"), out, "tr/ain")
    assert_one_error(run(*source, "train=0.99", "val=0.01"), out, "val would be empty")
    assert_one_error(run(*source, "train"), out, "SPLIT=SHARE")
    assert_one_error(run("folder", "--source", root, "--out", out, "--seed", "-1"), out, "--seed", "got '-1'")


def test_folders_of_others_are_not_replaced(tmp_path, run):
    root = write_pairs(tmp_path / "raw")
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    assert_one_error(run("folder", "--source", root, "--out", out), out, "cannot write")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.txt").write_text("mine")
    for name in ("file", "photos"):
        code, _, errors = run("folder", "--source", root, "--out", tmp_path / name, "--overwrite")
        assert code == 2
        assert "not a data set" in errors
    assert (tmp_path / "file").read_text() == (tmp_path / "photos" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["all", "a-b", "../x"])
def test_names_of_splits_are_checked(name, tmp_path, run, out):
    code, _, errors = run(
        "folder", "--source", write_pairs(tmp_path / "raw"), "--fractions", f"{name}=1", "--out", out
    )
    assert code == 2 and f"got the split name {name!r}, expected letters" in errors and not out.exists()


def test_output_is_replaced_only_with_overwrite(tmp_path, run, out):
    root = write_pairs(tmp_path / "raw")
    run("folder", "--source", root, "--out", out)
    card = (out / "README.md").read_bytes()
    code, _, errors = run("folder", "--source", root, "--out", out)
    assert code == 2
    assert "--overwrite" in errors
    (root / "masks" / "a.png").unlink()
    assert run("folder", "--source", root, "--out", out, "--overwrite")[0] == 2
    assert (out / "README.md").read_bytes() == card  # a failed rebuild leaves the old one
    (out / ".DS_Store").touch()  # a hidden file does not count, a hidden folder does
    (out / ".git").mkdir()
    assert "not a data set" in run("folder", "--source", root, "--out", out, "--overwrite", "--skip-unusable")[2]
    (out / ".git").rmdir()
    for name in ("extra-00000-of-00001.parquet", "train.parquet", "notes.txt"):
        (out / "data" / name).touch()
        assert "not a data set" in run("folder", "--source", root, "--out", out, "--overwrite", "--skip-unusable")[2]
        (out / "data" / name).unlink()
    assert run("folder", "--source", root, "--out", out, "--overwrite", "--skip-unusable")[0] == 0
    assert (out / "README.md").read_bytes() != card


def test_an_edited_card_is_not_replaced(tmp_path, run, out):
    command = ["folder", "--source", write_pairs(tmp_path / "raw"), "--out", out]
    run(*command)
    written = (out / "README.md").read_text()
    for edited in (written.replace("Not stated: write them here", "CC BY 4.0, by me"), written + "My notes\n"):
        assert edited != written
        (out / "README.md").write_text(edited)
        code, _, errors = run(*command, "--overwrite")
        assert code == 2
        assert "README.md, which was edited or is of an earlier version" in errors
        assert (out / "README.md").read_text() == edited
    (out / "README.md").write_text(written)
    assert run(*command, "--overwrite")[0] == 0


def test_a_data_set_that_a_kill_set_aside_is_not_replaced_unasked(tmp_path, run, out):
    command = ["folder", "--source", write_pairs(tmp_path / "raw"), "--out", out]
    run(*command)
    out.rename(out.with_name(".out.unconceal-old"))
    code, _, errors = run(*command)
    assert code == 2
    assert "out exists already" in errors
    assert len(load_splits(str(out), ["train"])["train"]) == 4


def test_a_folder_of_the_same_form_is_not_replaced(tmp_path, run, out):
    root = write_pairs(tmp_path / "raw")
    run("folder", "--source", root, "--out", out)
    (out / "data" / "mine.png").write_text("mine")
    assert "not a data set" in run("folder", "--source", root, "--out", out, "--overwrite")[2]
    (out / "data" / "mine.png").unlink()
    for text in ("# Mine\n", "---\ntags: [other]\n---\n", "---\n: [\n---\n"):
        (out / "README.md").write_text(text)
        assert "not a data set" in run("folder", "--source", root, "--out", out, "--overwrite")[2]
        assert (out / "README.md").read_text() == text


def test_data_sets_need_only_images_and_masks(tmp_path, run, out):
    run("folder", "--source", write_pairs(tmp_path / "raw"), "--out", out)
    rows = load_splits(str(out), ["train"])["train"].remove_columns(["id", "source"])
    rows.to_parquet(tmp_path / "bare" / "data" / "train-00000-of-00001.parquet")
    opened = load_splits(str(tmp_path / "bare"), ["train"])["train"]
    assert opened["id"][:] == [f"train-{i}" for i in range(4)]
    assert set(opened["source"]) == {"bare"}
    rows.rename_column("mask", "label").to_parquet(tmp_path / "other" / "data" / "train-00000-of-00001.parquet")
    with rejected("split train of data set .*other has no column mask, but image, label; rename its columns"):
        load_splits(str(tmp_path / "other"), ["train"])


def test_names_are_text(tmp_path):
    image = Image.new("RGB", (8, 8))
    cells = {"image": [image] * 3, "mask": [image.convert("L")] * 3, "id": [0, None, 7], "source": ["a", None, "a"]}
    (tmp_path / "set").mkdir()
    Dataset.from_dict(cells).to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    opened = load_splits(str(tmp_path / "set"), ["train"])["train"]
    assert opened["id"][:] == ["0", "train-1", "7"]
    assert opened["source"][:] == ["a", "set", "a"]
    assert opened[2]["image"].size == (8, 8)
    classes = Dataset.from_dict(cells | {"id": ["a", "", "c"], "source": [1, 0, None]})
    classes = classes.cast_column("source", ClassLabel(names=["one", "two"]))
    named = with_names(classes, "train", "set")
    assert named["id"][:] == ["a", "train-1", "c"]
    assert named["source"][:] == ["two", "one", "set"]
    assert item_name((3, {"id": 0})) == "0"
    assert item_name((3, {"id": None})) == "row 3 of the epoch"


def test_what_prepare_leaves_out_is_named(tmp_path, run, out, caplog):
    root = write_pairs(tmp_path / "raw")
    write_image(root / "images" / "more" / "deep" / "e.png", seed=5)
    for name in ("notes.txt", "f.npy", "g.npy", "h", ".i.png", ".DS_Store"):
        (root / "images" / name).write_text("no image")
    (root / "images" / "j.png").symlink_to(tmp_path / "gone")
    assert run("folder", "--source", root, "--out", out)[0] == 0
    left_out = [
        "1 .txt files are left out (notes.txt)",
        "2 .npy files are left out (f.npy, g.npy)",
        "1 files without suffix are left out (h)",
        "1 hidden images are left out (.i.png)",
        "1 broken links are left out (j.png)",
        "1 images in its subfolders are left out (more/deep/e.png)",
    ]
    assert sorted(caplog.messages) == sorted(f"{root / 'images'}: {what}" for what in left_out)
    only = tmp_path / "nested"
    write_image(only / "images" / "more" / "e.png", seed=5)
    write_mask(only / "masks" / "e.png", seed=5)
    assert_one_error(
        run("folder", "--source", only, "--out", out.with_name("b")), out.with_name("b"), "1 in subfolders"
    )


def test_what_a_search_of_subfolders_leaves_out_is_named(tmp_path, caplog):
    photos = tmp_path / "photos"
    for name in ("deep/a.png", "deep/.b.png", ".hidden/c.png"):
        write_image(photos / name)
    write_image(tmp_path / "other" / "d.png")
    (photos / "deep" / "linked").symlink_to(tmp_path / "other")
    (photos / "deep" / "e.jpx").write_text("no image")
    (photos / ".hidden" / "notes.txt").write_text("no image")
    assert find_images(photos) == [photos / "deep" / "a.png"]
    assert caplog.messages == [
        f"{photos}: 1 .jpx files are left out (deep/e.jpx)",
        f"{photos}: 2 hidden images are left out (.hidden/c.png, deep/.b.png)",
        f"{photos}: 1 linked folders are left out (deep/linked)",
    ]


@pytest.mark.parametrize(
    ("name", "part", "unused", "expected"),
    [
        ("kvasir", "train", "test", "train, validation"),
        ("kvasir", "Kvasir-SEG", "more", "Kvasir-SEG"),
        ("bus", "", "valid.txt", "images, masks, train.txt, val.txt, test.txt"),
        ("kbt", "", "train.lst", "images, masks, train.txt, val.txt, test.txt"),
        ("sirst", "", "idx_427/validation.txt", "train.txt, val.txt, test.txt"),
        ("sirst", "", "idx_320", "images, masks, idx_427"),
        ("cod", "TrainDataset", "ValDataset", "TrainDataset, TestDataset"),
        ("cod", "TrainDataset", "Imgs", "TrainDataset, TestDataset"),
        ("cod", "TrainDataset", "TrainDataset/Image", "Imgs, GT"),
        ("dis5k", "DIS-TR", "DIS-TE9", "DIS-TR, DIS-VD, DIS-TE1, DIS-TE2, DIS-TE3, DIS-TE4"),
        ("dis5k", "DIS5K/DIS-TR", "DIS-VD", "DIS5K"),
        ("magnetic_tiles", "MT_Free", "MT_Scratch", ", ".join(TILE_CLASSES)),
        ("people", "", "Test_Images", "Training_Images, Ground_Truth"),
    ],
)
def test_unused_folders_and_lists_are_named(name, part, unused, expected, tmp_path, caplog):
    folders = {"cod": ("Imgs", "GT"), "dis5k": ("im", "gt"), "people": ("Training_Images", "Ground_Truth")}
    folders |= {"magnetic_tiles": ("Imgs", "Imgs")}
    ending = "_pixels0.png" if name == "sirst" else ".png"
    write_pairs(tmp_path / part, ["exp1_num_1"], ".jpg", ending, *folders.get(name, ("images", "masks")))
    if name == "cod":
        (tmp_path / part / "Edge").mkdir()
    if name == "sirst":
        (tmp_path / "idx_427").mkdir()
        (tmp_path / "idx_427" / "trainval.txt").write_text("exp1_num_1")
    found = FINDERS[name](tmp_path)
    assert not caplog.messages
    place = tmp_path / unused
    if place.suffix:
        place.write_text("exp1_num_1")
    else:
        place.mkdir()
    assert FINDERS[name](tmp_path) == found
    kind = "text files" if place.suffix else "folders"
    assert caplog.messages == [f"{place.parent}: 1 {kind} are left out ({place.name}); expected only {expected}"]


def test_unused_folders_of_busi_are_named(busi, tmp_path, caplog):
    write_pairs(busi / "more", ["malignant (9)"])
    (busi / "Dataset_BUSI_with_GT" / "other").mkdir()
    assert len(FINDERS["busi"](busi, more=str(busi / "more"))) == 21
    (said,) = caplog.messages
    assert "Dataset_BUSI_with_GT: 1 folders are left out (other); expected only benign, malignant, normal" in said


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_text_are_unusable(tmp_path, run, out, caplog):
    root = write_pairs(tmp_path / "raw")
    for part in ("images", "masks"):
        (root / part / "a.png").rename(root / part / os.fsdecode(b"caf\xe9.png"))
    assert run("folder", "--source", root, "--out", out)[0] == 2
    assert "unusable: caf?: its name is not UTF-8 text; rename the files" in caplog.text
    assert run("folder", "--source", root, "--out", out, "--skip-unusable")[0] == 0
    assert len(load_splits(str(out), ["train"])["train"]) == 3


def test_files_changed_by_hand_are_read_again(tmp_path):
    """The datasets library itself would give its cached copy, because the card is the same."""
    build_synthetic("ultrasound", tmp_path / "set", {"train": 3}, size=48)
    before = load_splits(str(tmp_path / "set"), ["train"])["train"]
    (file,) = (tmp_path / "set" / "data").glob("*.parquet")
    before.map(lambda row: {"id": "new " + row["id"]}).to_parquet(file)
    after = load_splits(str(tmp_path / "set"), ["train"])["train"]
    assert after["id"][:] == ["new " + id for id in before["id"]]


def test_images_and_masks_are_prepared_when_they_are_opened(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = write_pairs(tmp_path / "raw", [f"{i}" for i in range(10)])
    splits = load_splits(str(root), ["train", "val"])
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 8, "val": 2}
    assert "raw holds images and masks: a fifth, chosen at random, is val" in caplog.text
    facts = describe_set(str(root), splits)
    assert (facts["path"], facts["images"], facts["license"]) == (str(root), {"train": 8, "val": 2}, "unknown")
    assert facts["sections"]["Terms"] == SOURCES["folder"].terms
    assert facts["sections"]["Splits"] == "random with seed 0, shares train 0.8, val 0.2, equal in each class."
    # Opened again, it is the same data set, until a file changes.
    made = list((tmp_path / "cache" / "unconceal").iterdir())
    assert load_splits(str(root), ["val"])["val"]["id"][:] == splits["val"]["id"][:]
    assert list((tmp_path / "cache" / "unconceal").iterdir()) == made
    write_pairs(root, ["new"])
    assert len(load_splits(str(root), ["train"])["train"]) == 9
    (root / "masks" / "3.png").unlink()
    with rejected("1 of 11 pairs are unusable"):
        load_splits(str(root), ["train"])
    for name in ("Test.txt", "idx_427"):
        (root / name).touch()
        with rejected(f"raw holds {name}, which a random split would ignore; run unconceal prepare"):
            load_splits(str(root), ["train"])
        (root / name).unlink()


def test_names_of_lists_may_be_in_capitals(sirst, run, out):
    (sirst / "idx_427" / "train.txt").rename(sirst / "idx_427" / "Train.TXT")
    run("sirst", "--source", sirst, "--out", out)
    assert len(load_splits(str(out), ["train", "val"])["train"]) == 4


def test_wrong_arguments_are_errors(tmp_path, run, out):
    base = ["synthetic", "--out", out, "--kind"]
    assert_one_error(run(*base, "infrared"), out, "--train")
    assert_one_error(run(*base, "infrared", "--train", "-1"), out, "-1")
    assert_one_error(run(*base, "fog", "--train", "1"), out, "fog")
    with pytest.raises(UserError, match="got 'sirts' as name of a data set"):
        build("sirts", tmp_path, out)


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unconceal.data.builders.write_card", fail)
    root = write_pairs(tmp_path / "raw")
    with pytest.raises(UserError, match="No space left"):
        build("folder", root, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


# A shell that starts tests in the background makes them ignore Ctrl-C, and their children inherit this.
INTERRUPTIBLE = """
import shutil
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from unconceal.__main__ import entry
entry("prepare")
"""


def test_interrupted_run_leaves_nothing(tmp_path):
    arguments = ["synthetic", "--kind", "infrared", "--size", "32", "--train", "1000000", "--out"]
    arguments.append(tmp_path / "out")
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTIBLE, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        # Until a file is written: in an import, Python itself prints a traceback.
        while not list(tmp_path.glob(".*/data/*.parquet")) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_large_splits_are_written_in_shards(monkeypatch, load, out):
    monkeypatch.setattr(data_write, "GROUP_BYTES", 4_000)
    monkeypatch.setattr(data_write, "SHARD_BYTES", 10_000)
    build_synthetic("dichotomous", out, {"train": 9}, size=32)
    shards = sorted((out / "data").iterdir())
    assert len(shards) > 1
    names = [f"train-{i:05d}-of-{len(shards):05d}.parquet" for i in range(len(shards))]
    assert [path.name for path in shards] == names
    assert load(out)["train"]["id"][:] == [f"train-{i:06d}" for i in range(9)]


# Transforms


@pytest.fixture
def scenes(tmp_path, load):
    build_synthetic("camouflage", tmp_path / "scenes", {"train": 6}, size=64)
    return load(tmp_path / "scenes")["train"]


def training_set(rows, seed=3, **fields):
    """Make a `TrainingSet` of 64x64 pixels in [0, 1] with only the changes `fields`."""
    off = {"rotate90_probability": 0, "flip_probability": 0}
    processor = UnconcealImageProcessor(size=64, do_normalize=False)
    return TrainingSet(rows, processor, TransformRecipe(**(off | fields)), seed)


def gray(sample):
    """Return the image of a sample, (H, W) in [0, 255]."""
    return (sample["pixel_values"].mean(0) * 255).numpy()


@pytest.mark.parametrize("fields", [{}, {"rotate90_probability": 1.0, "flip_probability": 0.3, "crop_size": 40}])
def test_color_changes_leave_the_numbers_of_the_others(fields, scenes):
    samples = training_set(scenes, **fields)
    changed = training_set(scenes, **fields, brightness=0.5, sharpness=2.0)
    samples.set_epoch(2)
    changed.set_epoch(2)
    for index in range(len(scenes)):
        rng = np.random.default_rng([3, 2, index])  # nothing else is drawn in between
        image, mask_image = turn_and_flip(scenes[index]["image"], scenes[index]["mask"], samples.recipe, rng)
        expected = samples.processor(image, mask_image)
        pixel_values, labels = crop(expected["pixel_values"][0], expected["labels"][0], samples.recipe, rng)
        assert torch.equal(samples[index]["pixel_values"], pixel_values)
        assert torch.equal(samples[index]["labels"], labels)
        # Colors draw separate numbers.
        assert torch.equal(changed[index]["labels"], labels)
        assert not torch.equal(changed[index]["pixel_values"], pixel_values)


def test_image_and_mask_turn_together(scenes):
    image, turned = scenes[0]["image"], set()
    for seed in range(40):
        recipe, rng = TransformRecipe(1.0, 1.0), np.random.default_rng(seed)
        one, its_mask = turn_and_flip(image, image.convert("L"), recipe, rng)
        assert one.convert("L").tobytes() == its_mask.tobytes()
        turned.add(its_mask.tobytes())
    assert len(turned) > 4


def test_crop_is_placed_on_objects():
    labels = torch.zeros(48, 48)
    labels[1, 47] = 1

    def count(**fields):
        found = 0
        for seed in range(40):
            pixel_values, cut = crop(labels[None], labels, TransformRecipe(**fields), np.random.default_rng(seed))
            assert torch.equal(pixel_values[0] > 0.5, cut > 0.5)
            assert cut.shape == (fields["crop_size"],) * 2
            found += int(cut.sum())
        return found

    assert count(crop_size=32, crop_object_probability=1.0) == 40
    assert count(crop_size=32, crop_object_probability=0.0) < 40
    assert count(crop_size=64) == 40


def test_horizontal_flip_is_never_upside_down(scenes):
    plain, samples = training_set(scenes), training_set(scenes, horizontal_flip_probability=0.5)
    flipped = 0
    for index in range(len(scenes)):
        for epoch in range(4):
            samples.set_epoch(epoch)
            sample, same = samples[index], plain[index]
            turned = not torch.equal(sample["pixel_values"], same["pixel_values"])
            for key in ("pixel_values", "labels"):
                assert torch.equal(sample[key], same[key].flip(-1) if turned else same[key])
            flipped += turned
    assert 4 < flipped < 20


def test_borders_are_trimmed_evenly():
    ramp = Image.fromarray(np.arange(100, dtype=np.uint8)[None].repeat(50, axis=0)).convert("RGB")
    cut_sizes = set()
    for seed in range(200):
        recipe, rng = TransformRecipe(max_crop_ratio=0.2), np.random.default_rng(seed)
        cut, cut_mask = flip_and_trim(ramp, ramp.convert("L"), recipe, rng)
        assert cut.convert("L").tobytes() == cut_mask.tobytes()
        first, last = np.asarray(cut_mask)[0, [0, -1]]
        assert first == 99 - last  # centered
        cut_sizes.add(cut.size)
    widths, heights = zip(*cut_sizes, strict=True)
    assert (min(widths), max(widths), min(heights), max(heights)) == (82, 100, 42, 50)
    dot = Image.new("RGB", (1, 1))
    assert flip_and_trim(dot, dot, TransformRecipe(max_crop_ratio=0.99), np.random.default_rng(0))[0].size == (1, 1)


def test_image_and_mask_rotate_together(scenes):
    marked = scenes.map(lambda row: {"image": row["mask"].convert("RGB")})
    plain, samples = training_set(marked), training_set(marked, rotate_probability=1.0, max_rotation=30)
    turned = 0
    for index in range(len(marked)):
        sample = samples[index]
        assert sample["labels"].shape == (64, 64)
        assert set(sample["labels"].unique().tolist()) <= {0, 1}
        turned += not torch.equal(sample["labels"], plain[index]["labels"])
        # Bilinear and nearest rotation differ along the contour only.
        assert ((gray(sample) > 127) == sample["labels"].numpy().astype(bool)).mean() > 0.97
    assert turned >= 4  # a small angle may move no pixel


def test_free_corners_get_the_mean_color_and_no_object():
    image = Image.new("RGB", (60, 60), (200, 100, 0))
    image.paste((0, 0, 100), (0, 0, 30, 60))
    recipe = TransformRecipe(rotate_probability=1, max_rotation=180)
    turned, turned_mask = rotate(image, Image.new("L", (60, 60), 255), recipe, np.random.default_rng(3))
    assert turned.size == turned_mask.size == (60, 60)
    assert turned.getpixel((0, 0)) == turned.getpixel((59, 59)) == (100, 50, 50)
    assert turned_mask.getpixel((0, 0)) == turned_mask.getpixel((59, 59)) == 0
    assert set(np.unique(turned_mask)) == {0, 255}


def test_rotation_stays_within_its_angle():
    line = Image.new("L", (101, 101))
    line.paste(255, (0, 48, 101, 53))
    angles = []
    for seed in range(100):
        recipe, rng = TransformRecipe(rotate_probability=0.5, max_rotation=15), np.random.default_rng(seed)
        _, turned = rotate(line.convert("RGB"), line, recipe, rng)
        heights = [np.asarray(turned)[:, column].nonzero()[0].mean() for column in (10, 90)]
        angles.append(np.degrees(np.arctan2(heights[0] - heights[1], 80)))
    assert 13 < max(np.abs(angles)) < 15.5
    assert min(angles) < 0 < max(angles)
    assert 30 < np.count_nonzero(angles) < 70


def test_color_changes_computed_by_hand():
    highest, lowest = SimpleNamespace(uniform=max), SimpleNamespace(uniform=min)
    image = Image.new("RGB", (4, 4), (40, 80, 0))
    for fields, rng, expected in (
        ({}, highest, (40, 80, 0)),
        ({"brightness": 0.5}, highest, (60, 120, 0)),
        ({"brightness": 0.5}, lowest, (20, 40, 0)),
        ({"saturation": 1.0}, lowest, (59, 59, 59)),
        ({"saturation": 2.0}, lowest, (59, 59, 59)),  # 1 - 2 is clipped to 0
        ({"contrast": 1.0}, lowest, (59, 59, 59)),
        ({"sharpness": 2.0}, highest, (40, 80, 0)),  # nothing to sharpen
    ):
        assert jitter_colors(image, TransformRecipe(**fields), rng).getpixel((1, 1)) == expected
    noise = Image.fromarray(np.random.default_rng(0).integers(60, 200, (9, 9, 3), dtype=np.uint8))
    soft, sharp = (jitter_colors(noise, TransformRecipe(sharpness=1.0), rng) for rng in (lowest, highest))
    assert np.std(soft) < np.std(noise) < np.std(sharp)


# Real data


@pytest.mark.parametrize(
    ("folder", "name", "expected"),
    [
        ("sirst", "sirst", {"train": 256, "val": 85}),
        pytest.param("busi", "busi", {"train": 138, "val": 34, "empty": 27}, marks=pytest.mark.thorough),
        pytest.param("kvasir_seg", "kvasir", {"train": 800, "val": 100, "changed": 900}, marks=pytest.mark.thorough),
        ("camo", "cod", {"train": 4}),
        ("dis5k", "dis5k", {"val": 3}),
        pytest.param("people", "people", {"train": 200, "val": 41, "resized": 163}, marks=pytest.mark.thorough),
        ("magnetic_tiles", "magnetic_tiles", {"train": 396, "val": 114, "empty": 186, "changed": 324}),
    ],
)
def test_real_data_sets(folder, name, expected, tmp_path):
    if not (REAL / folder).is_dir():
        pytest.skip("the real data is not here")
    report = build(name, REAL / folder, tmp_path / "out")
    assert not report.problems
    assert not report.repeats
    masks = {"changed": report.num_changed_masks, "resized": report.num_resized_masks, "empty": report.num_empty_masks}
    assert sizes(report) | {kind: number for kind, number in masks.items() if number} == expected


@pytest.mark.parametrize("name", ["set[1]", "v?", "x*", "a::b"])
def test_folders_that_would_be_read_as_patterns_are_refused(name, tmp_path):
    """Beside `set[1]`, the datasets library would open `set1`."""
    plain, odd = tmp_path / "plain", tmp_path / name
    build_synthetic("infrared", plain, {"train": 1, "val": 1}, size=32)
    shutil.copytree(plain, odd)
    uses = (
        lambda: load_splits(str(odd), ["train"]),
        lambda: shards_of_data(str(odd), "train"),
        lambda: build_synthetic("infrared", tmp_path / f"new{name}", {"train": 1}, size=32),
    )
    for use in uses:
        with rejected("datasets library reads that as a pattern, so choose another name"):
            use()
    assert not (tmp_path / f"new{name}").exists()


@pytest.mark.parametrize("name", ["n(1)", "s{1}", "p!q", "sp ace", "ü"])
def test_other_names_of_folders_are_taken_as_they_are(name, tmp_path, monkeypatch):
    build_synthetic("infrared", tmp_path / name, {"train": 1}, size=32)
    monkeypatch.chdir(tmp_path / name)
    for path in (str(tmp_path / name), "."):
        assert len(load_splits(path, ["train"])["train"]) == 1
