"""Scoring mask files that any method wrote, against true masks in a folder or in a prepared data set.

**Names.** A prediction belongs to the truth of its name: file names without suffix, and of the pictures of a data set the
part of their `id` after the last slash. Upper and lower case may differ.

**Values of a prediction.** A file in 8-bit grey is scored as it is, 255 for 1. Any other is converted, and counted: grey of
more bits is divided by 65535, which no value may exceed, floats must lie in [0, 1], and the rest is read as `to_mask`
reads masks (the brightest of the colours; a palette of colours is a map of classes).

**Size.** A prediction of another size than its truth is resized to it, bilinearly, and counted.

**Values of a truth.** By the rule of `data.pairs`: foreground above 127/255 of the file's full scale. Files with other
values than 0 and 255 are counted.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ..api import read_image
from ..data.pairs import by_name, list_images, read_mask
from ..models.image_processing_unconceal import to_mask, to_rgb
from ..utils.errors import UserError
from ..utils.images import MAX_PIXELS, open_image
from .base import Protocol
from .networks import checked_options, score_job
from .workers import map_unordered


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A prediction with its truth.

    Attributes:
        id: Name.
        source: The data set that it is from, where that is known.
        prediction: Mask file of the method.
        truth: Mask file, or position in the data set.
        image: Image file, if one is at hand apart from a data set.
    """

    id: str
    source: str
    prediction: Path
    truth: Path | int
    image: Path | None = None


