"""The protocols, against pysodmetrics and against cases worked by hand."""

import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import py_sod_metrics
import pytest
from PIL import Image, ImageFilter

from unconceal.data import generate
from unconceal.errors import UserError
from unconceal.metrics import PROTOCOLS, cod, dis, report
from unconceal.metrics.segmentation import score_image, summarize


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


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_summary_is_the_same_in_any_order(protocol):
    rng = np.random.default_rng(1)
    rows = [protocol.score_image(rng.random((9, 9)), rng.random((9, 9)) < 0.3) for _ in range(31)]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert protocol.summarize(rows) == protocol.summarize(shuffled)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_a_protocol_is_whole(protocol):
    probs, target = np.array([[0.9, 0.2], [0.4, 0.6]]), np.eye(2, dtype=bool)
    quick = protocol.summarize([protocol.score_image(probs, target)])
    row = protocol.score_image(probs, target, **protocol.options(**protocol.report_options))
    summary = protocol.summarize([row])
    assert {name: summary[name] for name in quick} == quick
    assert {name for name, value in row.items() if not isinstance(value, int | float)} == set(protocol.curves)
    assert {type(value) for value in summary.values()} == {int, float}
    assert protocol.best_metrics.keys() < quick.keys()  # training has no more to choose from
    for numbers in (quick, summary):
        lines = protocol.format_table(numbers).splitlines()
        assert len({line.count("|") for line in lines}) == 1
    with pytest.raises(UserError, match=f"got option sharpness, but the protocol {protocol.name} has only"):
        protocol.options(sharpness=1)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_refuses_what_is_not_a_prediction(protocol):
    score_image, summarize = protocol.score_image, protocol.summarize
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


def saved(probs: np.ndarray) -> np.ndarray:
    """The 8-bit picture that RUN's test code would write."""
    if probs.max() > probs.min():
        probs = (probs - probs.min()) / (probs.max() - probs.min())
    return np.rint(probs * 255).astype(np.uint8)


def directly(pairs: list[tuple[np.ndarray, np.ndarray]], **kwargs) -> dict[str, float]:
    """What pysodmetrics makes of predictions and truths."""
    measures = {
        "wf": py_sod_metrics.WeightedFmeasure(),
        "s": py_sod_metrics.Smeasure(),
        "e": py_sod_metrics.Emeasure(),
        "mae": py_sod_metrics.MAE(),
        "counted": py_sod_metrics.FmeasureV2(
            {
                "f": py_sod_metrics.FmeasureHandler(True, True, beta=0.3),
                "dice": py_sod_metrics.DICEHandler(False, False, with_binary=True),
                "iou": py_sod_metrics.IOUHandler(False, False, with_binary=True),
            }
        ),
    }
    for probs, target in pairs:
        for measure in measures.values():
            measure.step(probs, target, **kwargs)
    results = {name: measure.get_results() for name, measure in measures.items()}
    f, e = results["counted"]["f"], results["e"]["em"]
    return {
        "s_measure": results["s"]["sm"],
        "weighted_f_measure": results["wf"]["wfm"],
        "f_measure_adaptive": f["adaptive"],
        "f_measure_mean": f["dynamic"].mean(),
        "f_measure_max": f["dynamic"].max(),
        "e_measure_adaptive": e["adp"],
        "e_measure_mean": e["curve"].mean(),
        "e_measure_max": e["curve"].max(),
        "mae": results["mae"]["mae"],
        "mean_dice_at_0.5": results["counted"]["dice"]["binary"],
        "mean_iou_at_0.5": results["counted"]["iou"]["binary"],
        "num_images": len(pairs),
    }


def check_against_pysodmetrics(pairs: list[tuple[np.ndarray, np.ndarray]]):
    """Compare each picture alone and the data set, with and without the min-max step."""
    for chosen in ([pair] for pair in pairs), [pairs]:
        for pairs in chosen:
            files = [(saved(probs), target.astype(np.uint8) * 255) for probs, target in pairs]
            summary = cod.summarize(cod.score_image(*pair) for pair in pairs)
            assert summary == pytest.approx(directly(files), abs=1e-6)
            summary = cod.summarize(cod.score_image(*pair, min_max=False) for pair in pairs)
            assert summary == pytest.approx(directly(pairs, normalize=False), abs=1e-6)


