"""From scores to files that say what produced them."""

import csv
import json
import os
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .. import __version__
from ..utils.errors import UserError
from ..utils.files import is_folder, make_folder, printable, replacing
from ..utils.markdown import markdown_table
from .base import THRESHOLDS, Protocol, mean_curve


PER_IMAGE = {"csv": "per_image.csv", "parquet": "per_image.parquet"}
CURVES, RESULTS = "curves.csv", "results.json"
PICTURES = ("samples.png", "worst.png", "best.png", "curves.png")
REPORT_FILES = (*PER_IMAGE.values(), CURVES, *PICTURES, RESULTS)


def check_report_folder(out: str | Path, overwrite: bool):
    """Make the folder of a report, before the work whose result it shall hold.

    Raises:
        UserError: If a report is there already and `overwrite` is false, or if the folder cannot be written.
    """
    existing = [name for name in REPORT_FILES if os.path.lexists(Path(out) / name)]
    folders = [name for name in existing if is_folder(Path(out) / name)]
    if folders:
        raise UserError(f"{out} holds a folder {folders[0]}, where a file would go; choose another --out")
    if existing and not overwrite:
        raise UserError(
            f"{out} already holds {' and '.join(existing)}; choose another --out, or pass --overwrite to replace them"
        )
    make_folder(out)


def write_report(
    out: str | Path,
    protocol: Protocol,
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, float],
    run: Mapping[str, Any],
    file_format: str = "csv",
):
    """Write the numbers of each picture, the mean curves and `results.json`.

    An earlier report in the folder is replaced once all of this one is written, and as a whole: what this one does not
    have is removed.

    Args:
        out: Folder.
        protocol: By which `rows` were scored.
        rows: What `evaluate_model` or `PredictionFolder.evaluate` returned.
        summary: What the protocol's `summarize` made of them.
        run: What else produced the numbers (model, data, split, options of the protocol, command); kept beside protocol,
            sources, date, version and, in a git checkout, commit.
        file_format: Of the numbers of each picture, a key of `PER_IMAGE`.
    """
    folder = make_folder(out)
    scalars = [
        {
            name: printable(value) if isinstance(value, str) else value
            for name, value in row.items()
            if name not in protocol.curves
        }
        for row in rows
    ]
    curves = mean_curves(protocol, rows)
    results = {
        "protocol": protocol.name,
        "results": dict(summary),
        "sources": dict(Counter(row["source"] for row in rows)),
        **run,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "unconceal_version": __version__,
        "git_commit": git_commit(),
    }
    # Written beside, then renamed: a failure on the way leaves the earlier report as it was.
    with TemporaryDirectory(prefix=".", dir=folder) as beside:
        beside = Path(beside)
        if file_format == "csv":
            _write_csv(beside / PER_IMAGE["csv"], list(scalars[0]), scalars)
        else:
            pq.write_table(pa.Table.from_pylist(scalars), beside / PER_IMAGE["parquet"])
        if curves:
            points = [
                {"threshold": threshold, **dict(zip(curves, values, strict=True))}
                for threshold, values in zip(THRESHOLDS, zip(*curves.values(), strict=True), strict=True)
            ]
            _write_csv(beside / CURVES, list(points[0]), points)
        (beside / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        written = sorted(path.name for path in beside.iterdir())
        for name in written:
            (beside / name).replace(folder / name)
    for name in set(REPORT_FILES) - set(written):
        (folder / name).unlink(missing_ok=True)


def add_images(out: str | Path, pictures: Mapping[str, Image.Image]):
    """Put pictures, some of `PICTURES` by name, beside the numbers of a report."""
    for name, picture in pictures.items():
        with replacing(Path(out) / name) as path:
            picture.save(path)


def format_table(protocol: Protocol, summary: Mapping[str, float]) -> str:
    """Return the numbers of a data set as a Markdown table with one line of values."""
    columns = {name: column for name, column in protocol.columns.items() if name in summary}
    values = [column.format(summary[name]) for name, column in columns.items()]
    return markdown_table([column.title for column in columns.values()], [values])


def mean_curves(protocol: Protocol, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the mean over pictures of each of the protocol's curves, over the thresholds 255 to 0."""
    return {name: mean_curve(rows, name) for name in protocol.curves}


def _write_csv(path: Path, names: list[str], rows: Sequence[Mapping[str, Any]]):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)


def git_commit() -> str | None:
    """Return the commit that this package runs from, with "-dirty" where files differ from it; None outside git."""
    here = Path(__file__).resolve()
    try:
        # Installed inside another project's checkout, this file lies in git's reach but is none of its own.
        _git("ls-files", "--error-unmatch", here.name, cwd=here.parent)
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*", cwd=here.parent)
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str, cwd: Path) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()
