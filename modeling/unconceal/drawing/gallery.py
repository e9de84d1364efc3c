"""Draw the images of a report, and curves of several reports."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..evaluation.base import THRESHOLDS, Protocol
from ..evaluation.protocol_cod import prepare
from ..evaluation.report import CURVES_FILE, mean_curves
from ..evaluation.tables import Result
from ..utils.errors import UserError
from .sheets import ScoredImage, draw_curves, draw_sheet


def draw_gallery(
    name: str,
    protocol: Protocol,
    options: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    load_example: Callable[[int], tuple[Image.Image | None, np.ndarray, np.ndarray]],
    num_images: int,
) -> dict[str, Image.Image]:
    """Draw sheets of samples, best and worst images, and curves.

    Args:
        name: Name of the method.
        protocol: Protocol that scored `rows`.
        options: Its options.
        rows: Scores of each image.
        load_example: Takes a position in `rows`; returns image (or None), ground truth and prediction.
        num_images: Rows of each sheet.

    Returns:
        File name -> image.

    Raises:
        UserError: If matplotlib is not installed.
    """
    key, title = protocol.ranked_by
    ranked = sorted(range(len(rows)), key=lambda index: rows[index][key])
    num_images = min(num_images, len(rows))
    evenly = dict.fromkeys(np.linspace(0, len(rows) - 1, num_images).round().astype(int).tolist())
    sheets = {
        "samples.png": (f"{name}: samples", list(evenly)),
        "worst.png": (f"{name}: the lowest {title}", ranked[:num_images]),
        "best.png": (f"{name}: the highest {title}", ranked[::-1][:num_images]),
    }

    def scored_images(indices: list[int]) -> Iterator[ScoredImage]:
        for index in indices:
            image, target, probs = load_example(index)
            if options.get("min_max"):
                probs = prepare(probs, min_max=True)  # as it was scored
            caption = f"{title} {rows[index][key]:.3f}"
            yield ScoredImage(rows[index]["id"], caption, image, target, probs, options.get("threshold", 0.5))

    curves = draw_curves({name: mean_curves(protocol, rows)}, protocol.curves, f"Mean over {len(rows)} images")
    return {"curves.png": curves} | {
        file: draw_sheet(scored_images(indices), heading) for file, (heading, indices) in sheets.items()
    }


def compare_curves(results: Sequence[Result]) -> Image.Image:
    """Draw the curves of several results into one image.

    Raises:
        UserError: If their protocols have different curves, two have one name, or a file of curves cannot be read.
    """
    titles = results[0].protocol.curves
    curves = {}
    for result in results:
        if result.protocol.curves != titles:
            first = f"{results[0].protocol.name} in {results[0].path}"
            problem = f"{result.path} was scored by {result.protocol.name}, whose curves are not those of {first}"
            raise UserError(f"{problem}; draw them into two images")
        if result.name in curves:
            raise UserError(f"two results are named {result.name!r}; give them different --name")
        file = result.path.with_name(CURVES_FILE)
        try:
            with file.open(newline="", encoding="utf-8") as lines:
                points = list(csv.DictReader(lines))
            if [int(point["threshold"]) for point in points] != list(THRESHOLDS):
                raise ValueError("expected the thresholds 255 to 0")
            curves[result.name] = {name: [float(point[name]) for point in points] for name in titles}
            if not all(0 <= value <= 2 for values in curves[result.name].values() for value in values):
                raise ValueError("a value is out of range")
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"cannot read the curves in {file} ({error}); evaluate again with --out") from error
    return draw_curves(curves, titles, "Mean over the images of each data set")
