"""Score mask files of any method.

The ground truth is a folder of masks or a prepared data set.

**Names.** A prediction belongs to the ground truth of the same name. The name is the file name without suffix; in a
data set it is the part of `id` after the last slash. Upper and lower case are equal.

**Values of a prediction.** An 8-bit gray file is scored unchanged, with 255 for 1. Any other file is converted and
counted, as `prediction_levels` does it. Gray of more bits is divided by 65535, and floats must be in [0, 1]. If the
files of the folder hold one value beside 0, such as 1, that value is 1. See `white_of_predictions`. If only some files
hold one dark value, the log says so.

**Size.** A prediction of another size than its ground truth is resized to it, bilinearly, and counted.

**Values of a ground truth.** `data.masks.read_mask` reads it. Files with other values than 0 and 255 are counted. The
log says if such a file has no value above half, or if all masks are one value.
"""

import logging
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from ..data.image_files import read_image
from ..data.masks import TrueMask, one_value, read_mask
from ..data.names import by_name, first_names, list_images
from ..models.reading import (
    ONE_DARK_VALUE,
    Foreground,
    has_one_dark_value,
    needs_white,
    prediction_levels,
    scaled,
    to_rgb,
    white_of_predictions,
)
from ..utils.errors import UserError, one_line
from ..utils.images import MAX_PIXELS, open_image
from .base import Protocol
from .networks import in_order, report_vanished, score_job
from .workers import map_unordered


logger = logging.getLogger(__name__)


class MaskPair(NamedTuple):
    """A prediction and its ground truth."""

    id: str
    source: str  # in the data set, or ""
    prediction: Path
    truth: Path | int  # mask file, or position in the data set
    image: Path | None


