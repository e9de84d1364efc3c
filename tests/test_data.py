import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from unconceal.data import BUILDERS, build, build_synthetic, generate, otsu_table
from unconceal.data import write as data_write
from unconceal.data.pairs import Pair, UnusablePair, have_one_aspect, load_pair, read_mask, split_at_random
from unconceal.data.transforms import (
    TrainingSet,
    TransformRecipe,
    crop,
    jitter_colors,
    mirror_and_trim,
    rotate,
    turn_and_flip,
)
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor, to_mask
from unconceal.training.recipe import load_recipe
from unconceal.utils.errors import UserError, run_main
from unconceal.utils.images import MAX_PIXELS


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "prepare_data.py"
REAL = Path(os.environ.get("UNCONCEAL_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, capsys):
    """Run the command line in this process; returns exit code, output and errors."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            run_main(lambda: script.main([str(argument) for argument in arguments]))
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call


@pytest.fixture
def load(tmp_path):
    def load_folder(folder):
        from datasets import load_dataset

        return load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))

    return load_folder


def picture(path, size=(40, 36), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path, **options)


def mask(path, size=(40, 36), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).random((size[1], size[0])) > 0.7
    Image.fromarray(values.astype(np.uint8) * 255).save(path)


def folders(
    root, names=("a", "b", "c", "d"), image_suffix=".png", mask_suffix=".png", images="images", masks="masks", seed=0
):
    for i, name in enumerate(names, start=seed):
        picture(root / images / f"{name}{image_suffix}", seed=i)
        mask(root / masks / f"{name}{mask_suffix}", seed=i)
    return root


@pytest.fixture
def sirst(tmp_path):
    root = folders(tmp_path / "raw", [f"Misc_{i}" for i in range(1, 9)], mask_suffix="_pixels0.png")
    (root / "idx_427").mkdir()
    (root / "idx_427" / "train.txt").write_text("Misc_1\nMisc_2\nMisc_3\nMisc_4")  # no newline at the end
    (root / "idx_427" / "val.txt").write_text("Misc_5\r\nMisc_6\r\n\r\n")
    return root


@pytest.fixture
def busi(tmp_path):
    root = tmp_path / "raw" / "Dataset_BUSI_with_GT"
    for place, (label, count) in enumerate((("benign", 10), ("malignant", 5), ("normal", 5))):
        for i in range(1, count + 1):
            picture(root / label / f"{label} ({i}).png", seed=100 * place + i)
            values = np.zeros((36, 40), dtype=bool)
            values[:10, :10] = label != "normal"
            Image.fromarray(values).save(root / label / f"{label} ({i})_mask.png")
    second = np.zeros((36, 40, 4), dtype=np.uint8)
    second[..., 3] = 255
    second[20:30, 20:30, :3] = 255
    Image.fromarray(second).save(root / "benign" / "benign (1)_mask_1.png")
    return tmp_path / "raw"


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


def test_sirst_lists_and_round_trip(sirst, tmp_path, run, load):
    out = tmp_path / "out"
    code, text, _ = run("sirst", "--source", sirst, "--out", out)
    assert code == 0
    assert "train 4, val 2" in text
    assert sorted(path.name for path in (out / "data").iterdir()) == [
        "train-00000-of-00001.parquet",
        "val-00000-of-00001.parquet",
    ]
    loaded = load(out)
    assert loaded["train"]["id"][:] == ["Misc_1", "Misc_2", "Misc_3", "Misc_4"]
    assert loaded["val"]["id"][:] == ["Misc_5", "Misc_6"]
    assert loaded["train"].features == data_write.FEATURES
    assert set(loaded["train"]["source"]) == {"sirst"}
    for split in loaded.values():
        for row in split:
            stored = np.asarray(row["mask"])
            original = np.asarray(Image.open(sirst / "masks" / f"{row['id']}_pixels0.png"))
            assert row["mask"].mode == "L"
            np.testing.assert_array_equal(stored, original)
    rows = pq.read_table(out / "data" / "val-00000-of-00001.parquet").to_pylist()
    for row in rows:
        assert row["image"]["bytes"] == (sirst / "images" / f"{row['id']}.png").read_bytes()


def test_card(sirst, tmp_path, run):
    from huggingface_hub import DatasetCard

    mask(sirst / "masks" / "Misc_5_pixels0.png", size=(30, 36))
    out = tmp_path / "out"
    run("sirst", "--source", sirst, "--out", out, "--skip-unusable")
    card = DatasetCard.load(out / "README.md")
    assert card.data.license == "other"
    assert [split["num_examples"] for split in card.data.dataset_info["splits"]] == [4, 1]
    assert f"prepare_data.py sirst --source {sirst} --out {out} --skip-unusable" in card.text
    assert "`Misc_5`: mask Misc_5_pixels0.png is 30x36 but image Misc_5.png is 40x36" in card.text
    assert "2 name(s) stand in no list" in card.text


def test_busi_union_classes_and_shares(busi, tmp_path, load):
    out = tmp_path / "out"
    report = build("busi", busi, out)
    assert {split: done.num_examples for split, done in report.splits.items()} == {"train": 16, "val": 4}
    assert report.num_empty_masks == 5
    loaded = load(out)
    for split, counts in (("train", (8, 4, 4)), ("val", (2, 1, 1))):
        sources = loaded[split]["source"][:]
        assert tuple(sources.count(f"busi/{label}") for label in ("benign", "malignant", "normal")) == counts
    rows = {row["id"]: row for split in loaded.values() for row in split}
    assert (np.asarray(rows["benign (1)"]["mask"]) > 0).sum() == 200
    assert (np.asarray(rows["normal (1)"]["mask"]) > 0).sum() == 0


@pytest.mark.parametrize(("name", "suffix", "ids"), [("bus", ".png", "case{:04d}"), ("kbt", ".bmp", "{}")])
def test_bus_and_kbt(name, suffix, ids, tmp_path):
    root = folders(tmp_path / "raw", [ids.format(i) for i in range(10)], suffix, suffix)
    report = build(name, root, tmp_path / "random", seed=1)
    assert {split: done.num_examples for split, done in report.splits.items()} == {"train": 7, "val": 3}
    (root / "train.txt").write_text("\n".join(ids.format(i) for i in range(6)))
    (root / "val.txt").write_text("\n".join(ids.format(i) for i in range(6, 10)))
    report = build(name, root, tmp_path / "listed")
    assert {split: done.num_examples for split, done in report.splits.items()} == {"train": 6, "val": 4}
    report = build(name, root, tmp_path / "again", seed=1, random_split=True)
    assert {split: done.num_examples for split, done in report.splits.items()} == {"train": 7, "val": 3}
    first, again = (pq.read_table(tmp_path / out / "data")["id"].to_pylist() for out in ("random", "again"))
    assert first == again


def split_sizes(report):
    return {split: done.num_examples for split, done in report.splits.items()}


def test_kvasir_in_folders(tmp_path, load):
    root = tmp_path / "raw"
    folders(root / "train", ["0", "1", "2"], ".jpg", ".jpg")
    folders(root / "validation", ["0", "1"], ".jpg", ".jpg", seed=50)  # other pictures of the same names
    report = build("kvasir", root, tmp_path / "out")
    assert split_sizes(report) == {"train": 3, "val": 2}
    assert not report.repeats
    assert report.num_changed_masks == 5  # JPEG leaves values beside 0 and 255
    loaded = load(tmp_path / "out")
    assert loaded["train"]["id"][:] == ["train/0", "train/1", "train/2"]
    assert loaded["val"]["id"][:] == ["validation/0", "validation/1"]
    for row in loaded["val"]:
        raw = np.asarray(Image.open(root / "validation" / "masks" / f"{Path(row['id']).name}.jpg"))
        np.testing.assert_array_equal(np.asarray(row["mask"]), np.where(raw > 127, 255, 0))


def test_kvasir_official(tmp_path):
    root = folders(tmp_path / "raw" / "Kvasir-SEG", [f"cju{i}" for i in range(25)], ".jpg", ".jpg")
    (root / "kavsir_bboxes.json").write_text("{}")  # the makers' spelling
    assert split_sizes(build("kvasir", tmp_path / "raw", tmp_path / "outer")) == {"train": 22, "val": 3}
    assert split_sizes(build("kvasir", root, tmp_path / "inner")) == {"train": 22, "val": 3}
    (root / "train.txt").write_text("\n".join(f"cju{i}" for i in range(20)))
    (root / "val.txt").write_text("\n".join(f"cju{i}" for i in range(20, 25)))
    assert split_sizes(build("kvasir", root, tmp_path / "listed")) == {"train": 20, "val": 5}


COD_TRAIN = ["COD10K-CAM-1-Aquatic-1-BatFish-1", "camourflage_00001", "other"]


@pytest.mark.parametrize(
    ("images", "masks"), [("Imgs", "GT"), ("Image", "Mask"), ("Images", "Masks"), ("imgs", "gt"), ("Imgs", "MASK")]
)
def test_cod(images, masks, tmp_path, load):
    root = tmp_path / "raw"
    train = folders(root / "TrainDataset", COD_TRAIN, ".jpg", ".png", images, masks)
    mask(train / "Edge" / "camourflage_00001.png")
    for place, (name, file) in enumerate((("NC4K", "1"), ("CAMO", "camourflage_00001"), ("chameleon", "animal-1"))):
        folders(root / "TestDataset" / name, [file], ".jpg", ".png", images, masks, seed=10 + place)
    report = build("cod", root, tmp_path / "out")
    assert split_sizes(report) == {"train": 3, "CHAMELEON": 1, "CAMO": 1, "NC4K": 1}
    loaded = load(tmp_path / "out")
    assert loaded["train"]["id"][:] == [f"train/{name}" for name in COD_TRAIN]
    assert loaded["train"]["source"][:] == ["cod/COD10K", "cod/CAMO", "cod"]
    assert loaded["CAMO"]["id"][:] == ["CAMO/camourflage_00001"]  # a name of the training set may come again
    assert {split: loaded[split]["source"][0] for split in ("CHAMELEON", "CAMO", "NC4K")} == {
        "CHAMELEON": "cod/CHAMELEON",
        "CAMO": "cod/CAMO",
        "NC4K": "cod/NC4K",
    }


def test_cod_without_the_other_half(tmp_path, caplog):
    folders(tmp_path / "train" / "TrainDataset", COD_TRAIN, ".jpg", ".png", "Imgs", "GT")
    assert split_sizes(build("cod", tmp_path / "train", tmp_path / "one")) == {"train": 3}
    for name in ("CAMO", "CPD1K"):
        folders(tmp_path / "test" / "TestDataset" / name, ["a"], ".jpg", ".png", "Imgs", "GT")
    assert split_sizes(build("cod", tmp_path / "test", tmp_path / "two")) == {"CAMO": 1}
    assert "holds CPD1K; left out, expected only CHAMELEON, CAMO, COD10K, NC4K" in caplog.text


def test_cod_as_one_pack(tmp_path, run, load):
    root = folders(tmp_path / "raw", COD_TRAIN, ".jpg", ".png", "Imgs", "GT")
    assert run("cod", "--source", root, "--out", tmp_path / "one")[0] == 0
    assert load(tmp_path / "one")["train"]["id"][:] == COD_TRAIN
    assert run("cod", "--source", root, "--out", tmp_path / "two", "--fractions", "CAMO=1")[0] == 0
    assert load(tmp_path / "two")["CAMO"]["source"][:] == ["cod/COD10K", "cod/CAMO", "cod"]


def test_cod_pictures_without_a_mask_are_named(tmp_path, run, caplog):
    root, out = folders(tmp_path / "raw" / "TrainDataset", COD_TRAIN, ".jpg", ".png", "Imgs", "GT"), tmp_path / "out"
    bare = "COD10K-NonCAM-1-Aquatic-1-BatFish-1"
    picture(root / "Imgs" / f"{bare}.jpg")
    arguments = ["cod", "--source", root.parent, "--out", out]
    assert_one_error(run(*arguments), out, "1 of 4 pairs", "--skip-unusable")
    assert f"unusable: train/{bare}: no mask GT/{bare}.*" in caplog.text
    code, text, _ = run(*arguments, "--skip-unusable")
    assert code == 0
    assert "left out: 1 unusable" in text
    assert "train 3" in text


def test_cod_bad_sources(tmp_path, run):
    out = tmp_path / "out"
    (tmp_path / "raw" / "TestDataset" / "CPD1K").mkdir(parents=True)
    assert_one_error(run("cod", "--source", tmp_path / "raw", "--out", out), out, "no pairs", "TrainDataset", "NC4K")
    (tmp_path / "raw" / "TestDataset" / "NC4K").mkdir()
    assert_one_error(run("cod", "--source", tmp_path / "raw", "--out", out), out, "NC4K/Imgs", "folder of pictures")
    picture(tmp_path / "pack" / "Imgs" / "a.jpg")
    assert_one_error(run("cod", "--source", tmp_path / "pack", "--out", out), out, "pack/GT", "folder of pictures")


DIS5K = ("DIS-TR", "DIS-VD", "DIS-TE1", "DIS-TE2", "DIS-TE3", "DIS-TE4")
DIS5K_NAME = "1#Accessories#1#Bag#2339506821_83cf9f1d22_o"


@pytest.mark.parametrize("inner", ["", "DIS5K"])
def test_dis5k(inner, tmp_path, run, load):
    root = tmp_path / "raw"
    for place, name in enumerate(DIS5K):
        folders(root / inner / name, [DIS5K_NAME], ".jpg", ".png", "im", "gt", seed=place)
    (root / inner / "DIS-TE4" / "gt" / "notes.txt").write_text("no picture")
    soft = np.zeros((36, 40), np.uint8)
    soft[:, 10:], soft[:, 9] = 255, 128
    Image.fromarray(soft).save(root / inner / "DIS-VD" / "gt" / f"{DIS5K_NAME}.png")
    code, text, _ = run("dis5k", "--source", root, "--out", tmp_path / "out")
    assert code == 0
    assert "masks: 1 changed by the rule" in text
    loaded = load(tmp_path / "out")
    splits = ["train", "val", "DIS_TE1", "DIS_TE2", "DIS_TE3", "DIS_TE4"]
    assert list(loaded) == splits
    for split, name in zip(splits, DIS5K, strict=True):
        assert loaded[split]["id"][:] == [f"{split}/{DIS5K_NAME}"]
        assert loaded[split]["source"][:] == [f"dis5k/{name}"]
    np.testing.assert_array_equal(np.asarray(loaded["val"][0]["mask"]) > 0, soft > 127)


def test_dis5k_in_part(tmp_path, run):
    out = tmp_path / "out"
    (tmp_path / "raw").mkdir()
    assert_one_error(run("dis5k", "--source", tmp_path / "raw", "--out", out), out, "no pairs", "DIS-TR", "DIS-TE4")
    for name in ("DIS-TE3", "DIS-VD"):
        folders(tmp_path / "raw" / name, ["a", "b"], ".jpg", ".png", "im", "gt")
    assert split_sizes(build("dis5k", tmp_path / "raw", out)) == {"val": 2, "DIS_TE3": 2}
    card = (out / "README.md").read_text()
    assert "license: other" in card
    assert "non-commercial" in card


def test_people(tmp_path, run, load, caplog):
    root, out = tmp_path / "raw", tmp_path / "out"
    sizes = {"same": (40, 36), "half": (20, 18), "rounded": (13, 12), "larger": (81, 73), "other": (40, 20)}
    for place, (name, size) in enumerate(sizes.items()):
        picture(root / "Training_Images" / f"{name}.jpg", seed=place)
        values = np.zeros(size[::-1], np.uint8)
        values[:, size[0] // 2 :] = 255
        (root / "Ground_Truth").mkdir(exist_ok=True)
        Image.fromarray(values).save(root / "Ground_Truth" / f"{name}.png")
    arguments = ["people", "--source", root, "--out", out]
    assert_one_error(run(*arguments), out, "1 of 5 pairs", "--skip-unusable")
    reason = "unusable: other: mask other.png is 40x20 but image other.jpg is 40x36, of another aspect"
    assert reason in caplog.text
    code, text, _ = run(*arguments, "--skip-unusable")
    assert code == 0
    assert "masks: 0 changed by the rule, 3 resized to their image" in text
    assert "3 mask(s) had another size" in (out / "README.md").read_text()
    for row in (row for split in load(out).values() for row in split):
        assert row["mask"].size == row["image"].size == (40, 36)
        edge = np.asarray(row["mask"]).argmax(axis=1)  # upright still, and where the file has it
        width = sizes[row["id"]][0]
        assert (edge == round(width // 2 * 40 / width)).all()


def test_masks_are_resized_only_where_the_builder_says_so(tmp_path, run, caplog):
    root, out = folders(tmp_path / "raw"), tmp_path / "out"
    mask(root / "masks" / "a.png", size=(20, 18))
    assert_one_error(run("folder", "--source", root, "--out", out), out, "1 of 4 pairs")
    assert "unusable: a: mask a.png is 20x18 but image a.png is 40x36" in caplog.text
    build("folder", root, out, skip_unusable=True)
    assert "another size" not in (out / "README.md").read_text()


def test_people_split():
    people = [Pair(str(i), "people") for i in range(241)]
    dealt = split_at_random(people, BUILDERS["people"].fractions, seed=0)
    assert [sum(pair.split == split for pair in dealt) for split in ("train", "val")] == [200, 41]


@pytest.mark.parametrize(
    ("size", "other", "alike"),
    [
        ((1079, 900), (547, 457), True),  # three sizes of real pairs
        ((1500, 1001), (612, 408), True),
        ((1280, 960), (577, 433), True),
        ((1001, 667), (500, 333), True),  # halved, rounded down
        ((640, 480), (480, 640), False),
        ((640, 480), (320, 238), False),
        ((640, 480), (640, 478), False),
    ],
)
def test_aspect(size, other, alike):
    assert have_one_aspect(size, other) is have_one_aspect(other, size) is alike


# Names in upper and lower case


def ids_of(out):
    return sorted(row["id"] for path in sorted((out / "data").iterdir()) for row in pq.read_table(path).to_pylist())


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
def test_names_that_differ_in_case_or_suffix(name, images, masks, ending, options, tmp_path, caplog):
    root, one = tmp_path / "raw", {"fractions": {"train": 1.0}}
    for place, (image, its_mask) in enumerate((("Aa.JPG", "aA"), ("b.jpeg", "B"), ("C.png", "C"))):
        picture(root / images / image, seed=place)
        mask(root / masks / f"{its_mask}{ending}.PNG")
    build(name, root, tmp_path / "out", **one, **options)
    assert [id.split("/")[-1] for id in ids_of(tmp_path / "out")] == ["Aa", "C", "b"]
    mask(root / masks / f"AA{ending}.png")
    report = build(name, root, tmp_path / "again", skip_unusable=True, **one, **options)
    (left_out,) = report.skipped
    assert left_out[0].endswith("Aa")
    assert left_out[1] == f"2 masks: AA{ending}.png, aA{ending}.PNG"


def test_names_that_differ_in_case_in_busi(busi, tmp_path):
    root = busi / "Dataset_BUSI_with_GT" / "benign"
    (root / "benign (1)_mask_1.png").rename(root / "Benign (1)_Mask_1.PNG")
    (root / "benign (2).png").rename(root / "BENIGN (2).png")
    report = build("busi", busi, tmp_path / "out")
    assert split_sizes(report) == {"train": 16, "val": 4}
    assert {"benign (1)", "BENIGN (2)"} <= set(ids_of(tmp_path / "out"))
    mask(root / "Benign (3)_mask.png")
    report = build("busi", busi, tmp_path / "again", skip_unusable=True)
    assert report.skipped == [("benign (3)", "2 masks: Benign (3)_mask.png, benign (3)_mask.png")]


def test_listed_names_that_differ_in_case(sirst, tmp_path):
    (sirst / "idx_427" / "train.txt").write_text("MISC_1\nmisc_2")
    (sirst / "masks" / "Misc_2_pixels0.png").rename(sirst / "masks" / "misc_2_pixels0.png")
    report = build("sirst", sirst, tmp_path / "out")
    assert ids_of(tmp_path / "out") == ["Misc_1", "Misc_2", "Misc_5", "Misc_6"]  # as the image files have them
    assert sorted(report.unlisted) == ["Misc_3", "Misc_4", "Misc_7", "Misc_8"]
    (sirst / "idx_427" / "val.txt").write_text("misc_1")
    report = build("sirst", sirst, tmp_path / "again", skip_unusable=True)
    assert report.skipped == [("Misc_1", "the name occurs 2 times: Misc_1.png in train, Misc_1.png in val")]
    (sirst / "names.txt").write_text("MISC_1.png\nmisc_3\n")
    build("folder", sirst, tmp_path / "folder", list_file=sirst / "names.txt", mask_suffix="_pixels0")
    assert ids_of(tmp_path / "folder") == ["Misc_1", "Misc_3"]


def test_two_sets_of_names_that_differ_in_case_are_two(tmp_path):
    root = folders(tmp_path / "raw", ["a", "A", "b"])
    if len(list((root / "images").iterdir())) < 3:
        pytest.skip("this disk does not tell upper from lower case")
    (root / "names.txt").write_text("A\nb\n")
    build("folder", root, tmp_path / "all")
    assert ids_of(tmp_path / "all") == ["A", "a", "b"]
    build("folder", root, tmp_path / "listed", list_file=root / "names.txt")
    assert ids_of(tmp_path / "listed") == ["A", "b"]


# Large pictures and many of them

MEMORY = """
import resource, sys
from unconceal.data import build, write

write.GROUP_BYTES = 2**21
peaks = []
for folder in sys.argv[1:]:
    build("folder", folder, folder + "-out")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss counts in kB only on Linux")
def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    size, counts = (500, 500), {"few": 10, "many": 60}
    picture(tmp_path / "image.png", size=size)  # noise: 0.75 MB, and 1 MB when decoded
    mask(tmp_path / "mask.png", size=size)
    for name, count in counts.items():
        for kind in ("image", "mask"):
            (tmp_path / name / f"{kind}s").mkdir(parents=True)
            for i in range(count):
                (tmp_path / name / f"{kind}s" / f"{i}.png").symlink_to(tmp_path / f"{kind}.png")
    command = [sys.executable, "-c", MEMORY, *(tmp_path / name for name in counts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    few, many = (int(peak) / 1024 for peak in done.stdout.split())
    assert many - few < 20, f"{few} MB for {counts['few']} pairs, {many} MB for {counts['many']}"


def test_large_picture(tmp_path, load):
    (tmp_path / "raw" / "images").mkdir(parents=True)
    Image.new("RGB", (6000, 4000), "teal").save(tmp_path / "raw" / "images" / "a.jpg")
    (tmp_path / "raw" / "masks").mkdir()
    whole = Image.new("L", (6000, 4000))
    whole.paste(255, (100, 200, 5900, 3000))
    whole.save(tmp_path / "raw" / "masks" / "a.png", compress_level=1)
    build("folder", tmp_path / "raw", tmp_path / "out")
    assert load(tmp_path / "out")["train"][0]["mask"].getbbox() == (100, 200, 5900, 3000)


@pytest.mark.filterwarnings("error")
def test_pictures_over_the_limit(tmp_path, run, caplog):
    root, out = folders(tmp_path / "raw"), tmp_path / "out"
    limit = 8000 * 8000
    for name, size in (("a", (8001, 8000)), ("b", (8000, 8000)), ("c", (40000, 8000))):
        Image.new("1", size).save(root / "images" / f"{name}.png")
    Image.new("1", (8000, 8000)).save(root / "masks" / "b.png")
    Image.new("1", (8001, 8000)).save(root / "masks" / "d.png")
    assert limit < MAX_PIXELS
    arguments = ["folder", "--source", root, "--out", out, "--max-pixels"]
    assert_one_error(run(*arguments, limit), out, "3 of 4 pairs", "--skip-unusable")
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("unusable")]
    rule = f"over the limit of {limit} pixels that guards against decompression bombs; raise --max-pixels"
    assert told == [
        f"unusable: a: a.png cannot be read: 8001x8000 is {rule}",
        f"unusable: c: c.png cannot be read: it is {rule}",
        f"unusable: d: d.png cannot be read: 8001x8000 is {rule}",
    ]
    code, text, _ = run(*arguments, limit, "--skip-unusable")
    assert code == 0
    assert "train 1" in text
    assert_one_error(run(*arguments, 0), tmp_path / "none", "max-pixels 0", "expected 1 or more")
    assert_one_error(run("otsu", out, "--max-pixels", 100), tmp_path / "none", "image b", "limit of 100 pixels")


def test_the_limit_can_be_lifted(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # Pillow's own, which would refuse these
    for name, size in (("a", (40, 200)), ("b", (200, 40))):
        picture(tmp_path / "raw" / "images" / f"{name}.png", size=(40, 200))
        mask(tmp_path / "raw" / "masks" / f"{name}.png", size=size)
    report = build("folder", tmp_path / "raw", tmp_path / "out", skip_unusable=True)
    assert report.skipped == [("b", "mask b.png is 200x40 but image b.png is 40x200")]
    assert Image.MAX_IMAGE_PIXELS == 3000


def test_folder_with_two_folders(tmp_path, run, load):
    root = folders(tmp_path / "raw", mask_suffix="_mask.png", image_suffix=".jpg")
    out = tmp_path / "out"
    where = ["--images", root / "images", "--masks", root / "masks", "--mask-suffix", "_mask"]
    code, _, _ = run("folder", *where, "--out", out, "--fractions", "train=0.5", "val=0.25", "test=0.25")
    assert code == 0
    assert {split: len(rows) for split, rows in load(out).items()} == {"train": 2, "val": 1, "test": 1}


def test_folder_with_a_list(tmp_path, run, load):
    root = folders(tmp_path / "raw", ["a", "b c", "d"])
    (root / "pairs.txt").write_text("images/a.png masks/a.png\nimages/b c.png\tmasks/b c.png\n")
    (root / "names.txt").write_text("b c\nd")
    run("folder", "--list", root / "pairs.txt", "--out", tmp_path / "one")
    assert load(tmp_path / "one")["train"]["id"][:] == ["images/a", "images/b c"]
    where = ["--images", root / "images", "--masks", root / "masks"]
    run("folder", *where, "--list", root / "names.txt", "--out", tmp_path / "two")
    assert load(tmp_path / "two")["train"]["id"][:] == ["b c", "d"]
    run("folder", "--source", root, "--list", root / "names.txt", "--out", tmp_path / "three")
    assert load(tmp_path / "three")["train"]["id"][:] == ["b c", "d"]
    picture(root / "images" / "e.1.ppm")  # every kind of file that `segment` finds too
    mask(root / "masks" / "e.1.png")
    (root / "names.txt").write_text("a.png\nb c.PNG\nd\ne.1")
    run("folder", "--source", root, "--list", root / "names.txt", "--out", tmp_path / "four")
    assert load(tmp_path / "four")["train"]["id"][:] == ["a", "b c", "d", "e.1"]


def test_synthetic_and_otsu(tmp_path, run, load):
    out = tmp_path / "out"
    counts = ["--train", 3, "--val", 2]
    code, _, _ = run("synthetic", "--kind", "infrared", "--size", 32, *counts, "--seed", 5, "--out", out)
    assert code == 0
    loaded = load(out)
    assert loaded["val"]["id"][:] == ["val-000000", "val-000001"]
    expected, expected_mask = generate("infrared", 32, 5, 1)
    assert loaded["train"][1]["image"].convert("RGB").tobytes() == expected.tobytes()
    assert loaded["train"][1]["mask"].tobytes() == expected_mask.tobytes()
    assert {row["image"].tobytes() for row in loaded["train"]}.isdisjoint(
        row["image"].tobytes() for row in loaded["val"]
    )
    assert set(otsu_table(out)) == {("train", "synthetic/infrared"), ("val", "synthetic/infrared")}
    code, text, _ = run("otsu", out)
    assert code == 0
    assert "mean Otsu IoU" in text


# Splits


def test_random_splits_follow_the_seed():
    pairs = [Pair(f"{label}{i}", label) for label in "xy" for i in range(20)]
    shares = {"train": 0.7, "val": 0.1, "test": 0.2}
    dealt = split_at_random(pairs, shares, seed=0)
    assert dealt == split_at_random(pairs[::-1], shares, seed=0)
    assert dealt != split_at_random(pairs, shares, seed=1)
    assert sorted(pair.id for pair in dealt) == sorted(pair.id for pair in pairs)
    assert [sum(p.split == split and p.source == "x" for p in dealt) for split in shares] == [14, 2, 4]


def test_repeats_across_splits_are_told(sirst, tmp_path, caplog):
    Image.open(sirst / "images" / "Misc_1.png").save(sirst / "images" / "Misc_5.png", compress_level=1)
    report = build("sirst", sirst, tmp_path / "out")
    assert report.repeats == [("train/Misc_1", "val/Misc_5")]
    assert "1 pictures lie in more than one split" in caplog.text


# The mask rule


def grey_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 255, 255, 0, 0, 0])  # white comes first
    image.putdata([0, 1])
    return image, [True, False]


def colour_palette():
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 64, 0, 0, 0, 0, 128])
    image.putdata([0, 1, 2])
    return image, [False, True, True]


