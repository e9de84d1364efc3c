"""Tables of measured and published figures, from hand-made results and the file of the papers' figures."""

import json
import statistics
from pathlib import Path

import pytest

from unconceal.data.sources import COD_TEST_SETS, DIS5K_SPLITS
from unconceal.evaluation.protocols import PROTOCOLS
from unconceal.evaluation.tables import (
    MARKS,
    find_benchmark,
    load_papers,
    make_tables,
    read_result,
    to_latex,
    to_markdown,
)
from unconceal.utils.errors import UserError
from unconceal.utils.markdown import escape_latex, latex_table


BENCHMARKS, PUBLISHED = load_papers()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCORES = {
    "cod": {"s_measure": 0.8, "f_measure_adaptive": 0.75, "e_measure_mean": 0.86, "mae": 0.0704},
    "dis": {"f_measure_max": 0.8, "mae": 0.06, "hce": 150.4},
    "lesion": {"mean_iou": 0.88, "mean_f1": 0.93},
    "infrared": {"niou": 0.85, "pd": 0.97, "fa": 1.2361e-5},
    "segmentation": {"iou": 0.7, "f1": 0.8},
}


@pytest.fixture
def write(tmp_path):
    """Writes the results.json of a method on a benchmark into a new folder and returns that; keywords change it."""

    def write(on: str = "CAMO", *, num_images: int | None = None, scores: dict | None = None, **changed) -> Path:
        benchmark = BENCHMARKS[on]
        protocol = PROTOCOLS[changed.get("protocol", benchmark.protocol)]
        num_images = num_images or benchmark.num_images
        data = {
            "name": "ours",
            "protocol": protocol.name,
            "results": {**SCORES[protocol.name], **(scores or {}), "num_images": num_images},
            "sources": {benchmark.source: num_images},
            "split": benchmark.split,
            "benchmark": None,
            "limit": None,
            "options": protocol.options(**protocol.report_options),
            "date": "2026-11-21T10:00:00+00:00",
            "git_commit": COMMIT,
            **changed,
        }
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(data), encoding="utf-8")
        return folder

    return write


def tables_of(*paths: Path, **options):
    return make_tables(map(read_result, paths), **options)


def cells(table, method: str, source: str = "measured") -> dict[str, str]:
    """The one row of a method and a source, by the titles of the columns."""
    (row,) = [row for row in table.rows if (row[0], row[-1]) == (method, source)]
    return dict(zip(table.header, row, strict=True))


# The published figures.


def test_benchmarks_are_known():
    assert list(BENCHMARKS) == [
        *("CHAMELEON", "CAMO", "COD10K", "NC4K", "DIS-VD", "DIS-TE1", "DIS-TE2", "DIS-TE3", "DIS-TE4", "DIS-TE"),
        *("BUS", "KBT"),
    ]
    assert [benchmark.num_images for benchmark in BENCHMARKS.values()] == [
        *(76, 250, 2026, 4121, 470, 500, 500, 500, 500, 2000),
        *(169, 1799),
    ]
    splits = {name: (each.source, each.split) for name, each in BENCHMARKS.items() if each.source}
    expected = {name: (f"cod/{name}", name) for name in COD_TEST_SETS}
    expected |= {name: (f"dis5k/{name}", split) for name, split in DIS5K_SPLITS.items() if name != "DIS-TR"}
    assert splits == expected | {"BUS": ("bus", "val"), "KBT": ("kbt", "val")}
    assert {each.protocol for each in BENCHMARKS.values()} <= PROTOCOLS.keys()
    assert BENCHMARKS["DIS-TE"].mean_of == ("DIS-TE1", "DIS-TE2", "DIS-TE3", "DIS-TE4")


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.benchmark}-{row.method}-{row.source}")
def test_published_figures_are_plausible(row):
    columns = PROTOCOLS[BENCHMARKS[row.benchmark].protocol].columns
    assert row.figures
    for metric, value in row.figures.items():
        if metric == "hce":
            assert isinstance(value, int) and 100 < value < 3000
        elif columns[metric].higher_is_better:
            assert 0.6 < value < 1
        else:
            assert 0 < value < 0.1
    assert row.doubts.keys() <= row.figures.keys()


