import importlib.util
import io
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from PIL import Image, ImageDraw

from unconceal.__main__ import main
from unconceal.data import photos as photos_module
from unconceal.data.builders import build_camouflage, build_synthetic
from unconceal.data.loading import load_splits
from unconceal.data.photos import PhotoScenes, read_photos, share_out
from unconceal.data.silhouettes import draw_animal, place, read_shapes
from unconceal.data.transforms import TrainingSet, TransformRecipe
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor
from unconceal.utils.errors import UserError


def write_photo(path, seed, size=(120, 90)):
    """Write a photo of stones; the seed gives it a color of its own."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    grain = Image.fromarray(rng.integers(0, 256, (30, 40), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    tint = rng.uniform(0.4, 1, 3)
    Image.fromarray((np.asarray(grain)[..., None] * tint).astype(np.uint8)).save(path, quality=95)


def write_mask(path, *boxes, size=(100, 80)):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size)
    for box in boxes:
        ImageDraw.Draw(mask).ellipse(box, fill=255)
    mask.save(path)


@pytest.fixture
def photos(tmp_path):
    for seed in range(6):
        write_photo(tmp_path / "photos" / ("deep" if seed > 3 else "") / f"{seed}.jpg", seed)
    return tmp_path / "photos"


@pytest.fixture
def shapes(tmp_path):
    for number in range(3):
        write_mask(tmp_path / "shapes" / f"{number}.png", (10, 10, 60 + number, 40))
    return tmp_path / "shapes"


def scenes_of(photos, shapes=(), size=64, seed=0):
    found, problems = read_photos(photos, {}, size)
    assert problems == []
    return PhotoScenes({"train": [found]}, {"train": list(shapes)}, size, seed)


def decode(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded))).astype(float)


def test_the_command_writes_a_data_set_with_backgrounds(photos, shapes, tmp_path):
    out = tmp_path / "out"
    arguments = ["--photos", photos, "--shapes", shapes, "--out", out, "--train", 3, "--val", 2, "--size", 48]
    assert main(["prepare", "camouflage", *map(str, arguments)]) == 0
    splits = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3, "val": 2}
    assert splits["train"].column_names == ["image", "mask", "id", "source", "background"]
    for row in splits["train"]:
        assert row["image"].size == row["mask"].size == row["background"].size == (48, 48)
        assert set(np.unique(row["mask"])) == {0, 255}
        assert row["image"].format == "JPEG"
    card = DatasetCard.load(out / "README.md")
    assert "| `background` |" in card.text
    assert "unconceal prepare camouflage --photos" in card.text


def test_training_and_other_data_sets_do_without_backgrounds(photos, tmp_path):
    build_camouflage([photos], tmp_path / "with", {"train": 1, "val": 1}, size=32)
    build_synthetic("camouflage", tmp_path / "without", {"train": 1, "val": 1}, size=32)
    for name, columns in (("with", {"background"}), ("without", set())):
        split = load_splits(str(tmp_path / name), ["train", "val"])["train"]
        assert set(split.column_names) == {"image", "mask", "id", "source"} | columns
        sample = TrainingSet(split, UnconcealImageProcessor(size=32), TransformRecipe(), 0)[0]
        assert set(sample) == {"pixel_values", "labels"}
    assert "background`" not in (tmp_path / "without" / "README.md").read_text()


def test_equal_seeds_give_equal_files(photos, shapes, tmp_path):
    counts = {"train": 2, "val": 1}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        build_camouflage([photos], tmp_path / name, counts, shapes=[shapes], size=32, seed=seed)
    tables = [pq.read_table(tmp_path / name / "data" / "train-00000-of-00001.parquet") for name in "abc"]
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])


def test_images_differ_from_their_background_at_the_object_only(photos):
    scenes = scenes_of(photos)
    inside, far = [], []
    for number in range(20):
        image, background, mask = scenes.draw("train", number)
        assert 0.001 < mask.mean() < 0.95
        change = np.abs(decode(image) - decode(background)).mean(2)
        near = np.asarray(Image.fromarray(mask).convert("L").resize((8, 8), Image.Resampling.BOX)) > 0
        near = np.asarray(Image.fromarray(near).convert("L").resize((24, 24)).resize((64, 64))) > 0
        inside.append(change[mask].mean())
        far.append(change[~near & ~mask].mean() if (~near & ~mask).any() else 0)
    assert np.mean(inside) > 15
    assert np.mean(far) < 0.5 * np.mean(inside)


def test_brightness_does_not_reveal_the_object(photos):
    scenes = scenes_of(photos)
    differences = []
    for number in range(20):
        image, _, mask = scenes.draw("train", number)
        gray = decode(image).mean(2)
        differences.append(abs(gray[mask].mean() - gray[~mask].mean()))
    assert np.median(differences) < 30


def test_a_photo_and_a_shape_serve_one_split():
    for seed in range(5):
        parts = share_out(list(range(25)), ["train", "val", "test"], seed)
        assert sorted(sum(parts.values(), [])) == list(range(25))
        assert [len(part) for part in parts.values()] == [21, 2, 2]
    assert share_out([1, 2], ["val"], 0)["val"] in ([1, 2], [2, 1])


def test_shapes_are_the_larger_pieces_of_a_mask(tmp_path):
    folder = tmp_path / "shapes"
    write_mask(folder / "two.png", (5, 5, 45, 40), (55, 30, 95, 70), (2, 70, 6, 74))
    write_mask(folder / "whole.png", (-40, -40, 140, 120))
    write_mask(folder / "cut.png", (20, -40, 80, 30))
    write_mask(folder / "empty.png")
    found, problems = read_shapes(folder)
    sizes = [Image.open(io.BytesIO(shape)).size for shape in found]
    assert sizes == [(43, 38), (43, 43)]
    assert problems == []


def test_drawn_animals_are_one_piece_and_differ():
    animals = [draw_animal(np.random.default_rng(seed)) for seed in range(12)]
    assert len({animal.shape for animal in animals}) > 6
    assert all(0.05 < animal.mean() < 0.95 for animal in animals)


def test_a_silhouette_keeps_its_size_when_placed():
    shape = np.ones((40, 40), dtype=bool)
    sizes = [place(np.random.default_rng(seed), shape, 200, 60).sum() for seed in range(8)]
    assert 0.6 < np.mean(sizes) / 60**2 < 1.5


def test_marked_objects_are_avoided(tmp_path):
    red = Image.new("RGB", (200, 100))
    red.paste((255, 0, 0), (100, 0, 200, 100))
    (tmp_path / "photos").mkdir()
    red.save(tmp_path / "photos" / "one.png")
    write_mask(tmp_path / "marked" / "one.png", (100, -200, 400, 300), size=(200, 100))
    found, _ = read_photos(tmp_path / "photos", {"one": tmp_path / "marked" / "one.png"}, 64)
    sides = np.full(12, 60.0)
    lefts = [photos_module._choose(np.random.default_rng(seed), found[0], sides)[0][0] for seed in range(10)]
    assert max(lefts) < 60


@pytest.fixture
def bad(photos):
    (photos / "broken.jpg").write_bytes(b"no photo")
    write_photo(photos / "small.png", 9, size=(20, 90))
    return photos


def test_unusable_photos_are_named_and_skipped_on_demand(bad, tmp_path, caplog):
    with pytest.raises(UserError, match="2 files are unusable.*--skip-unusable"):
        build_camouflage([bad], tmp_path / "out", {"train": 1}, size=64)
    assert "broken.jpg: not an image" in caplog.text
    assert "small.png: it is 20x90, expected sides of 32 or more" in caplog.text
    assert not (tmp_path / "out").exists()
    build_camouflage([bad], tmp_path / "out", {"train": 1}, size=64, skip_unusable=True)
    assert "- `broken.jpg`" in (tmp_path / "out" / "README.md").read_text().replace(f"{bad}/", "")


def test_an_interrupted_file_is_unusable(photos, tmp_path):
    whole = (photos / "0.jpg").read_bytes()
    (photos / "0.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="1 files are unusable"):
        build_camouflage([photos], tmp_path / "out", {"train": 1}, size=64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"photos": "empty"}, "holds no images"),
        ({"photos": "absent"}, "absent is not a folder"),
        ({"shapes": "empty"}, "holds no images"),
        ({"shapes": "blank"}, "shapes: 0 usable"),
        ({"avoid": "empty"}, "holds no images"),
        ({"photos": "one"}, "1 usable for the 2 splits train, val"),
        ({"counts": {}}, "no number of images"),
        ({"size": 16}, "got image size 16, expected 32 or more"),
    ],
)
def test_wrong_input_is_one_line(change, words, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    write_photo(tmp_path / "one" / "1.png", 0)
    write_mask(tmp_path / "blank" / "1.png")
    options = {"counts": {"train": 1, "val": 1}, "size": 32} | change
    for name in ("photos", "shapes", "avoid"):
        if name in change:
            options[name] = [tmp_path / change[name]]
    with pytest.raises(UserError, match=words) as error:
        build_camouflage(options.pop("photos", [photos]), tmp_path / "out", options.pop("counts"), **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_backgrounds_are_scored_against_the_truth(photos, tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[1] / "scripts/score_backgrounds.py"
    spec = importlib.util.spec_from_file_location("score_backgrounds", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    build_camouflage([photos], tmp_path / "with", {"val": 4}, size=96)
    build_synthetic("camouflage", tmp_path / "without", {"val": 1}, size=32)

    def run(name, *more):
        monkeypatch.setattr(sys, "argv", ["score", "--data", str(tmp_path / name), *more])
        return script.main()

    assert run("with", "--sheet", str(tmp_path / "sheet.png")) is None
    left_in, smooth, textured = map(float, re.findall(r"PSNR (\S+) dB", capsys.readouterr().out))
    assert left_in < textured
    assert left_in < smooth
    assert Image.open(tmp_path / "sheet.png").size == (4 * 96, 4 * 96)
    assert "no column background" in run("without")