@pytest.mark.parametrize(
    ("image", "expected", "changed"),
    [
        (Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)), [False, False, True, True], True),
        (Image.fromarray(np.array([[0, 255]], np.uint8)), [False, True], False),
        (Image.fromarray(np.array([[0, 1]], np.uint8)), [False, True], True),
        (Image.fromarray(np.array([[False, True]])), [False, True], False),
        (Image.fromarray(np.array([[0, 32639, 32640, 65535]], np.uint16)), [False, False, True, True], True),
        (Image.fromarray(np.array([[0, 255]], np.uint16)), [False, True], False),
        (Image.fromarray(np.array([[[0, 0, 0], [255, 0, 0]]], np.uint8)), [False, True], False),
        (Image.fromarray(np.array([[[255] * 3 + [0], [255] * 4]], np.uint8)), [False, True], False),
        (Image.fromarray(np.array([[[180] * 3 + [170], [180] * 3 + [190]]], np.uint8)), [False, True], True),
        (Image.fromarray(np.zeros((1, 2), np.uint8)), [False, False], False),
        (*grey_palette(), False),
        (*colour_palette(), False),
    ],
    ids=[
        "grey",
        "8bit",
        "0-1",
        "1bit",
        "16bit",
        "8-in-16",
        "red",
        "alpha",
        "half alpha",
        "empty",
        "grey palette",
        "colour palette",
    ],
)
def test_mask_rule(image, expected, changed, tmp_path):
    image.save(tmp_path / "mask.png")
    values, was_changed, _ = read_mask(tmp_path / "mask.png")
    assert values.tolist() == [expected]
    assert was_changed == changed
    soft = np.asarray(to_mask(Image.open(tmp_path / "mask.png")))
    if soft.max() != 1 and not image.mode.startswith("I"):  # there the scale is the file's own
        assert (soft > 127).tolist() == [expected]


