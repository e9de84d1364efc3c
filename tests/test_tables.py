"""Test tables of measured and published figures."""

import json
import statistics
from pathlib import Path

import pytest
from common import rejected
from PIL import Image

from unconceal.__main__ import main
from unconceal.commands.explain import save_sheet
from unconceal.data.sources import COD_TEST_SETS, DIS5K_SPLITS
from unconceal.evaluation.protocols import PROTOCOLS
from unconceal.evaluation.tables import find_benchmark, load_papers, make_tables, read_result, to_markdown


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
    """Return a function to write a results.json into a new folder."""

    def write(on: str = "CAMO", *, num_images: int | None = None, scores: dict | None = None, **changed) -> Path:
        benchmark = BENCHMARKS[on]
        protocol = PROTOCOLS.get(changed.get("protocol"), PROTOCOLS[benchmark.protocol])
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
    """Return the row of a method and a source, by column title."""
    (row,) = [row for row in table.rows if (row[0], row[-1]) == (method, source)]
    return dict(zip(table.header, row, strict=True))


def test_benchmarks_are_splits_of_our_data_sets():
    splits = {name: (each.source, each.split) for name, each in BENCHMARKS.items() if each.source}
    expected = {name: (f"cod/{name}", name) for name in COD_TEST_SETS}
    expected |= {name: (f"dis5k/{name}", split) for name, split in DIS5K_SPLITS.items() if name != "DIS-TR"}
    assert splits == expected | {"BUS": ("bus", "val"), "KBT": ("kbt", "val")}
    assert {each.protocol for each in BENCHMARKS.values()} <= PROTOCOLS.keys()


def test_published_rows_are_different():
    rows = [(row.benchmark, row.method, row.backbone, row.source) for row in PUBLISHED]
    assert len(set(rows)) == len(rows)
    assert all(row.figures.keys() <= PROTOCOLS[BENCHMARKS[row.benchmark].protocol].columns.keys() for row in PUBLISHED)


@pytest.mark.parametrize("method", ["IS-Net", "OPDS"])
def test_published_means_are_those_of_the_four_sets(method):
    by_set = {row.benchmark: row.figures for row in PUBLISHED if row.method == method}
    for metric, overall in by_set["DIS-TE"].items():
        mean = statistics.fmean(by_set[f"DIS-TE{i}"][metric] for i in range(1, 5))
        # Both sides are rounded. OPDS's overall HCE is 0.75 above the mean of its four.
        assert overall == pytest.approx(mean, abs=1 if metric == "hce" else 0.00101)


@pytest.mark.parametrize(
    ("on", "changed", "expected"),
    [
        ("CAMO", {}, "CAMO"),
        ("KBT", {"division_seed": 3}, "KBT"),
        ("KBT", {"protocol": "segmentation"}, "KBT"),
        ("CAMO", {"split": None}, None),
        ("CAMO", {"sources": {"cod/CAMO": 249, "cod/COD10K": 1}}, None),
        ("CAMO", {"sources": {}, "split": None}, None),
        ("CAMO", {"sources": {"mine": 76}, "split": None, "benchmark": "CHAMELEON"}, "CHAMELEON"),
        ("CAMO", {"benchmark": "NC4K"}, "NC4K"),
    ],
)
def test_benchmark_is_found_by_source_and_split(write, on, changed, expected):
    assert find_benchmark(read_result(write(on, **changed))) == expected


def test_benchmarks_come_in_their_order_and_other_data_last(write):
    paths = [write("KBT", split="train"), write("BUS"), write("CAMO", benchmark="NC4K"), write("CAMO")]
    assert [table.title for table in tables_of(*paths)] == [
        "CAMO (camouflaged objects), 250 images, protocol cod",
        "NC4K (camouflaged objects), 4121 images, protocol cod",
        "BUS (breast lesions in ultrasound), 169 images, protocol lesion",
        "train of kbt, protocol infrared",
    ]


