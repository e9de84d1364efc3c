"""Test scores of mask files: names, values, sizes, workers."""

import json
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import py_sod_metrics
import pytest
from common import rejected
from PIL import Image
from test_evaluate import equal

from unconceal.__main__ import main
from unconceal.data.write import FEATURES
from unconceal.drawing import gallery
from unconceal.evaluation import workers
from unconceal.evaluation.mask_files import PredictionFolder, read_prediction
from unconceal.evaluation.protocols import PROTOCOLS
from unconceal.evaluation.report import mean_curves
from unconceal.utils.errors import UserError


RNG = np.random.default_rng(0)
SIZES = {"a": (40, 50), "b": (64, 30), "c": (20, 21)}


def truth_of(name: str) -> np.ndarray:
    height, width = SIZES[name]
    y, x = np.ogrid[:height, :width]
    return (y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 3) ** 2


def soft(name: str) -> np.ndarray:
    rng = np.random.default_rng(len(name) + ord(name[0]))
    levels = 255 * np.clip(0.7 * truth_of(name) + 0.4 * rng.random(SIZES[name]) - 0.05, 0, 1)
    levels = levels.round().astype(np.uint8)
    levels[0, 0], levels[-1, -1] = 0, 255
    return levels


@pytest.fixture
def folders(tmp_path):
    for folder in ("pred", "gt", "images"):
        (tmp_path / folder).mkdir()
    for name in SIZES:
        Image.fromarray(soft(name)).save(tmp_path / "pred" / f"{name}.png")
        Image.fromarray(truth_of(name).astype(np.uint8) * 255).save(tmp_path / "gt" / f"{name}.png")
        Image.fromarray(soft(name)).convert("RGB").save(tmp_path / "images" / f"{name}.jpg")
    return tmp_path


@pytest.fixture
def dataset():
    rows = []
    for name in "cab":
        image = Image.new("RGB", SIZES[name][::-1], "red")
        mask = Image.fromarray(truth_of(name).astype(np.uint8) * 255)
        rows.append({"image": image, "mask": mask, "id": f"CAMO/{name.upper()}", "source": "cod/CAMO"})
    return datasets.Dataset.from_list(rows, features=FEATURES)


@pytest.mark.parametrize(("name", "num_workers"), [*((name, 0) for name in PROTOCOLS), ("cod", 2)])
def test_files_score_as_arrays(folders, name, num_workers):
    protocol = PROTOCOLS[name]
    rows = PredictionFolder(folders / "pred", folders / "gt").evaluate(protocol, num_workers, progress=False)
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    for row in rows:
        assert (row["height"], row["width"]) == SIZES[row["id"]]
        assert not (row["converted"] or row["resized"] or row["mask_changed"])
        expected = protocol.score_image(soft(row["id"]), truth_of(row["id"]))
        for key, value in expected.items():
            np.testing.assert_array_equal(row[key], value, err_msg=key)


def test_a_data_set_can_be_the_ground_truth(folders, dataset):
    protocol = PROTOCOLS["cod"]
    files, rows = (
        PredictionFolder(folders / "pred", truth).evaluate(protocol, 2, progress=False)
        for truth in (folders / "gt", dataset)
    )
    assert [row["id"] for row in rows] == ["CAMO/C", "CAMO/A", "CAMO/B"]  # the data set's own names and order
    assert {row["source"] for row in rows} == {"cod/CAMO"}
    assert {row["source"] for row in files} == {""}
    assert protocol.summarize(rows) == protocol.summarize(files)
    image, target, probs = PredictionFolder(folders / "pred", dataset).load_example(1)
    assert image.getpixel((0, 0)) == (255, 0, 0)
    np.testing.assert_array_equal(target, truth_of("a"))
    np.testing.assert_array_equal(probs, soft("a"))