def test_published_rows_are_complete():
    run = [row for row in PUBLISHED if row.source.startswith("RUN, Table 1")]
    assert len(run) == 19 * 4
    assert {len(row.figures) for row in run} == {4}
    settings = [row.source for row in run if row.benchmark == "NC4K"]
    expected = {"common setting": 13, "multiple input scales": 3, "multiple stages": 3}
    assert settings == [f"RUN, Table 1, {setting}" for setting, number in expected.items() for _ in range(number)]
    rows = [(row.benchmark, row.method, row.backbone, row.source) for row in PUBLISHED]
    assert len(set(rows)) == len(rows)
    for name in BENCHMARKS:
        doubts = {doubt for row in PUBLISHED if row.benchmark == name for doubt in row.doubts.values()}
        assert len(doubts) <= len(MARKS)


@pytest.mark.parametrize("method", ["IS-Net", "OPDS"])
def test_published_means_are_those_of_the_four_sets(method):
    by_set = {row.benchmark: row.figures for row in PUBLISHED if row.method == method}
    for metric, overall in by_set["DIS-TE"].items():
        mean = statistics.fmean(by_set[f"DIS-TE{i}"][metric] for i in range(1, 5))
        # Both sides are rounded, and OPDS's overall HCE is 0.75 above the mean of its four.
        assert overall == pytest.approx(mean, abs=1 if metric == "hce" else 0.00101)


@pytest.mark.parametrize(
    ("benchmark", "method", "backbone", "place", "expected"),
    [
        ("CHAMELEON", "SINet", "ResNet-50", "common", {"mae": 0.034, "f_measure_adaptive": 0.823}),
        ("CAMO", "RUN", "ResNet-50", "common", {"mae": 0.070, "f_measure_adaptive": 0.781, "e_measure_mean": 0.868}),
        ("CAMO", "CamoFocus", "PVTv2", "common", {"mae": 0.044, "s_measure": 0.870}),
        ("COD10K", "RUN", "PVTv2", "common", {"mae": 0.021, "e_measure_mean": 0.941, "s_measure": 0.878}),
        ("COD10K", "FEDER", "ResNet-50", "input scales", {"e_measure_mean": 0.913, "s_measure": 0.837}),
        ("NC4K", "RUN", "Res2Net-50", "common", {"f_measure_adaptive": 0.830, "s_measure": 0.859}),
        ("NC4K", "RUN-4", "ResNet-50", "stages", {"mae": 0.041, "e_measure_mean": 0.925, "s_measure": 0.870}),
        ("DIS-VD", "IS-Net", None, "", {"f_measure_max": 0.791, "weighted_f_measure": 0.717, "hce": 1116}),
        ("DIS-TE4", "IS-Net", None, "", {"s_measure": 0.830, "e_measure_mean": 0.870, "hce": 2888}),
        ("DIS-TE3", "OPDS", None, "poster", {"f_measure_max": 0.882, "mae": 0.058, "hce": 680}),
        ("DIS-TE", "OPDS", None, "poster", {"weighted_f_measure": 0.799, "e_measure_mean": 0.896, "hce": 986}),
        ("DIS-TE1", "OPDS with single-scale supervision", None, "Table 2", {"f_measure_max": 0.806, "hce": 169}),
        ("BUS", "SRS", None, "README", {"mean_iou": 0.8829, "mean_f1": 0.9344}),
        ("KBT", "SRS", None, "quick", {"niou": 0.8617, "mean_f1": 0.9148}),
    ],
)
def test_spot_checks(benchmark, method, backbone, place, expected):
    (row,) = [
        row
        for row in PUBLISHED
        if (row.benchmark, row.method, row.backbone) == (benchmark, method, backbone) and place in row.source
    ]
    assert {metric: row.figures[metric] for metric in expected} == expected


