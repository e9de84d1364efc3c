"""Draw how losses and metrics of a training went."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image

from .sheets import LINE_COLORS, STYLES, check_plots


def draw_training(
    history: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]], metric: str
) -> Image.Image:
    """Draw loss, terms of the loss, and metric over the epochs.

    The RGB image is 1440 pixels wide. A phase whose loss has one term has two panels.

    Args:
        history: Rows of the finished epochs: `epoch`, `train_loss`, `losses` by name, and `eval_METRIC` where there
            was an evaluation.
        steps: Rows of steps, maybe none: `loss`, and `epoch`, such as 1.5 in the middle of the second one.
        metric: The number that chooses the best checkpoint.

    Raises:
        UserError: If matplotlib is not installed.
    """
    check_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    middles = [row["epoch"] - 0.5 for row in history]  # a mean over an epoch
    names = history[-1].get("losses", {})
    terms = {name: [row.get("losses", {}).get(name, math.nan) for row in history] for name in names}
    figure = Figure((12, 4), 120, layout="constrained", facecolor="white")
    panels = list(figure.subplots(1, 3 if terms else 2))
    panels[0].plot(
        [row["epoch"] for row in steps], [row["loss"] for row in steps], color="0.75", linewidth=1, label="steps"
    )
    panels[0].plot(middles, [row["train_loss"] for row in history], color=LINE_COLORS[0], marker=".", label="epochs")
    panels[0].set_title("training loss")
    panels[0].legend(frameon=False)
    if terms:
        styles = zip(cycle(LINE_COLORS), np.repeat(STYLES, len(LINE_COLORS)).tolist(), strict=False)
        for (name, values), (color, line) in zip(terms.items(), styles, strict=False):
            panels[1].plot(middles, values, color=color, linestyle=line, label=name)
        panels[1].set_title("terms of the loss")
        panels[1].legend(frameon=False, fontsize=8, ncols=1 + len(terms) // 8)
    scored = [(row["epoch"], row[f"eval_{metric}"]) for row in history if f"eval_{metric}" in row]
    panels[-1].plot(*zip(*scored, strict=True), color=LINE_COLORS[1], marker="o")
    panels[-1].set_title(f"validation: {metric}")
    for axes in panels:
        axes.set_xlabel("epochs")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
