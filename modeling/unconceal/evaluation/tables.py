"""Tables of measured results beside the figures that papers print: one for each benchmark, that is test split.

What is published stands in `papers.yaml`, what is measured in the `results.json` of evaluations. Both are shown as the
columns of the benchmark's protocol say.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from ..utils.errors import UserError, one_line
from ..utils.files import is_folder
from ..utils.markdown import escape_latex, latex_table, markdown_table
from .base import Column, Protocol
from .protocols import PROTOCOLS
from .report import RESULTS


MISSING = "–"
MARKS = "†‡§¶"
REQUIRED = {"name": str, "protocol": str, "results": dict, "sources": dict, "options": dict}
OPTIONAL = {
    "split": str,
    "benchmark": str,
    "division_seed": int,
    "refine": str,
    "data": str,
    "weights": str,
    "limit": int,
    "command": str,
    "date": str,
    "git_commit": str,
}
"""What `read_result` reads of a results.json; those of `OPTIONAL` may be null or absent."""


@dataclass(frozen=True)
class Benchmark:
    """A test split and how it is scored.

    Attributes:
        title: Name for people.
        protocol: Key of `PROTOCOLS`.
        num_images: Pictures of the split.
        source: What the column `source` of our data sets says of its pictures.
        split: Its name in our data sets.
        mean_of: Benchmarks whose figures it is the mean of. Nothing is scored on such a one: no source, no split.
    """

    title: str
    protocol: str
    num_images: int
    source: str | None = None
    split: str | None = None
    mean_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """A row of a paper's table, on one benchmark.

    Attributes:
        benchmark: Its name.
        method: As the paper calls it.
        backbone: Where stated.
        source: Where the row stands, such as "RUN, Table 1, common setting".
        reference: The paper that holds it.
        figures: Metric -> value, as our protocols name and scale them.
        doubts: Metric -> what to know before its figure is compared.
        remarks: What to know of the whole row.
    """

    benchmark: str
    method: str
    backbone: str | None
    source: str
    reference: str
    figures: Mapping[str, float]
    doubts: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """A measured result.

    Attributes:
        path: File that it was read from.
        name: Of the method, chosen by the user.
        protocol: By which it was scored.
        figures: Metric -> value.
        num_images: Pictures that were scored.
        sources: Where they come from, sorted.
        split: Their split, if any.
        benchmark: Name of the benchmark, if the user gave one.
        division_seed: Of the random division of the data, if there was one.
        settings: Options that are not those of a report, such as "min_max off".
        stamps: When and at which commit it was measured.
        weights: Digest of the model's weights, if there was a model (see `inference.weights_digest`).
        limit: Number of images, if only the first of the split were scored.
        data: Folder or id of what it was scored on.
        date: When, by ISO 8601.
        command: What measured it.
    """

    path: Path
    name: str
    protocol: Protocol
    figures: Mapping[str, float]
    num_images: int
    sources: tuple[str, ...]
    split: str | None = None
    benchmark: str | None = None
    division_seed: int | None = None
    settings: tuple[str, ...] = ()
    stamps: tuple[str, ...] = ()
    weights: str | None = None
    limit: int | None = None
    data: str | None = None
    date: str | None = None
    command: str | None = None


@dataclass(frozen=True)
class Table:
    """A table of plain text, which `to_markdown` and `to_latex` escape.

    Attributes:
        title: What was scored, and how.
        header: Titles of the columns.
        rows: Lines of as many cells as the header has.
        notes: Lines to stand under the table.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


@dataclass(frozen=True)
class _Test:
    """What the results in one table share. A benchmark stands for its split and sources."""

    protocol: str
    benchmark: str | None
    split: str | None = None
    sources: tuple[str, ...] = ()


@cache
def load_papers() -> tuple[dict[str, Benchmark], list[Published]]:
    """Return the benchmarks by name, and the published rows, both in the order in which tables show them."""
    data = yaml.safe_load(resources.files(__package__).joinpath("papers.yaml").read_text(encoding="utf-8"))
    benchmarks = {}
    for name, facts in data["benchmarks"].items():
        if "mean_of" in facts:
            parts = tuple(facts["mean_of"])
            facts |= {"mean_of": parts, "num_images": sum(benchmarks[part].num_images for part in parts)}
        benchmarks[name] = Benchmark(**facts)
    return benchmarks, [row for paper in data["papers"] for row in _published_rows(paper, benchmarks)]