# Which table a result belongs to.


@pytest.mark.parametrize(
    ("on", "changed", "expected"),
    [
        ("CAMO", {}, "CAMO"),
        ("COD10K", {}, "COD10K"),
        ("DIS-VD", {}, "DIS-VD"),
        ("DIS-TE2", {}, "DIS-TE2"),
        ("BUS", {}, "BUS"),
        ("KBT", {"division_seed": 3}, "KBT"),
        ("KBT", {"protocol": "segmentation"}, "KBT"),
        ("CAMO", {"split": "train"}, None),
        ("CAMO", {"split": None}, None),
        ("CAMO", {"sources": {"cod/CAMO": 249, "cod/COD10K": 1}}, None),
        ("CAMO", {"sources": {}, "split": None}, None),
        ("CAMO", {"sources": {"mine": 76}, "split": None, "benchmark": "CHAMELEON"}, "CHAMELEON"),
        ("CAMO", {"benchmark": "NC4K"}, "NC4K"),
    ],
)
def test_find_benchmark(write, on, changed, expected):
    assert find_benchmark(read_result(write(on, **changed))) == expected


def test_benchmarks_come_in_their_order_and_other_data_last(write):
    paths = [write("KBT", split="train"), write("BUS"), write("CAMO", benchmark="NC4K"), write("CAMO")]
    assert [table.title for table in tables_of(*paths)] == [
        "CAMO (camouflaged objects), 250 images, protocol cod",
        "NC4K (camouflaged objects), 4121 images, protocol cod",
        "BUS (breast lesions in ultrasound), 169 images, protocol lesion",
        "train of kbt, protocol infrared",
    ]


def test_other_data_stands_alone(write):
    other = {"protocol": "segmentation", "split": "val"}
    (table, test) = tables_of(
        write(**other, sources={"busi/normal": 5, "busi/benign": 20}, num_images=25),
        write(**other, name="theirs", sources={"busi/benign": 3, "busi/normal": 1}, num_images=4),
        write(protocol="segmentation", split=None, sources={"busi/benign": 20}, num_images=20),
    )
    assert table.title == "val of busi/benign, busi/normal, protocol segmentation"
    assert table.header == ["method", "IoU", "F1", "source"]
    assert table.rows == [
        ["ours (25 images)", "0.700", "0.800", "measured"],
        ["theirs (4 images)", "0.700", "0.800", "measured"],
    ]
    assert table.notes == ["Measured: ours on 2026-11-21 at commit 0123456; theirs on 2026-11-21 at commit 0123456."]
    assert test.title == "busi/benign, protocol segmentation"


def test_another_protocol_than_the_benchmarks_has_no_published_rows(write):
    comparable, alone = tables_of(write("BUS"), write("BUS", protocol="segmentation"))
    assert [row[-1] for row in comparable.rows] == ["SRS, README", "measured"]
    assert alone.title == "BUS (breast lesions in ultrasound), 169 images, protocol segmentation"
    assert alone.rows == [["ours", "0.700", "0.800", "measured"]]
    assert alone.notes[0] == (
        "Scored by the protocol segmentation. Published figures are of the protocol lesion, so none is shown."
    )
    assert not any("Published:" in note for note in alone.notes)


# What a table shows.


def test_published_rows_first_and_marked(write):
    (table,) = tables_of(write(scores={"weighted_f_measure": 0.6666}))
    assert table.header == ["method", "S", "weighted F", "adaptive F", "mean E", "MAE", "source"]
    assert table.rows[0] == [
        "SINet (ResNet-50)",
        "0.745",
        "–",
        "0.712†",
        "0.804†",
        "0.092",
        "RUN, Table 1, common setting",
    ]
    assert table.rows[-1] == ["ours", "0.800", "0.667", "0.750", "0.860", "0.070", "measured"]
    places = [row[-1].removeprefix("RUN, Table 1, ") for row in table.rows]
    assert places == ["common setting"] * 13 + ["multiple input scales"] * 3 + ["multiple stages"] * 3 + ["measured"]
    assert table.notes[0].startswith("† RUN does not say which F and E")
    assert table.notes[1:] == [
        "Published: RUN (ICML 2025, https://arxiv.org/abs/2501.18783).",
        "Measured: ours on 2026-11-21 at commit 0123456.",
    ]


