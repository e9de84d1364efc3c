"""Test scores of a model, and the command `unconceal evaluate`."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from common import SMALLEST_SRS, TWO_PROCESSES, rejected
from PIL import Image

from unconceal import SrsConfig, SrsForImageSegmentation, SrsForReconstruction
from unconceal.__main__ import main
from unconceal.api import Segmenter
from unconceal.commands import evaluate as evaluate_command
from unconceal.data.write import FEATURES
from unconceal.evaluation.networks import evaluate_model
from unconceal.evaluation.protocol_segmentation import PROTOCOL, score_image
from unconceal.evaluation.protocols import PROTOCOLS
from unconceal.evaluation.report import (
    IMAGE_FILES,
    PER_IMAGE_FILES,
    add_images,
    check_report_folder,
    write_report,
)
from unconceal.evaluation.tables import load_papers
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor
from unconceal.models.refine import REFINE
from unconceal.training.recipe import DataRecipe
from unconceal.training.start import load_data
from unconceal.utils.devices import has_bfloat16
from unconceal.utils.errors import UserError


SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate.py"


def make_dataset(num_images: int, seed: int = 0) -> datasets.Dataset:
    """Make images of bright discs on noise; the last has no disc."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_images):
        height, width = (int(side) for side in rng.integers(40, 90, 2))
        y, x = np.ogrid[:height, :width]
        disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (5 + i) ** 2
        disc &= i < num_images - 1
        pixels = rng.integers(0, 100, (height, width, 3)) + 120 * disc[..., None]
        image, mask = (Image.fromarray(values.astype(np.uint8)) for values in (pixels, 255 * disc))
        rows.append({"image": image, "mask": mask, "id": f"disc-{i}", "source": "test"})
    return datasets.Dataset.from_list(rows, features=FEATURES)


class Brightness(torch.nn.Module):
    """A network with results that depend on the whole batch."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(1, affine=False, track_running_stats=False)
        self.scale = torch.nn.Parameter(torch.tensor(5.0))
        self.frozen = torch.nn.BatchNorm2d(1)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.scale * self.norm(pixel_values.mean(1, keepdim=True)))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def processor():
    return UnconcealImageProcessor(size={"height": 64, "width": 64})


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Give the tests and their subprocesses a cache of their own."""
    folder = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "data").mkdir()
    make_dataset(7).to_parquet(folder / "data" / "val-00000-of-00001.parquet")
    train = make_dataset(3, seed=1).map(lambda row: {"id": f"train-{row['id']}"})
    train.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    model = SrsForImageSegmentation(SrsConfig(**SMALLEST_SRS)).eval()
    processor = UnconcealImageProcessor(size={"height": 64, "width": 64})
    with torch.no_grad():  # shift the logits so that masks hold both values
        model.head.bias.sub_(model(**processor(images=make_dataset(7)["image"][:])).logits.median())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_dark_masks_are_named(processor, caplog):
    rows = [dict(row) for row in make_dataset(3)]
    for row in rows[:2]:
        width, height = row["mask"].size
        row["mask"] = Image.fromarray(np.arange(height, dtype=np.uint8)[:, None].repeat(width, 1))
    dark = datasets.Dataset.from_list(rows, features=FEATURES)
    evaluate_model(Brightness(), processor, dark, progress=False)
    assert "above half" not in caplog.text
    evaluate_model(Brightness(), processor, dark)
    assert "2 ground truth masks hold gray levels but none above half" in caplog.text
    assert "(disc-0, disc-1)" in caplog.text


def test_rows_hold_every_image_in_order(processor):
    dataset = make_dataset(5)
    model = Brightness()
    rows = evaluate_model(model, processor, dataset, batch_size=2, progress=False)
    assert [row["id"] for row in rows] == dataset["id"]
    assert list(rows[0]) == [
        *("id", "source", "height", "width", "tp", "fp", "fn", "tn", "iou", "f1", "precision", "recall"),
        *("precision_curve", "recall_curve", "f1_curve"),
    ]
    for row, example in zip(rows, dataset, strict=True):
        assert (row["width"], row["height"]) == example["image"].size
        assert row["tp"] + row["fp"] + row["fn"] + row["tn"] == row["width"] * row["height"]
    # The first batch, computed by hand.
    inputs = processor(images=dataset[:2]["image"], return_tensors="pt").pixel_values
    sizes = [(row["height"], row["width"]) for row in rows[:2]]
    predicted = processor.post_process_masks(model(inputs), target_sizes=sizes)
    for row, mask, probs in zip(rows, dataset["mask"], predicted, strict=False):
        expected = score_image(probs.detach().numpy(), np.asarray(mask) > 127)
        for name, value in expected.items():
            np.testing.assert_array_equal(row[name], value, err_msg=name)
    assert 0 < PROTOCOL.summarize(rows)["iou"] < 1


