"""The protocol `segmentation`, against pysodmetrics and against cases worked by hand."""

import random
import shutil
import subprocess

import numpy as np
import py_sod_metrics
import pytest

from unconceal.metrics import report, score_image, summarize


SCORES = ("iou", "f1", "precision", "recall")


def mask(*rows: str) -> np.ndarray:
    """A mask drawn with '#' for foreground."""
    return np.array([[pixel == "#" for pixel in row] for row in rows])


def scores(row: dict) -> tuple:
    return tuple(row[name] for name in SCORES)


def test_counts_and_scores_by_hand():
    target = mask("##..", "##..", "....")
    probs = np.array([[0.9, 0.6, 0.51, 0.0], [0.8, 0.5, 0.2, 0.0], [0.0, 0.0, 0.0, 0.7]])
    row = score_image(probs, target)
    # 0.5 is not above 0.5, so (1, 1) is missed.
    assert (row["tp"], row["fp"], row["fn"], row["tn"]) == (3, 2, 1, 6)
    assert scores(row) == pytest.approx((3 / 6, 6 / 9, 3 / 5, 3 / 4), abs=1e-15)
    assert (score_image(probs, target, threshold=0.65)["tp"], score_image(probs, target, threshold=0.45)["tp"]) == (
        2,
        4,
    )


@pytest.mark.parametrize(
    ("predicted", "target", "expected"),
    [
        (mask("#...", "...."), mask("#...", "...."), (1, 1, 1, 1)),  # one pixel, found
        (mask(".#..", "...."), mask("#...", "...."), (0, 0, 0, 0)),  # one pixel, missed by one
        (mask("....", "...."), mask("#...", "...."), (0, 0, 0, 0)),  # nothing predicted, something there
        (mask("#...", "...."), mask("....", "...."), (0, 0, 0, 0)),  # something predicted, nothing there
        (mask("....", "...."), mask("....", "...."), (1, 1, 1, 1)),  # both all black
        (mask("####", "####"), mask("####", "####"), (1, 1, 1, 1)),  # both all white
        (mask("####", "####"), mask("##..", "...."), (2 / 8, 4 / 10, 2 / 8, 1)),  # all white predicted
        (mask("##..", "...."), mask("####", "####"), (2 / 8, 4 / 10, 1, 2 / 8)),  # all white true
    ],
)
def test_edge_cases(predicted, target, expected):
    row = score_image(predicted.astype(np.float32), target)
    assert scores(row) == pytest.approx(expected, abs=1e-15)
    summary = summarize([row])
    assert scores(summary) == scores(row)  # one picture: the data set is the picture
    assert [summary[name] for name in ("niou", "mean_f1", "mean_precision", "mean_recall")] == list(scores(row))


def test_global_and_mean_numbers_differ_as_written():
    small = score_image(np.zeros((4, 4)), mask("#...", "....", "....", "...."))
    large = score_image(np.ones((10, 10)), np.ones((10, 10), dtype=bool))
    summary = summarize([small, large])
    assert summary["iou"] == pytest.approx(100 / 101, abs=1e-15)
    assert summary["recall"] == pytest.approx(100 / 101, abs=1e-15)
    assert summary["precision"] == 1
    assert summary["niou"] == 0.5
    assert summary["mean_precision"] == 0.5
    assert summary["num_images"] == 2


def test_a_data_set_of_empty_pictures():
    empty = score_image(np.zeros((3, 3)), np.zeros((3, 3), dtype=bool))
    assert all(value == 1 for value in summarize([empty, empty]).values() if isinstance(value, float))


def test_equals_pysodmetrics():
    rng = np.random.default_rng(0)
    handlers = {
        "iou": py_sod_metrics.IOUHandler,
        "f1": py_sod_metrics.DICEHandler,
        "precision": py_sod_metrics.PrecisionHandler,
        "recall": py_sod_metrics.RecallHandler,
    }
    per_image = py_sod_metrics.FmeasureV2(
        {name: handler(False, False, with_binary=True, sample_based=True) for name, handler in handlers.items()}
    )
    overall = py_sod_metrics.FmeasureV2(
        {name: handler(False, False, with_binary=True, sample_based=False) for name, handler in handlers.items()}
    )
    rows = []
    for foreground in (0.002, 0.1, 0.5, 0.9, 1.0):
        for size in ((1, 1), (7, 5), (64, 48)):
            target = rng.random(size) < foreground
            target[0, 0] = True  # never empty: there our rule is another, see test_edge_cases
            probs = np.clip(0.6 * target + 0.5 * rng.random(size), 0, 1)
            per_image.step(probs, target, normalize=False)
            overall.step(probs, target, normalize=False)
            rows.append(score_image(probs, target))
    summary = summarize(rows)
    for name, mean in zip(SCORES, ("niou", "mean_f1", "mean_precision", "mean_recall"), strict=True):
        assert summary[mean] == pytest.approx(per_image.get_results()[name]["binary"], abs=1e-12)
        assert summary[name] == pytest.approx(overall.get_results()[name]["binary"], abs=1e-12)


def test_summary_is_the_same_in_any_order():
    rng = np.random.default_rng(1)
    rows = [score_image(rng.random((9, 9)), rng.random((9, 9)) < 0.3) for _ in range(31)]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert summarize(rows) == summarize(shuffled)


def test_refuses_what_is_not_a_prediction():
    target = np.ones((2, 3), dtype=bool)
    with pytest.raises(ValueError, match="size"):
        score_image(np.zeros((3, 2)), target)
    with pytest.raises(TypeError, match="bool"):
        score_image(np.zeros((2, 3)), target.astype(np.uint8))
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        score_image(np.full((2, 3), 255.0), target)
    with pytest.raises(ValueError, match="nan"):
        score_image(np.array([[0, np.nan, 0], [0, 0, 0]]), target)
    with pytest.raises(ValueError, match="no picture"):
        summarize([])


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")
def test_the_commit_is_of_the_repository_that_holds_this_source(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    source = tmp_path / "site-packages" / "report.py"
    source.parent.mkdir()
    source.touch()
    (tmp_path / "other.py").touch()
    monkeypatch.setattr(report, "__file__", str(source))
    assert report.git_commit() is None  # no repository
    git("init")
    git("add", "other.py")
    git("commit", "-m", "another project")
    assert report.git_commit() is None
    git("add", ".")
    git("commit", "-m", "this project")
    assert len(report.git_commit()) == 40
    source.write_text("changed")
    assert report.git_commit().endswith("-dirty")