def test_other_data_has_a_table_of_its_own(write):
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
    assert [row[-1] for row in comparable.rows] == ["paper: SRS, README", "measured"]
    assert alone.title == "BUS (breast lesions in ultrasound), 169 images, protocol segmentation"
    assert alone.rows == [["ours", "0.700", "0.800", "measured"]]
    assert alone.notes[0] == (
        "Scored by the protocol segmentation. The published figures follow the protocol lesion, so none is shown."
    )
    assert not any("Published:" in note for note in alone.notes)


def test_published_rows_come_first_and_name_their_paper(write):
    (table,) = tables_of(write(scores={"weighted_f_measure": 0.6666}))
    assert table.header == ["method", "S", "weighted F", "adaptive F", "mean E", "MAE", "source"]
    common = "paper: RUN, Table 1, common setting"
    assert table.rows[0] == ["SINet (ResNet-50)", "0.745", "–", "0.712", "0.804", "0.092", common]
    assert table.rows[-1] == ["ours", "0.800", "0.667", "0.750", "0.860", "0.070", "measured"]
    assert [row[-1].startswith("paper: ") for row in table.rows] == [True] * 19 + [False]
    assert table.notes[0].startswith("RUN does not state which F and E")
    measured = "Measured: ours on 2026-11-21 at commit 0123456."
    assert table.notes[1:] == ["Published: RUN (ICML 2025, https://arxiv.org/abs/2501.18783).", measured]
    (alone,) = tables_of(write(), with_papers=False)
    assert alone.rows == [["ours", "0.800", "0.750", "0.860", "0.070", "measured"]] and alone.notes == [measured]


def test_notes_of_all_papers_are_under_the_table(write):
    (table,) = tables_of(write("DIS-TE1"))
    assert cells(table, "IS-Net", "paper: IS-Net, quantitative comparison") == {
        **{"method": "IS-Net", "max F": "0.740", "weighted F": "0.662", "MAE": "0.074", "S": "0.787"},
        **{"mean E": "0.820", "HCE": "149", "source": "paper: IS-Net, quantitative comparison"},
    }
    assert cells(table, "ours")["HCE"] == "150"
    assert [note.split()[0] for note in table.notes[:2]] == ["IS-Net's", "OPDS"]
    assert table.notes[2] == "Published: IS-Net (ECCV 2022, https://github.com/xuebinqin/DIS); OPDS (BMVC 2023)."


def test_columns_scale(write):
    (table,) = tables_of(write("KBT"))
    assert table.header == ["method", "nIoU", "mean F1", "Pd", "Fa (1e-6)", "source"]
    assert table.rows == [
        ["SRS", "0.863", "0.926", "–", "–", "paper: SRS, README"],
        ["SRS", "0.862", "0.915", "–", "–", "paper: SRS, README, newer quick evaluation"],
        ["ours", "0.850", "–", "0.970", "12.36", "measured"],
    ]
    assert "means over three" in table.notes[0]


@pytest.mark.parametrize(
    ("on", "changed", "method"),
    [
        ("CAMO", {"num_images": 22}, "ours (22 of 250 images)"),
        ("CAMO", {"options": {"min_max": False}}, "ours (min_max off)"),
        ("CAMO", {"refine": "auto"}, "ours (refine auto)"),
        ("DIS-VD", {"options": {"min_max": True, "hce": True}}, "ours"),
        ("DIS-VD", {"options": {"min_max": True, "hce": False}}, "ours (hce off)"),
        ("KBT", {"options": {"threshold": 0.4, "by_area": True}}, "ours (threshold 0.4, by_area on)"),
        ("BUS", {"options": {"newer": "x"}, "num_images": 5}, "ours (5 of 169 images, newer x)"),
        ("BUS", {"division_seed": 0}, "ours (random split, seed 0)"),
        ("BUS", {"name": " two\nlines "}, "two lines"),
        ("BUS", {"protocol": "segmentation", "num_images": 5}, "ours (5 of 169 images)"),
    ],
)
def test_method_names_options_that_papers_do_not_use(write, on, changed, method):
    (table,) = tables_of(write(on, **changed))
    assert table.rows[-1][0] == method