def test_training_modes_are_restored(processor):
    model = Brightness().train()
    model.frozen.eval()
    evaluate_model(model, processor, make_dataset(2), progress=False)
    assert (model.training, model.norm.training, model.frozen.training) == (True, True, False)
    model.scale.data.fill_(torch.nan)
    with pytest.raises(UserError):
        evaluate_model(model, processor, make_dataset(2), progress=False)
    assert (model.training, model.norm.training, model.frozen.training) == (True, True, False)


def test_refined_masks_are_those_of_the_segmenter():
    torch.manual_seed(0)
    model = SrsForImageSegmentation(SrsConfig(**SMALLEST_SRS)).eval()
    processor = UnconcealImageProcessor(size={"height": 32, "width": 32})
    dataset = make_dataset(4)
    with torch.no_grad():  # an untrained network draws no edges
        model.head.weight.mul_(1e4)
        model.head.bias.sub_(model(**processor(dataset["image"][0])).logits.median())
    assert max(max(image.size) for image in dataset["image"]) >= 64
    dis, scored = PROTOCOLS["dis"], {}
    for refine in ("never", "auto"):
        rows = evaluate_model(model, processor, dataset, protocol=dis, refine=refine, batch_size=2, progress=False)
        masks = Segmenter(model, processor).segment(dataset["image"], batch_size=2, refine=refine)
        for row, mask, truth in zip(rows, masks, dataset["mask"], strict=True):
            assert row["mae"] == dis.score_image(mask, np.asarray(truth) > 127)["mae"]
        scored[refine] = [row["mae"] for row in rows]
    assert scored["never"] != scored["auto"]


def equal(rows: list[dict], others: list[dict]) -> bool:
    """Return whether two results are equal to the last digit."""
    return len(rows) == len(others) and all(
        row.keys() == other.keys() and all(np.array_equal(row[name], other[name]) for name in row)
        for row, other in zip(rows, others, strict=True)
    )


def test_worker_processes_change_no_number(processor):
    dataset = make_dataset(5)
    options = {"batch_size": 2, "protocol": PROTOCOLS["cod"], "progress": False}
    alone, loaded, scored = (
        evaluate_model(Brightness(), processor, dataset, **options, **workers)
        for workers in ({}, {"num_workers": 2}, {"metric_workers": 2})
    )
    assert equal(alone, loaded) and equal(alone, scored)
    assert not equal(alone, alone[:-1]) and not equal(alone, alone[::-1])


def test_batches_are_equal_for_any_number_of_processes(processor, monkeypatch):
    dataset, options = make_dataset(7), {"batch_size": 2, "progress": False}
    expected = evaluate_model(Brightness(), processor, dataset, **options)
    monkeypatch.setattr("unconceal.evaluation.networks.gather_object", lambda rows: rows)
    for size in (2, 3, 5):  # 4 batches: with 5 processes one has nothing to do
        gathered = []
        for rank in range(size):
            accelerator = SimpleNamespace(process_index=rank, num_processes=size, unwrap_model=lambda model: model)
            gathered += evaluate_model(Brightness(), processor, dataset, accelerator=accelerator, **options)
        assert equal(sorted(gathered, key=lambda row: row["id"]), expected)


def test_unusable_images_are_named(processor):
    rows = list(make_dataset(2))
    rows[1]["mask"] = Image.new("L", (7, 5))
    dataset = datasets.Dataset.from_list(rows, features=FEATURES)
    with pytest.raises(UserError, match="disc-1: got a mask of 7x5 for an image of "):
        evaluate_model(Brightness(), processor, dataset, progress=False)
    broken = Brightness()
    broken.scale.data.fill_(torch.nan)
    with pytest.raises(UserError, match="disc-0: the output of the network is not finite"):
        evaluate_model(broken, processor, dataset, progress=False)