def test_each_doubt_has_its_mark(write):
    (table,) = tables_of(write("DIS-TE1"))
    assert cells(table, "IS-Net", "IS-Net, quantitative comparison") == {
        **{"method": "IS-Net", "max F": "0.740†", "weighted F": "0.662", "MAE": "0.074", "S": "0.787"},
        **{"mean E": "0.820", "HCE": "149", "source": "IS-Net, quantitative comparison"},
    }
    assert cells(table, "OPDS", "OPDS, poster")["max F"] == "0.822‡"
    assert [row[0] for row in table.rows if row[-1] == "OPDS, poster, ablation in Table 2"] == [
        "OPDS with a single head and single-scale supervision",
        "OPDS with single-scale supervision",
    ]
    assert cells(table, "ours")["HCE"] == "150"
    assert [note[:2] for note in table.notes[:2]] == ["† ", "‡ "]
    assert table.notes[2] == "Published: IS-Net (ECCV 2022, https://github.com/xuebinqin/DIS); OPDS (BMVC 2023)."


def test_without_papers(write):
    (table,) = tables_of(write(), with_papers=False)
    assert table.rows == [["ours", "0.800", "0.750", "0.860", "0.070", "measured"]]
    assert table.notes == ["Measured: ours on 2026-11-21 at commit 0123456."]


def test_columns_scale(write):
    (table,) = tables_of(write("KBT"))
    assert table.header == ["method", "nIoU", "mean F1", "Pd", "Fa (1e-6)", "source"]
    assert table.rows == [
        ["SRS", "0.863", "0.926", "–", "–", "SRS, README"],
        ["SRS", "0.862", "0.915", "–", "–", "SRS, README, newer quick evaluation"],
        ["ours", "0.850", "–", "0.970", "12.36", "measured"],
    ]
    assert "means over three" in table.notes[0]


@pytest.mark.parametrize(
    ("on", "changed", "method"),
    [
        ("CAMO", {"num_images": 22}, "ours (22 of 250 images)"),
        ("CAMO", {"num_images": 251}, "ours (251 of 250 images)"),
        ("CAMO", {"options": {"min_max": False}}, "ours (min_max off)"),
        ("CAMO", {"refine": "never"}, "ours"),
        ("CAMO", {"refine": "auto"}, "ours (refine auto)"),
        ("DIS-VD", {"options": {"min_max": True, "hce": True}}, "ours"),
        ("DIS-VD", {"options": {"min_max": True, "hce": False}}, "ours (hce off)"),
        (
            "KBT",
            {"options": {"threshold": 0.4, "max_distance": 3, "by_area": True}},
            "ours (threshold 0.4, by_area on)",
        ),
        ("BUS", {"options": {"newer": "x"}, "num_images": 5}, "ours (5 of 169 images, newer x)"),
        ("BUS", {"division_seed": 0}, "ours (division by seed 0)"),
        ("BUS", {"name": " two\nlines "}, "two lines"),
        ("BUS", {"protocol": "segmentation", "num_images": 5}, "ours (5 of 169 images)"),
    ],
)
def test_method_tells_what_is_not_as_in_papers(write, on, changed, method):
    (table,) = tables_of(write(on, **changed))
    assert table.rows[-1][0] == method


def test_note_on_what_was_measured(write):
    paths = [
        write(name="a", git_commit=f"{COMMIT}-dirty"),
        write(name="b", git_commit=None),
        write(name="c", date=None, git_commit=None),
    ]
    (table,) = tables_of(*paths)
    assert table.notes[-1] == (
        "Measured: a on 2026-11-21 at commit 0123456 with uncommitted changes; b on 2026-11-21; c on an unknown day."
    )