def test_note_names_date_and_commit(write):
    unknown = {"git_commit": None}
    paths = [write(name="a", git_commit=f"{COMMIT}-dirty"), write(name="b", **unknown)]
    (table,) = tables_of(*paths, write(name="c", date=None, **unknown))
    assert table.notes[-1] == (
        "Measured: a on 2026-11-21 at commit 0123456 with uncommitted changes; b on 2026-11-21; c on an unknown day."
    )


def test_random_splits_become_mean_and_deviation(write):
    ious, f1s = [0.8812, 0.8734, 0.8951], [0.93, 0.92, 0.97]
    paths = [
        write("BUS", scores={"mean_iou": iou, "mean_f1": f1}, division_seed=seed, date=f"2026-11-2{seed}")
        for seed, (iou, f1) in enumerate(zip(ious, f1s, strict=True))
    ]
    (table,) = tables_of(*paths, write("BUS", name="once"))
    row = cells(table, "ours (mean of 3 random splits)")
    assert row["mean IoU"] == f"{statistics.mean(ious):.3f} ± {statistics.stdev(ious):.3f}" == "0.883 ± 0.011"
    assert row["mean F1"] == f"{statistics.mean(f1s):.3f} ± {statistics.stdev(f1s):.3f}"
    assert cells(table, "once")["mean IoU"] == "0.880"
    assert [row[0] for row in table.rows] == ["SRS", "ours (mean of 3 random splits)", "once"]
    assert "± is the sample standard deviation over the random splits." in table.notes
    assert all(f"on 2026-11-2{seed} at commit" in table.notes[-1] for seed in range(3))


def write_test_sets(write, **changed):
    """Write results on the four sets: mean MAE 0.0625, HCE 985.25."""
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
    assert cells(mean, "OPDS", "paper: OPDS, poster")["HCE"] == "986"
    row = cells(mean, "ours")
    assert (row["max F"], row["MAE"], row["HCE"], row["S"]) == ("0.825", "0.062", "985", "–")
    assert len(tables_of(*write_test_sets(write)[:3])) == 3  # no mean


def test_mean_of_the_test_sets_names_options_of_its_parts(write):
    paths = write_test_sets(write)[:3]
    replaced = write("DIS-TE4", options={"min_max": False, "hce": False}, num_images=10, date="2026-11-23")
    data = json.loads((replaced / "results.json").read_text())
    del data["results"]["hce"]
    (replaced / "results.json").write_text(json.dumps(data))
    mean = tables_of(*paths, replaced)[-1]
    row = cells(mean, "ours (1510 of 2000 images, min_max off, hce off)")
    assert row["HCE"] == "–" and row["max F"] == "0.815"
    assert "on 2026-11-21" in mean.notes[-1] and "on 2026-11-23" in mean.notes[-1]


def test_mean_of_the_test_sets_over_random_splits(write):
    first = write_test_sets(write, division_seed=1)
    second = [write(f"DIS-TE{i}", scores={"f_measure_max": 0.805}, division_seed=2) for i in range(1, 5)]
    row = cells(tables_of(*first, *second)[-1], "ours (mean of 2 random splits)")
    assert row["max F"] == f"0.815 ± {statistics.stdev([0.825, 0.805]):.3f}"


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        ({}, {}, "are not random splits with different seeds"),
        ({"division_seed": 4}, {"division_seed": 4}, "are not random splits with different seeds"),
        ({"division_seed": 1}, {}, "are not random splits with different seeds"),  # one random, one official
        ({"division_seed": 1}, {"division_seed": 2, "options": {"threshold": 0.4}}, "scored with different options"),
    ],
)
def test_two_results_for_one_row_are_rejected(write, first, second, problem):
    paths = [write("BUS", **first), write("BUS", name="other"), write("KBT"), write("BUS", **second)]
    files = f"{paths[0] / 'results.json'} and {paths[3] / 'results.json'}"
    parts = (problem, files, "'ours'", "BUS", "give them different --name")
    with rejected("".join(f"(?=.*{part})" for part in parts)):
        tables_of(*paths)