def test_examples_are_loaded_from_files(folders):
    folder = PredictionFolder(folders / "pred", folders / "gt", images=folders / "images")
    image, target, probs = folder.load_example(1)
    assert image.size == SIZES["b"][::-1]
    np.testing.assert_array_equal(target, truth_of("b"))
    np.testing.assert_array_equal(probs, soft("b"))
    assert PredictionFolder(folders / "pred", folders / "gt").load_example(1)[0] is None


def test_suffixes_and_case(folders):
    for old, new in (("a.png", "A_pixels0.PNG"), ("b.png", "b_pixels0.png"), ("c.png", "c_pixels0.png")):
        (folders / "gt" / old).rename(folders / "gt" / new)
    folder = PredictionFolder(folders / "pred", folders / "gt", truth_suffix="_pixels0")
    assert [entry.id for entry in folder.entries] == ["a", "b", "c"]


def test_files_without_counterpart_are_rejected(folders, caplog):
    (folders / "pred" / "a.png").unlink()
    (folders / "pred" / "c.png").rename(folders / "pred" / "d.png")
    caplog.set_level(logging.WARNING)
    problem = r"1 predictions have no ground truth \(d\) and 2 ground truths have no prediction \(a, c\)"
    with pytest.raises(UserError, match=problem):
        PredictionFolder(folders / "pred", folders / "gt")
    assert caplog.messages == ["d: no ground truth", "a: no prediction", "c: no prediction"]
    folder = PredictionFolder(folders / "pred", folders / "gt", only_matched=True)
    assert [entry.id for entry in folder.entries] == ["b"]
    assert (folder.without_truth, folder.without_prediction) == (["d"], ["a", "c"])
    (folders / "pred" / "b.png").rename(folders / "pred" / "e.png")
    with pytest.raises(UserError, match="has the name of a ground truth"):
        PredictionFolder(folders / "pred", folders / "gt", only_matched=True)


def test_ambiguous_names_are_rejected(folders, dataset):
    Image.fromarray(soft("a")).save(folders / "pred" / "a.bmp")
    with pytest.raises(UserError, match="several files in .* have the name a;"):
        PredictionFolder(folders / "pred", folders / "gt", only_matched=True)
    (folders / "pred" / "a.bmp").unlink()
    twice = datasets.concatenate_datasets([dataset, dataset.map(lambda row: {"id": f"other/{row['id']}"})])
    with pytest.raises(UserError, match="several files in .* have the name a, b, c;"):
        PredictionFolder(folders / "pred", twice)


def save(values: np.ndarray, path: Path, mode: str | None = None) -> Path:
    Image.fromarray(values).save(path) if mode is None else Image.fromarray(values).convert(mode).save(path)
    return path