def test_divisions_become_mean_and_deviation(write):
    ious, f1s = [0.8812, 0.8734, 0.8951], [0.93, 0.92, 0.97]
    paths = [
        write(
            "BUS", scores={"mean_iou": iou, "mean_f1": f1}, division_seed=seed, date=f"2026-11-2{seed}T00:00:00+00:00"
        )
        for seed, (iou, f1) in enumerate(zip(ious, f1s, strict=True))
    ]
    (table,) = tables_of(*paths, write("BUS", name="once"))
    row = cells(table, "ours (mean of 3 divisions)")
    assert row["mean IoU"] == f"{statistics.mean(ious):.3f} ± {statistics.stdev(ious):.3f}" == "0.883 ± 0.011"
    assert row["mean F1"] == f"{statistics.mean(f1s):.3f} ± {statistics.stdev(f1s):.3f}"
    assert cells(table, "once")["mean IoU"] == "0.880"
    assert [row[0] for row in table.rows] == ["SRS", "ours (mean of 3 divisions)", "once"]
    assert "± is the sample standard deviation over the divisions." in table.notes
    assert all(f"on 2026-11-2{seed} at commit" in table.notes[-1] for seed in range(3))


def test_divisions_of_other_sizes(write):
    paths = [write("BUS", division_seed=seed, num_images=number) for seed, number in enumerate((170, 168, 169))]
    (table,) = tables_of(*paths)
    assert table.rows[-1][0] == "ours (mean of 3 divisions, 168 to 170 of 169 images)"


def test_deviations_scale(write):
    paths = [write("KBT", division_seed=seed, scores={"fa": fa}) for seed, fa in ((5, 1e-5), (8, 3e-5))]
    (table,) = tables_of(*paths)
    assert cells(table, "ours (mean of 2 divisions)")["Fa (1e-6)"] == "20.00 ± 14.14"


# The mean of the four test sets of DIS5K.


def write_test_sets(write, **changed):
    """Results on the four sets whose means by hand are max F 0.825, MAE 0.0625 and HCE 985.25."""
    figures = [(0.81, 0.05, 147), (0.82, 0.06, 346), (0.83, 0.07, 680), (0.84, 0.07, 2768)]
    return [
        write(f"DIS-TE{i}", scores={"f_measure_max": f, "mae": mae, "hce": hce}, **changed)
        for i, (f, mae, hce) in enumerate(figures, start=1)
    ]


def test_mean_of_the_test_sets(write):
    *sets, mean = tables_of(*write_test_sets(write), write("DIS-TE1", name="one only"))
    assert [table.title[:7] for table in sets] == ["DIS-TE1", "DIS-TE2", "DIS-TE3", "DIS-TE4"]
    assert mean.title == "DIS-TE1 to DIS-TE4 of DIS5K, mean of the four, 2000 images, protocol dis"
    assert [row[0] for row in mean.rows] == ["IS-Net", "OPDS", "ours"]
    assert cells(mean, "OPDS", "OPDS, poster")["HCE"] == "986"
    row = cells(mean, "ours")
    assert (row["max F"], row["MAE"], row["HCE"], row["S"]) == ("0.825", "0.062", "985", "–")
    assert mean.notes[-1] == "Measured: ours on 2026-11-21 at commit 0123456."


def test_no_mean_of_three_test_sets(write):
    assert len(tables_of(*write_test_sets(write)[:3])) == 3


def test_no_mean_by_another_protocol(write):
    assert len(tables_of(*write_test_sets(write, protocol="segmentation"))) == 4


def test_mean_of_the_test_sets_tells_what_its_parts_tell(write):
    paths = write_test_sets(write)[:3]
    replaced = write("DIS-TE4", options={"min_max": False, "hce": False}, num_images=10, date="2026-11-23")
    data = json.loads((replaced / "results.json").read_text())
    del data["results"]["hce"]
    (replaced / "results.json").write_text(json.dumps(data))
    mean = tables_of(*paths, replaced)[-1]
    row = cells(mean, "ours (1510 of 2000 images, min_max off, hce off)")
    assert row["HCE"] == "–" and row["max F"] == "0.815"
    assert "on 2026-11-21" in mean.notes[-1] and "on 2026-11-23" in mean.notes[-1]