@pytest.mark.parametrize(
    ("benchmark", "expected"),
    [
        ("COD", "expected one of CHAMELEON, CAMO, .*, KBT;"),
        ("DIS-TE", "expected one of DIS-TE1, DIS-TE2, DIS-TE3, DIS-TE4;"),
    ],
)
def test_unknown_benchmark_is_rejected(write, benchmark, expected):
    path = write("DIS-TE1", benchmark=benchmark)
    with rejected(f"(?=.*{path}).*{expected}"):
        tables_of(path)


def test_missing_file_is_rejected(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with rejected("No such file.*unconceal evaluate --out"):
            read_result(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is damaged"),
        (b'{"name": "ours",\n\n', "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[1, 2]", "it holds a list"),
        (b'{"accuracy": 0.9}', "it has no 'name'"),
        (b'{"name": "x", "protocol": ["cod"]}', "'protocol' is .* expected str"),
    ],
)
def test_damaged_and_foreign_content_is_rejected(tmp_path, content, problem):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with rejected(f"{path}.*{problem}"):
        read_result(path)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"name": None}, "'name' is null, expected str"),
        ({"name": "  "}, "'name' is empty"),
        ({"protocol": "voc"}, "'protocol' is 'voc', expected one of segmentation, cod"),
        ({"sources": ["cod/CAMO"]}, "'sources' is .* expected dict"),
        ({"split": 3}, "'split' is 3, expected str"),
        ({"division_seed": True}, "'division_seed' is true, expected int"),
        ({"results": {"s_measure": 0.8}}, "no num_images"),
        ({"results": {"s_measure": 0.8, "num_images": 2.5}}, "no num_images"),
        ({"results": {"accuracy": 0.8, "num_images": 4}}, "no number of the protocol cod"),
        ({"scores": {"mae": float("nan")}}, "mae is NaN, expected a finite number"),
        ({"scores": {"mae": "0.05"}}, "mae is "),
    ],
)
def test_foreign_file_is_rejected(write, changed, problem):
    path = write(**changed)
    with rejected(f"(?=.*{path}).*is not a results.json of unconceal evaluate: .*{problem}"):
        read_result(path)


def test_overwrite_replaces_tables_and_sheets_only(write, tmp_path):
    result, table, photo = write(), tmp_path / "table.md", tmp_path / "photo.png"
    Image.new("RGB", (9, 9)).save(photo)
    command = ["evaluate", "table", str(result), "--overwrite", "--out"]
    for _ in range(2):
        main([*command, str(table)])
    text = table.read_text()
    table.write_text("# Mine\n\n" + text)
    for kind, out in (("table", table), ("table", result / "results.json"), ("table", photo), ("curves", photo)):
        before = out.read_bytes()
        with rejected(f"{out.name} is no file of this command, so it is not replaced"):
            main(["evaluate", kind, str(result), "--overwrite", "--out", str(out)])
        assert out.read_bytes() == before
    save_sheet(Image.new("RGB", (9, 9)), photo)
    with rejected("cannot read the curves"):  # a sheet of ours may go
        main(["evaluate", "curves", str(result), "--overwrite", "--out", str(photo)])


def test_markdown(write):
    text = to_markdown(tables_of(write("BUS", name="a|b"), write("CAMO", name="c")))
    assert text.startswith("### CAMO (camouflaged objects), 250 images, protocol cod\n\n| method | S | adaptive F |")
    assert "\n| SINet (ResNet-50) | 0.745 | 0.712 | 0.804 | 0.092 | paper: RUN, Table 1, common setting |\n" in text
    assert "\n| a\\|b | 0.880 | 0.930 | measured |\n\n" in text
    assert "\n\nRUN does not state" in text
    assert text.count("\n### BUS") == 1
    # Every line of a table has the same number of cells.
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1