def test_command_writes_a_report(data, model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--model", str(model_folder), "--data", str(data), "--split", "val", "--out", str(out)]
    main(["evaluate", *command, "--limit", "3", "--threshold", "0.4"])
    assert "3 images, threshold 0.4" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["results"]["num_images"] == 3
    assert (results["split"], results["options"], results["limit"]) == ("val", {"threshold": 0.4}, 3)
    assert (results["protocol"], results["sources"]) == ("segmentation", {"test": 3})
    assert results["name"] == results["model"] == str(model_folder)
    assert "--limit 3" in results["command"]
    rows = read_csv(out / "per_image.csv")
    assert [row["id"] for row in rows] == ["disc-0", "disc-1", "disc-2"]
    assert sum(float(row["iou"]) for row in rows) / 3 == pytest.approx(results["results"]["niou"], abs=1e-12)

    with pytest.raises(UserError, match="--overwrite"):
        main(["evaluate", *command])
    report = (out / "results.json").read_bytes()
    for mine in ("mine", "[]", "{}"):  # somebody else's files of the same names
        (out / "results.json").write_text(mine)
        with rejected("holds per_image.csv, but no results.json of this command"):
            main(["evaluate", *command, "--overwrite"])
    (out / "results.json").write_bytes(report)
    main(["evaluate", *command, "--overwrite", "--batch-size", "3"])
    assert json.loads((out / "results.json").read_text())["results"]["num_images"] == 7
    assert sorted(path.name for path in out.iterdir()) == ["curves.csv", "per_image.csv", "results.json"]
    points = read_csv(out / "curves.csv")
    assert [int(point["threshold"]) for point in points] == list(range(255, -1, -1))
    assert list(points[0]) == ["threshold", "precision_curve", "recall_curve", "f1_curve"]
    assert float(points[-1]["recall_curve"]) == 6 / 7  # one image has no object to recall


def test_overwrite_keeps_the_files_of_others(tmp_path):
    rows = [{"id": "a", "source": "b", **score_image(np.eye(9), np.eye(9) > 0)}]

    def write(images=(), overwrite=True) -> list[str]:
        check_report_folder(tmp_path, overwrite, images)
        write_report(tmp_path, PROTOCOL, rows, PROTOCOL.summarize(rows), {}, images=images)
        add_images(tmp_path, dict.fromkeys(images, Image.new("RGB", (9, 9))))
        return json.loads((tmp_path / "results.json").read_text())["files"]

    (tmp_path / "best.png").write_text("mine")
    numbers = ["curves.csv", "per_image.csv", "results.json"]
    assert write(overwrite=False) == write() == numbers
    with rejected("holds best.png, but no results.json of this command that names it"):
        write(IMAGE_FILES)
    (tmp_path / "best.png").rename(tmp_path / "mine.png")
    assert write(IMAGE_FILES) == write(IMAGE_FILES) == [*numbers, *IMAGE_FILES]
    assert Image.open(tmp_path / "best.png").info["icc_profile"]
    write()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*numbers, "mine.png"])
    assert (tmp_path / "mine.png").read_text() == "mine"


def test_split_seed_scores_the_images_that_training_held_back(data, model_folder, tmp_path):
    held_back = load_data(DataRecipe(path=str(data), split_seed=1))["val"]
    unchanged = [f"disc-{i}" for i in range(7)]
    assert held_back["id"][:] != unchanged
    (tmp_path / "masks").mkdir()
    for row in held_back:
        row["mask"].save(tmp_path / "masks" / f"{row['id']}.png")
    for option, scored, ids in (
        ("--split-seed", ["--model", str(model_folder)], held_back["id"][:]),
        ("--split-seed", ["--predictions", str(tmp_path / "masks"), "--train-split", "train"], held_back["id"][:]),
        ("--division-seed", ["--model", str(model_folder)], unchanged),  # the old name is only recorded
    ):
        command = ["evaluate", *scored, "--data", str(data), "--split", "val", option, "1", "--overwrite"]
        main([*command, "--out", str(tmp_path / "out")])
        assert [row["id"] for row in read_csv(tmp_path / "out" / "per_image.csv")] == ids
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["division_seed"] == 1
        assert results.get("train_split") == ("train" if option == "--split-seed" else None)