def _published_rows(paper: Mapping[str, Any], benchmarks: Mapping[str, Benchmark]) -> Iterator[Published]:
    """The rows of a paper of `papers.yaml`, taken apart by benchmark."""
    notes = paper.get("notes", ())
    about = ", ".join(filter(None, (paper["reference"], paper.get("url"))))
    for place, rows in paper["rows"].items():
        for row in rows:
            for benchmark, values in row.items():
                if benchmark in ("method", "backbone"):
                    continue
                metrics = paper["figures"][benchmarks[benchmark].protocol]
                yield Published(
                    benchmark=benchmark,
                    method=row["method"],
                    backbone=row.get("backbone"),
                    source=f"{paper['paper']}, {place}",
                    reference=f"{paper['paper']} ({about})",
                    figures=dict(zip(metrics, values, strict=True)),
                    doubts={metric: note["text"] for note in notes for metric in note.get("figures", ())},
                    remarks=tuple(note["text"] for note in notes if "figures" not in note),
                )


def read_result(path: str | Path) -> Result:
    """Read what an evaluation wrote.

    Args:
        path: A results.json, or the folder that holds it.

    Raises:
        UserError: If there is none, or if it is damaged or foreign.
    """
    path = Path(path)
    file = path / RESULTS if is_folder(path) else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {file} ({error.strerror}); expected a {RESULTS}, or the folder that evaluate.py --out wrote"
        ) from None
    except (ValueError, RecursionError) as error:  # of the JSON or of its encoding
        raise UserError(f"{file} is damaged ({one_line(error)}); evaluate again") from None
    problem = _problem(data)
    if problem:
        raise UserError(f"{file} is no {RESULTS} of evaluate.py: {problem}; evaluate again, or leave it out")
    protocol = PROTOCOLS[data["protocol"]]
    return Result(
        path=file,
        name=" ".join(data["name"].split()),
        protocol=protocol,
        figures={metric: data["results"][metric] for metric in protocol.columns if metric in data["results"]},
        num_images=data["results"]["num_images"],
        # Masks in a folder have no source of their own: the folder tells one test set from another.
        sources=tuple(sorted({source or data.get("data") or "unnamed data" for source in data["sources"]})),
        split=data.get("split"),
        benchmark=data.get("benchmark"),
        division_seed=data.get("division_seed"),
        settings=_settings(protocol, data["options"], data.get("refine")),
        stamps=(_stamp(data.get("date"), data.get("git_commit")),),
        **{key: data.get(key) for key in ("weights", "limit", "data", "date", "command")},
    )


def _problem(data: Any) -> str | None:
    """What makes the content of a file none of our results, if anything does."""
    if not isinstance(data, dict):
        return f"it holds a {type(data).__name__}, expected an object"
    for key, kind in {**REQUIRED, **OPTIONAL}.items():
        value = data.get(key)
        if type(value) is not kind and not (value is None and key in OPTIONAL):
            return (
                f"{key!r} is {json.dumps(value)[:50]}, expected {kind.__name__}"
                if key in data
                else f"it has no {key!r}"
            )
    if not data["name"].strip():
        return "'name' is empty"
    if data["protocol"] not in PROTOCOLS:
        return f"'protocol' is {data['protocol']!r}, expected one of {', '.join(PROTOCOLS)}"
    results, columns = data["results"], PROTOCOLS[data["protocol"]].columns
    num_images = results.get("num_images")
    if type(num_images) is not int or num_images < 1 or not columns.keys() & results.keys():
        return f"'results' has no num_images or no number of the protocol {data['protocol']}"
    for metric in columns:
        value = results.get(metric, 0)
        if type(value) not in (int, float) or not abs(value) < 1e300:  # NaN and infinity fail too
            return f"{metric} is {json.dumps(value)[:50]}, expected a finite number"
    return None


def _settings(protocol: Protocol, options: Mapping[str, Any], refine: str | None) -> tuple[str, ...]:
    """The options that are not those of a report, in words."""
    # Refining is no option of a protocol, but papers score without it.
    usual = {**protocol.options(**protocol.report_options), "refine": "never"}
    used = {**options, "refine": refine or "never"}
    return tuple(
        f"{name} {('off', 'on')[value] if isinstance(value, bool) else value}"
        for name, value in used.items()
        if name not in usual or value != usual[name]
    )


def _stamp(date: str | None, commit: str | None) -> str:
    """Day and commit, in words."""
    day = f"on {date[:10]}" if date else "on an unknown day"
    if not commit:
        return day
    clean = commit.removesuffix("-dirty")
    return f"{day} at commit {clean[:7]}{'' if clean == commit else ' with uncommitted changes'}"


