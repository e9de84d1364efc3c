"""Split data sets at random with equal shares of each source."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..utils.errors import UserError


if TYPE_CHECKING:
    from datasets import Dataset

    from .pairs import Pair


def split_rows_at_random(
    ids: Sequence[str], sources: Sequence[str], fractions: dict[str, float], seed: int
) -> dict[str, list[int]]:
    """Split rows at random, keeping the share of each source.

    The result depends on names, sources, fractions and seed only, not on the order of the rows.

    Returns:
        Split name -> positions of its rows, in the order of their names.

    Raises:
        UserError: If a name occurs twice.
    """
    if len(set(ids)) < len(ids):
        repeated = next(id for id in ids if list(ids).count(id) > 1)
        raise UserError(f"cannot split at random: the name {repeated} occurs twice, expected unique names; rename it")
    by_source = defaultdict(list)
    for row in sorted(range(len(ids)), key=lambda row: ids[row]):
        by_source[sources[row]].append(row)
    rng = np.random.default_rng(seed)
    splits: dict[str, list[int]] = {split: [] for split in fractions}
    for _, rows in sorted(by_source.items()):
        ends = np.rint(np.cumsum(list(fractions.values())) * len(rows)).astype(int)
        for split, chosen in zip(fractions, np.split(rng.permutation(rows), ends[:-1]), strict=True):
            splits[split] += chosen.tolist()
    return {split: sorted(rows, key=lambda row: ids[row]) for split, rows in splits.items()}


def split_at_random(pairs: list[Pair], fractions: dict[str, float], seed: int) -> list[Pair]:
    """Return pairs with `split` set at random, as `split_rows_at_random` does."""
    splits = split_rows_at_random([pair.id for pair in pairs], [pair.source for pair in pairs], fractions, seed)
    return [replace(pairs[row], split=split) for split, rows in splits.items() for row in rows]


def split_datasets_at_random(splits: dict[str, Dataset], seed: int) -> dict[str, Dataset]:
    """Join the splits of a data set and split it again.

    Each split gets its share of each source, rounded. `unconceal prepare --random-split` makes the same splits of the
    same raw folder with the same shares.

    Raises:
        UserError: If a name occurs twice.
    """
    from datasets import concatenate_datasets

    whole = concatenate_datasets(list(splits.values()))
    fractions = {name: len(split) / len(whole) for name, split in splits.items()}
    rows = split_rows_at_random(whole["id"][:], whole["source"][:], fractions, seed)
    return {name: whole.select(rows[name]) for name in splits}


def check_fractions(fractions: dict[str, float]):
    """Check the shares of a random split.

    Raises:
        UserError: If a split has no valid name, a share is not positive, or they do not add up to 1.
    """
    for split, share in fractions.items():
        if not re.fullmatch(r"\w+", split):
            raise UserError(f"got split name {split!r}, expected letters, digits and _ only")
        if not share > 0:
            raise UserError(f"got {share} as share of split {split}, expected a number above 0")
    if not abs(sum(fractions.values()) - 1) < 1e-6:
        raise UserError(f"the shares of the splits add up to {sum(fractions.values()):g}, expected 1")