def test_size_is_compared_after_the_exif_turn(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "image.jpg", size=(40, 30), exif=exif)
    mask(tmp_path / "upright.png", size=(30, 40))
    mask(tmp_path / "stored.png", size=(40, 30))
    loaded = load_pair(Pair("x", "test", tmp_path / "image.jpg", (tmp_path / "upright.png",)))
    assert loaded.mask.shape == (40, 30)
    with pytest.raises(UnusablePair, match="40x30 but image image.jpg is 30x40 once turned"):
        load_pair(Pair("x", "test", tmp_path / "image.jpg", (tmp_path / "stored.png",)))


# What users do wrong


def test_every_unusable_pair_is_named(sirst, tmp_path, run, caplog):
    (sirst / "masks" / "Misc_1_pixels0.png").unlink()
    (sirst / "images" / "Misc_2.png").unlink()
    mask(sirst / "masks" / "Misc_3_pixels0.png", size=(20, 20))
    whole = (sirst / "images" / "Misc_4.png").read_bytes()
    (sirst / "images" / "Misc_4.png").write_bytes(whole[: len(whole) // 2])
    (sirst / "masks" / "Misc_5_pixels0.png").write_text("no picture")
    with (sirst / "idx_427" / "val.txt").open("a") as file:
        file.write("Misc_404\nMisc_6\n")
    out = tmp_path / "out"
    assert_one_error(run("sirst", "--source", sirst, "--out", out), out, "7 of 8 pairs", "--skip-unusable")
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("unusable")]
    for name, reason in (
        ("Misc_1", "no mask masks/Misc_1_pixels0.*"),
        ("Misc_2", "no image images/Misc_2.*"),
        ("Misc_3", "is 20x20 but image Misc_3.png is 40x36"),
        ("Misc_4", "Misc_4.png cannot be read"),
        ("Misc_5", "Misc_5_pixels0.png cannot be read: not a picture"),
        ("Misc_6", "occurs 2 times"),
        ("Misc_404", "no image"),
    ):
        assert [line for line in told if f": {name}: " in line and reason in line], (name, told)


def test_skip_unusable(sirst, tmp_path, run):
    (sirst / "masks" / "Misc_1_pixels0.png").unlink()
    code, text, _ = run("sirst", "--source", sirst, "--out", tmp_path / "out", "--skip-unusable")
    assert code == 0
    assert "left out: 1 unusable, 2 in no list" in text
    assert "train 3, val 2" in text


def test_bad_sources(sirst, tmp_path, run):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert_one_error(run("sirst", "--source", tmp_path / "nowhere", "--out", out), out, "nowhere")
    assert_one_error(run("sirst", "--source", tmp_path / "empty", "--out", out), out, "empty", "images")
    (tmp_path / "empty" / "images").mkdir()
    assert_one_error(run("sirst", "--source", tmp_path / "empty", "--out", out), out, "images", "no pictures")
    (sirst / "idx_427" / "val.txt").write_bytes(b"\xff\xfe\x00bad\xff")
    assert_one_error(run("sirst", "--source", sirst, "--out", out), out, "val.txt", "UTF-8")
    (sirst / "idx_427" / "val.txt").write_text("")
    assert_one_error(run("sirst", "--source", sirst, "--out", out), out, "val.txt", "empty")


def test_bad_lists_and_shares(tmp_path, run):
    root, out = folders(tmp_path / "raw"), tmp_path / "out"
    (root / "list.txt").write_text("one two three\n")
    assert_one_error(run("folder", "--out", out), out, "--images")
    assert_one_error(run("folder", "--list", root / "list.txt", "--out", out), out, "3 entries")
    assert_one_error(run("folder", "--list", root / "none.txt", "--out", out), out, "none.txt")
    (root / "list.txt").write_text("images/a.png masks/absent.png\n")
    assert_one_error(run("folder", "--list", root / "list.txt", "--out", out), out, "1 of 1 pairs")
    source = ["folder", "--source", root, "--out", out, "--fractions"]
    assert_one_error(run(*source, "train=0.5"), out, "0.5", "expected 1")
    assert_one_error(run(*source, "train=1.5", "val=-0.5"), out, "val", "-0.5")
    assert_one_error(run(*source, "tr/ain=1"), out, "tr/ain")
    assert_one_error(run(*source, "train=0.99", "val=0.01"), out, "val would be empty")
    assert_one_error(run(*source, "train"), out, "SPLIT=SHARE")
    assert_one_error(run("folder", "--source", root, "--out", out, "--seed", "-1"), out, "seed -1")


def test_bad_outputs(tmp_path, run):
    root = folders(tmp_path / "raw")
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    assert_one_error(run("folder", "--source", root, "--out", out), out, "cannot write")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.txt").write_text("mine")
    for name, words in (("file", "no data set"), ("photos", "no data set")):
        code, _, errors = run("folder", "--source", root, "--out", tmp_path / name, "--overwrite")
        assert code == 2
        assert words in errors
    assert (tmp_path / "file").read_text() == (tmp_path / "photos" / "mine.txt").read_text() == "mine"


def test_existing_output_is_kept_unless_told(tmp_path, run):
    root, out = folders(tmp_path / "raw"), tmp_path / "out"
    run("folder", "--source", root, "--out", out)
    card = (out / "README.md").read_bytes()
    code, _, errors = run("folder", "--source", root, "--out", out)
    assert code == 2
    assert "--overwrite" in errors
    (root / "masks" / "a.png").unlink()
    assert run("folder", "--source", root, "--out", out, "--overwrite")[0] == 2
    assert (out / "README.md").read_bytes() == card  # a failed rebuild leaves the old one
    (out / ".DS_Store").touch()  # a system's own files do not make it somebody's work, but hidden folders do
    (out / ".git").mkdir()
    assert "no data set" in run("folder", "--source", root, "--out", out, "--overwrite", "--skip-unusable")[2]
    (out / ".git").rmdir()
    assert run("folder", "--source", root, "--out", out, "--overwrite", "--skip-unusable")[0] == 0
    assert (out / "README.md").read_bytes() != card


def test_bad_synthetic(tmp_path, run):
    out = tmp_path / "out"
    base = ["synthetic", "--out", out, "--kind"]
    assert_one_error(run(*base, "infrared"), out, "--train")
    assert_one_error(run(*base, "infrared", "--train", "-1"), out, "-1")
    assert_one_error(run(*base, "infrared", "--train", "1", "--size", "8"), out, "8x8")
    assert_one_error(run(*base, "fog", "--train", "1"), out, "fog")
    assert_one_error(run("otsu", tmp_path / "nowhere"), out, "nowhere")
    with pytest.raises(UserError, match="no builder named 'sirts'"):
        build("sirts", tmp_path, out)


def test_otsu_on_damaged_files(tmp_path, run):
    data = tmp_path / "data" / "data"
    build_synthetic("infrared", tmp_path / "data", {"train": 2}, size=32)
    (shard,) = data.iterdir()
    whole, table = shard.read_bytes(), pq.read_table(shard)
    rows = table.to_pylist()
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:-200]

    def check(*words):
        assert_one_error(run("otsu", tmp_path / "data"), tmp_path / "out", *words)

    shard.write_bytes(whole[: len(whole) // 2])
    check(shard.name, "cannot be read")
    middle = whole.index(b"\x89PNG")
    shard.write_bytes(whole[:middle] + bytes(60) + whole[middle + 60 :])
    check(shard.name, "cannot be read")
    pq.write_table(table.drop_columns("source"), shard)
    check(shard.name, "columns", "source")
    pq.write_table(table.from_pylist(rows, schema=table.schema), shard)
    check(f"{shard.name}: image train-000001 cannot be read")


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_write, "write_card", fail)
    monkeypatch.setattr("unconceal.data.builders.write_card", fail)
    root = folders(tmp_path / "raw")
    with pytest.raises(UserError, match="No space left"):
        build("folder", root, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_interrupted_run_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, SCRIPT, "synthetic", "--kind", "camouflage", "--train", "100000", "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*/data")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_shards_and_row_groups(tmp_path, monkeypatch, load):
    monkeypatch.setattr(data_write, "GROUP_BYTES", 4_000)
    monkeypatch.setattr(data_write, "SHARD_BYTES", 10_000)
    out = tmp_path / "out"
    build_synthetic("dichotomous", out, {"train": 9}, size=32)
    shards = sorted((out / "data").iterdir())
    assert len(shards) > 1
    assert [path.name for path in shards] == [
        f"train-{i:05d}-of-{len(shards):05d}.parquet" for i in range(len(shards))
    ]
    assert load(out)["train"]["id"][:] == [f"train-{i:06d}" for i in range(9)]


# Transforms


@pytest.fixture
def scenes(tmp_path, load):
    build_synthetic("camouflage", tmp_path / "scenes", {"train": 6}, size=64)
    return load(tmp_path / "scenes")["train"]


def training_set(rows, seed=3, **fields):
    """Rows of 64 pixels a side as `TrainingSet` gives them, with nothing on but `fields`; pixels stay in [0, 1]."""
    off = {"rotate90_probability": 0, "flip_probability": 0}
    processor = UnconcealImageProcessor(size=64, do_normalize=False)
    return TrainingSet(rows, processor, TransformRecipe(**(off | fields)), seed)


def grey(sample):
    """The image of a sample, (H, W) in [0, 255]."""
    return (sample["pixel_values"].mean(0) * 255).numpy()


ALL_ON = {
    "horizontal_flip_probability": 0.5,
    "max_crop_ratio": 0.3,
    "brightness": 0.5,
    "contrast": 0.5,
    "saturation": 1.0,
    "sharpness": 2.0,
    "rotate_probability": 0.5,
}


@pytest.mark.parametrize("fields", [{}, {"rotate90_probability": 1.0, "flip_probability": 0.3, "crop_size": 40}])
def test_old_recipes_draw_the_same_numbers(fields, scenes):
    samples = training_set(scenes, **fields)
    changed = training_set(scenes, **fields, brightness=0.5, sharpness=2.0)
    samples.set_epoch(2)
    changed.set_epoch(2)
    for index in range(len(scenes)):
        rng = np.random.default_rng([3, 2, index])  # the seed, epoch and index, and nothing else drawn in between
        image, mask_image = turn_and_flip(scenes[index]["image"], scenes[index]["mask"], samples.recipe, rng)
        expected = samples.processor(image, mask_image)
        pixel_values, labels = crop(expected["pixel_values"][0], expected["labels"][0], samples.recipe, rng)
        assert torch.equal(samples[index]["pixel_values"], pixel_values)
        assert torch.equal(samples[index]["labels"], labels)
        # Colours on top of it draw from numbers of their own.
        assert torch.equal(changed[index]["labels"], labels)
        assert not torch.equal(changed[index]["pixel_values"], pixel_values)


def test_new_changes_are_off_by_default():
    off = TransformRecipe()
    assert all(getattr(off, name) == 0 for name in ALL_ON)


def test_switching_one_off_leaves_the_others(scenes):
    whole = training_set(scenes, **ALL_ON)
    colourless = {name: 0 for name in ("brightness", "contrast", "saturation", "sharpness")}
    without = training_set(scenes, **ALL_ON | colourless)
    for index in range(len(scenes)):
        assert torch.equal(whole[index]["labels"], without[index]["labels"])


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


def test_border_crop_by_pixel():
    ramp = Image.fromarray(np.arange(100, dtype=np.uint8)[None].repeat(50, axis=0)).convert("RGB")
    sizes = set()
    for seed in range(200):
        cut, cut_mask = mirror_and_trim(
            ramp, ramp.convert("L"), TransformRecipe(max_crop_ratio=0.2), np.random.default_rng(seed)
        )
        assert cut.convert("L").tobytes() == cut_mask.tobytes()
        first, last = np.asarray(cut_mask)[0, [0, -1]]
        assert first == 99 - last  # centred
        sizes.add(cut.size)
    widths, heights = zip(*sizes, strict=True)
    assert (min(widths), max(widths), min(heights), max(heights)) == (82, 100, 42, 50)
    dot = Image.new("RGB", (1, 1))
    assert mirror_and_trim(dot, dot, TransformRecipe(max_crop_ratio=0.99), np.random.default_rng(0))[0].size == (1, 1)


def test_image_and_mask_rotate_together(scenes):
    marked = scenes.map(lambda row: {"image": row["mask"].convert("RGB")})
    plain, samples = training_set(marked), training_set(marked, rotate_probability=1.0, max_rotation=30)
    turned = 0
    for index in range(len(marked)):
        sample = samples[index]
        assert sample["labels"].shape == (64, 64)
        assert set(sample["labels"].unique().tolist()) <= {0, 1}
        turned += not torch.equal(sample["labels"], plain[index]["labels"])
        # Bilinear and nearest rotation differ along the contour alone.
        assert ((grey(sample) > 127) == sample["labels"].numpy().astype(bool)).mean() > 0.97
    assert turned >= 4  # a small angle may move no pixel


def test_free_corners_have_the_mean_colour_and_no_object():
    image = Image.new("RGB", (60, 60), (200, 100, 0))
    image.paste((0, 0, 100), (0, 0, 30, 60))
    turned, turned_mask = rotate(
        image,
        Image.new("L", (60, 60), 255),
        TransformRecipe(rotate_probability=1, max_rotation=180),
        np.random.default_rng(3),
    )
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


def test_colours_by_hand():
    class Highest:
        def uniform(self, low, high):
            return high

    class Lowest:
        def uniform(self, low, high):
            return low

    image = Image.new("RGB", (4, 4), (40, 80, 0))
    for fields, rng, expected in (
        ({}, Highest(), (40, 80, 0)),
        ({"brightness": 0.5}, Highest(), (60, 120, 0)),
        ({"brightness": 0.5}, Lowest(), (20, 40, 0)),
        ({"saturation": 1.0}, Lowest(), (59, 59, 59)),
        ({"saturation": 2.0}, Lowest(), (59, 59, 59)),  # 1 - 2 is stopped at 0
        ({"contrast": 1.0}, Lowest(), (59, 59, 59)),
        ({"sharpness": 2.0}, Highest(), (40, 80, 0)),  # nothing to sharpen
    ):
        assert jitter_colors(image, TransformRecipe(**fields), rng).getpixel((1, 1)) == expected
    noise = Image.fromarray(np.random.default_rng(0).integers(60, 200, (9, 9, 3), dtype=np.uint8))
    soft, sharp = (jitter_colors(noise, TransformRecipe(sharpness=1.0), rng) for rng in (Lowest(), Highest()))
    assert np.std(soft) < np.std(noise) < np.std(sharp)


def test_a_mask_of_any_kind_rotates_into_background(scenes):
    white_first = Image.new("P", (64, 64), 1)
    white_first.putpalette([255, 255, 255, 0, 0, 0])  # the fill must not be index 0, which is white here
    samples = training_set(scenes, rotate_probability=1.0, max_rotation=45)
    samples.dataset = [{"image": row["image"], "mask": white_first} for row in scenes]
    assert not any(samples[index]["labels"].any() for index in range(len(scenes)))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("horizontal_flip_probability=1.5", "is 1.5, expected from 0 to 1"),
        ("rotate_probability=-1", "is -1.0, expected from 0 to 1"),
        ("max_crop_ratio=1", "is 1.0, expected less than 1"),
        ("max_crop_ratio=-0.1", "is -0.1, expected 0 or more"),
        ("brightness=-0.5", "is -0.5, expected 0 or more"),
        ("contrast=nan", "is nan, expected 0 or more"),
        ("sharpness=inf", "is inf, expected 0 or more"),
        ("saturation=much", "Value 'much'"),
        ("max_rotation=181", "is 181.0, expected at most 180 degrees"),
    ],
)
def test_ranges_of_the_recipe(override, expected):
    with pytest.raises(UserError) as raised:
        load_recipe(ROOT / "configs/srs/smoke.yaml", [f"data.transforms.{override}"])
    assert f"data.transforms.{override.split('=')[0]}" in str(raised.value)
    assert expected in str(raised.value)