def test_values_of_predictions(tmp_path):
    levels = soft("a")
    values, converted, resized = read_prediction(save(levels, tmp_path / "L.png"))
    assert (values.dtype, converted, resized) == (np.uint8, False, False)
    np.testing.assert_array_equal(values, levels)
    # 1 of 255 is nearly black, even in a file without larger values.
    np.testing.assert_array_equal(read_prediction(save(levels // 255, tmp_path / "dark.png"))[0], levels // 255)
    for path, expected in (
        (save(levels, tmp_path / "RGB.png", "RGB"), levels),
        (save(levels, tmp_path / "RGBA.png", "RGBA"), levels),
        (save(levels, tmp_path / "P.png", "P"), levels),
        (save(levels > 99, tmp_path / "1.png"), np.where(levels > 99, 255, 0)),
        (save(levels.astype(np.uint16) * 256 + 7, tmp_path / "16.png"), (levels * 256.0 + 7) / 65535),
        (save(np.full((3, 4), 200, np.uint16), tmp_path / "16.pgm"), np.full((3, 4), 200 / 65535)),
        (save(levels.astype(np.float32) / 300, tmp_path / "F.tiff"), levels.astype(np.float32) / 300),
    ):
        values, converted, _ = read_prediction(path)
        assert converted
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-7, err_msg=path.name)


@pytest.mark.parametrize(
    ("value", "dtype"), [(1.5, np.float32), (np.nan, np.float32), (70000, np.int32), (-1, np.int32)]
)
def test_values_outside_0_to_1_are_rejected(tmp_path, value, dtype):
    with pytest.raises(UserError, match=r"x.tiff .*(values from .* expected (\[0, 1\]|0 to 65535)|NaN)"):
        read_prediction(save(np.full((4, 4), value, dtype), tmp_path / "x.tiff"))


def test_unreadable_files_are_named(folders):
    (folders / "pred" / "b.png").write_bytes(b"not an image")
    for num_workers in (0, 2):  # a worker passes the line on
        with rejected("b.png cannot be read as a mask"):
            PredictionFolder(folders / "pred", folders / "gt").evaluate(PROTOCOLS["cod"], num_workers, progress=False)
    with pytest.raises(UserError, match="a.png: got 50x40, expected at most 100 pixels"):
        read_prediction(folders / "pred" / "a.png", max_pixels=100)


def test_another_size_is_resized_and_counted(folders):
    """Compare with pysodmetrics on the enlarged and saved prediction."""
    small = Image.fromarray(soft("a")).resize((20, 16), Image.Resampling.BILINEAR)
    small.save(folders / "pred" / "a.png")
    rows = PredictionFolder(folders / "pred", folders / "gt").evaluate(PROTOCOLS["cod"], progress=False)
    assert [row["resized"] for row in rows] == [True, False, False]
    enlarged = np.asarray(small.convert("F").resize((50, 40), Image.Resampling.BILINEAR))
    stretched = (enlarged - enlarged.min()) / (enlarged.max() - enlarged.min())
    measures = {"s_measure": py_sod_metrics.Smeasure(), "mae": py_sod_metrics.MAE()}
    for measure in measures.values():
        measure.step(np.rint(255 * stretched).astype(np.uint8), truth_of("a").astype(np.uint8) * 255)
    assert rows[0]["mae"] == pytest.approx(measures["mae"].get_results()["mae"], abs=1e-6)
    assert rows[0]["s_measure"] == pytest.approx(measures["s_measure"].get_results()["sm"], abs=1e-6)


def test_masks_of_other_values_are_counted(folders):
    target = truth_of("a").astype(np.uint8) * 255
    target[0, :3] = 64, 127, 128
    Image.fromarray(target).save(folders / "gt" / "a.png")
    Image.fromarray(truth_of("b").astype(np.uint8)).save(folders / "gt" / "b.png")  # 0 and 1
    rows = PredictionFolder(folders / "pred", folders / "gt").evaluate(PROTOCOLS["lesion"], progress=False)
    assert [row["mask_changed"] for row in rows] == [True, True, False]
    assert rows[0]["tp"] + rows[0]["fn"] == truth_of("a").sum() + 1  # 128 alone
    assert rows[1]["tp"] + rows[1]["fn"] == truth_of("b").sum()


@pytest.mark.parametrize("value", [1, 2, 100, 255, 300])
def test_hard_predictions_of_any_white_score_alike(folders, value):
    lesion = PROTOCOLS["lesion"]
    dtype = np.uint8 if value < 256 else np.uint16
    for name in SIZES:
        Image.fromarray(truth_of(name).astype(dtype) * dtype(value)).save(folders / "pred" / f"{name}.png")
    rows = PredictionFolder(folders / "pred", folders / "gt").evaluate(lesion, progress=False)
    assert [row["iou"] for row in rows] == [1, 1, 1]
    assert [row["converted"] for row in rows] == [value != 255] * 3


def test_a_dark_prediction_stays_soft_among_others(folders):
    Image.fromarray(truth_of("a").astype(np.uint8)).save(folders / "pred" / "a.png")  # nothing found
    rows = PredictionFolder(folders / "pred", folders / "gt").evaluate(PROTOCOLS["lesion"], progress=False)
    assert rows[0]["iou"] == 0
    assert rows[1]["iou"] > 0.5


def test_dark_predictions_among_others_are_named(folders, caplog):
    for name in "ab":
        Image.fromarray(truth_of(name).astype(np.uint8)).save(folders / "pred" / f"{name}.png")
    PredictionFolder(folders / "pred", folders / "gt").evaluate(PROTOCOLS["lesion"], progress=False)
    (message,) = caplog.messages
    assert message.startswith("2 predictions hold one value beside 0, not above half of white; if it is the object")
    assert message.endswith("(a, b)")


def test_deep_predictions_of_another_white_are_named(folders, caplog):
    for name in SIZES:
        Image.fromarray(soft(name).astype(np.uint16) * 39).save(folders / "pred" / f"{name}.png")
    PredictionFolder(folders / "pred", folders / "gt").evaluate(PROTOCOLS["lesion"], progress=False)
    (message,) = caplog.messages
    assert message.startswith("no prediction has a value above 9945 of 65535")


def test_predictions_in_colors_of_classes_are_refused(folders):
    colors = np.zeros((*SIZES["a"], 3), np.uint8)
    colors[:9], colors[20:] = (200, 0, 0), (0, 0, 200)
    Image.fromarray(colors).save(folders / "pred" / "a.png")
    with rejected("a.png cannot be read as a mask: .* a map of classes"):
        PredictionFolder(folders / "pred", folders / "gt").evaluate(PROTOCOLS["lesion"], progress=False)


def test_maps_of_classes_need_a_choice(folders, capsys):
    for name in SIZES:
        ids = truth_of(name).astype(np.uint8)
        ids[:3] = 2
        Image.fromarray(ids).save(folders / "gt" / f"{name}.png")
    with rejected(r"a.png: a mask holds the values 0, 1, 2, a map of classes"):
        PredictionFolder(folders / "pred", folders / "gt").evaluate(PROTOCOLS["lesion"], progress=False)
    command = [
        "evaluate",
        "--predictions",
        str(folders / "pred"),
        "--truth",
        str(folders / "gt"),
        "--protocol",
        "lesion",
    ]
    tables = []
    for ids in ("1", "1,2", "any"):
        assert main([*command, "--foreground", ids]) == 0
        tables.append(capsys.readouterr().out.splitlines()[-1])
    assert tables[0] != tables[1] == tables[2]


def test_sets_without_an_object_and_dark_masks_are_named(folders, caplog):
    for name in SIZES:
        Image.new("L", SIZES[name][::-1]).save(folders / "gt" / f"{name}.png")
    PredictionFolder(folders / "pred", folders / "gt").evaluate(PROTOCOLS["lesion"], progress=False)
    assert caplog.messages == ["no mask shows an object, so the scores say little; check the ground truth"]
    caplog.clear()
    Image.fromarray(soft("a") // 3).save(folders / "gt" / "a.png")
    Image.fromarray(truth_of("b")).save(folders / "gt" / "b.png")
    PredictionFolder(folders / "pred", folders / "gt").evaluate(PROTOCOLS["lesion"], progress=False)
    (message,) = caplog.messages
    assert message.startswith("1 ground truth masks hold gray levels but none above half")
    assert message.endswith("(a)")


def double(job):
    if job == "break":
        os._exit(1)
    if job == "refuse":
        raise UserError("got refuse")
    return 2 * job


def test_workers_do_every_job_once():
    jobs = list(range(23))
    assert sorted(workers.map_unordered(double, iter(jobs), 3)) == [2 * job for job in jobs]
    assert list(workers.map_unordered(double, iter(jobs), 0)) == [2 * job for job in jobs]
    assert list(workers.map_unordered(double, [], 2)) == []


def test_jobs_are_drawn_as_they_are_needed():
    drawn = []
    jobs = (drawn.append(job) or job for job in range(100))
    done = workers.map_unordered(double, jobs, 2)
    next(done)
    assert len(drawn) <= 4
    done.close()
    assert len(drawn) <= 4


def test_errors_in_a_worker_are_reported():
    with pytest.raises(UserError, match="got refuse"):
        list(workers.map_unordered(double, [1, "refuse", 2], 2))
    with pytest.raises(UserError, match="one of the 2 metric workers was killed, probably because memory ran out"):
        list(workers.map_unordered(double, [1, "break", 2], 2))
    with pytest.raises(ZeroDivisionError):  # from the jobs themselves
        list(workers.map_unordered(double, (1 // job for job in (1, 0)), 2))


def own_pid(job):
    return os.getpid()


def be_killed(pids):
    working = workers.map_unordered(own_pid, range(1000), 2)
    pids.send({next(working) for _ in range(4)})
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_workers_end_with_a_parent_that_is_killed():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    parent = multiprocessing.get_context("fork").Process(target=be_killed, args=(sender,))
    parent.start()
    try:
        assert receiver.poll(500)
        pids = receiver.recv()
        parent.join()
    finally:
        parent.kill()
    until = time.monotonic() + 500
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_command_scores_files(folders, tmp_path, capsys):
    Image.fromarray(soft("a")).convert("RGB").save(folders / "pred" / "a.png")
    out = tmp_path / "out"
    score(folders, out, "--protocol", "cod", "--format", "parquet", "--name", "my method", "--split-seed", "3")
    assert json.loads((out / "results.json").read_text())["division_seed"] == 3
    shown = capsys.readouterr().out
    assert f"my method on {folders / 'gt'}, protocol cod: 3 images, min_max True" in shown
    assert "num_converted 1, num_resized 0, num_mask_changed 0" in shown
    assert sorted(path.name for path in out.iterdir()) == ["curves.csv", "per_image.parquet", "results.json"]
    table = datasets.Dataset.from_parquet(str(out / "per_image.parquet"), cache_dir=str(tmp_path / "cache"))
    assert table["id"][:] == ["a", "b", "c"]
    rows = PredictionFolder(folders / "pred", folders / "gt").evaluate(PROTOCOLS["cod"], progress=False)
    assert table["s_measure"][:] == [row["s_measure"] for row in rows]
    # A new report removes all files of the old one, and no others.
    (out / "worst.png").touch()
    score(folders, out, "--protocol", "cod", "--overwrite")
    assert sorted(path.name for path in out.iterdir()) == ["curves.csv", "per_image.csv", "results.json", "worst.png"]


def score(folders, out: Path, *options: str):
    truth = ["--predictions", str(folders / "pred"), "--truth", str(folders / "gt")]
    main(["evaluate", *truth, "--out", str(out), *options])


def test_command_draws_sheets(folders, tmp_path):
    pytest.importorskip("matplotlib")
    out, images = tmp_path / "out", folders / "images"
    score(folders, out, "--protocol", "cod", "--images", str(images), "--sheets", "2")
    sizes = {path.name: Image.open(path).size for path in out.glob("*.png")}
    assert set(sizes) == {"samples.png", "worst.png", "best.png", "curves.png"}
    assert all(min(size) > 200 for size in sizes.values())

    # If a sheet cannot be drawn, the numbers are kept.
    (images / "b.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match="b.jpg: not an image file"):
        score(folders, tmp_path / "new", "--images", str(images), "--pictures", "3")
    assert json.loads((tmp_path / "new" / "results.json").read_text())["results"]["num_images"] == 3


def test_sheets_show_the_worst_first(folders, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    shown = {}

    def draw_sheet(images, title):
        shown[title] = list(images)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(gallery, "draw_sheet", draw_sheet)
    Image.fromarray(255 - soft("b")).save(folders / "pred" / "b.png")
    faint = (60 + soft("c") // 4).astype(np.uint8)
    Image.fromarray(faint).save(folders / "pred" / "c.png")
    score(folders, tmp_path / "out", "--protocol", "cod", "--sheets", "2", "--name", "x")
    measured = {
        name: PROTOCOLS["cod"].score_image(levels, truth_of(name))["s_measure"]
        for name, levels in (("a", soft("a")), ("b", 255 - soft("b")), ("c", faint))
    }
    assert {title: [image.id for image in images] for title, images in shown.items()} == {
        "x: samples": ["a", "c"],
        "x: the lowest S": sorted(measured, key=measured.get)[:2],
        "x: the highest S": sorted(measured, key=measured.get)[:0:-1],
    }
    (stretched,) = (image for image in shown["x: samples"] if image.id == "c")
    assert (stretched.probs.min(), stretched.probs.max()) == (0, 1)  # as it was scored
    assert stretched.caption == f"S {measured['c']:.3f}"


def test_curves_of_several_results(folders, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = {}
    monkeypatch.setattr(gallery, "draw_curves", lambda curves, *_: drawn.update(curves) or Image.new("RGB", (1, 1)))
    score(folders, tmp_path / "one", "--name", "one")
    score(folders, tmp_path / "two", "--name", "two", "--protocol", "infrared")
    image_file = tmp_path / "curves.png"
    main(["evaluate", "curves", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(image_file)])
    assert image_file.exists()
    protocol = PROTOCOLS["segmentation"]
    rows = PredictionFolder(folders / "pred", folders / "gt").evaluate(protocol, progress=False)
    assert drawn == dict.fromkeys(("one", "two"), mean_curves(protocol, rows))

    score(folders, tmp_path / "three", "--name", "three", "--protocol", "cod")
    score(folders, tmp_path / "four", "--name", "one")
    score(folders, tmp_path / "five", "--name", "five")
    (tmp_path / "five" / "curves.csv").write_text("threshold,f1_curve\n255,x\n")
    for other, out, message in (
        ("one", image_file, "exists; choose another --out"),
        ("one", tmp_path / "c.jpg", "ends in .png"),
        ("three", tmp_path / "c.png", "three/results.json was scored by cod, whose curves are not those of segment"),
        ("four", tmp_path / "c.png", "two results are named 'one'"),
        ("five", tmp_path / "c.png", "cannot read the curves in .*five/curves.csv"),
    ):
        with pytest.raises(UserError, match=message):
            main(["evaluate", "curves", str(tmp_path / "one"), str(tmp_path / other), "--out", str(out)])
    assert not (tmp_path / "c.png").exists()
    whole = (tmp_path / "one" / "curves.csv").read_text()
    for text in ("", whole.splitlines()[0] + "\n", whole[: len(whole) // 2], whole.replace("0.", "nan", 1)):
        (tmp_path / "five" / "curves.csv").write_text(text)
        with pytest.raises(UserError, match="cannot read the curves in .*five/curves.csv"):
            main(["evaluate", "curves", str(tmp_path / "five"), "--out", str(tmp_path / "c.png")])


def test_a_failed_report_keeps_the_earlier_one(folders, tmp_path, monkeypatch):
    score(folders, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("unconceal.evaluation.report.git_commit", lambda: object())  # JSON cannot hold that
    with pytest.raises(TypeError):
        score(folders, tmp_path / "out", "--overwrite", "--protocol", "cod")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_of_undecodable_bytes_are_reported(folders, tmp_path):
    for folder in ("pred", "gt"):
        (folders / folder / "a.png").rename(folders / folder / os.fsdecode(b"caf\xe9.png"))
    for form in ("csv", "parquet"):
        score(folders, tmp_path / form, "--format", form, "--name", os.fsdecode(b"na\xefve"))
        assert json.loads((tmp_path / form / "results.json").read_text())["name"] == "na?ve"
    assert "caf?" in (tmp_path / "csv" / "per_image.csv").read_text()


def test_each_folder_of_ground_truth_is_a_test_set(folders, tmp_path, capsys):
    (folders / "other").mkdir()
    for path in (folders / "gt").iterdir():
        Image.open(path).rotate(90).resize(Image.open(path).size).save(folders / "other" / path.name)
    score(folders, tmp_path / "one", "--name", "same")
    score(folders, tmp_path / "two", "--name", "same", "--truth", str(folders / "other"))
    capsys.readouterr()
    main(["evaluate", "table", str(tmp_path / "one"), str(tmp_path / "two")])
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("###")]
    assert titles == [f"### {folders / name}, protocol segmentation" for name in ("gt", "other")]


def test_table_of_results(folders, tmp_path, capsys):
    score(folders, tmp_path / "out", "--protocol", "cod", "--name", "mine", "--benchmark", "CAMO")
    capsys.readouterr()
    main(["evaluate", "table", str(tmp_path / "out")])
    table = capsys.readouterr().out
    assert "| mine (3 of 250 images) |" in table and "| RUN (ResNet-50) |" in table
    main(["evaluate", "table", str(tmp_path / "out"), "--no-papers"])
    assert "ResNet-50" not in capsys.readouterr().out
    file = tmp_path / "table.md"
    main(["evaluate", "table", str(tmp_path / "out"), "--out", str(file)])
    assert file.read_text() == table
    with pytest.raises(UserError, match="--overwrite"):
        main(["evaluate", "table", str(tmp_path / "out"), "--out", str(file)])


def test_without_matplotlib_nothing_is_scored_first(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'unconceal\[plots\]'"):
        main(["evaluate", "--predictions", "p", "--truth", "t", "--out", "o", "--sheets", "2"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--predictions p", "--predictions needs ground truth"),
        ("--predictions p --truth t --data d --split s", "--predictions needs ground truth"),
        ("--predictions p --data d", "give --data and --split"),
        ("--model m --split s", "give --data and --split"),
        ("--model m --data d --split s --truth t", "--truth is for --predictions"),
        ("--model m --data d --split s --only-matched", "--only-matched is for --predictions"),
        ("--model m --data d --split s --max-pixels 9", "--max-pixels is for --predictions"),
        ("--model m --data d --split s --train-split t", "--train-split is for --data with --split-seed"),
        ("--model m --data d --split train --split-seed 0", "got train as --split and as --train-split; give"),
        ("--predictions p --truth t --refine auto", "--refine is for --model"),
        ("--predictions p --truth t --revision v1", "--revision is for --model"),
        ("--predictions p --truth t --sheets 2", "--sheets needs a folder"),
        ("--predictions p --truth t --images i", "--images is for --sheets"),
        ("--predictions p --data d --split s --truth-suffix _x", "--truth-suffix is for --truth"),
        ("--predictions p --truth t --out ./p", "as --predictions and as --out"),
        ("--predictions p --truth t --name ' '", "--name is empty"),
        ("--model '' --data d --split s", "--model is empty"),
        ("--data d --split s", "got neither --model nor --predictions, expected one of them"),
        ("--model m --predictions p --truth t", "got both --model and --predictions"),
        ("--predictions absent --truth absent", "absent: .*expected a folder of images"),
    ],
)
def test_options_that_do_not_fit_are_rejected(options, message):
    with rejected(message):
        main(["evaluate", *shlex.split(options)])


def test_limit_takes_the_first(folders, dataset):
    folder = PredictionFolder(folders / "pred", folders / "gt", limit=2)
    assert [entry.id for entry in folder.entries] == ["a", "b"]
    whole = PredictionFolder(folders / "pred", folders / "gt").evaluate(PROTOCOLS["cod"], progress=False)
    assert equal(folder.evaluate(PROTOCOLS["cod"], progress=False), whole[:2])
