"""Split data sets at random with equal shares of each source."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy.sparse.csgraph import connected_components

from ..models.reading import to_rgb
from ..utils.errors import UserError


if TYPE_CHECKING:
    from datasets import Dataset

    from .pairs import Pair
    from .sources import Source


TRAIN = "train"
TILE_NAME = re.compile(r"exp(\d+)_num_(\d+)")  # exposure, and the number of the photo
TILE_GAP = 200
NEAR_COPIES = {"busi"}  # sets whose makers filed some images twice, a little changed
HASH_SIDE, MAX_DISTANCE = 16, 12


def find_groups(ids: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Return the group of each row; a random split keeps groups whole.

    The photos of one magnetic tile are a group. Any other row is a group of its own. The photos of a class are sorted
    by number. A tile ends where the exposure does not rise, or where the number jumps by more than 200. Tiles of two
    classes are one tile if their numbers overlap: the makers filed some exposures of one tile as free, others with its
    defect.
    """
    groups = list(ids)
    photos = []
    for row, (id, source) in enumerate(zip(ids, sources, strict=True)):
        if source.startswith("magnetic_tiles/") and (found := TILE_NAME.search(id)):
            photos.append((source, int(found[2]), int(found[1]), row))
    tiles: list[list[tuple[int, int]]] = []  # number and row of each photo
    before = ("", 0, 0)
    for source, number, exposure, row in sorted(photos):
        if source != before[0] or number - before[1] > TILE_GAP or exposure <= before[2]:
            tiles.append([])
        tiles[-1].append((number, row))
        before = source, number, exposure
    name, last = "", -1
    for tile in sorted(tiles):
        if tile[0][0] > last:
            name = ids[tile[0][1]]
        last = max(last, tile[-1][0])
        for _, row in tile:
            groups[row] = name
    return groups


def has_near_copies(source: str) -> bool:
    """Return whether images of a source are compared before a split."""
    return source.partition("/")[0] in NEAR_COPIES


def difference_hash(image: Image.Image) -> np.ndarray:
    """Return 256 booleans: where gray rises to the right, on 16x16 places.

    Two images that look the same differ in few of them.
    """
    gray = image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.LANCZOS)
    return (np.diff(np.asarray(gray, np.int16), axis=1) > 0).ravel()


def join_near_copies(groups: Sequence[str], hashes: dict[int, np.ndarray]) -> list[str]:
    """Give rows whose images look the same one group.

    `hashes` are the `difference_hash` of some rows. Two rows look the same if at most 12 places differ, or if a chain
    of such rows joins them.
    """
    joined, rows = list(groups), list(hashes)
    if not rows:
        return joined
    bits = np.stack([hashes[row] for row in rows]).astype(np.int32)
    distances = bits @ (1 - bits).T
    _, labels = connected_components(distances + distances.T <= MAX_DISTANCE, directed=False)
    first = {}
    for row, label in zip(rows, labels, strict=True):
        joined[row] = first.setdefault(label, groups[row])
    return joined


def split_rows_at_random(
    ids: Sequence[str],
    sources: Sequence[str],
    fractions: dict[str, float],
    seed: int,
    hash_of: Callable[[int], np.ndarray],
) -> dict[str, list[int]]:
    """Split rows at random, keeping the share of each source.

    The result depends on names, sources, fractions and seed only, not on the order of the rows. Groups stay whole, so
    that the shares of their source are met as nearly as their sizes allow. `hash_of` returns the `difference_hash` of
    a row. It is called for sources with near copies.

    Returns:
        Split name -> positions of its rows, in the order of their names.

    Raises:
        UserError: If a name occurs twice.
    """
    if len(set(ids)) < len(ids):
        repeated = next(id for id in ids if list(ids).count(id) > 1)
        raise UserError(f"cannot split at random: the name {repeated} occurs twice, expected unique names; rename it")
    by_group = defaultdict(list)
    hashes = {row: hash_of(row) for row, source in enumerate(sources) if has_near_copies(source)}
    names = join_near_copies(find_groups(ids, sources), hashes)
    for row in sorted(range(len(ids)), key=lambda row: ids[row]):
        by_group[names[row]].append(row)
    by_source = defaultdict(list)
    for rows in by_group.values():
        by_source[sources[rows[0]]].append(rows)
    rng = np.random.default_rng(seed)
    splits: dict[str, list[int]] = {split: [] for split in fractions}
    for _, groups in sorted(by_source.items()):
        dealt = [groups[i] for i in rng.permutation(len(groups))]
        sizes = np.array([len(rows) for rows in dealt])
        ends = np.rint(np.cumsum(list(fractions.values())) * sizes.sum())
        # A group belongs where its middle is.
        places = np.searchsorted(ends[:-1], np.cumsum(sizes) - sizes / 2, side="right")
        for place, rows in zip(places, dealt, strict=True):
            splits[list(fractions)[place]] += rows
    return {split: sorted(rows, key=lambda row: ids[row]) for split, rows in splits.items()}


def split_at_random(
    pairs: list[Pair], fractions: dict[str, float], seed: int, hashes: dict[str, np.ndarray]
) -> list[Pair]:
    """Return pairs with `split` set at random, as `split_rows_at_random` does.

    `hashes` are the `difference_hash` of pairs of sources with near copies, by id.
    """
    ids, sources = [pair.id for pair in pairs], [pair.source for pair in pairs]
    splits = split_rows_at_random(ids, sources, fractions, seed, lambda row: hashes[ids[row]])
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
    images = whole.select_columns(["image"])

    def hash_of(row: int) -> np.ndarray:
        return difference_hash(to_rgb(images[row]["image"]))

    rows = split_rows_at_random(whole["id"][:], whole["source"][:], fractions, seed, hash_of)
    return {name: whole.select(rows[name]) for name in splits}


def shares_to_deal(fractions: dict[str, float] | None, facts: Source, official: set[str]) -> dict[str, float]:
    """Return the share of each split in a random split.

    Args:
        fractions: Shares that were asked for. None means those of the source, without its official test splits.
        facts: The source.
        official: Official splits of the raw data. Only `train`, and those with a share, are dealt again.

    Raises:
        UserError: If a share names an official test split, or nothing is left to deal.
    """
    kept = sorted(official & set(facts.test_splits))
    if fractions is None:
        names = official - set(kept) if kept else facts.fractions
        fractions = {split: share for split, share in facts.fractions.items() if split in names}
        fractions = {split: share / sum(fractions.values()) for split, share in fractions.items()}
    if taken := sorted(fractions.keys() & set(kept)):
        what = f"got a share for {taken[0]}, an official test split, which stays as it is"
        raise UserError(f"{what}; give shares for {TRAIN} and splits of it, such as train=0.9 val=0.1")
    if official and not official & {TRAIN, *fractions}:
        raise UserError(f"the raw data has only the official splits {', '.join(sorted(official))}; none can be dealt")
    return fractions


def check_name(split: str):
    """Raise `UserError` if the datasets library takes no split of this name."""
    if not re.fullmatch(r"\w+", split) or split == "all":
        raise UserError(f"got the split name {split!r}, expected letters, digits and _ only, and not all; rename it")


def check_fractions(fractions: dict[str, float]):
    """Check the shares of a random split.

    Raises:
        UserError: If a split has no valid name, a share is not positive, or they do not add up to 1.
    """
    for split, share in fractions.items():
        check_name(split)
        if not share > 0:
            raise UserError(f"got {share} as share of split {split}, expected a number above 0")
    if not abs(sum(fractions.values()) - 1) < 1e-6:
        raise UserError(f"the shares of the splits add up to {sum(fractions.values()):g}, expected 1")