class PredictionFolder:
    """Mask files of a method, matched with their ground truths.

    Args:
        predictions: Folder of mask files.
        truth: Folder of ground truth masks, or a split of a data set with the columns `image`, `mask`, `id`, `source`.
        truth_suffix: Text that follows the name in ground truth files, such as `_pixels0`.
        images: Folder of images, for sheets. A data set has its own.
        only_matched: Leave out files without a counterpart instead of refusing them. Their names are kept in
            `without_truth` and `without_prediction`.
        max_pixels: Limit on width times height of a file.
        limit: Number of pairs to score, from the first. The pairs `entries` are in the order of names or of the data
            set.
        foreground: What is object if ground truth masks are maps of classes, as for `to_mask`.

    Raises:
        UserError: If a folder cannot be read, a name is ambiguous, or a file has no counterpart and `only_matched` is
            false. Missing counterparts are also logged.
    """

    def __init__(
        self,
        predictions: str | Path,
        truth: str | Path | Dataset,
        truth_suffix: str = "",
        images: str | Path | None = None,
        only_matched: bool = False,
        max_pixels: int = MAX_PIXELS,
        limit: int | None = None,
        foreground: Foreground | None = None,
    ):
        self.max_pixels, self.foreground = max_pixels, foreground
        self.dataset = truth if isinstance(truth, Dataset) else None
        if self.dataset is None:
            where, truths = str(truth), list_images(Path(truth), re.escape(truth_suffix))
        else:
            where, truths = "the data set", defaultdict(list)
            ids, sources = truth["id"][:], truth["source"][:]
            for index, id in enumerate(ids):
                truths[id.rpartition("/")[2]].append(index)
        matched = by_name(list_images(Path(predictions)), truths)
        image_files = list_images(Path(images)) if images else {}
        image_files = {name.casefold(): files[0] for name, files in image_files.items()}
        ambiguous = [name for name, files in matched.items() if max(map(len, files)) > 1]
        if ambiguous:
            files = f"several files in {predictions} or {where}"
            raise UserError(f"{files} have the name {first_names(ambiguous)}; give each image its own name")
        self.without_truth = [name for name, (_, true) in matched.items() if not true]
        self.without_prediction = [name for name, (masks, _) in matched.items() if not masks]
        self.entries = []
        for name, (masks, true) in matched.items():
            if masks and true:
                id, source = (name, "") if self.dataset is None else (ids[true[0]], sources[true[0]])
                self.entries.append(MaskPair(id, source, masks[0], true[0], image_files.get(name.casefold())))
        if self.dataset is not None:
            self.entries.sort(key=lambda entry: entry.truth)
        unmatched = []
        for names, have, lack in (
            (self.without_truth, "predictions", "ground truth"),
            (self.without_prediction, "ground truths", "prediction"),
        ):
            for name in names:
                logger.warning("%s: no %s", name, lack)
            if names:
                unmatched.append(f"{len(names)} {have} have no {lack} ({first_names(names)})")
        unmatched = " and ".join(unmatched)
        if not self.entries:
            problem = f"no file in {predictions} has the name of a ground truth in {where}"
            raise UserError(f"{problem}: {unmatched}; rename them")
        if unmatched and not only_matched:
            others = f"--only-matched to score the {len(self.entries)} that have both"
            raise UserError(f"{unmatched}; rename them, or pass {others}")
        self.entries = self.entries[:limit]

    def evaluate(
        self, protocol: Protocol, metric_workers: int = 0, progress: bool = True, **options: Any
    ) -> list[dict[str, Any]]:
        """Score every prediction by a protocol.

        Args:
            protocol: One of `PROTOCOLS`.
            metric_workers: Processes that read and score; 0 scores in this process.
            progress: Whether to show a progress bar.
            **options: Options of the protocol's `score_image`.

        Returns:
            One row for each image, in the order of `entries`: `id`, `source`, `height`, `width` (pixels), `converted`,
            `resized`, `mask_changed` (see above) and the keys of the protocol's `score_image`.

        Raises:
            UserError: If a file cannot be read or used.
            ValueError: If the protocol has no such option.
        """
        if problem := one_value(self._read_truth(entry).mask for entry in self.entries):
            logger.warning("%s, so the scores say little; check the ground truth", problem)
        limits = (self.max_pixels, self.foreground, self.whites)
        score = partial(_score_entry, protocol, protocol.options(**options), *limits)
        jobs = ((index, entry, self._truth(entry)) for index, entry in enumerate(self.entries))
        done = map_unordered(score, jobs, min(metric_workers, len(self.entries)))
        rows = in_order(list(tqdm(done, "evaluate", len(self.entries), unit="image", disable=not progress)))
        report_vanished(rows)
        if dark := [row["id"] for row in rows if row.pop("is_dark")]:
            logger.warning(f"{ONE_DARK_VALUE} (%s)", len(dark), first_names(dark))
        return rows

    def load_example(self, index: int) -> tuple[Image.Image | None, np.ndarray, np.ndarray]:
        """Return image or None, ground truth and prediction of an entry."""
        entry = self.entries[index]
        target = self._read_truth(entry).mask
        probs, *_ = read_prediction(entry.prediction, target.shape, self.max_pixels, self.whites)
        if entry.image:
            try:
                return read_image(entry.image, self.max_pixels), target, probs
            except UserError as error:
                raise UserError(f"{entry.image}: {error}") from error
        image = to_rgb(self.dataset[entry.truth]["image"]) if self.dataset is not None else None
        return image, target, probs

    def _truth(self, entry: MaskPair) -> Path | Image.Image:
        if self.dataset is None:
            return entry.truth
        # Select the column: otherwise the image is decoded, too.
        return self.dataset.select_columns("mask")[entry.truth]["mask"]

    def _read_truth(self, entry: MaskPair) -> TrueMask:
        return read_ground_truth(self._truth(entry), entry.id, self.max_pixels, self.foreground)

    @cached_property
    def whites(self) -> dict[bool, int]:
        """Return what means object in 8-bit files (True) and deeper ones (False)."""
        depths = [(_has_8_bits(entry.prediction), entry.prediction) for entry in self.entries]

        def levels(has_8_bits: bool) -> Iterator[np.ndarray]:
            for depth, path in depths:
                if depth in (has_8_bits, None):
                    values, _ = _prediction_levels(path, self.max_pixels)
                    if needs_white(values) and (values.dtype == np.uint8) == has_8_bits:
                        yield values

        return {has_8_bits: white_of_predictions(levels(has_8_bits)) for has_8_bits in (True, False)}