# Real data


@pytest.mark.skipif(not (REAL / "sirst").is_dir(), reason="no real data here")
def test_real_sirst(tmp_path):
    report = build("sirst", REAL / "sirst", tmp_path / "out")
    assert {split: done.num_examples for split, done in report.splits.items()} == {"train": 256, "val": 85}
    assert not report.skipped
    assert not report.repeats


@pytest.mark.skipif(not (REAL / "busi").is_dir(), reason="no real data here")
def test_real_busi(tmp_path):
    report = build("busi", REAL / "busi", tmp_path / "out")
    assert sum(done.num_examples for done in report.splits.values()) == 172
    assert report.num_empty_masks == 27
    assert not report.skipped


@pytest.mark.skipif(not (REAL / "kvasir_seg").is_dir(), reason="no real data here")
def test_real_kvasir(tmp_path):
    report = build("kvasir", REAL / "kvasir_seg", tmp_path / "out")
    assert split_sizes(report) == {"train": 800, "val": 100}
    assert report.num_changed_masks == 900
    assert report.num_empty_masks == 0
    assert not report.skipped
    assert not report.repeats


@pytest.mark.skipif(not (REAL / "camo").is_dir(), reason="no real data here")
def test_real_camo(tmp_path):
    report = build("cod", REAL / "camo", tmp_path / "out", fractions={"CAMO": 1.0})
    assert split_sizes(report) == {"CAMO": 4}
    assert report.num_changed_masks == report.num_empty_masks == 0


@pytest.mark.skipif(not (REAL / "dis5k").is_dir(), reason="no real data here")
def test_real_dis5k(tmp_path, load):
    report = build("dis5k", REAL / "dis5k", tmp_path / "out")
    assert split_sizes(report) == {"val": 3}
    assert report.num_changed_masks == report.num_resized_masks == report.num_empty_masks == 0
    rows = {Path(row["id"]).name: row for row in load(tmp_path / "out")["val"]}
    for path in (REAL / "dis5k" / "DIS-VD" / "gt").iterdir():
        np.testing.assert_array_equal(np.asarray(rows[path.stem]["mask"]), np.asarray(Image.open(path)))


@pytest.mark.skipif(not (REAL / "people").is_dir(), reason="no real data here")
def test_real_people(tmp_path):
    report = build("people", REAL / "people", tmp_path / "out")
    assert split_sizes(report) == {"train": 200, "val": 41}
    assert report.num_resized_masks == 163
    assert not report.skipped
    assert not report.repeats
