"""Pictures of an evaluation: samples, the best and the worst cases, and curves; the curves of several beside each other."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..evaluation.base import THRESHOLDS, Protocol
from ..evaluation.protocol_cod import prepare
from ..evaluation.report import CURVES, mean_curves
from ..evaluation.tables import Result
from ..utils.errors import UserError
from .sheets import Case, draw_curves, draw_sheet


Look = Callable[[int], tuple[Image.Image | None, np.ndarray, np.ndarray]]


def draw_gallery(
    name: str,
    protocol: Protocol,
    options: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    look: Look,
    num_cases: int,
) -> dict[str, Image.Image]:
    """Draw the pictures that a report can hold, by their file names.

    Args:
        name: What was scored.
        protocol: By which.
        options: The protocol's options.
        rows: Numbers of each picture.
        look: Takes a position in `rows` and returns the picture, if it is at hand, the truth and the prediction.
        num_cases: Rows of each sheet.

    Raises:
        UserError: If matplotlib is not installed.
    """
    key, title = protocol.ranked_by
    ranked = sorted(range(len(rows)), key=lambda index: rows[index][key])
    num_cases = min(num_cases, len(rows))
    evenly = dict.fromkeys(np.linspace(0, len(rows) - 1, num_cases).round().astype(int).tolist())
    sheets = {
        "samples.png": (f"{name}: samples", list(evenly)),
        "worst.png": (f"{name}: the lowest {title}", ranked[:num_cases]),
        "best.png": (f"{name}: the highest {title}", ranked[::-1][:num_cases]),
    }

    def cases(indices: list[int]) -> Iterator[Case]:
        for index in indices:
            image, target, probs = look(index)
            if options.get("min_max"):
                probs = prepare(probs, min_max=True)  # as it was scored
            caption = f"{title} {rows[index][key]:.3f}"
            yield Case(rows[index]["id"], caption, image, target, probs, options.get("threshold", 0.5))

    curves = draw_curves({name: mean_curves(protocol, rows)}, protocol.curves, f"Mean over {len(rows)} pictures")
    return {"curves.png": curves} | {
        file: draw_sheet(cases(where), heading) for file, (heading, where) in sheets.items()
    }


def compare_curves(results: Sequence[Result]) -> Image.Image:
    """Draw the curves of several evaluations into one picture.

    Raises:
        UserError: If they were scored by protocols with other curves, two have one name, or the curves of one are not
            beside its results.json.
    """
    titles = results[0].protocol.curves
    curves = {}
    for result in results:
        if result.protocol.curves != titles:
            raise UserError(
                f"{result.path} was scored by {result.protocol.name}, whose curves are not those of "
                f"{results[0].protocol.name}, by which {results[0].path} was; compare them in two pictures"
            )
        if result.name in curves:
            raise UserError(f"two results are named {result.name!r}; give them different --name")
        file = result.path.with_name(CURVES)
        try:
            with file.open(newline="", encoding="utf-8") as lines:
                points = list(csv.DictReader(lines))
            if [int(point["threshold"]) for point in points] != list(THRESHOLDS):
                raise ValueError("it has not the thresholds 255 to 0")
            curves[result.name] = {name: [float(point[name]) for point in points] for name in titles}
            if not all(0 <= value <= 2 for values in curves[result.name].values() for value in values):
                raise ValueError("a value is out of range")
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"cannot read the curves in {file} ({error}); evaluate again with --out") from None
    return draw_curves(curves, titles, "Mean over the pictures of each data set")