@pytest.mark.parametrize(
    ("split", "seed", "option", "says"),
    [
        ("train", None, [], "the network was trained on train of"),
        ("val", 1, [], "the network was trained on a random part of .*; --split-seed 1 scores the other part; these"),
        ("val", 1, ["--split-seed", "1"], None),
        ("val", None, [], None),
    ],
)
def test_scores_of_training_images_are_called_so(data, model_folder, tmp_path, caplog, split, seed, option, says):
    model = shutil.copytree(model_folder, tmp_path / "model")
    recipe = {"data": {"path": ["other", str(data)], "train_split": "train", "eval_split": "val", "split_seed": seed}}
    (model / "progress.json").write_text(json.dumps({"task": "segmentation", "recipe": recipe}))
    main(["evaluate", "--model", str(model), "--data", str(data), "--split", split, *option])
    said = [line for line in caplog.messages if "was trained on" in line]
    assert len(said) == (says is not None) and re.search(says or "", "".join(said))


@pytest.fixture(scope="module")
def make_run(model_folder, tmp_path_factory):
    """Return a function that makes a run and returns its checkpoint."""

    def make(recipe: str) -> Path:
        run = tmp_path_factory.mktemp("run")
        (run / "recipe.yaml").write_text(recipe)
        return Path(shutil.copytree(model_folder, run / "segmentation" / "best"))

    return make


def test_split_seed_takes_the_splits_of_the_run(data, make_run, tmp_path, monkeypatch):
    # The evaluation split comes first here: the order of the splits changes what is dealt.
    model = make_run("data: {path: x, train_split: val, eval_split: train, split_seed: 1}")
    held_back = load_data(DataRecipe(path=str(data), train_split="val", eval_split="train", split_seed=1))["train"]
    monkeypatch.chdir(model)
    for place, more in ((model, ["--train-split", "val"]), (".", [])):
        command = ["evaluate", "--model", str(place), "--data", str(data), "--split", "train", "--split-seed", "1"]
        main([*command, *more, "--out", str(tmp_path), "--overwrite"])
        assert [row["id"] for row in read_csv(tmp_path / "per_image.csv")] == held_back["id"][:]
        assert json.loads((tmp_path / "results.json").read_text())["train_split"] == "val"


def test_test_splits_are_not_split_again(model_folder):
    command = ["evaluate", "--model", str(model_folder), "--data", "absent", "--split-seed", "0", "--split"]
    for split in ("test", "CAMO", "DIS_TE1"):
        with rejected(f"got --split-seed 0 for {split}, a test split, .* leave --split-seed out"):
            main([*command, split])


SEED_0 = "data: {path: x, split_seed: 0}"


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (SEED_0, "--split test --split-seed 0", "got --split test, but .* has val; give --split val"),
        (SEED_0, "--split train --split-seed 0", "got --split train, but .* has val"),
        (SEED_0, "--split val --split-seed 1", "got --split-seed 1, but .* has 0; give --split-seed"),
        (SEED_0, "--split val --split-seed 0 --train-split x", "got --train-split x, but .* has train"),
        ("data: {path: x}", "--split val --split-seed 0", "has no split_seed; leave --split-seed out"),
        ("data: {path: x, split_seed: many}", "--split val --split-seed 0", "cannot read recipe .*recipe.yaml: "),
        ("- data", "--split val --split-seed 0", "cannot read recipe .*recipe.yaml: "),
    ],
)
def test_splits_that_the_run_did_not_use_are_rejected(make_run, recipe, options, message):
    with rejected(message):
        main(["evaluate", "--model", str(make_run(recipe)), "--data", "absent", *options.split()])


@pytest.mark.parametrize("word", ["table", "curves"])
def test_options_before_table_are_rejected(word, tmp_path):
    out = str(tmp_path / "out.png")
    with pytest.raises(UserError, match=f"got --out before `{word}`, .*put them after `{word}`"):
        main(["evaluate", "--out", out, word, "absent", "--out", out])
    assert not list(tmp_path.iterdir())