def test_mean_of_the_test_sets_over_divisions(write):
    first = write_test_sets(write, division_seed=1)
    second = [write(f"DIS-TE{i}", scores={"f_measure_max": 0.805}, division_seed=2) for i in range(1, 5)]
    row = cells(tables_of(*first, *second)[-1], "ours (mean of 2 divisions)")
    assert row["max F"] == f"0.815 ± {statistics.stdev([0.825, 0.805]):.3f}"


# Mistakes.


def one_line_of(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("changed", [{}, {"division_seed": 4}])
def test_two_results_for_one_row(write, changed):
    paths = [write("BUS", **changed), write("BUS", name="other"), write("BUS", **changed)]
    with pytest.raises(UserError) as error:
        tables_of(*paths)
    message = one_line_of(error)
    assert f"{paths[0] / 'results.json'} and {paths[2] / 'results.json'}" in message
    assert "'ours'" in message and "BUS" in message and "give them different --name" in message


def test_a_division_beside_the_official_one(write):
    with pytest.raises(UserError, match="not of two random divisions"):
        tables_of(write("BUS", division_seed=1), write("BUS"))


def test_one_name_on_two_benchmarks_is_no_mistake(write):
    assert len(tables_of(write("BUS"), write("KBT"), write("BUS", protocol="segmentation"))) == 3


def test_divisions_scored_by_different_options(write):
    paths = [write("CAMO", division_seed=seed, options={"min_max": bool(seed)}) for seed in range(2)]
    with pytest.raises(UserError, match="different options"):
        tables_of(*paths)


@pytest.mark.parametrize(
    ("benchmark", "expected"),
    [
        ("COD", "expected one of CHAMELEON, CAMO, .*, KBT;"),
        ("DIS-TE", "expected one of DIS-TE1, DIS-TE2, DIS-TE3, DIS-TE4;"),
    ],
)
def test_benchmark_that_nothing_is_scored_on(write, benchmark, expected):
    path = write("DIS-TE1", benchmark=benchmark)
    with pytest.raises(UserError, match=expected) as error:
        tables_of(path)
    assert str(path) in one_line_of(error)


def test_reads_a_file_or_its_folder(write):
    folder = write()
    assert read_result(folder) == read_result(str(folder / "results.json"))


@pytest.mark.parametrize("name", ["nothing", "", "nothing.json"])
def test_missing_file(tmp_path, name):
    with pytest.raises(UserError, match="No such file") as error:
        read_result(tmp_path / name)
    assert "evaluate.py --out" in one_line_of(error)


@pytest.mark.parametrize("content", [b"", b'{"name": "ours",\n\n', b"\xff\xfe\x00", b"name: ours"])
def test_damaged_file(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged") as error:
        read_result(path)
    assert str(path) in one_line_of(error)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"name": None}, "'name' is null, expected str"),
        ({"name": "  "}, "'name' is empty"),
        ({"sources": ["cod/CAMO"]}, "'sources' is .* expected dict"),
        ({"options": None}, "'options' is null"),
        ({"split": 3}, "'split' is 3, expected str"),
        ({"division_seed": True}, "'division_seed' is true, expected int"),
        ({"results": {"s_measure": 0.8}}, "no num_images"),
        ({"results": {"s_measure": 0.8, "num_images": 2.5}}, "no num_images"),
        ({"results": {"accuracy": 0.8, "num_images": 4}}, "no number of the protocol cod"),
        ({"scores": {"mae": float("nan")}}, "mae is NaN, expected a finite number"),
        ({"scores": {"mae": "0.05"}}, "mae is "),
        ({"scores": {"mae": True}}, "mae is true"),
    ],
)
def test_foreign_file(write, changed, problem):
    path = write(**changed)
    with pytest.raises(UserError, match=f"is no results.json of evaluate.py: .*{problem}") as error:
        read_result(path)
    assert str(path) in one_line_of(error)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[1, 2]", "it holds a list"),
        ('{"accuracy": 0.9}', "it has no 'name'"),
        ('{"name": "x", "protocol": ["cod"]}', "'protocol' is .* expected str"),
        (
            '{"name": "x", "protocol": "voc", "results": {}, "sources": {}, "options": {}}',
            "'protocol' is 'voc', expected one of segmentation, cod",
        ),
    ],
)
def test_foreign_content(tmp_path, content, problem):
    path = tmp_path / "any.json"
    path.write_text(content)
    with pytest.raises(UserError, match=problem):
        read_result(path)