def find_benchmark(result: Result) -> str | None:
    """Return the benchmark of a result: the one it names, else the one that has its source and split, if any.

    Raises:
        UserError: If it names one that does not exist, or that is not scored itself.
    """
    benchmarks, _ = load_papers()
    if result.benchmark is None:
        test = (result.sources, result.split)
        return next((name for name, each in benchmarks.items() if ((each.source,), each.split) == test), None)
    scored = [name for name, each in benchmarks.items() if not each.mean_of]
    if result.benchmark not in scored:
        parts = benchmarks[result.benchmark].mean_of if result.benchmark in benchmarks else scored
        raise UserError(
            f"{result.path} is for the benchmark {result.benchmark!r}; expected one of {', '.join(parts)}; "
            "evaluate again with one of these as --benchmark, or without"
        )
    return result.benchmark


def make_tables(results: Iterable[Result], with_papers: bool = True) -> list[Table]:
    """Put results and the papers' rows into tables: those of the benchmarks, in their order, then those of other data.

    Results of one name over several random divisions of the data become one row, of means and sample standard
    deviations. A benchmark that is the mean of others gets the rows that all of these have.

    Args:
        results: What `read_result` returned.
        with_papers: Whether the papers' rows stand beside the measured ones.

    Raises:
        UserError: If two results claim one row, or one names a benchmark that nothing is scored on.
    """
    benchmarks, published = load_papers()
    tests: dict[_Test, dict[str, list[Result]]] = {}
    for result in results:
        benchmark = find_benchmark(result)
        where = {} if benchmark else {"split": result.split, "sources": result.sources}
        methods = tests.setdefault(_Test(result.protocol.name, benchmark, **where), {})
        methods.setdefault(result.name, []).append(result)
    for test, methods in tests.items():
        for runs in methods.values():
            _check_divisions(runs, _title(test))
    for name, benchmark in benchmarks.items():
        if benchmark.mean_of:
            means = _mean_of_parts([tests.get(_Test(benchmark.protocol, part), {}) for part in benchmark.mean_of])
            if means:
                tests[_Test(benchmark.protocol, name)] = means
    order = list(benchmarks)
    in_order = sorted(tests, key=lambda test: order.index(test.benchmark) if test.benchmark else len(order))
    return [_make_table(test, tests[test], published if with_papers else ()) for test in in_order]


def _check_divisions(runs: Sequence[Result], title: str):
    """Refuse results of one name but for those over different random divisions that were scored alike."""
    for one, other in combinations(runs, 2):
        if None in (one.division_seed, other.division_seed) or one.division_seed == other.division_seed:
            problem = "and not of two random divisions by different seeds"
        elif one.settings != other.settings:
            problem = "and were scored by different options"
        else:
            continue
        raise UserError(
            f"{one.path} and {other.path} are both results of {one.name!r} on {title}, {problem}; "
            "give them different --name"
        )


def _mean_of_parts(parts: Sequence[Mapping[str, Sequence[Result]]]) -> dict[str, list[Result]]:
    """The means over benchmarks, each given as its results by name, of what there is on all of them."""
    by_run = [{(run.name, run.division_seed): run for runs in part.values() for run in runs} for part in parts]
    means: dict[str, list[Result]] = {}
    for key, first in by_run[0].items():
        runs = [part[key] for part in by_run if key in part]
        if len(runs) == len(parts):
            mean = replace(
                first,
                figures={metric: fmean(values) for metric, values in _common_figures(runs).items()},
                num_images=sum(run.num_images for run in runs),
                settings=tuple(dict.fromkeys(each for run in runs for each in run.settings)),
                stamps=tuple(dict.fromkeys(each for run in runs for each in run.stamps)),
            )
            means.setdefault(first.name, []).append(mean)
    return means


def _common_figures(runs: Sequence[Result]) -> dict[str, list[float]]:
    """Metric -> its values, where all have it."""
    return {
        metric: [run.figures[metric] for run in runs]
        for metric in runs[0].figures
        if all(metric in run.figures for run in runs)
    }


def _title(test: _Test) -> str:
    benchmark = load_papers()[0].get(test.benchmark)
    if benchmark:
        what = f"{benchmark.title}, {benchmark.num_images} images"
    else:
        what = " of ".join(filter(None, (test.split, ", ".join(test.sources))))
    return f"{what}, protocol {test.protocol}"