class PredictionFolder:
    """Mask files of a method, matched with their truths.

    Args:
        predictions: Folder of mask files.
        truth: Folder of true masks, or a split of a data set with columns `image`, `mask`, `id` and `source`.
        truth_suffix: What a true mask has after the name of its prediction, such as `_pixels0`.
        images: Folder of the pictures, for sheets; a data set has its own.
        only_matched: Leave out predictions without truth, and the reverse, instead of refusing them.
        max_pixels: Width times height above which a file is refused.
        limit: Take the first so many entries only.

    Attributes:
        entries: What can be scored, in the order of names, or of the data set.
        without_truth: Names of predictions that have none.
        without_prediction: Names of truths that have none.

    Raises:
        UserError: If a folder cannot be read, a name is ambiguous, or a file lacks its counterpart and `only_matched` is
            false. Each of the latter is logged.
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
    ):
        self.max_pixels = max_pixels
        self.dataset = truth if isinstance(truth, Dataset) else None
        if self.dataset is None:
            truths, sources = list_images(Path(truth), re.escape(truth_suffix)), {}
            where = str(truth)
        else:
            ids = self.dataset["id"][:]
            sources = dict(enumerate(self.dataset["source"][:]))
            truths = {}
            for index, id in enumerate(ids):
                truths.setdefault(id.rpartition("/")[2], []).append(index)
            where = "the data set"
        matched = by_name(list_images(Path(predictions)), truths)
        pictures = list_images(Path(images)) if images else {}
        pictures = {name.casefold(): files[0] for name, files in pictures.items()}
        double = [name for name, files in matched.items() if max(map(len, files)) > 1]
        if double:
            raise UserError(
                f"{_named(double)} in {predictions} or {where} stand for several files each; give every picture one"
            )
        self.without_truth = [name for name, (_, true) in matched.items() if not true]
        self.without_prediction = [name for name, (masks, _) in matched.items() if not masks]
        self.entries = [
            Entry(
                ids[true[0]] if self.dataset is not None else name,
                sources.get(true[0], ""),
                masks[0],
                true[0],
                pictures.get(name.casefold()),
            )
            for name, (masks, true) in matched.items()
            if masks and true
        ]
        if self.dataset is not None:
            self.entries.sort(key=lambda entry: entry.truth)
        for kind, names in (("truth", self.without_truth), ("prediction", self.without_prediction)):
            for name in names:
                logger.warning("%s: no %s", name, kind)
        lacking = " and ".join(
            f"{len(names)} {have} have no {lack} ({_named(names)})"
            for names, have, lack in (
                (self.without_truth, "predictions", "truth"),
                (self.without_prediction, "truths", "prediction"),
            )
            if names
        )
        if not self.entries:
            raise UserError(f"no file of {predictions} has the name of a truth in {where}: {lacking}; name them alike")
        if lacking and not only_matched:
            raise UserError(
                f"{lacking}; name them alike, or pass --only-matched to score the {len(self.entries)} that have both"
            )
        self.entries = self.entries[:limit]

    def evaluate(
        self, protocol: Protocol, metric_workers: int = 0, progress: bool = True, **options: Any
    ) -> list[dict[str, Any]]:
        """Score every prediction by a protocol.

        Args:
            protocol: How to score, one of `PROTOCOLS`.
            metric_workers: Processes that read and score; with 0 it is done here.
            progress: Whether to show a progress bar.
            **options: Options of the protocol's `score_image`.

        Returns:
            One row a picture, in the order of `entries`: `id`, `source`, `height`, `width` (pixels), `converted`,
            `resized`, `mask_changed` (by the rules above) and the keys of the protocol's `score_image`.

        Raises:
            UserError: If a file cannot be read or used, or the protocol has no such option.
        """
        score = partial(_score_entry, protocol, checked_options(protocol, **options), self.max_pixels)
        done = map_unordered(score, self._jobs(), min(metric_workers, len(self.entries)))
        rows = list(tqdm(done, "evaluate", len(self.entries), unit="picture", disable=not progress))
        rows.sort(key=lambda row: row["index"])
        for row in rows:
            del row["index"]
        return rows

    def look(self, index: int) -> tuple[Image.Image | None, np.ndarray, np.ndarray]:
        """Return the picture, if it is at hand, the truth (H, W) and the prediction (H, W) of an entry."""
        entry = self.entries[index]
        truth = self._truth(entry)
        target, _ = read_truth(truth, self.max_pixels)
        probs, *_ = read_prediction(entry.prediction, target.shape, self.max_pixels)
        if entry.image:
            try:
                return read_image(entry.image, self.max_pixels), target, probs
            except UserError as error:
                raise UserError(f"{entry.image}: {error}") from None
        image = to_rgb(self.dataset[entry.truth]["image"]) if self.dataset is not None else None
        return image, target, probs

    def _jobs(self) -> Iterator[tuple[int, Entry, Path | np.ndarray]]:
        order = range(len(self.entries))
        if self.dataset is None:
            # The largest first: a large one that comes last would keep one worker busy while the others wait.
            order = sorted(order, key=lambda index: -_num_pixels(self.entries[index].truth, self.max_pixels))
        for index in order:
            yield index, self.entries[index], self._truth(self.entries[index])

    def _truth(self, entry: Entry) -> Path | np.ndarray:
        if self.dataset is None:
            return entry.truth
        # Without the column of images, which would be decoded too.
        return np.asarray(to_mask(self.dataset.select_columns("mask")[entry.truth]["mask"]))


def read_truth(truth: Path | np.ndarray, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, bool]:
    """Return a true mask (H, W), boolean, and whether it held other values than 0 and 255.

    Args:
        truth: File, or the grey values of a data set's mask.
        max_pixels: Width times height above which a file is refused.

    Raises:
        UserError: If the file cannot be read.
    """
    if isinstance(truth, Path):
        try:
            return read_mask(truth, max_pixels=max_pixels)[:2]
        except UserError as error:
            raise UserError(f"{truth.parent}: {error}") from None
    return truth > 127, bool(((truth != 0) & (truth != 255)).any())


def read_prediction(
    path: Path, shape: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, bool, bool]:
    """Read a prediction by the rules above.

    Args:
        path: Mask file.
        shape: (height, width) to resize it to.
        max_pixels: Width times height above which it is refused.

    Returns:
        (H, W), uint8 or, where it was resized or has more depth, float32 in [0, 1]; whether it was converted; whether it
        was resized.

    Raises:
        UserError: If the file cannot be read, or holds values that are no prediction.
    """
    try:
        with open_image(path, max_pixels) as image:
            mode = image.mode
            if mode.startswith(("I", "F")):
                values = np.asarray(ImageOps.exif_transpose(image), np.float32) / (65535 if mode[0] == "I" else 1)
            else:
                values = np.asarray(to_mask(image))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # Pillow's decoders raise nearly any class on damaged files
        raise UserError(f"{path} cannot be read as a mask: {' '.join(str(error).split())}") from None
    if values.dtype != np.uint8 and not (values.min() >= 0 and values.max() <= 1):
        raise UserError(
            f"{path} holds values from {values.min():g} to {values.max():g}, where 1 is white; expected [0, 1]: save "
            "probabilities, or grey of 8 or 16 bits"
        )
    resized = shape is not None and values.shape != shape
    if resized:
        probs = np.asarray(values, np.float32) / (255 if values.dtype == np.uint8 else 1)
        probs = Image.fromarray(probs).resize(shape[::-1], Image.Resampling.BILINEAR)
        values = np.asarray(probs).clip(0, 1)
    return values, mode != "L", resized


def counts(rows: list[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many predictions were converted and resized, and how many truths were not of 0 and 255 alone."""
    return {f"num_{name}": sum(row[name] for row in rows) for name in ("converted", "resized", "mask_changed")}


def _score_entry(
    protocol: Protocol, options: dict[str, Any], max_pixels: int, job: tuple[int, Entry, Path | np.ndarray]
) -> dict[str, Any]:
    """The row of an entry, with its position; runs in a worker."""
    index, entry, truth = job
    target, mask_changed = read_truth(truth, max_pixels)
    probs, converted, resized = read_prediction(entry.prediction, target.shape, max_pixels)
    example = {
        "index": index,
        "id": entry.id,
        "source": entry.source,
        "height": target.shape[0],
        "width": target.shape[1],
        "converted": converted,
        "resized": resized,
        "mask_changed": mask_changed,
    }
    return score_job(protocol.score_image, options, (example, probs, target))


def _num_pixels(path: Path, max_pixels: int) -> int:
    try:
        with open_image(path, max_pixels) as picture:
            return picture.width * picture.height
    except (UserError, OSError):
        return 0  # whoever reads it says why


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
