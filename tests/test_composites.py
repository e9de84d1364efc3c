"""Composites: objects of data sets on other scenes."""

import numpy as np
import pytest
from common import rejected
from datasets import Dataset, load_dataset
from PIL import Image

from unconceal.__main__ import main
from unconceal.data.builders import build_composites
from unconceal.data.composites import Composites, Piece, paste
from unconceal.data.write import FEATURES
from unconceal.utils.errors import UserError


RED, GREEN, BLUE = (220, 30, 30), (30, 200, 30), (30, 30, 220)
SIZE = 64


def photo(color, object_color, box):
    """Return a photo of a plain scene with a plain object, and its mask."""
    image, mask = Image.new("RGB", (90, 80), color), Image.new("L", (90, 80))
    image.paste(object_color, box)
    mask.paste(255, box)
    return image, mask


def save_set(path, **splits):
    """Save photos as a data set: split -> photos."""
    made = {}
    for split, photos in splits.items():
        images, masks = zip(*photos, strict=True)
        rows = {"image": images, "mask": masks, "id": [f"{split}{i}" for i in range(len(photos))]}
        made[split] = Dataset.from_dict({**rows, "source": ["test"] * len(photos)}, features=FEATURES)
    for split, dataset in made.items():
        (path / "data").mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(path / "data" / f"{split}-00000-of-00001.parquet")
    return str(path)


@pytest.fixture
def people(tmp_path):
    """Red objects in a green scene; in val blue ones."""
    inside = (30, 20, 60, 60)
    return save_set(tmp_path / "people", train=[photo(GREEN, RED, inside)], val=[photo(GREEN, BLUE, inside)])


def draw(path, split="train", number=0, seed=0, scenes=None):
    opened = {split: [load_dataset(path, split=split)]}
    image, mask = Composites(opened, scenes or opened, SIZE, seed).draw(split, number)
    return image, mask


def test_objects_are_where_the_mask_is(people, tmp_path):
    """The scene is green everywhere else, although its own object was red."""
    build_composites([people], tmp_path / "out", {"train": 8}, size=SIZE)
    for row in load_dataset(str(tmp_path / "out"), split="train"):
        pixels, mask = np.asarray(row["image"], np.float32), np.asarray(row["mask"]) > 127
        redness = pixels[..., 0] - pixels[..., 1]
        assert pixels.shape == (SIZE, SIZE, 3)
        assert 0.01 < mask.mean() < 0.9
        redness, share = (of.reshape(SIZE // 4, 4, SIZE // 4, 4).mean((1, 3)) for of in (redness, mask))
        assert (redness[share == 1] > 0).all()
        assert (redness[share == 0] < 0).all()


def test_a_split_is_made_of_its_own_rows(people, tmp_path):
    build_composites([people], tmp_path / "out", {"train": 3, "val": 3}, size=SIZE)
    made = load_dataset(str(tmp_path / "out"))
    for split, channel, other in (("train", 0, 2), ("val", 2, 0)):
        for row in made[split]:
            color = np.asarray(row["image"], np.float32)[np.asarray(row["mask"]) > 127].mean(0)
            assert color[channel] > color[other]


def test_the_same_command_makes_the_same_images(people):
    assert draw(people)[0] == draw(people)[0]
    assert draw(people)[0] != draw(people, number=1)[0]
    assert draw(people)[0] != draw(people, seed=1)[0]


def test_an_object_cut_off_by_its_photo_is_cut_off_by_the_image():
    """No person floats without legs."""
    scene = Image.new("RGB", (SIZE, SIZE), GREEN)
    half = Piece(Image.new("RGB", (20, 30), RED), Image.new("L", (20, 30), 255), (False, False, False, True))
    for seed in range(20):
        _, mask = paste(np.random.default_rng(seed), scene, half)
        assert mask[-1].any()


def test_a_photo_without_object_can_be_a_scene(people, tmp_path):
    empty = save_set(tmp_path / "empty", train=[(Image.new("RGB", (70, 70), BLUE), Image.new("L", (70, 70)))])
    command = ["prepare", "composites", "--objects", people, "--scenes", empty, "--out", str(tmp_path / "out")]
    assert main([*command, "--train", "2", "--size", str(SIZE)]) == 0
    row = load_dataset(str(tmp_path / "out"), split="train")[0]
    outside = np.asarray(row["image"], np.float32)[np.asarray(row["mask"]) == 0].mean(0)
    assert outside[2] > outside[:2].max()


def test_bad_input_is_named(people, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no split test"):
        build_composites([people], out, {"test": 1}, size=SIZE)
    with pytest.raises(UserError, match="does not exist"):
        build_composites([str(tmp_path / "missing")], out, {"train": 1}, size=SIZE)
    with pytest.raises(UserError, match="no number of images"):
        build_composites([people], out, {}, size=SIZE)
    with pytest.raises(UserError, match="image size 4"):
        build_composites([people], out, {"train": 1}, size=4)
    empty = save_set(tmp_path / "empty", train=[(Image.new("RGB", (70, 70), BLUE), Image.new("L", (70, 70)))])
    with pytest.raises(UserError, match="shows an object"):
        build_composites([empty], out, {"train": 1}, size=SIZE)
    assert not out.exists()


def test_inputs_are_never_replaced(people, tmp_path):
    made = tmp_path / "sets" / "made"
    build_composites([people], made, {"train": 1}, size=SIZE)
    card = (made / "README.md").read_bytes()
    for out in (made, made.parent, made / "deep", tmp_path / "sets" / ".." / "sets" / "made"):
        for objects, scenes in (([str(made)], []), ([people], [str(made)])):
            with rejected("which is, holds or lies in the input .*made; choose another --out"):
                build_composites(objects, out, {"train": 1}, scenes=scenes, size=SIZE, overwrite=True)
    assert (made / "README.md").read_bytes() == card
    build_composites([people], made, {"train": 1}, size=SIZE, overwrite=True)