def read_ground_truth(
    truth: Path | Image.Image, id: str, max_pixels: int = MAX_PIXELS, foreground: Foreground | None = None
) -> TrueMask:
    """Read a mask file, or a mask of a data set.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return read_mask(truth, max_pixels=max_pixels, foreground=foreground)
    except UserError as error:
        raise UserError(f"{truth.parent if isinstance(truth, Path) else id}: {error}") from error


def _has_8_bits(path: Path) -> bool | None:
    """Return the depth in the header of a prediction; None if unreadable."""
    try:
        with open_image(path, sys.maxsize) as image:
            return not image.mode.startswith(("I", "F"))
    except Exception:  # decoding it reports the reason
        return None


def _prediction_levels(path: Path, max_pixels: int) -> tuple[np.ndarray, str]:
    """Return the values of a prediction, and its mode."""
    try:
        with open_image(path, max_pixels) as image:
            return prediction_levels(image), image.mode
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # Pillow raises nearly any class on damaged files
        raise UserError(f"{path} cannot be read as a mask: {one_line(error)}") from error


def read_prediction(
    path: Path,
    shape: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    whites: dict[bool, int] | None = None,
) -> tuple[np.ndarray, bool, bool]:
    """Read a prediction by the rules above.

    Args:
        path: Its file.
        shape: (H, W) to which it is resized.
        max_pixels: Limit on width times height of a file.
        whites: `PredictionFolder.whites`, by default those of gray levels.

    Returns:
        (H, W), uint8, or float32 in [0, 1] if it was resized to `shape` or has more bits; whether it was converted,
        and resized.

    Raises:
        UserError: If the file cannot be read, or its values are not those of a prediction.
    """
    levels, mode = _prediction_levels(path, max_pixels)
    white = (whites or {True: 255, False: 65535})[levels.dtype == np.uint8] if levels.dtype.kind != "f" else 1
    values = scaled(levels, white)
    if values.dtype != np.uint8 and not (values.min() >= 0 and values.max() <= 1):
        got = f"values from {values.min():g} to {values.max():g} (white is 1)"
        raise UserError(f"{path} holds {got}, expected [0, 1]; save probabilities, or 8-bit or 16-bit gray")
    resized = shape is not None and values.shape != shape
    if resized:
        probs = np.asarray(values, np.float32) / (255 if values.dtype == np.uint8 else 1)
        probs = Image.fromarray(probs).resize(shape[::-1], Image.Resampling.BILINEAR)
        values = np.asarray(probs).clip(0, 1)
    return values, mode != "L" or white != 255, resized


def _score_entry(
    protocol: Protocol,
    options: dict[str, Any],
    max_pixels: int,
    foreground: Foreground | None,
    whites: dict[bool, int],
    job: tuple[int, MaskPair, Path | Image.Image],
) -> dict[str, Any]:
    index, entry, truth = job
    target, changed, _, has_vanished, _ = read_ground_truth(truth, entry.id, max_pixels, foreground)
    probs, converted, resized = read_prediction(entry.prediction, target.shape, max_pixels, whites)
    height, width = target.shape
    example = {"index": index, "id": entry.id, "source": entry.source, "height": height, "width": width}
    example |= {"converted": converted, "resized": resized, "mask_changed": changed}
    is_dark = has_one_dark_value(probs, 255 if probs.dtype == np.uint8 else 1)
    example |= {"has_vanished": has_vanished, "is_dark": is_dark}
    return score_job(protocol.score_image, options, (example, probs, target))
