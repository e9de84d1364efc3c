"""Compare results with each other and with the figures of papers.

Each benchmark, that is each test split, has a table of its own. `papers.yaml` holds what papers print. The
`results.json` of an evaluation holds what was measured.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import yaml

from ..utils.errors import UserError, one_line
from ..utils.files import is_folder
from ..utils.markdown import markdown_table
from .base import MetricColumn, Protocol
from .protocols import PROTOCOLS
from .report import RESULTS_FILE


MISSING = "–"
# What `read_result` reads of a results.json. Optional keys may be null or absent.
REQUIRED = {"name": str, "protocol": str, "results": dict, "sources": dict, "options": dict}
OPTIONAL = {
    **dict.fromkeys(("split", "benchmark", "refine", "data", "weights", "command", "date", "git_commit"), str),
    **dict.fromkeys(("division_seed", "limit"), int),
}


@dataclass(frozen=True)
class Benchmark:
    """A test split and its protocol."""

    title: str
    protocol: str  # key of `PROTOCOLS`
    num_images: int
    source: str | None = None  # column `source` of these images in our data sets
    split: str | None = None  # in our data sets
    mean_of: tuple[str, ...] = ()  # benchmarks whose figures are averaged; then it has no source and no split


@dataclass(frozen=True)
class Published:
    """A row of a paper's table, for one benchmark."""

    benchmark: str
    method: str
    backbone: str | None
    source: str  # place of the row, such as "RUN, Table 1, common setting"
    reference: str  # the paper
    figures: Mapping[str, float]  # metric -> value, with the names and scales of our protocols
    notes: tuple[str, ...]  # facts to know before comparing


@dataclass(frozen=True)
class Result:
    """A measured result."""

    path: Path  # the results.json
    name: str  # of the method, chosen by the user
    protocol: Protocol
    figures: Mapping[str, float]  # metric -> value
    num_images: int
    sources: tuple[str, ...]  # of the images, sorted
    settings: tuple[str, ...] = ()  # options that differ from those of a report, such as "min_max off"
    stamps: tuple[str, ...] = ()  # date and commit of the measurement, in words
    split: str | None = None
    benchmark: str | None = None
    split_seed: int | None = None  # of the random split, if there was one
    weights: str | None = None  # digest of the model's weights, as `api.weights_digest`
    limit: int | None = None  # number of images, if only the first of the split were scored
    data: str | None = None  # folder or Hub id
    date: str | None = None  # ISO 8601
    command: str | None = None


