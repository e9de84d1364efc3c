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


@dataclass(frozen=True)
class Benchmark:
    """A test split and its protocol.

    Attributes:
        title: Name for people.
        protocol: Key of `PROTOCOLS`.
        num_images: Number of images in the split.
        source: The column `source` of these images in our data sets.
        split: Name of the split in our data sets.
        mean_of: Benchmarks whose figures are averaged. Such a benchmark is not scored: it has no source and no split.
    """

    title: str
    protocol: str
    num_images: int
    source: str | None = None
    split: str | None = None
    mean_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """A row of a paper's table, for one benchmark.

    Attributes:
        benchmark: Name of the benchmark.
        method: Name in the paper.
        backbone: Backbone, if stated.
        source: Place of the row, such as "RUN, Table 1, common setting".
        reference: The paper.
        figures: Metric -> value, with the names and scales of our protocols.
        notes: Facts to know before comparing.
    """

    benchmark: str
    method: str
    backbone: str | None
    source: str
    reference: str
    figures: Mapping[str, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """A measured result.

    Attributes:
        path: The results.json.
        name: Name of the method, chosen by the user.
        protocol: Protocol that scored it.
        figures: Metric -> value.
        num_images: Number of scored images.
        sources: Sources of the images, sorted.
        split: Split of the data set, if any.
        benchmark: Name of the benchmark, if given.
        split_seed: Seed of the random split of the data, if there was one.
        settings: Options that differ from those of a report, such as "min_max off".
        stamps: Date and commit of the measurement.
        weights: Digest of the model's weights, if there was a model (see `api.weights_digest`).
        limit: Number of images, if only the first of the split were scored.
        data: Folder or Hub id of the data.
        date: Time of the measurement, ISO 8601.
        command: Command of the measurement.
    """

    path: Path
    name: str
    protocol: Protocol
    figures: Mapping[str, float]
    num_images: int
    sources: tuple[str, ...]
    split: str | None = None
    benchmark: str | None = None
    split_seed: int | None = None
    settings: tuple[str, ...] = ()
    stamps: tuple[str, ...] = ()
    weights: str | None = None
    limit: int | None = None
    data: str | None = None
    date: str | None = None
    command: str | None = None


@dataclass(frozen=True)
class Table:
    """A table of plain text; `to_markdown` escapes it.

    Attributes:
        title: Test set and protocol.
        header: Titles of the columns.
        rows: Cells of each row, as many as titles.
        notes: Lines under the table.
    """

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


def results_table(paths: Iterable[str | Path], with_papers: bool = True) -> str:
    """Return Markdown tables of results, one for each test set.

    Args:
        paths: Files results.json, or folders that hold one.
        with_papers: Whether to add the papers' rows.

    Raises:
        UserError: As `read_result` and `make_tables`.
    """
    return to_markdown(make_tables(map(read_result, paths), with_papers))


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
    about = ", ".join(filter(None, (paper["reference"], paper.get("url"))))
    for place, rows in paper["rows"].items():
        for row in rows:
            for benchmark in (key for key in row if key in benchmarks):
                metrics = paper["figures"][benchmarks[benchmark].protocol]
                yield Published(
                    benchmark=benchmark,
                    method=row["method"],
                    backbone=row.get("backbone"),
                    source=f"{paper['paper']}, {place}",
                    reference=f"{paper['paper']} ({about})",
                    figures=dict(zip(metrics, row[benchmark], strict=True)),
                    notes=tuple(paper.get("notes", ())),
                )


def read_result(path: str | Path) -> Result:
    """Read a results.json.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        UserError: If there is no such file, or it is damaged or foreign.
    """
    path = Path(path)
    file = path / RESULTS_FILE if is_folder(path) else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {file} ({error.strerror}); "
            f"expected a {RESULTS_FILE}, or a folder that unconceal evaluate --out wrote"
        ) from error
    except (ValueError, RecursionError) as error:  # wrong JSON or wrong encoding
        raise UserError(f"{file} is damaged ({one_line(error)}); evaluate again") from error
    problem = _problem(data)
    if problem:
        raise UserError(
            f"{file} is not a {RESULTS_FILE} of unconceal evaluate: {problem}; evaluate again, or leave it out"
        )
    protocol = PROTOCOLS[data["protocol"]]
    return Result(
        path=file,
        name=" ".join(data["name"].split()),
        protocol=protocol,
        figures={metric: data["results"][metric] for metric in protocol.columns if metric in data["results"]},
        num_images=data["results"]["num_images"],
        # Masks in a folder have no source: the folder tells test sets apart.
        sources=tuple(sorted({source or data.get("data") or "unnamed data" for source in data["sources"]})),
        split_seed=data.get("division_seed"),  # the file keeps the option's old name
        settings=_settings(protocol, data["options"], data.get("refine")),
        stamps=(_stamp(data.get("date"), data.get("git_commit")),),
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
    """Return the options that differ from those of a report, in words."""
    # `refine` is not an option of a protocol, but papers score without it.
    usual = {**protocol.options(**protocol.report_options), "refine": "never"}
    used = {**options, "refine": refine or "never"}
    return tuple(
        f"{name} {('off', 'on')[value] if isinstance(value, bool) else value}"
        for name, value in used.items()
        if name not in usual or value != usual[name]
    )


def _stamp(date: str | None, commit: str | None) -> str:
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
        raise UserError(
            f"{result.path} is for the benchmark {result.benchmark!r}, expected one of {', '.join(parts)}; "
            "evaluate again with one of these as --benchmark, or without --benchmark"
        )
    return result.benchmark


def make_tables(results: Iterable[Result], with_papers: bool = True) -> list[Table]:
    """Make one table for each test set: benchmarks first, in their order.

    Results of one name on several random splits become one row: mean and sample standard deviation. A benchmark that
    is a mean of others gets a row if all of these have one.

    Args:
        results: From `read_result`.
        with_papers: Whether to add the papers' rows.

    Raises:
        UserError: If two results need the same row, or a result names an unknown benchmark.
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
            _check_one_row(runs, _title(test))
    for name, benchmark in benchmarks.items():
        means = benchmark.mean_of and _mean_of_parts(
            [tests.get(_Test(benchmark.protocol, part), {}) for part in benchmark.mean_of]
        )
        if means:
            tests[_Test(benchmark.protocol, name)] = means
    order = list(benchmarks)
    in_order = sorted(tests, key=lambda test: order.index(test.benchmark) if test.benchmark else len(order))
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
        raise UserError(
            f"{one.path} and {other.path} are both results of {one.name!r} on {title}, {problem}; "
            "give them different --name"
        )


def _mean_of_parts(parts: Sequence[Mapping[str, Sequence[Result]]]) -> dict[str, list[Result]]:
    """Return the mean of each result over all benchmarks, by name."""
    by_run = [{(run.name, run.split_seed): run for runs in part.values() for run in runs} for part in parts]
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
    """Return the values of each metric that all results have."""
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
    benchmark = load_papers()[0].get(test.benchmark)
    comparable = benchmark is not None and benchmark.protocol == test.protocol
    papers = [row for row in published if comparable and row.benchmark == test.benchmark]
    shown = {
        metric for row in (*papers, *(run for runs in methods.values() for run in runs)) for metric in row.figures
    }
    columns = {metric: column for metric, column in PROTOCOLS[test.protocol].columns.items() if metric in shown}
    rows = []
    for row in papers:
        figures = {metric: columns[metric].format(value) for metric, value in row.figures.items()}
        details = [row.backbone] if row.backbone else []
        rows.append(_cells(row.method, details, columns, figures, f"paper: {row.source}"))
    rows += [_measured_row(runs, columns, benchmark) for runs in methods.values()]
    notes = list(dict.fromkeys(note for row in papers for note in row.notes))
    if benchmark and not comparable:
        notes.append(
            f"Scored by the protocol {test.protocol}. The published figures follow the protocol {benchmark.protocol}, "
            "so none is shown."
        )
    if any(len(runs) > 1 for runs in methods.values()):
        notes.append("± is the sample standard deviation over the random splits.")
    if papers:
        notes.append(f"Published: {'; '.join(dict.fromkeys(row.reference for row in papers))}.")
    stamps = {name: dict.fromkeys(stamp for run in runs for stamp in run.stamps) for name, runs in methods.items()}
    notes.append("Measured: " + "; ".join(f"{name} {', '.join(each)}" for name, each in stamps.items()) + ".")
    return Table(_title(test), ["method", *(column.title for column in columns.values()), "source"], rows, notes)


def _measured_row(
    runs: Sequence[Result], columns: Mapping[str, MetricColumn], benchmark: Benchmark | None
) -> list[str]:
    """Return the row of one method: one result, or several random splits."""
    details = []
    if len(runs) > 1:
        details.append(f"mean of {len(runs)} random splits")
    elif runs[0].split_seed is not None:
        details.append(f"random split, seed {runs[0].split_seed}")
    # A result on fewer or more images than the benchmark's is not comparable.
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
    """Return tables as Markdown, each with a heading."""
    parts = []
    for table in tables:
        rows = [[cell.replace("|", r"\|") for cell in row] for row in (table.header, *table.rows)]
        parts += [f"### {table.title}", markdown_table(rows[0], rows[1:]), *table.notes]
    return "\n\n".join(parts)