def test_protocol_options_reach_the_report(data, model_folder, tmp_path, capsys):
    command = ["evaluate", "--model", str(model_folder), "--data", str(data), "--split", "val", "--limit", "4"]
    results = {}
    for name, options, shown in (
        ("stretched", ["cod"], "min_max True"),
        ("plain", ["cod", "--no-min-max"], "min_max False"),
        ("whole", ["dis"], "min_max True, hce True"),
        ("quick", ["dis", "--no-hce"], "min_max True, hce False"),
    ):
        main([*command, "--out", str(tmp_path / name), "--protocol", *options])
        output = capsys.readouterr().out
        assert f"protocol {options[0]}: 4 images, {shown}" in output
        results[name] = json.loads((tmp_path / name / "results.json").read_text())["results"]
        assert f"| {results[name]['s_measure']:.3f} |" in output
        assert ("| HCE |" in output) == (name == "whole")
        rows = read_csv(tmp_path / name / "per_image.csv")
        assert "f_measure_curve" not in rows[0] and ("hce" in rows[0]) == (name == "whole")
        assert sum(float(row["mae"]) for row in rows) / 4 == pytest.approx(results[name]["mae"], abs=1e-12)
    assert results["stretched"] != results["plain"]
    assert results["whole"].pop("hce") > 0
    assert results["whole"] == results["quick"]