class Table(NamedTuple):
    """A table of plain text; `to_markdown` escapes it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


class _Test(NamedTuple):
    """Test set of a table; a benchmark implies split and sources."""

    protocol: str
    benchmark: str | None
    split: str | None = None
    sources: tuple[str, ...] = ()


@cache
def load_papers() -> tuple[dict[str, Benchmark], list[Published]]:
    """Return the benchmarks by name, and the published rows."""
    data = yaml.safe_load(resources.files(__package__).joinpath("papers.yaml").read_text(encoding="utf-8"))
    benchmarks = {}
    for name, facts in data["benchmarks"].items():
        if "mean_of" in facts:
            parts = tuple(facts["mean_of"])
            facts |= {"mean_of": parts, "num_images": sum(benchmarks[part].num_images for part in parts)}
        benchmarks[name] = Benchmark(**facts)
    return benchmarks, [row for paper in data["papers"] for row in _published_rows(paper, benchmarks)]


def _published_rows(paper: Mapping[str, Any], benchmarks: Mapping[str, Benchmark]) -> Iterator[Published]:
    name, notes = paper["paper"], tuple(paper.get("notes", ()))
    about = ", ".join(filter(None, (paper["reference"], paper.get("url"))))
    for place, rows in paper["rows"].items():
        for row in rows:
            method, backbone = row["method"], row.get("backbone")
            for benchmark in (key for key in row if key in benchmarks):
                metrics = paper["figures"][benchmarks[benchmark].protocol]
                figures = dict(zip(metrics, row[benchmark], strict=True))
                yield Published(benchmark, method, backbone, f"{name}, {place}", f"{name} ({about})", figures, notes)


def read_result(path: str | Path) -> Result:
    """Read a results.json, or the one in a folder.

    Raises:
        UserError: If there is no such file, or it is damaged or foreign.
    """
    path = Path(path)
    file = path / RESULTS_FILE if is_folder(path) else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        expected = f"expected a {RESULTS_FILE}, or a folder that unconceal evaluate --out wrote"
        raise UserError(f"cannot read {file} ({error.strerror}); {expected}") from error
    except (ValueError, RecursionError) as error:  # wrong JSON or wrong encoding
        raise UserError(f"{file} is damaged ({one_line(error)}); evaluate again") from error
    problem = _problem(data)
    if problem:
        what = f"{file} is not a {RESULTS_FILE} of unconceal evaluate"
        raise UserError(f"{what}: {problem}; evaluate again, or leave it out")
    protocol, results = PROTOCOLS[data["protocol"]], data["results"]
    return Result(
        path=file,
        name=" ".join(data["name"].split()),
        protocol=protocol,
        figures={metric: results[metric] for metric in protocol.columns if metric in results},
        num_images=results["num_images"],
        # Masks in a folder have no source: the folder tells test sets apart.
        sources=tuple(sorted({source or data.get("data") or "unnamed data" for source in data["sources"]})),
        settings=_settings(protocol, data["options"], data.get("refine")),
        stamps=(stamp(data.get("date"), data.get("git_commit")),),
        split_seed=data.get("division_seed"),  # the file keeps the option's old name
        **{key: data.get(key) for key in ("split", "benchmark", "weights", "limit", "data", "date", "command")},
    )


def _problem(data: Any) -> str | None:
    """Return why data is not a result of ours, or None."""
    if not isinstance(data, dict):
        return f"it holds a {type(data).__name__}, expected an object"
    for key, kind in {**REQUIRED, **OPTIONAL}.items():
        value = data.get(key)
        if key not in data and key in REQUIRED:
            return f"it has no {key!r}"
        if type(value) is not kind and not (value is None and key in OPTIONAL):
            return f"{key!r} is {json.dumps(value)[:50]}, expected {kind.__name__}"
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
        if type(value) not in (int, float) or not abs(value) < 1e300:  # also refuses NaN and infinity
            return f"{metric} is {json.dumps(value)[:50]}, expected a finite number"
    return None


def _settings(protocol: Protocol, options: Mapping[str, Any], refine: str | None) -> tuple[str, ...]:
    """Return the unusual options, in words."""
    # `refine` is not an option of a protocol, but papers score without it.
    usual = {**protocol.options(**protocol.report_options), "refine": "never"}
    used = {**options, "refine": refine or "never"}
    return tuple(
        f"{name} {('off', 'on')[value] if isinstance(value, bool) else value}"
        for name, value in used.items()
        if name not in usual or value != usual[name]
    )


def stamp(date: str | None, commit: str | None) -> str:
    """Return day and commit in words."""
    day = f"on {date[:10]}" if date else "on an unknown day"
    if not commit:
        return day
    clean = commit.removesuffix("-dirty")
    return f"{day} at commit {clean[:7]}{'' if clean == commit else ' with uncommitted changes'}"


def find_benchmark(result: Result) -> str | None:
    """Return the benchmark of a result: named, or known from its data.

    Raises:
        UserError: If the named benchmark does not exist or is not scored itself.
    """
    benchmarks, _ = load_papers()
    if result.benchmark is None:
        test = (result.sources, result.split)
        return next((name for name, each in benchmarks.items() if ((each.source,), each.split) == test), None)
    scored = [name for name, each in benchmarks.items() if not each.mean_of]
    if result.benchmark not in scored:
        parts = benchmarks[result.benchmark].mean_of if result.benchmark in benchmarks else scored
        problem = f"is for the benchmark {result.benchmark!r}, expected one of {', '.join(parts)}"
        advice = "evaluate again with one of these as --benchmark, or without --benchmark"
        raise UserError(f"{result.path} {problem}; {advice}")
    return result.benchmark


def make_tables(results: Iterable[Result], with_papers: bool = True) -> list[Table]:
    """Make one table for each test set: benchmarks first, in their order.

    Results of one name on several random splits become one row: mean and sample standard deviation. A benchmark that
    is a mean of others gets a row if all of these have one. `with_papers` adds the papers' rows.

    Raises:
        UserError: If two results need the same row, or a result names an unknown benchmark.
    """
    benchmarks, published = load_papers()
    tests: dict[_Test, dict[str, list[Result]]] = {}
    for result in results:
        benchmark = find_benchmark(result)
        where = (None, ()) if benchmark else (result.split, result.sources)
        methods = tests.setdefault(_Test(result.protocol.name, benchmark, *where), {})
        methods.setdefault(result.name, []).append(result)
    for test, methods in tests.items():
        for runs in methods.values():
            _check_one_row(runs, _title(test))
    for name, benchmark in benchmarks.items():
        parts = [tests.get(_Test(benchmark.protocol, part), {}) for part in benchmark.mean_of]
        if means := _means(parts):
            tests[_Test(benchmark.protocol, name)] = means
    order = [*benchmarks, None]
    in_order = sorted(tests, key=lambda test: order.index(test.benchmark))
    return [_make_table(test, tests[test], published if with_papers else ()) for test in in_order]


def _check_one_row(runs: Sequence[Result], title: str):
    """Check that results of one name are different random splits."""
    for one, other in combinations(runs, 2):
        if None in (one.split_seed, other.split_seed) or one.split_seed == other.split_seed:
            problem = "and are not random splits with different seeds"
        elif one.settings != other.settings:
            problem = "but were scored with different options"
        else:
            continue
        both = f"{one.path} and {other.path} are both results of {one.name!r} on {title}"
        raise UserError(f"{both}, {problem}; give them different --name")


def _means(parts: Sequence[Mapping[str, Sequence[Result]]]) -> dict[str, list[Result]]:
    """Return the mean of each result over all parts, by name."""
    by_run = [{(run.name, run.split_seed): run for runs in part.values() for run in runs} for part in parts]
    means: dict[str, list[Result]] = {}
    for key, first in by_run[0].items() if by_run else ():
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
    """Return the values of each metric that all results have."""
    common = [metric for metric in runs[0].figures if all(metric in run.figures for run in runs)]
    return {metric: [run.figures[metric] for run in runs] for metric in common}


def _title(test: _Test) -> str:
    what = " of ".join(filter(None, (test.split, ", ".join(test.sources))))
    if benchmark := load_papers()[0].get(test.benchmark):
        what = f"{benchmark.title}, {benchmark.num_images} images"
    return f"{what}, protocol {test.protocol}"


def _make_table(test: _Test, methods: Mapping[str, Sequence[Result]], published: Iterable[Published]) -> Table:
    benchmark = load_papers()[0].get(test.benchmark)
    comparable = benchmark is not None and benchmark.protocol == test.protocol
    papers = [row for row in published if comparable and row.benchmark == test.benchmark]
    measured = [run for runs in methods.values() for run in runs]
    shown = {metric for row in (*papers, *measured) for metric in row.figures}
    columns = {metric: column for metric, column in PROTOCOLS[test.protocol].columns.items() if metric in shown}
    rows = []
    for row in papers:
        figures = {metric: columns[metric].format(value) for metric, value in row.figures.items()}
        details = [row.backbone] if row.backbone else []
        rows.append(_cells(row.method, details, columns, figures, f"paper: {row.source}"))
    rows += [_measured_row(runs, columns, benchmark) for runs in methods.values()]
    notes = list(dict.fromkeys(note for row in papers for note in row.notes))
    if benchmark and not comparable:
        theirs = f"The published figures follow the protocol {benchmark.protocol}, so none is shown."
        notes.append(f"Scored by the protocol {test.protocol}. {theirs}")
    if len(measured) > len(methods):
        notes.append("± is the sample standard deviation over the random splits.")
    if papers:
        notes.append(f"Published: {'; '.join(dict.fromkeys(row.reference for row in papers))}.")
    stamps = {name: dict.fromkeys(stamp for run in runs for stamp in run.stamps) for name, runs in methods.items()}
    notes.append("Measured: " + "; ".join(f"{name} {', '.join(each)}" for name, each in stamps.items()) + ".")
    return Table(_title(test), ["method", *(column.title for column in columns.values()), "source"], rows, notes)


def _measured_row(runs: Sequence[Result], columns: Mapping[str, MetricColumn], of: Benchmark | None) -> list[str]:
    """Return the row of one method: one result, or several random splits."""
    details = []
    if len(runs) > 1:
        details.append(f"mean of {len(runs)} random splits")
    elif runs[0].split_seed is not None:
        details.append(f"random split, seed {runs[0].split_seed}")
    # A result on fewer or more images than the benchmark's is not comparable.
    num_images = sorted({run.num_images for run in runs})
    if of is None or num_images != [of.num_images]:
        scored = " to ".join(str(number) for number in dict.fromkeys((num_images[0], num_images[-1])))
        details.append(f"{scored} of {of.num_images} images" if of else f"{scored} images")
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
    """Return tables as Markdown, each with a heading."""
    parts = []
    for table in tables:
        rows = [[cell.replace("|", r"\|") for cell in row] for row in (table.header, *table.rows)]
        parts += [f"### {table.title}", markdown_table(rows[0], rows[1:]), *table.notes]
    return "\n\n".join(parts)
