"""Pictures of an evaluation: samples, the best and the worst cases, and curves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .base import Protocol
from .protocol_cod import prepare
from .report import mean_curves
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
    ranked = sorted(range(len(rows)), key=lambda index: rows[index][protocol.ranked_by])
    evenly = dict.fromkeys(np.linspace(0, len(rows) - 1, num_cases).round().astype(int).tolist())
    by = protocol.ranked_by.replace("_", " ")
    sheets = {
        "samples.png": (f"{name}: samples", list(evenly)),
        "worst.png": (f"{name}: the lowest {by}", ranked[:num_cases]),
        "best.png": (f"{name}: the highest {by}", ranked[::-1][:num_cases]),
    }

    def cases(indices: list[int]) -> Iterator[Case]:
        for index in indices:
            image, target, probs = look(index)
            if options.get("min_max"):
                probs = prepare(probs, min_max=True)  # what was scored
            caption = f"{by} {rows[index][protocol.ranked_by]:.3f}"
            yield Case(rows[index]["id"], caption, image, target, probs, options.get("threshold", 0.5))

    curves = draw_curves(
        {name: mean_curves(protocol, rows)}, protocol.curves, f"{name}: mean over {len(rows)} pictures"
    )
    return {"curves.png": curves} | {
        file: draw_sheet(cases(indices), title) for file, (title, indices) in sheets.items()
    }