def _make_table(test: _Test, methods: Mapping[str, Sequence[Result]], published: Iterable[Published]) -> Table:
    """One table from the results by name, and those of the published rows that belong beside them."""
    benchmark = load_papers()[0].get(test.benchmark)
    comparable = benchmark is not None and benchmark.protocol == test.protocol
    papers = [row for row in published if comparable and row.benchmark == test.benchmark]
    shown = {
        metric for row in (*papers, *(run for runs in methods.values() for run in runs)) for metric in row.figures
    }
    columns = {metric: column for metric, column in PROTOCOLS[test.protocol].columns.items() if metric in shown}
    doubts = dict.fromkeys(doubt for row in papers for doubt in row.doubts.values())
    marks = dict(zip(doubts, MARKS, strict=False))
    rows = [_published_row(row, columns, marks) for row in papers]
    rows += [_measured_row(runs, columns, benchmark) for runs in methods.values()]
    notes = [f"{mark} {doubt}" for doubt, mark in marks.items()]
    notes += dict.fromkeys(remark for row in papers for remark in row.remarks)
    if benchmark and not comparable:
        notes.append(
            f"Scored by the protocol {test.protocol}. Published figures are of the protocol {benchmark.protocol}, so "
            "none is shown."
        )
    if any(len(runs) > 1 for runs in methods.values()):
        notes.append("± is the sample standard deviation over the divisions.")
    if papers:
        notes.append(f"Published: {'; '.join(dict.fromkeys(row.reference for row in papers))}.")
    stamps = [
        f"{name} {', '.join(dict.fromkeys(stamp for run in runs for stamp in run.stamps))}"
        for name, runs in methods.items()
    ]
    notes.append(f"Measured: {'; '.join(stamps)}.")
    return Table(_title(test), ["method", *(column.title for column in columns.values()), "source"], rows, notes)


def _published_row(row: Published, columns: Mapping[str, Column], marks: Mapping[str, str]) -> list[str]:
    figures = {
        metric: columns[metric].format(value) + marks.get(row.doubts.get(metric), "")
        for metric, value in row.figures.items()
    }
    return _cells(row.method, [row.backbone] if row.backbone else [], columns, figures, row.source)


def _measured_row(runs: Sequence[Result], columns: Mapping[str, Column], benchmark: Benchmark | None) -> list[str]:
    """The row of one method: of its only result, or of its results over several divisions."""
    details = []
    if len(runs) > 1:
        details.append(f"mean of {len(runs)} divisions")
    elif runs[0].division_seed is not None:
        details.append(f"division by seed {runs[0].division_seed}")
    # On fewer or more pictures than the benchmark's a result is not comparable.
    num_images = sorted({run.num_images for run in runs})
    if benchmark is None or num_images != [benchmark.num_images]:
        scored = " to ".join(str(number) for number in dict.fromkeys((num_images[0], num_images[-1])))
        details.append(f"{scored} of {benchmark.num_images} images" if benchmark else f"{scored} images")
    details += runs[0].settings
    figures = {}
    for metric, values in _common_figures(runs).items():
        spread = (columns[metric].format(stdev(values)),) if len(values) > 1 else ()
        figures[metric] = " ± ".join((columns[metric].format(fmean(values)), *spread))
    return _cells(runs[0].name, details, columns, figures, "measured")


def _cells(
    name: str, details: Sequence[str], columns: Iterable[str], figures: Mapping[str, str], source: str
) -> list[str]:
    method = f"{name} ({', '.join(details)})" if details else name
    return [method, *(figures.get(metric, MISSING) for metric in columns), source]


def to_markdown(tables: Iterable[Table]) -> str:
    """Return tables as Markdown, each under a heading."""

    def escape(cells: Iterable[str]) -> list[str]:
        return [cell.replace("|", r"\|") for cell in cells]

    parts = []
    for table in tables:
        grid = markdown_table(escape(table.header), map(escape, table.rows))
        parts += [f"### {table.title}", grid, *table.notes]
    return "\n\n".join(parts)


def to_latex(tables: Iterable[Table]) -> str:
    r"""Return tables as LaTeX, each a `table` with a caption; the document needs `\usepackage{booktabs}`."""
    return "\n\n".join(
        "\n".join(
            (
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{escape_latex(table.title)}}}",
                latex_table(table.header, table.rows),
                r"\begin{flushleft}\footnotesize",
                "\n\n".join(map(escape_latex, table.notes)),
                r"\end{flushleft}",
                r"\end{table}",
            )
        )
        for table in tables
    )
