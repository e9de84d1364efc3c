"""Write scores to files, with a record of how they were made."""

import csv
import json
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
from ..models.reading import tag_srgb
from ..utils.commits import git_commit
from ..utils.errors import UserError
from ..utils.files import has_keys, is_folder, is_taken, make_folder, printable, replacing
from ..utils.markdown import markdown_table
from .base import THRESHOLDS, Protocol, mean_curve


PER_IMAGE_FILES = {"csv": "per_image.csv", "parquet": "per_image.parquet"}
CURVES_FILE, RESULTS_FILE = "curves.csv", "results.json"
NUMBER_FILES = (*PER_IMAGE_FILES.values(), CURVES_FILE, RESULTS_FILE)
IMAGE_FILES = ("samples.png", "worst.png", "best.png", "curves.png")


def check_report_folder(out: str | Path, overwrite: bool, images: Sequence[str] = ()):
    """Make the folder of a report, before any work is done.

    `images` are names that `add_images` will write.

    Raises:
        UserError: If the folder holds a report and `overwrite` is false, if it holds a file of such a name that no
            report wrote, or if it cannot be written.
    """
    existing = [name for name in (*NUMBER_FILES, *images) if is_taken(Path(out) / name)]
    folders = [name for name in existing if is_folder(Path(out) / name)]
    if folders:
        raise UserError(f"{out} holds a folder named {folders[0]}, expected a file; choose another --out")
    if existing and not overwrite:
        names = " and ".join(existing)
        raise UserError(f"{out} already holds {names}; choose another --out, or pass --overwrite to replace them")
    written = _written_files(out)
    if foreign := [name for name in existing if name not in written]:
        what = f"{out} holds {foreign[0]}, but no {RESULTS_FILE} of this command that names it"
        raise UserError(f"{what}; move it, or choose another --out")
    make_folder(out)


def _written_files(out: str | Path) -> set[str]:
    """Return the names of the files that a report wrote."""
    file = Path(out) / RESULTS_FILE
    if not has_keys(file, "protocol", "results"):
        return set()
    if not has_keys(file, "files"):  # an older report: nothing says whose the images are
        return set(NUMBER_FILES)
    return {*NUMBER_FILES, *IMAGE_FILES} & set(json.loads(file.read_text(encoding="utf-8"))["files"])


def write_report(
    out: str | Path,
    protocol: Protocol,
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, float],
    run: Mapping[str, Any],
    file_format: str = "csv",
    images: Sequence[str] = (),
):
    """Write the numbers of each image, the mean curves and `results.json`.

    An earlier report in the folder is replaced as a whole, after all files of this one are written. `results.json`
    names the files of its report. Other files stay.

    Args:
        out: Folder.
        protocol: Protocol that scored `rows`.
        rows: From `evaluate_model` or `PredictionFolder.evaluate`.
        summary: From the protocol's `summarize`.
        run: What else made the numbers: model, data, split, options of the protocol, command. It is kept together with
            protocol, sources, date, version and, in a git checkout, commit.
        file_format: Key of `PER_IMAGE_FILES`, for the numbers of each image.
        images: Names of the images that `add_images` will add.
    """
    folder, stale = make_folder(out), _written_files(out)
    curves = mean_curves(protocol, rows)
    scalars = [{name: value for name, value in row.items() if name not in curves} for row in rows]
    for row in scalars:
        row.update(id=printable(row["id"]), source=printable(row["source"]))
    results = {
        "protocol": protocol.name,
        "results": dict(summary),
        "sources": dict(Counter(row["source"] for row in rows)),
        **run,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "unconceal_version": __version__,
        "git_commit": git_commit(),
    }
    # Write to a temporary folder, then rename: a failure keeps the earlier report.
    with TemporaryDirectory(prefix=".", dir=folder) as temporary:
        temporary = Path(temporary)
        if file_format == "csv":
            _write_csv(temporary / PER_IMAGE_FILES["csv"], scalars)
        else:
            pq.write_table(pa.Table.from_pylist(scalars), temporary / PER_IMAGE_FILES["parquet"])
        if curves:
            columns = {"threshold": THRESHOLDS, **curves}
            points = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            _write_csv(temporary / CURVES_FILE, points)
        written = [*sorted(path.name for path in temporary.iterdir()), RESULTS_FILE]
        results["files"] = [*written, *images]
        (temporary / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        for name in written:
            (temporary / name).replace(folder / name)
    for name in stale - set(written):
        (folder / name).unlink(missing_ok=True)


def add_images(out: str | Path, images: Mapping[str, Image.Image]):
    """Save images, named as in `IMAGE_FILES`, into the folder of a report."""
    for name, image in images.items():
        with replacing(Path(out) / name) as path:
            tag_srgb(image).save(path)


def format_table(protocol: Protocol, summary: Mapping[str, float]) -> str:
    """Return the numbers of a data set as a Markdown table."""
    columns = {name: column for name, column in protocol.columns.items() if name in summary}
    values = [column.format(summary[name]) for name, column in columns.items()]
    return markdown_table([column.title for column in columns.values()], [values])


def mean_curves(protocol: Protocol, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the mean of each of the protocol's curves over images."""
    return {name: mean_curve(rows, name) for name in protocol.curves}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