def test_cod_equals_pysodmetrics():
    rng = np.random.default_rng(0)
    pairs = []
    for foreground in (0.002, 0.1, 0.5, 0.9):
        for size in ((7, 5), (64, 48), (33, 90)):
            target = rng.random(size) < foreground
            target[size[0] // 2, size[1] // 2] = True
            pairs.append((np.clip(0.2 + 0.5 * target + 0.4 * rng.random(size), 0, 1), target))
    check_against_pysodmetrics(pairs)


BLACK, WHITE = np.zeros((12, 16), dtype=bool), np.ones((12, 16), dtype=bool)
PIXEL, BLOCK = BLACK.copy(), BLACK.copy()
PIXEL[4, 9] = True
BLOCK[3:8, 5:11] = True


@pytest.mark.parametrize("target", [BLACK, WHITE, PIXEL, BLOCK], ids=["black", "white", "pixel", "block"])
@pytest.mark.parametrize(
    "predicted",
    [BLACK, WHITE, PIXEL, BLOCK, np.full((12, 16), 0.5), np.random.default_rng(0).random((12, 16))],
    ids=["black", "white", "pixel", "block", "half", "random"],
)
def test_cod_edge_cases_equal_pysodmetrics(predicted, target):
    check_against_pysodmetrics([(predicted.astype(np.float64), target)])


DIS5K = Path(__file__).parents[2] / "shared/data/dis5k_gt_and_predictions"


@pytest.mark.skipif(not DIS5K.is_dir(), reason=f"{DIS5K} is not here")
def test_cod_equals_pysodmetrics_on_real_predictions():
    pairs = []
    for path in sorted((DIS5K / "gt").glob("*.png"))[::4]:
        probs, target = (
            np.asarray(Image.open(folder / path.name).convert("L").resize((256, 192)))
            for folder in (DIS5K / "pred", DIS5K / "gt")
        )
        pairs.append((probs / 255, target > 127))
    assert len(pairs) > 4
    check_against_pysodmetrics(pairs)


def test_cod_of_pictures_without_object():
    right = cod.score_image(np.zeros((12, 16)), BLACK)
    wrong = cod.score_image(np.ones((12, 16)), BLACK)
    pixels, thresholds = BLACK.size, 256
    assert (right["s_measure"], wrong["s_measure"]) == (1, 0)
    assert (right["mae"], wrong["mae"]) == (0, 1)
    # At the threshold 0, the lowest of 256 and the adaptive one, all of a black prediction counts as predicted.
    assert right["e_measure_adaptive"] == wrong["e_measure_adaptive"] == 0
    assert right["e_measure_max"] == pytest.approx(pixels / (pixels - 1))
    assert right["e_measure_mean"] == pytest.approx(pixels / (pixels - 1) * (thresholds - 1) / thresholds)
    assert wrong["e_measure_max"] == 0
    for name in cod.score_image(BLOCK.astype(float), BLACK):
        if name.startswith(("f_", "weighted", "dice", "iou")):
            assert np.all(right[name] == 0) and np.all(wrong[name] == 0)


def test_cod_where_pysodmetrics_gives_no_number():
    """The centroid of the truth in the last row and column leaves three quarters of the picture without a pixel."""
    target = BLACK.copy()
    target[-1, -1] = True
    probs = np.random.default_rng(0).random(target.shape)
    measure = py_sod_metrics.Smeasure()
    with np.errstate(invalid="ignore"), pytest.warns(RuntimeWarning):
        assert np.isnan(measure.cal_sm(probs, target))
    expected = 0.5 * measure.object(probs, target) + 0.5 * measure.ssim(probs, target)
    assert cod.score_image(probs, target, min_max=False)["s_measure"] == pytest.approx(expected, abs=1e-15)


def test_cod_max_is_of_the_mean_curve():
    low, high = (
        cod.score_image(np.where(BLOCK, *levels), BLOCK, min_max=False) for levels in ((0.4, 0.1), (0.9, 0.5))
    )
    assert low["f_measure_max"] == high["f_measure_max"] == 1
    # Where `low` is right, all of `high` counts as predicted; where `high` is right, nothing of `low`.
    precision = BLOCK.mean()
    assert cod.summarize([low, high])["f_measure_max"] == pytest.approx(
        (1 + 1.3 * precision / (0.3 * precision + 1)) / 2
    )


def test_cod_min_max_stretches_and_rounds():
    faint = np.where(BLOCK, 0.3, 0.1)
    assert cod.score_image(faint, BLOCK)["mae"] == 0
    assert cod.score_image(faint, BLOCK)["dice_at_0.5"] == 1
    plain = cod.score_image(faint, BLOCK, min_max=False)
    assert plain["mae"] == pytest.approx(np.abs(faint - BLOCK).mean())
    assert plain["dice_at_0.5"] == 0
    # A constant is rounded (to 128 / 255) but not stretched.
    assert cod.score_image(np.full(BLOCK.shape, 0.5), WHITE)["mae"] == pytest.approx(1 - 128 / 255)


def dis_directly(pairs: list[tuple[np.ndarray, np.ndarray]], **kwargs) -> dict[str, float]:
    """What pysodmetrics makes of predictions and truths, in the columns of DIS5K's tables."""
    results = directly(pairs, **kwargs)
    names = ("f_measure_max", "weighted_f_measure", "mae", "s_measure", "e_measure_mean", "num_images")
    effort = py_sod_metrics.HumanCorrectionEffortMeasure(relax=5, epsilon=2.0)
    for pair in pairs:
        effort.step(*pair, **kwargs)
    return {**{name: results[name] for name in names}, "hce": effort.get_results()["hce"]}


def check_dis_against_pysodmetrics(pairs: list[tuple[np.ndarray, np.ndarray]]):
    files = [(saved(probs), target.astype(np.uint8) * 255) for probs, target in pairs]
    summary = dis.summarize(dis.score_image(*pair, hce=True) for pair in pairs)
    assert summary == pytest.approx(dis_directly(files), abs=1e-6)
    summary = dis.summarize(dis.score_image(*pair, min_max=False, hce=True) for pair in pairs)
    assert summary == pytest.approx(dis_directly(pairs, normalize=False), abs=1e-6)


@pytest.mark.parametrize("target", [BLACK, WHITE, PIXEL, BLOCK], ids=["black", "white", "pixel", "block"])
@pytest.mark.parametrize(
    "predicted",
    [BLACK, WHITE, PIXEL, BLOCK, np.full((12, 16), 0.5), np.random.default_rng(0).random((12, 16))],
    ids=["black", "white", "pixel", "block", "half", "random"],
)
def test_dis_edge_cases_equal_pysodmetrics(predicted, target):
    check_dis_against_pysodmetrics([(predicted.astype(np.float64), target)])


def test_dis_equals_pysodmetrics():
    rng = np.random.default_rng(0)
    pairs = []
    for index in range(4):
        target = np.asarray(generate("intricate", (96, 128), 0, index)[1]) > 0
        blurred = np.asarray(Image.fromarray(target).convert("L").filter(ImageFilter.GaussianBlur(2))) / 255
        pairs.append((np.clip(0.1 + 0.9 * blurred + 0.2 * rng.normal(size=target.shape), 0, 1), target))
    check_dis_against_pysodmetrics(pairs)


@pytest.mark.skipif(not DIS5K.is_dir(), reason=f"{DIS5K} is not here")
def test_dis_equals_pysodmetrics_on_real_predictions_at_their_own_size():
    smallest = sorted((DIS5K / "gt").glob("*.png"), key=lambda path: np.prod(Image.open(path).size))[:2]
    pairs = []
    for path in smallest:
        probs, target = (
            np.asarray(Image.open(folder / path.name).convert("L")) for folder in (DIS5K / "pred", DIS5K / "gt")
        )
        pairs.append((probs / 255, target > 127))
    files = [(saved(probs), target.astype(np.uint8) * 255) for probs, target in pairs]
    summary = dis.summarize(dis.score_image(*pair, hce=True) for pair in pairs)
    assert summary == pytest.approx(dis_directly(files), abs=1e-6)
    assert summary["hce"] > 0


def effort(predicted: np.ndarray, target: np.ndarray) -> int:
    return dis.score_image(predicted.astype(float), target, hce=True)["hce"]


def test_human_correction_effort_by_hand():
    left = np.zeros((60, 90), dtype=bool)
    left[:, :30] = True
    assert effort(left, left) == 0

    apart = left.copy()
    apart[20:40, 60:80] = True
    assert effort(apart, left) == 1  # one region to remove, by one click

    bump = left.copy()
    bump[20:40, 30:50] = True
    assert effort(bump, left) == 2  # one straight outline to draw, from end to end

    bumps = bump | apart
    assert effort(bumps, left) == 3

    wide = np.zeros_like(left)
    wide[:, :34] = True
    assert effort(wide, left) == 0  # 4 pixels too far: within the relaxation of 5

    speck = left.copy()
    speck[20:30, 60:70] = True
    assert effort(speck, left) == 0  # 10 pixels wide, gone after 5 erosions

    wire = left.copy()
    wire[30, 30:80] = True
    assert effort(wire, left) == 0  # too much that is thin is forgiven,
    assert effort(left, wire) > 0  # a missed thin part is not: it belongs to the skeleton


def test_human_correction_effort_is_counted_only_on_demand():
    probs = np.where(BLOCK, 0.9, 0.1)
    quick, whole = dis.score_image(probs, BLOCK), dis.score_image(probs, BLOCK, hce=True)
    assert "hce" not in quick and whole["hce"] == 0
    assert "HCE" not in dis.format_table(dis.summarize([quick, quick]))
    assert dis.format_table(dis.summarize([whole, {**whole, "hce": 1016}])).endswith("| 508 |")


def test_dis_shares_the_numbers_of_cod():
    pairs = [(np.random.default_rng(i).random(BLOCK.shape), BLOCK) for i in range(3)]
    ours, shared = (protocol.summarize(protocol.score_image(*pair) for pair in pairs) for protocol in (dis, cod))
    assert ours == {name: shared[name] for name in ours}


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
