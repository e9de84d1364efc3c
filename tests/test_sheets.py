"""Test sheets of predictions and drawings of curves."""

import gc
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
from common import rejected
from PIL import Image, ImageFont

from unconceal.drawing.layout import FRAME, GAP, LINE_HEIGHT, PAPER, shortened
from unconceal.drawing.sheets import (
    CELL,
    CELL_NAMES,
    COLORS,
    FALSE,
    FOUND,
    MAX_RINGS,
    MIN_SIDE,
    MIN_WIDTH,
    MISSED,
    REST,
    SMALL,
    WHITE_BEHIND,
    ScoredImage,
    _figure,
    check_plots,
    draw_curves,
    draw_sheet,
    highest_point,
)
from unconceal.evaluation import protocol_cod as cod
from unconceal.evaluation import protocol_segmentation as segmentation


def cells_of(sheet, sizes, columns=CELL_NAMES):
    """Cut the cells of each row from the sheet; None for blanks."""
    width = max(MIN_WIDTH, *(size[0] for size in sizes))
    assert sheet.width == len(columns) * (width + GAP) + GAP
    rows = []
    bottom = sheet.height
    for cell_width, cell_height in reversed(sizes):
        top = bottom - GAP - cell_height
        lefts = [GAP + index * (width + GAP) for index in range(len(columns))]
        cells = (cut(sheet, left, top, cell_width, cell_height) for left in lefts)
        rows.append(dict(zip(columns, cells, strict=True)))
        bottom = top - LINE_HEIGHT
    return rows[::-1]


def cut(sheet, left, top, width, height):
    """Cut a framed cell; None for a blank."""
    framed = np.asarray(sheet.crop((left - 1, top - 1, left + width + 1, top + height + 1)))
    is_frame = np.ones(framed.shape[:2], bool)
    is_frame[1:-1, 1:-1] = False
    if (framed[is_frame] == PAPER).all():
        assert (framed == PAPER).all()
        return None
    assert (framed[is_frame] == FRAME).all()
    return framed[1:-1, 1:-1]


def kinds_of(cell):
    """Turn colors into kinds of error; all other colors are REST."""
    kinds = np.full(cell.shape[:2], REST)
    for kind in (FALSE, MISSED, FOUND):
        kinds[(cell == COLORS[kind]).all(-1)] = kind
    return kinds


def errors_of(target, probs, size=(CELL, CELL), image=None, **options):
    sheet = draw_sheet([ScoredImage("id", "", image, target, probs, **options)], "title")
    (cells,) = cells_of(sheet, [size], CELL_NAMES if image else CELL_NAMES[1:])
    return cells["errors"]


def make_scored(width=CELL, height=200, image=True, seed=0, **options):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) if image else None
    return ScoredImage("id", "IoU", image, rng.random((height, width)) > 0.5, rng.random((height, width)), **options)


def test_cells_at_the_size_of_the_image():
    scored = make_scored()
    (cells,) = cells_of(draw_sheet([scored], "title"), [(CELL, 200)])
    np.testing.assert_array_equal(cells["image"], np.asarray(scored.image))
    np.testing.assert_array_equal(cells["ground truth"], np.where(scored.target, 255, 0)[..., None].repeat(3, -1))
    np.testing.assert_array_equal(cells["prediction"], np.rint(scored.probs * 255)[..., None].repeat(3, -1))
    predicted = scored.probs > 0.5
    expected = np.where(scored.target, np.where(predicted, FOUND, MISSED), np.where(predicted, FALSE, REST))
    # Random pixels are connected, so there are hardly any rings; rings only cover REST.
    drawn = kinds_of(cells["errors"])
    np.testing.assert_array_equal(drawn[expected != REST], expected[expected != REST])
    is_rest = (expected == REST) & (drawn == REST)
    assert is_rest.sum() > 0.9 * (expected == REST).sum()
    behind = (WHITE_BEHIND * (np.asarray(scored.image.convert("L"))[is_rest] / 255)).astype(np.uint8)
    np.testing.assert_array_equal(cells["errors"][is_rest], behind[:, None].repeat(3, -1))


def test_without_an_image_the_rest_is_dark():
    target = np.zeros((8, 8), bool)
    np.testing.assert_array_equal(errors_of(target, target * 1.0), np.broadcast_to(COLORS[REST], (CELL, CELL, 3)))


def test_small_images_are_enlarged_by_nearest_neighbor():
    target = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool)
    probs = np.array([[1, 0.2, 0, 0], [0, 0, 0, 0.7]])
    (cells,) = cells_of(draw_sheet([ScoredImage("id", "", None, target, probs)], ""), [(CELL, 160)], CELL_NAMES[1:])
    blocks = np.array([[FOUND, MISSED, REST, REST], [REST, REST, REST, FALSE]])
    np.testing.assert_array_equal(cells["errors"], COLORS[blocks.repeat(80, 0).repeat(80, 1)])
    np.testing.assert_array_equal(cells["prediction"][::80, ::80, 0], [[255, 51, 0, 0], [0, 0, 0, 178]])


