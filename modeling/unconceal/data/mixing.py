"""Train on several data sets at once."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
from datasets import Dataset, concatenate_datasets

from ..utils.errors import UserError, one_line
from .loading import load_splits
from .sources import TEST_SPLITS
from .splits import split_datasets_at_random
from .write import FEATURES


def load_sets(
    paths: Sequence[str], train_split: str, eval_split: str, split_seed: int | None = None
) -> list[dict[str, Dataset]]:
    """Open the splits of each data set.

    A set may lack the evaluation split if another one has it. With a seed each set is split again by itself.

    Raises:
        UserError: If a set cannot be used, none has the evaluation split, or a test split would be dealt again.
    """
    optional = [eval_split] if len(paths) > 1 and eval_split != train_split else []
    sets = [load_splits(path, [train_split, eval_split], optional) for path in paths]
    if not any(eval_split in splits for splits in sets):
        names = ", ".join(paths)
        raise UserError(
            f"none of the data sets {names} has a split {eval_split}; set data.eval_split, or add such a set"
        )
    if split_seed is None:
        return sets
    if eval_split in TEST_SPLITS:
        raise UserError(
            f"data.split_seed deals {train_split} and {eval_split} again: it would train on images of the test split "
            f"{eval_split}; set data.eval_split to another split"
        )
    return [split_datasets_at_random(splits, split_seed) for splits in sets]


def join_sets(sets: Sequence[dict[str, Dataset]]) -> dict[str, Dataset]:
    """Join the splits of equal names.

    Several sets keep only the columns that all have.

    Raises:
        UserError: If a column of a set has another type than `unconceal prepare` writes.
    """
    if len(sets) == 1:
        return sets[0]
    joined: dict[str, list[Dataset]] = {}
    for splits in sets:
        for name, rows in splits.items():
            rows = rows.select_columns(list(FEATURES))
            try:
                for column, feature in FEATURES.items():
                    if rows.features[column] != feature:
                        rows = rows.cast_column(column, feature)
            except (ValueError, TypeError, NotImplementedError) as error:  # pyarrow's are among them
                got = rows.features[column]
                what = f"cannot join data sets: the column {column} of a split {name} is {one_line(str(got))}"
                raise UserError(f"{what}, expected {feature}; make it by unconceal prepare") from error
            joined.setdefault(name, []).append(rows)
    return {name: concatenate_datasets(parts) for name, parts in joined.items()}


class Mixture:
    """Draw the samples of an epoch from joined data sets by weight.

    An epoch has as many samples as the sets together, and each set its share, at least one sample. A set comes in
    random order, the whole set before an image comes again, over the epochs too. So no image is drawn more often than
    another of its set, and epochs of a small share show all images in turn. The order depends on the seed only.

    Args:
        sizes: Images of each set, in the order of joining.
        weights: Share of each set, in any unit.
        seed: Seed of the orders.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        total = sum(sizes)
        ends = np.rint(np.cumsum([0, *weights]) / sum(weights) * total).astype(int)
        counts = np.maximum(np.diff(ends), 1)
        counts[counts.argmax()] -= counts.sum() - total
        self.counts = counts.tolist()
        self.sizes, self.seed = list(sizes), seed
        self._starts = list(accumulate(self.counts, initial=0))
        self._first_rows = list(accumulate(sizes, initial=0))

    def row(self, index: int, epoch: int) -> int:
        """Return the row, in the joined sets, of a sample."""
        part = bisect_right(self._starts, index) - 1
        nth = epoch * self.counts[part] + index - self._starts[part]
        round_, place = divmod(nth, self.sizes[part])
        return self._first_rows[part] + int(_order(self.sizes[part], self.seed, part, round_)[place])


@lru_cache(maxsize=32)
def _order(size: int, seed: int, part: int, round_: int) -> np.ndarray:
    """Return the order of a data set in one of its passes."""
    return np.random.default_rng([seed, part, round_]).permutation(size)
