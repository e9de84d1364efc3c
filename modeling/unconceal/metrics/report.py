"""From scores to files that say what produced them."""

import csv
import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UserError
from ..files import make_folder, replacing
from .base import Protocol


PER_IMAGE, RESULTS = "per_image.csv", "results.json"


def check_report_folder(out: str | Path, overwrite: bool):
    """Make the folder of a report, before the work whose result it shall hold.

    Raises:
        UserError: If a report is there already and `overwrite` is false, or if the folder cannot be written.
    """
    existing = [name for name in (PER_IMAGE, RESULTS) if (Path(out) / name).exists()]
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
):
    """Write `per_image.csv`, one line for each of `rows`, then `results.json`; each is whole or as it was before.

    Args:
        out: Folder.
        protocol: By which `rows` were scored.
        rows: What `evaluate_model` returned.
        summary: What the protocol's `summarize` made of them.
        run: What else produced the numbers (model, data, split, options of the protocol, command); kept beside protocol,
            date, version and, in a git checkout, commit.
    """
    folder = make_folder(out)
    with replacing(folder / PER_IMAGE) as path, path.open("w", newline="", encoding="utf-8") as file:
        scalars = [name for name in rows[0] if name not in protocol.curves]
        writer = csv.DictWriter(file, fieldnames=scalars, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    results = {
        "protocol": protocol.name,
        "results": dict(summary),
        **run,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "unconceal_version": __version__,
        "git_commit": git_commit(),
    }
    with replacing(folder / RESULTS) as path:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


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