@pytest.mark.parametrize("kind", [FALSE, MISSED, FOUND])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (749, 888), (1499, 1999), (1493, 1)])
def test_one_pixel_survives_shrinking(kind, row, column):
    target, probs = np.zeros((1500, 2000), bool), np.zeros((1500, 2000), np.uint8)
    target[row, column] = kind != FALSE
    probs[row, column] = 0 if kind == MISSED else 128
    sheet = draw_sheet([ScoredImage("id", "", None, target, probs)], "")
    (cells,) = cells_of(sheet, [(CELL, 240)], CELL_NAMES[1:])
    position = -(-(row + 1) * 240 // 1500) - 1, -(-(column + 1) * 320 // 2000) - 1  # the cell pixel over it
    assert (cells["errors"][position] == COLORS[kind]).all()
    truth, prediction = np.zeros((240, 320)), np.zeros((240, 320))
    truth[position] = 0 if kind == FALSE else 255
    prediction[position] = 0 if kind == MISSED else 128
    np.testing.assert_array_equal(cells["ground truth"][..., 0], truth)
    np.testing.assert_array_equal(cells["prediction"][..., 0], prediction)


def test_errors_hide_found_pixels_and_the_more_frequent_error_wins():
    target, probs = np.ones((640, 640), bool), np.ones((640, 640))
    probs[0, 0] = 0  # one missed of four
    target[1, 3], probs[0, 2] = 0, 0  # one of each
    target[0, 4:6], probs[1, 4] = 0, 0  # two false, one missed
    target[:2, 6:8] = False
    kinds = kinds_of(errors_of(target, probs))
    assert list(kinds[0, :5]) == [MISSED, MISSED, FALSE, FALSE, FOUND]


@pytest.mark.parametrize("is_there", [False, True])
def test_errors_of_any_number_under_a_pixel_keep_their_kind(is_there):
    target = np.full((CELL * 12, CELL * 12), is_there)  # 144 under each, more than int8 can count
    kinds = kinds_of(errors_of(target, np.where(target, np.uint8(0), np.uint8(255))))
    assert (kinds == (MISSED if is_there else FALSE)).all()


@pytest.mark.parametrize("threshold", [0.5, 0.3, 128 / 255])
def test_8_bit_predictions_are_drawn_as_floats(threshold):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    target = np.arange(256).reshape(16, 16) % 3 == 0
    scored = [ScoredImage("id", "", None, target, probs, threshold) for probs in (levels, levels / np.float64(255))]
    sheets = [draw_sheet([one], "") for one in scored]
    np.testing.assert_array_equal(*map(np.asarray, sheets))
    (cells,) = cells_of(sheets[0], [(CELL, CELL)], CELL_NAMES[1:])
    predicted = np.isin(kinds_of(cells["errors"]), (FOUND, FALSE))[::20, ::20]
    np.testing.assert_array_equal(predicted, levels / 255 > threshold)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_predicted_pixels_are_those_of_the_scores(dtype):
    probs = np.array([[0.3, 0.29, 0.31, 0.5]], dtype)
    target = np.array([[True, True, True, False]])
    counts = segmentation.score_image(probs, target, threshold=0.3)
    kinds = kinds_of(errors_of(target, probs, (CELL, 80), threshold=0.3))[0, ::80]
    assert [(kinds == kind).sum() for kind in (FOUND, FALSE, MISSED)] == [counts[name] for name in ("tp", "fp", "fn")]


def test_rings_mark_small_regions():
    target, probs = np.zeros((CELL, CELL), bool), np.zeros((CELL, CELL))
    target[50:52, 50:52] = True  # missed
    probs[50:52, 150:152] = 1  # false
    target[50:52, 250:254] = True
    probs[50:52, 252:256] = 1  # found in part
    target[200 : 200 + SMALL + 1, 100] = True  # not small
    cell = errors_of(target, probs)
    kinds = kinds_of(cell)
    for column, kind in ((50.5, MISSED), (150.5, FALSE), (252.5, FOUND)):
        window = kinds[35:67, int(column) - 15 : int(column) + 17]
        rows, columns = np.nonzero(window == kind)
        distances = np.hypot(rows + 35 - 50.5, columns + int(column) - 15 - column)
        assert (distances > 4).sum() > 20
        assert distances.max() < 11
        others = set(np.unique(window[np.hypot(*(np.indices(window.shape) - 15.5)) > 5])) - {REST, kind}
        assert not others
    kinds[200 : 200 + SMALL + 1, 100] = REST
    kinds[:100] = REST
    assert (kinds == REST).all()


def test_rings_hide_nothing_and_do_not_fill_the_cell():
    rng = np.random.default_rng(0)
    target, probs = np.zeros((CELL, CELL), bool), np.zeros((CELL, CELL))
    target[160, 160] = True
    false = rng.permutation(np.argwhere(~target[::4, ::4]) * 4)
    for count in (MAX_RINGS, MAX_RINGS + 1):
        probs[tuple(false[:count].T)] = 1
        kinds = kinds_of(errors_of(target, probs))
        np.testing.assert_array_equal(kinds[(probs > 0.5) & ~target], FALSE)
        assert kinds[160, 160] in (MISSED, FOUND)
        assert ((kinds == FALSE).sum() > count) == (count == MAX_RINGS)
        assert (kinds == kinds[160, 160]).sum() > 20


def test_a_found_target_under_an_error_has_a_white_ring():
    target, probs = np.zeros((3200, 3200), bool), np.zeros((3200, 3200))
    target[1600:1602, 1600:1602] = True
    probs[1601:1605, 1601:1605] = 1
    kinds = kinds_of(errors_of(target, probs))
    assert kinds[160, 160] == FALSE
    assert (kinds == FOUND).sum() > 20
    assert (kinds == FALSE).sum() == 1


def test_the_image_column_is_left_out_without_images():
    scored = [make_scored(image=False, seed=seed) for seed in range(2)]
    rows = cells_of(draw_sheet(scored, "title"), [(CELL, 200)] * 2, CELL_NAMES[1:])
    assert not any(cell is None for row in rows for cell in row.values())
    rows = cells_of(draw_sheet([scored[0], make_scored()], "title"), [(CELL, 200)] * 2)
    assert [row["image"] is None for row in rows] == [True, False]
    assert all(row[name] is not None for row in rows for name in CELL_NAMES[1:])


def test_images_are_shown_at_the_size_of_the_ground_truth():
    for mode, gray in (("L", 200), ("RGBA", (200, 200, 200, 255)), ("I;16", 200 * 257)):
        scored = replace(make_scored(), image=Image.new(mode, (10, 70), gray))
        (cells,) = cells_of(draw_sheet([scored], ""), [(CELL, 200)])
        assert (cells["image"] == 200).all()


def test_images_are_taken_one_by_one():
    taken = []

    def scored_images():
        for seed in range(2):
            gc.collect()
            assert not any(reference() is not None for reference in taken)
            scored = make_scored(seed=seed)
            taken.extend(weakref.ref(each) for each in (scored, scored.target, scored.probs, scored.image))
            yield scored
            del scored

    sheet = draw_sheet(scored_images(), "title")
    for seed, row in enumerate(cells_of(sheet, [(CELL, 200)] * 2)):
        np.testing.assert_array_equal(row["image"], np.asarray(make_scored(seed=seed).image))


@pytest.mark.parametrize("shape", [(1, 1), (2, 3000), (20000, 1), (7, 5)])
def test_extreme_sizes(shape):
    target, probs = np.zeros(shape, bool), np.zeros(shape)
    target[0, 0] = True
    probs[-1, -1] = 1
    height, width = (max(MIN_SIDE, round(CELL * side / max(shape))) for side in shape)
    sheet = draw_sheet([ScoredImage("id", "caption", Image.new("RGB", shape[::-1]), target, probs)], "title")
    (cells,) = cells_of(sheet, [(width, height)])
    errors = cells["errors"]
    assert (errors[0, 0] == COLORS[MISSED if target.size > 1 else FOUND]).all()
    assert (errors[-1, -1] == COLORS[FALSE if target.size > 1 else FOUND]).all()
    assert sheet.height < 600


def test_shortened():
    font = ImageFont.load_default(size=13)
    text = "first-" + "x" * 300 + "-last"
    for width in (50, 120, 121, 300):
        short = shortened(text, lambda line, width=width: font.getlength(line) <= width)
        start, end = short.split("…")
        assert text.startswith(start) and text.endswith(end)
        assert 0 <= len(start) - len(end) <= 1
        assert font.getlength(short) <= width < font.getlength(f"{start}xx…{end}")
    assert shortened("abcdef", lambda line: len(line) <= 6) == "abcdef"
    assert shortened("abcdef", lambda line: len(line) <= 5) == "ab…ef"
    assert shortened("abcdef", lambda line: len(line) <= 4) == "ab…f"
    assert shortened("abcdef", lambda line: False) == "…"
    assert shortened("a\n b\udcff", lambda line: True) == "a b?"


def test_what_cannot_be_drawn_is_rejected():
    with pytest.raises(ValueError, match="resize the prediction"):
        draw_sheet([ScoredImage("id", "", None, np.zeros((2, 2), bool), np.zeros((2, 3)))], "title")
    with pytest.raises(ValueError, match="^no image to draw$"):
        draw_sheet(iter(()), "title")
    with pytest.raises(ValueError, match="^no curve to draw$"):
        draw_curves({}, segmentation.CURVES, "")


def curves_of(seed=0):
    rng = np.random.default_rng(seed)
    recall, precision, f1 = np.sort(rng.random(256)), np.sort(rng.random(256)), rng.random(256)
    return {"precision_curve": precision.tolist(), "recall_curve": recall.tolist(), "f1_curve": f1.tolist()}


def test_highest_point_is_at_its_threshold():
    rng = np.random.default_rng(0)
    target = rng.random((60, 60)) > 0.6
    probs = (0.5 * target + 0.5 * rng.random(target.shape)) ** 2
    threshold, value = highest_point(segmentation.score_image(probs, target)["f1_curve"])
    by_hand = {}
    for each in range(256):
        predicted = np.floor(probs * 255) >= each
        by_hand[each] = 2 * (predicted & target).sum() / (predicted.sum() + target.sum())
    assert threshold == max(by_hand, key=by_hand.get)
    assert value == pytest.approx(by_hand[threshold])
    assert highest_point([0.0] * 255 + [1.0]) == (0, 1.0)
    assert highest_point([1.0] + [0.0] * 255) == (255, 1.0)
    assert highest_point([0.25] * 256) == (255, 0.25)


def test_lines_hold_the_curves():
    methods = {"RUN": curves_of(0), "SRS": curves_of(1)}
    figure = _figure(methods, segmentation.CURVES, "SIRST")
    left, right = figure.axes
    assert (left.get_xlabel(), left.get_ylabel(), right.get_ylabel()) == ("recall", "precision", "F1")
    (legend,) = figure.legends
    for values, over_recall, over_threshold, text in zip(
        methods.values(), left.lines, right.lines, legend.get_texts(), strict=True
    ):
        np.testing.assert_array_equal(over_recall.get_xdata(), values["recall_curve"])
        np.testing.assert_array_equal(over_recall.get_ydata(), values["precision_curve"])
        f = dict(over_threshold.get_xydata().tolist())
        assert (f[255], f[254], f[0]) == (values["f1_curve"][0], values["f1_curve"][1], values["f1_curve"][255])
        best = max(f, key=f.get)
        (marked,) = over_threshold.get_markevery()
        assert over_threshold.get_xdata()[marked] == best
        assert over_recall.get_markevery() == [marked]
        assert text.get_text().endswith(f": {f[best]:.3f} at {best:.0f}")
    assert [text.get_text().split(":")[0] for text in legend.get_texts()] == ["RUN", "SRS"]


def test_f_of_camouflage_is_drawn_and_not_e():
    rng = np.random.default_rng(0)
    curves = {name: rng.random(256).tolist() for name in cod.CURVES}
    _, right = _figure({"RUN": curves}, cod.CURVES, "").axes
    np.testing.assert_array_equal(right.lines[0].get_ydata(), curves["f_measure_curve"])
    assert right.get_ylabel() == "F (β² = 0.3)"


def test_image_of_curves():
    import matplotlib

    settings = dict(matplotlib.rcParams)
    image = draw_curves({"RUN": curves_of()}, segmentation.CURVES, "SIRST")
    assert image.mode == "RGB"
    assert image.width == 2400
    pixels = np.asarray(image)
    assert (pixels == (0x00, 0x72, 0xB2)).all(-1).sum() > 5000  # the line
    assert (pixels[:5] == 255).all() and (pixels[:, :5] == 255).all() and (pixels[:, -5:] == 255).all()
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("name", ["_hidden", "$\\frac$", "a\nb", "x" * 500, "W" * 30, "bytes\udcff"])
def test_names_of_all_kinds(name):
    methods = {name: curves_of(), "other": curves_of(1), "third" + name: curves_of(2)}
    image = draw_curves(methods, segmentation.CURVES, name)
    (legend,) = _figure(methods, segmentation.CURVES, name).legends
    first = legend.get_texts()[0].get_text().split(": ")[0]
    assert first == shortened(name, lambda text: len(text) <= 40)
    pixels = np.asarray(image)
    assert (pixels[:, :5] == 255).all() and (pixels[:, -5:] == 255).all()


def test_without_matplotlib(monkeypatch):
    check_plots()
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (check_plots, lambda: draw_curves({"RUN": curves_of()}, segmentation.CURVES, "")):
        with rejected("pip install 'unconceal\\[plots\\]'"):
            call()
    draw_sheet([make_scored()], "title")  # which needs none