def test_options_of_another_protocol_are_rejected(tmp_path):
    command = ["--model", "absent", "--data", "absent", "--split", "val", "--out", str(tmp_path / "out")]
    for options, message in (
        (["--protocol", "cod", "--threshold", "0.5"], "got option threshold, but the protocol cod has only min_max"),
        (["--min-max"], "got option min_max, but the protocol segmentation has only threshold"),
        (["--protocol", "lesion", "--by-area"], "got option by_area, but the protocol lesion has only threshold"),
    ):
        with pytest.raises(UserError, match=message):
            main(["evaluate", *command, *options])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--threshold", "1"), ("--num-workers", "-1"), ("--split-seed", "-1"), ("--batch-size", "0")),
        *(("--limit", "1.5"), ("--max-distance", "nan"), ("--max-distance", "inf"), ("--max-distance", "0")),
    ],
)
def test_wrong_numbers_are_rejected(option, value, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--model", "absent", "--data", "absent", "--split", "val", option, value])
    assert caught.value.code == 2
    assert f"argument {option}: got {value!r}, expected" in capsys.readouterr().err


def test_wrong_networks_and_missing_files_are_rejected(data, model_folder, tmp_path):
    SrsForReconstruction(SrsConfig(**SMALLEST_SRS)).save_pretrained(tmp_path / "r")
    UnconcealImageProcessor().save_pretrained(tmp_path / "r")
    for model, source, split, message in (
        (tmp_path / "r", data, "val", "SrsForReconstruction"),
        (tmp_path / "absent", data, "val", "absent"),
        (model_folder, tmp_path / "absent", "val", "absent"),
        (model_folder, data, "test", "train, val"),
    ):
        with rejected(message):
            main(["evaluate", "--model", str(model), "--data", str(source), "--split", split])


def test_choices_are_those_of_the_registries():
    benchmarks, _ = load_papers()
    assert tuple(PROTOCOLS) == evaluate_command.PROTOCOL_NAMES
    assert tuple(name for name, each in benchmarks.items() if not each.mean_of) == evaluate_command.BENCHMARK_NAMES
    assert tuple(PER_IMAGE_FILES) == evaluate_command.PER_IMAGE_FORMATS
    assert evaluate_command.REFINE == REFINE


@pytest.mark.slow
def test_dtype_is_used_and_recorded(data, model_folder, tmp_path):
    results = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        where = ["--data", str(data), "--split", "val", "--out", str(out)]
        main(["evaluate", "--model", str(model_folder), *where, "--dtype", dtype])
        results[dtype] = json.loads((out / "results.json").read_text())
    expected = "bfloat16" if has_bfloat16(torch.device("cpu")) else "float32"
    assert [result["dtype"] for result in results.values()] == ["float32", expected]
    if expected == "bfloat16":
        one, two = ((tmp_path / dtype / "per_image.csv").read_text() for dtype in results)
        assert one != two


def test_two_processes_give_the_numbers_of_one(data, model_folder, tmp_path):
    command = ["--model", str(model_folder), "--data", str(data), "--split", "val", "--batch-size", "2"]
    command += ["--protocol", "cod", "--metric-workers", "0", "--out"]
    main(["evaluate", *command, str(tmp_path / "one")])
    launched = [sys.executable, *TWO_PROCESSES, str(SCRIPT), *command, str(tmp_path / "two")]
    subprocess.run(launched, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert two["num_processes"] == 2
    assert 0 < one["results"]["s_measure"] < 1
    assert one["results"] == two["results"]
    one, two = ((tmp_path / name / "per_image.csv").read_text() for name in ("one", "two"))
    assert one == two


def test_a_network_is_scored_on_folders_of_images_and_masks(model_folder, tmp_path, capsys, caplog):
    for folder in ("images", "masks", "both"):
        (tmp_path / folder).mkdir()
    dataset = make_dataset(3)
    for number, row in enumerate(dataset):
        width, height = row["image"].size
        small = row["mask"].resize((width // 2, height + 3), Image.Resampling.NEAREST) if number == 1 else row["mask"]
        row["image"].save(tmp_path / "images" / f"{number}.png")
        small.point(lambda value: value // 255).save(tmp_path / "masks" / f"{number}.png")  # 0 and 1
        row["image"].save(tmp_path / "both" / f"{number}.png")
        small.save(tmp_path / "both" / f"{number}_Mask.png")
    model, results = ["evaluate", "--model", str(model_folder)], []
    for images, truth, *suffix in (("images", "masks"), ("both", "both", "--truth-suffix", "_mask")):
        out = tmp_path / f"of_{images}"
        folders = ["--images", str(tmp_path / images), "--truth", str(tmp_path / truth), *suffix]
        main([*model, *folders, "--out", str(out), "--sheets", "2"])
        assert "3 images, threshold 0.5, refine never, num_mask_resized 1" in capsys.readouterr().out
        results.append(json.loads((out / "results.json").read_text()))
        rows = read_csv(out / "per_image.csv")
        assert [row["mask_resized"] for row in rows] == ["False", "True", "False"]
        assert [(int(row["width"]), int(row["height"])) for row in rows] == [image.size for image in dataset["image"]]
    assert results[0]["results"] == results[1]["results"]
    assert 0 < results[0]["results"]["iou"] < 1
    assert (results[0]["num_mask_resized"], results[0]["unmatched"]) == (1, [])

    (tmp_path / "masks" / "2.png").unlink()
    folders = ["--images", str(tmp_path / "images"), "--truth", str(tmp_path / "masks")]
    with rejected("1 of 3 images or masks have no counterpart, .*--only-matched to score the 2 pairs"):
        main([*model, *folders])
    assert "2: no mask" in caplog.text
    main([*model, *folders, "--only-matched", "--out", str(tmp_path / "two")])
    assert json.loads((tmp_path / "two" / "results.json").read_text())["unmatched"] == ["2"]
    both = ["--images", str(tmp_path / "both"), "--truth", str(tmp_path / "both")]
    for options, message in (
        (both, "holds images and masks; give what the names of masks end in, such as _mask$"),
        ([*both, "--truth-suffix", "_x"], r"_mask \('_x' ends no name\)"),
        (folders[:2], "give --data and --split: .*; or --images and --truth"),
        ([*folders, "--data", "x", "--split", "val"], "give --data and --split: .*; or --images and --truth"),
        ([*folders, "--foreground", "1"], "--foreground is for --predictions with --truth"),
        ([*folders, "--max-pixels", "9"], "--max-pixels is for --predictions; leave it out"),
    ):
        with rejected(message):
            main([*model, *options])


def test_images_of_their_own_size_are_scored_one_by_one():
    dataset = make_dataset(3)
    sizes = [(48, 40), (40, 64), (72, 36)]
    rows = [
        {**row, "image": row["image"].resize(size), "mask": row["mask"].resize(size)}
        for row, size in zip(dataset, sizes, strict=True)
    ]
    dataset = datasets.Dataset.from_list(rows, features=FEATURES)
    model = SrsForImageSegmentation(SrsConfig(**SMALLEST_SRS)).eval()
    processor = UnconcealImageProcessor(do_resize=False)
    scored = evaluate_model(model, processor, dataset, batch_size=3, progress=False)
    masks = Segmenter(model, processor).segment(dataset["image"], batch_size=3)
    for row, size, image, mask in zip(scored, sizes, dataset["image"], masks, strict=True):
        assert (row["width"], row["height"]) == size == mask.shape[::-1]
        logits = model(**processor(image)).logits
        np.testing.assert_allclose(mask, logits.sigmoid()[0, 0].detach(), atol=1e-5)
        assert row["tp"] + row["fp"] == (mask > 0.5).sum()
