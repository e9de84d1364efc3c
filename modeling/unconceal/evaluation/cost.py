"""What scoring costs: time by the number of workers, where it goes, and the distance from pysodmetrics called directly."""

import cProfile
import pstats
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import py_sod_metrics
from PIL import Image, ImageFilter

from ..data.synthetic import generate
from .base import Protocol
from .mask_files import PredictionFolder, read_prediction, read_truth


def make_masks(out: Path, num_images: int, size: tuple[int, int]):
    """Generate truths of intricate shapes in `out/gt`, and predictions as a network may make them in `out/pred`.

    Args:
        out: Folder.
        num_images: Pairs.
        size: (height, width).
    """
    for folder in ("gt", "pred"):
        (out / folder).mkdir(parents=True)
    for index in range(num_images):
        truth = generate("intricate", size, seed=0, index=index)[1]
        truth.save(out / "gt" / f"{index}.png")
        seen = truth.resize((size[1] // 4, size[0] // 4)).filter(ImageFilter.GaussianBlur(3))
        seen.resize(truth.size, Image.Resampling.BICUBIC).save(out / "pred" / f"{index}.png")


def time_workers(
    folder: PredictionFolder, protocol: Protocol, numbers: Sequence[int]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Score the folder with each number of workers; return its numbers, and seconds and a worker's peak in GiB of each.

    Raises:
        RuntimeError: If the numbers of the data set depend on the number of workers.
    """
    results, summaries = [], []
    for num_workers in numbers:
        start = time.perf_counter()
        rows = folder.evaluate(protocol, num_workers, progress=False, **protocol.report_options)
        seconds = time.perf_counter() - start
        who = resource.RUSAGE_CHILDREN if num_workers else resource.RUSAGE_SELF
        peak = resource.getrusage(who).ru_maxrss / 2**20  # of the largest child so far; they do the same work
        results.append({"metric_workers": num_workers, "seconds": seconds, "peak_gib": peak})
        summaries.append(protocol.summarize(rows))
    if any(summary != summaries[0] for summary in summaries):
        raise RuntimeError(f"the numbers depend on the number of workers: {summaries}")
    return summaries[0], results


def profile(folder: PredictionFolder, protocol: Protocol, num_functions: int = 8) -> list[dict[str, Any]]:
    """Score the folder in this process; return the functions that take the most time themselves, and their share."""
    profiler = cProfile.Profile()
    profiler.enable()
    folder.evaluate(protocol, 0, progress=False, **protocol.report_options)
    profiler.disable()
    stats = pstats.Stats(profiler)
    functions = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:num_functions]
    return [
        {"function": _name(*function), "calls": calls, "share": own / stats.total_tt}
        for function, (_, calls, own, *_) in functions
    ]


def distance_from_pysodmetrics(folder: PredictionFolder, protocol: Protocol) -> dict[str, float]:
    """Return how far the data set's numbers of `dis` are from those of pysodmetrics on the same 8-bit pictures."""
    measures = {
        "weighted_f_measure": (py_sod_metrics.WeightedFmeasure(), lambda results: results["wfm"]),
        "mae": (py_sod_metrics.MAE(), lambda results: results["mae"]),
        "s_measure": (py_sod_metrics.Smeasure(), lambda results: results["sm"]),
        "e_measure_mean": (py_sod_metrics.Emeasure(), lambda results: results["em"]["curve"].mean()),
        "f_measure_max": (
            py_sod_metrics.FmeasureV2({"f": py_sod_metrics.FmeasureHandler(True, False, beta=0.3)}),
            lambda results: results["f"]["dynamic"].max(),
        ),
        "hce": (py_sod_metrics.HumanCorrectionEffortMeasure(relax=5, epsilon=2.0), lambda results: results["hce"]),
    }
    for entry in folder.entries:
        target, _ = read_truth(entry.truth)
        probs, *_ = read_prediction(entry.prediction, target.shape)
        for measure, _ in measures.values():
            measure.step(probs, target.astype(np.uint8) * 255)
    rows = folder.evaluate(protocol, 0, progress=False, **protocol.report_options)
    summary = protocol.summarize(rows)
    return {
        name: abs(summary[name] - float(result(measure.get_results()))) for name, (measure, result) in measures.items()
    }


def _name(file: str, line: int, function: str) -> str:
    return function.strip("<>") if file.startswith("~") else f"{Path(file).stem}.{function}"