# Markdown and LaTeX.


def test_markdown(write):
    tables = tables_of(write("BUS", name="a|b"), write("CAMO", name="c"))
    text = to_markdown(tables)
    assert text.startswith("### CAMO (camouflaged objects), 250 images, protocol cod\n\n| method | S | adaptive F |")
    assert "\n| SINet (ResNet-50) | 0.745 | 0.712† | 0.804† | 0.092 | RUN, Table 1, common setting |\n" in text
    assert "\n| a\\|b | 0.880 | 0.930 | measured |\n\n" in text
    assert "\n\n† RUN does not say" in text
    assert text.count("\n### BUS") == 1
    # Every line of a table has the same number of cells.
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1


def test_latex(write):
    seeds = [write("BUS", name="50% of R_1 & #2", division_seed=seed) for seed in range(2)]
    camo, bus = to_latex(tables_of(*seeds, write("CAMO"))).split("\n\n\\begin{table}\n")
    assert camo.startswith(
        "\\begin{table}\n\\centering\n\\caption{CAMO (camouflaged objects), 250 images, protocol cod}\n"
    )
    assert (
        "\n\\begin{tabular}{lccccc}\n\\toprule\nmethod & S & adaptive F & mean E & MAE & source \\\\\n\\midrule\n"
        in camo
    )
    assert "\nSINet (ResNet-50) & 0.745 & 0.712\\textdagger{} & 0.804\\textdagger{} & 0.092 &" in camo
    assert "\n\\textdagger{} RUN does not say" in camo
    row = r"50\% of R\_1 \& \#2 (mean of 2 divisions) & 0.880 $\pm$ 0.000 & 0.930 $\pm$ 0.000 & measured \\"
    assert f"\n{row}\n\\bottomrule\n\\end{{tabular}}\n" in bus
    assert "\nMeasured: 50\\% of R\\_1 \\& \\#2 on" in bus
    assert bus.endswith("\n\\end{flushleft}\n\\end{table}")
    other = to_latex(tables_of(write("CAMO", sources={"my_data": 250}, split="50%")))
    assert "\n\\caption{50\\% of my\\_data, protocol cod}\n" in other


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b % c & #1 $2", r"a\_b \% c \& \#1 \$2"),
        ("{x}~^", r"\{x\}\textasciitilde{}\textasciicircum{}"),
        ("\\", r"\textbackslash{}"),
        ("a<b>|c", r"a\textless{}b\textgreater{}\textbar{}c"),
        ("0.1 ± 0.2†‡§¶ –", r"0.1 $\pm$ 0.2\textdagger{}\textdaggerdbl{}\S{}\P{} --"),
        ("[best]*", "{[}best]{*}"),
    ],
)
def test_latex_escapes(text, expected):
    assert escape_latex(text) == expected


def test_every_mark_can_be_set_in_latex():
    assert all(escape_latex(mark).isascii() for mark in MARKS)


def test_latex_table():
    assert latex_table(iter(["a_b", "c"]), iter([["1", "2"], ["x", "&"]])) == "\n".join(
        [
            r"\begin{tabular}{lc}",
            r"\toprule",
            r"a\_b & c \\",
            r"\midrule",
            r"1 & 2 \\",
            r"x & \& \\",
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )
