"""Test the protocols against pysodmetrics and against cases computed by hand."""

import random
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import py_sod_metrics
import pytest
from PIL import Image, ImageFilter

from unconceal.data.synthetic import generate
from unconceal.evaluation import protocol_cod as cod
from unconceal.evaluation import protocol_dis as dis
from unconceal.evaluation import protocol_infrared as infrared
from unconceal.evaluation import protocol_lesion as lesion
from unconceal.evaluation.protocol_segmentation import PROTOCOL, score_image
from unconceal.evaluation.protocols import PROTOCOLS
from unconceal.evaluation.report import format_table
from unconceal.utils import commits


SCORES = ("iou", "f1", "precision", "recall")


def mask(*rows: str) -> np.ndarray:
    """Return a mask drawn with '#' for object."""
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
    assert [score_image(probs, target, threshold)["tp"] for threshold in (0.65, 0.45)] == [2, 4]


@pytest.mark.parametrize(
    ("predicted", "target", "expected"),
    [
        (mask("#...", "...."), mask("#...", "...."), (1, 1, 1, 1)),  # one pixel, found
        (mask(".#..", "...."), mask("#...", "...."), (0, 0, 0, 0)),  # one pixel, missed by one
        (mask("....", "...."), mask("#...", "...."), (0, 0, 0, 0)),  # nothing predicted, one object pixel
        (mask("#...", "...."), mask("....", "...."), (0, 0, 0, 0)),  # one pixel predicted, no object
        (mask("....", "...."), mask("....", "...."), (1, 1, 1, 1)),  # both all black
        (mask("####", "####"), mask("####", "####"), (1, 1, 1, 1)),  # both all white
        (mask("####", "####"), mask("##..", "...."), (2 / 8, 4 / 10, 2 / 8, 1)),  # all white predicted
        (mask("##..", "...."), mask("####", "####"), (2 / 8, 4 / 10, 1, 2 / 8)),  # all white true
    ],
)
def test_edge_cases(predicted, target, expected):
    row = score_image(predicted.astype(np.float32), target)
    assert scores(row) == pytest.approx(expected, abs=1e-15)
    summary = PROTOCOL.summarize([row])
    assert scores(summary) == scores(row)  # the data set is one image
    assert [summary[name] for name in ("niou", "mean_f1", "mean_precision", "mean_recall")] == list(scores(row))


def test_global_and_mean_numbers_differ_as_written():
    small = score_image(np.zeros((4, 4)), mask("#...", "....", "....", "...."))
    large = score_image(np.ones((10, 10)), np.ones((10, 10), dtype=bool))
    summary = PROTOCOL.summarize([small, large])
    assert summary["iou"] == pytest.approx(100 / 101, abs=1e-15)
    assert summary["recall"] == pytest.approx(100 / 101, abs=1e-15)
    assert summary["precision"] == 1
    assert summary["niou"] == 0.5
    assert summary["mean_precision"] == 0.5
    assert summary["num_images"] == 2


def test_equals_pysodmetrics():
    rng = np.random.default_rng(0)
    handlers = {"iou": "IOUHandler", "f1": "DICEHandler", "precision": "PrecisionHandler", "recall": "RecallHandler"}
    handlers = {name: partial(getattr(py_sod_metrics, handler), False, False) for name, handler in handlers.items()}
    per_image, overall = (
        py_sod_metrics.FmeasureV2({name: make(with_binary=True, sample_based=each) for name, make in handlers.items()})
        for each in (True, False)
    )
    rows = []
    for foreground in (0.002, 0.1, 0.5, 0.9, 1.0):
        for size in ((1, 1), (7, 5), (64, 48)):
            target = rng.random(size) < foreground
            target[0, 0] = True  # never empty: our rule for empty masks differs, see test_edge_cases
            probs = np.clip(0.6 * target + 0.5 * rng.random(size), 0, 1)
            per_image.step(probs, target, normalize=False)
            overall.step(probs, target, normalize=False)
            rows.append(score_image(probs, target))
    summary = PROTOCOL.summarize(rows)
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
def test_a_protocol_is_complete(protocol):
    probs, target = np.array([[0.9, 0.2], [0.4, 0.6]]), np.eye(2, dtype=bool)
    quick = protocol.summarize([protocol.score_image(probs, target)])
    row = protocol.score_image(probs, target, **protocol.options(**protocol.report_options))
    summary = protocol.summarize([row])
    assert {name: summary[name] for name in quick} == quick
    assert {name for name, value in row.items() if not isinstance(value, int | float)} == set(protocol.curves)
    assert {type(value) for value in summary.values()} == {int, float}
    assert protocol.best_metrics.keys() < quick.keys()  # training has no other metrics
    assert set(protocol.columns) == set(summary) - {"num_images"}
    assert isinstance(row[protocol.ranked_by[0]], float)
    for numbers in (quick, summary):
        titles, _, values = (line.split("|") for line in format_table(protocol, numbers).splitlines())
        assert len(titles) == len(values) == len(numbers) + 1  # an empty cell at both ends, and no num_images
    with pytest.raises(ValueError, match=f"got option sharpness, but the protocol {protocol.name} has only"):
        protocol.options(sharpness=1)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_8_bit_predictions_score_as_floats(protocol):
    rng = np.random.default_rng(3)
    target = rng.random((20, 30)) < 0.3
    levels = rng.integers(0, 256, target.shape).astype(np.uint8)
    levels[0, :2] = 0, 255  # neither stretching nor rounding changes anything
    rows = [protocol.score_image(probs, target) for probs in (levels, levels / 255)]
    for name in rows[0]:
        np.testing.assert_array_equal(*(row[name] for row in rows), err_msg=name)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_curves_are_counts_at_thresholds(protocol):
    rng = np.random.default_rng(4)
    target = rng.random((20, 30)) < 0.3
    levels = np.where(rng.random(target.shape) < 0.3, 0, rng.integers(0, 256, target.shape)).astype(np.uint8)
    levels[0, :2] = 0, 255
    row = protocol.score_image(levels, target)
    for threshold in (1, 100, 254):
        predicted = levels >= threshold
        hits = np.count_nonzero(predicted & target)
        assert row["precision_curve"][255 - threshold] == pytest.approx(hits / predicted.sum())
        assert row["recall_curve"][255 - threshold] == pytest.approx(hits / target.sum())
    (f_curve,) = (name for name in protocol.curves if name in ("f1_curve", "f_measure_curve"))
    precision, recall = row["precision_curve"][155], row["recall_curve"][155]
    beta = 1 if f_curve == "f1_curve" else 0.3
    assert row[f_curve][155] == pytest.approx((1 + beta) * precision * recall / (beta * precision + recall))


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_unusable_arrays_are_rejected(protocol):
    target = np.ones((2, 3), dtype=bool)
    for probs, truth, error, message in (
        (np.zeros((3, 2)), target, ValueError, "size 2x3, but a ground truth of 3x2"),
        (np.zeros((2, 3)), target.astype(np.uint8), TypeError, "expected bool"),
        (np.zeros((2, 3), dtype=np.int64), target, TypeError, "int64, expected floating"),
        (np.full((2, 3), 255.0), target, ValueError, r"expected \[0, 1\]"),
        (np.array([[0, np.nan, 0], [0, 0, 0]]), target, ValueError, "nan"),
    ):
        with pytest.raises(error, match=message):
            protocol.score_image(probs, truth)
    with pytest.raises(ValueError, match="no image"):
        protocol.summarize([])


def saved(probs: np.ndarray) -> np.ndarray:
    """Return the 8-bit image that RUN's test code would write."""
    if probs.max() > probs.min():
        probs = (probs - probs.min()) / (probs.max() - probs.min())
    return np.rint(probs * 255).astype(np.uint8)


def directly(pairs: list[tuple[np.ndarray, np.ndarray]], **kwargs) -> dict[str, float]:
    """Return the scores of pysodmetrics."""
    handlers = {
        "f": py_sod_metrics.FmeasureHandler(True, True, beta=0.3),
        "dice": py_sod_metrics.DICEHandler(False, False, with_binary=True),
        "iou": py_sod_metrics.IOUHandler(False, False, with_binary=True),
    }
    kinds = ("WeightedFmeasure", "Smeasure", "Emeasure", "MAE")
    measures = [*(getattr(py_sod_metrics, kind)() for kind in kinds), py_sod_metrics.FmeasureV2(handlers)]
    for probs, target in pairs:
        for measure in measures:
            measure.step(probs, target, **kwargs)
    weighted_f, s, e, mae, counted = (measure.get_results() for measure in measures)
    f, e = counted["f"], e["em"]
    return {
        "s_measure": s["sm"],
        "weighted_f_measure": weighted_f["wfm"],
        "f_measure_adaptive": f["adaptive"],
        "f_measure_mean": f["dynamic"].mean(),
        "f_measure_max": f["dynamic"].max(),
        "e_measure_adaptive": e["adp"],
        "e_measure_mean": e["curve"].mean(),
        "e_measure_max": e["curve"].max(),
        "mae": mae["mae"],
        "mean_dice_at_0.5": counted["dice"]["binary"],
        "mean_iou_at_0.5": counted["iou"]["binary"],
        "num_images": len(pairs),
    }


def check_against_pysodmetrics(pairs: list[tuple[np.ndarray, np.ndarray]]):
    """Compare single images and the data set, as arrays and as files."""
    for chosen in ([pair] for pair in pairs), [pairs]:
        for pairs in chosen:
            files = [(saved(probs), target.astype(np.uint8) * 255) for probs, target in pairs]
            summary = cod.PROTOCOL.summarize(cod.score_image(*pair) for pair in pairs)
            assert summary == pytest.approx(directly(files), abs=1e-6)
            # A file of a smaller range than 0 to 255 is stretched and not rounded again.
            faint = [(np.rint(30 + 100 * probs).astype(np.uint8), target) for probs, target in pairs]
            summary = cod.PROTOCOL.summarize(cod.score_image(*pair) for pair in faint)
            faint = [(levels, target.astype(np.uint8) * 255) for levels, target in faint]
            assert summary == pytest.approx(directly(faint), abs=1e-6)
            summary = cod.PROTOCOL.summarize(cod.score_image(*pair, min_max=False) for pair in pairs)
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


DIS5K = Path(__file__).parents[2] / "shared/data/dis5k_gt_and_predictions"


@pytest.mark.skipif(not DIS5K.is_dir(), reason=f"{DIS5K} is not here")
def test_cod_equals_pysodmetrics_on_real_predictions():
    pairs = []
    for path in sorted((DIS5K / "gt").glob("*.png"))[::4]:
        files = (Image.open(folder / path.name).convert("L") for folder in (DIS5K / "pred", DIS5K / "gt"))
        probs, target = (np.asarray(image.resize((128, 96))) for image in files)
        pairs.append((probs / 255, target > 127))
    assert len(pairs) > 4
    check_against_pysodmetrics(pairs)


def test_cod_of_images_without_object():
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
    """A centroid in the last row and column leaves quarters empty."""
    target = BLACK.copy()
    target[-1, -1] = True
    probs = np.random.default_rng(0).random(target.shape)
    measure = py_sod_metrics.Smeasure()
    with np.errstate(invalid="ignore"), pytest.warns(RuntimeWarning):
        assert np.isnan(measure.cal_sm(probs, target))
    expected = 0.5 * measure.object(probs, target) + 0.5 * measure.ssim(probs, target)
    assert cod.score_image(probs, target, min_max=False)["s_measure"] == pytest.approx(expected, abs=1e-15)


def test_cod_max_is_of_the_mean_curve():
    predictions = (np.where(BLOCK, *levels) for levels in ((0.4, 0.1), (0.9, 0.5)))
    low, high = (cod.score_image(probs, BLOCK, min_max=False) for probs in predictions)
    assert low["f_measure_max"] == high["f_measure_max"] == 1
    # Where `low` is right, all of `high` counts as predicted; where `high` is right, nothing of `low`.
    precision = BLOCK.mean()
    expected = (1 + 1.3 * precision / (0.3 * precision + 1)) / 2
    assert cod.PROTOCOL.summarize([low, high])["f_measure_max"] == pytest.approx(expected)


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
    """Return the scores of pysodmetrics, in the columns of DIS5K's tables."""
    results = directly(pairs, **kwargs)
    names = ("f_measure_max", "weighted_f_measure", "mae", "s_measure", "e_measure_mean", "num_images")
    effort = py_sod_metrics.HumanCorrectionEffortMeasure(relax=5, epsilon=2.0)
    for pair in pairs:
        effort.step(*pair, **kwargs)
    return {**{name: results[name] for name in names}, "hce": effort.get_results()["hce"]}


def check_dis_against_pysodmetrics(pairs: list[tuple[np.ndarray, np.ndarray]]):
    files = [(saved(probs), target.astype(np.uint8) * 255) for probs, target in pairs]
    summary = dis.PROTOCOL.summarize(dis.score_image(*pair, hce=True) for pair in pairs)
    assert 0 <= summary.pop("boundary_iou") <= 1
    assert summary == pytest.approx(dis_directly(files), abs=1e-6)
    summary = dis.PROTOCOL.summarize(dis.score_image(*pair, min_max=False, hce=True) for pair in pairs)
    del summary["boundary_iou"]
    assert summary == pytest.approx(dis_directly(pairs, normalize=False), abs=1e-6)


@pytest.mark.parametrize("target", [BLACK, WHITE, PIXEL, BLOCK], ids=["black", "white", "pixel", "block"])
def test_edge_cases_equal_pysodmetrics(target):
    others = np.full((12, 16), 0.5), np.random.default_rng(0).random((12, 16))
    for predicted in (BLACK, WHITE, PIXEL, BLOCK, *others):
        check_against_pysodmetrics([(predicted.astype(np.float64), target)])
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
    files = [
        tuple(np.asarray(Image.open(folder / path.name).convert("L")) for folder in (DIS5K / "pred", DIS5K / "gt"))
        for path in smallest
    ]
    summary = dis.PROTOCOL.summarize(dis.score_image(levels, gray > 127, hce=True) for levels, gray in files)
    del summary["boundary_iou"]
    assert summary == pytest.approx(dis_directly(files), abs=1e-6)
    assert summary["hce"] > 0


def test_human_correction_effort_does_not_depend_on_the_background_around():
    """Compare a part of the image with the whole image."""
    rng = np.random.default_rng(0)
    whole = py_sod_metrics.HumanCorrectionEffortMeasure(relax=5, epsilon=2.0)
    for index in range(6):
        target = np.asarray(generate("intricate", (64, 80), 0, index)[1]) > 0
        noise = Image.fromarray((rng.random(target.shape) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2))
        predicted = (target ^ (np.asarray(noise) > 133)).astype(float)
        # At the borders of the image, near them, and far from them.
        for before, after in ((0, 0), (1, 4), (7, 9), (40, 20)):
            pair = [np.pad(mask, ((before, after), (after, before))) for mask in (predicted, target)]
            assert dis.human_correction_effort(*pair) == whole.cal_hce(*pair)


def effort(predicted: np.ndarray, target: np.ndarray) -> int:
    return dis.score_image(predicted.astype(float), target, hce=True)["hce"]


def test_human_correction_effort_by_hand():
    left = np.zeros((60, 90), dtype=bool)
    left[:, :30] = True
    assert effort(left, left) == 0

    def and_also(rows, columns):
        added = left.copy()
        added[rows, columns] = True
        return added

    apart, bump = and_also(slice(20, 40), slice(60, 80)), and_also(slice(20, 40), slice(30, 50))
    assert effort(apart, left) == 1  # one region to remove, by one click
    assert effort(bump, left) == 2  # one straight outline to draw
    assert effort(bump | apart, left) == 3
    assert effort(and_also(slice(None), slice(34)), left) == 0  # 4 pixels too wide: within the relaxation of 5
    assert effort(and_also(slice(20, 30), slice(60, 70)), left) == 0  # 10 pixels wide, gone after 5 erosions
    wire = and_also(30, slice(30, 80))
    assert effort(wire, left) == 0  # false thin parts are forgiven,
    assert effort(left, wire) > 0  # missed thin parts are not: they belong to the skeleton


def drawing(*rows: str) -> np.ndarray:
    return mask(*rows).astype(np.float64)


def test_targets_by_hand():
    target = mask(
        "##........",
        "##........",
        "..........",
        "......##..",
        "......##..",
        "..........",
    )
    probs = drawing(
        ".....#....",
        "##........",
        "##........",
        "....##....",
        "..........",
        "#.......##",
    )
    # The first target, centroid (0.5, 0.5): the first blob in the order of rows is the pixel (0, 5), 4.5 away; the
    # next, (1.5, 0.5), is 1 away. The second target, (3.5, 6.5): (3, 4.5) is 2.06 away, (5, 8.5) is 2.5 away and comes
    # later.
    row = infrared.score_image(probs, target)
    assert (row["num_targets"], row["num_detected"], row["num_false_blobs"]) == (2, 2, 3)
    assert row["false_pixels"] == 1 + 1 + 2
    summary = infrared.PROTOCOL.summarize([row])
    assert summary["pd"] == 1
    assert summary["fa"] == pytest.approx(4 / 60)
    # The two blobs that were taken have 4 and 2 pixels: by area the false blob of 2 pixels is not found.
    flawed = infrared.score_image(probs, target, by_area=True)
    assert (flawed["num_false_blobs"], flawed["false_pixels"]) == (2, 2)
    assert flawed["num_detected"] == 2
    near = infrared.score_image(probs, target, max_distance=2)
    assert (near["num_detected"], near["false_pixels"]) == (1, 1 + 1 + 2 + 2)
    strict = infrared.score_image(probs, target, max_distance=1)  # 1 is not less than 1
    assert strict["num_detected"] == 0
    assert infrared.PROTOCOL.summarize([row, near])["pd"] == 3 / 4


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_ranking_score_grows_with_quality(protocol):
    good, bad = (np.roll(BLOCK, shift, 1).astype(float) for shift in (1, 4))
    key, title = protocol.ranked_by
    assert protocol.score_image(good, BLOCK)[key] > protocol.score_image(bad, BLOCK)[key]
    assert any(title == column.title.split(" of ")[0] for column in protocol.columns.values())


def test_one_blob_is_one_target():
    target = mask("#..#", "....", "#...")
    assert infrared.score_image(drawing("#..#", "....", "#..."), target)["num_detected"] == 3
    merged = infrared.score_image(drawing("####", "....", "...."), target)  # one blob cannot match two targets
    assert (merged["num_targets"], merged["num_detected"], merged["num_false_blobs"]) == (3, 1, 0)
    corners = infrared.score_image(drawing(".#", "#."), mask(".#", "#."))
    assert (corners["num_targets"], corners["num_detected"]) == (1, 1)  # touching at a corner is one component


def test_targets_take_the_first_blob_not_the_nearest():
    """As in the common code, the first target may take another's blob."""
    target, probs = mask("..#.#....", "........."), drawing("....#.#..", ".........")
    row = infrared.score_image(probs, target)
    # (0, 2) takes (0, 4), 2 away; (0, 4) takes (0, 6) then. The nearest would have been (0, 4) for (0, 4) alone.
    assert (row["num_detected"], row["false_pixels"]) == (2, 0)


def test_images_without_targets():
    nothing = np.zeros((4, 5))
    empty = infrared.score_image(nothing, nothing > 0)
    assert (infrared.PROTOCOL.summarize([empty])["pd"], infrared.PROTOCOL.summarize([empty])["fa"]) == (1, 0)
    missed = infrared.score_image(nothing, mask("#....", ".....", ".....", "....."))
    assert infrared.PROTOCOL.summarize([missed, empty])["pd"] == 0
    false = infrared.score_image(drawing("#....", ".....", ".....", "....."), nothing > 0)
    assert infrared.PROTOCOL.summarize([false, empty])["fa"] == 1 / 40
    assert format_table(infrared.PROTOCOL, infrared.PROTOCOL.summarize([false, empty])).endswith("| 25000.00 |")


def test_infrared_and_lesion_share_the_pixels_of_segmentation():
    rng = np.random.default_rng(5)
    pairs = [(rng.random((9, 11)), rng.random((9, 11)) < share) for share in (0.0, 0.2, 0.6)]
    pixels, targets, lesions = (
        protocol.summarize(protocol.score_image(*pair, threshold=0.7) for pair in pairs)
        for protocol in map(PROTOCOLS.get, ("segmentation", "infrared", "lesion"))
    )
    for name in ("iou", "niou", "f1", "mean_f1"):
        assert targets[name] == pixels[name]
    assert (lesions["iou"], lesions["mean_iou"]) == (pixels["iou"], pixels["niou"])
    assert (lesions["mean_f1"], lesions["mean_precision"]) == (pixels["mean_f1"], pixels["mean_precision"])
    assert lesions["mean_sensitivity"] == pixels["mean_recall"]


def test_lesion_by_hand():
    target = mask("##..", "##..", "....")
    row = lesion.score_image(np.array([[0.9, 0.6, 0.51, 0.0], [0.8, 0.5, 0.2, 0.0], [0.0, 0.0, 0.0, 0.7]]), target)
    assert [row[name] for name in lesion.SCORES] == pytest.approx([3 / 6, 6 / 9, 3 / 4, 3 / 5, 9 / 12], abs=1e-15)
    healthy = np.zeros((3, 4), dtype=bool)
    assert [lesion.score_image(np.zeros((3, 4)), healthy)[name] for name in lesion.SCORES] == [1] * 5
    speck = drawing("#...", "....", "....")
    assert [lesion.score_image(speck, healthy)[name] for name in lesion.SCORES] == [0, 0, 0, 0, 11 / 12]


def test_lesion_equals_srs_except_for_smoothing():
    """Compare with the formulas of the release of SRS."""
    rng = np.random.default_rng(6)
    for share in (0.01, 0.3, 0.9):
        target = rng.random((32, 32)) < share
        predicted = rng.random((32, 32)) < 0.5
        hits, union = (predicted & target).sum(), (predicted | target).sum()
        sensitivity, precision = hits / (target.sum() + 1e-6), hits / (predicted.sum() + 1e-6)
        theirs = {
            "iou": (hits + 1e-5) / (union + 1e-5),
            "sensitivity": sensitivity,
            "precision": precision,
            "f1": 2 * sensitivity * precision / (sensitivity + precision + 1e-6),
        }
        row = lesion.score_image(predicted.astype(float), target)
        assert {name: row[name] for name in theirs} == pytest.approx(theirs, abs=1e-4)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")
def test_commit_is_that_of_this_package(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    source = tmp_path / "site-packages" / "commits.py"
    source.parent.mkdir()
    source.touch()
    (tmp_path / "other.py").touch()
    monkeypatch.setattr(commits, "__file__", str(source))
    assert commits.git_commit() is None  # no repository
    git("init")
    git("add", "other.py")
    git("commit", "-m", "another project")
    assert commits.git_commit() is None
    git("add", ".")
    git("commit", "-m", "this project")
    assert len(commits.git_commit()) == 40
    source.write_text("changed")
    assert commits.git_commit().endswith("-dirty")


def boundary_by_definition(mask, target, distance):
    """Boundary IoU from the distance of each pixel to the background, one by one."""

    def edge(one):
        padded = np.pad(one, distance)
        return {
            (row, column)
            for row, column in zip(*one.nonzero(), strict=True)
            if not padded[row : row + 2 * distance + 1, column : column + 2 * distance + 1].all()
        }

    edges = edge(mask), edge(target)
    return len(edges[0] & edges[1]) / len(edges[0] | edges[1])


def test_boundary_iou_by_hand():
    """Two squares of 6 pixels, one moved by a pixel; d is 1."""
    target, moved = np.zeros((2, 20, 30), bool)
    target[5:11, 5:11] = moved[5:11, 6:12] = True
    # Each edge has 20 pixels. They share the top and bottom rows, 5 pixels each.
    assert dis.boundary_iou(moved, target) == pytest.approx(10 / 30)
    assert dis.boundary_iou(target, target) == 1
    hollow = target.copy()
    hollow[6:10, 6:10] = False  # the inside does not matter, its new edge is the same pixels
    assert dis.boundary_iou(hollow, target) == 1
    empty = np.zeros_like(target)
    assert dis.boundary_iou(empty, target) == dis.boundary_iou(target, empty) == 0
    assert dis.boundary_iou(empty, empty) == 1


@pytest.mark.parametrize(("shape", "distance"), [((40, 50), 1), ((300, 400), 2)])
def test_boundary_iou_follows_its_definition(shape, distance):
    rng = np.random.default_rng(0)
    small = rng.random((2, shape[0] // 10, shape[1] // 10)) > 0.5
    mask, target = (np.kron(one, np.ones((10, 10))).astype(bool) for one in small)
    assert mask[:, 0].any()  # the object reaches the border of the image, which is background
    assert dis.boundary_iou(mask, target) == pytest.approx(boundary_by_definition(mask, target, distance))
