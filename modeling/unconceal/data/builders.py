"""Build data sets on disk, from raw folders or from generated scenes."""

import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .. import __version__
from ..utils.errors import UserError
from ..utils.images import MAX_PIXELS
from .finders import FINDERS
from .masks import encode_mask
from .pairs import Checked, LoadedPair, Pair, check_pairs, find_repeats, load_pair
from .sources import SOURCES, SYNTHETIC_SPLITS, Source
from .splits import check_fractions, split_at_random
from .synthetic import generate
from .write import Card, Split, make_row, new_data_set, write_card, write_splits


logger = logging.getLogger(__name__)

# First image number of each split. A larger split only adds images to a smaller one.
SPLIT_STRIDE = 10**9


@dataclass(kw_only=True)
class Report(Checked):
    """Result of `build`: that of `check_pairs`, and what was written.

    Attributes:
        splits: Split name -> pairs and bytes written.
        split_rule: How the splits were made.
        unlisted: Names in none of the official lists, left out.
        repeats: Names of equal images in different splits.
    """

    splits: dict[str, Split]
    split_rule: str
    unlisted: list[str]
    repeats: list[tuple[str, ...]]


def build(
    name: str,
    source: str | Path | None,
    out: str | Path,
    *,
    seed: int = 0,
    random_split: bool = False,
    fractions: dict[str, float] | None = None,
    skip_unusable: bool = False,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
    command: str | None = None,
    **options,
) -> Report:
    """Build a data set from its raw folder.

    Every pair is opened before the first is written. Unusable pairs are logged by name and reason. Memory holds one
    pair at a time. `out` appears when everything is written, or not at all.

    Args:
        name: A key of `SOURCES`.
        source: Raw folder.
        out: Folder to make.
        seed: Seed of a random split.
        random_split: Split at random, even if the raw folder has official lists or folders.
        fractions: Share of each split of a random split. Giving it asks for one. The default is the source's own.
        skip_unusable: Leave unusable pairs out instead of stopping.
        max_pixels: Limit on width times height of a file. Larger ones are unusable.
        overwrite: Replace `out` if it is a data set built before.
        command: Command line for the card; by default this call.
        options: Further arguments of the function in `FINDERS`.

    Raises:
        UserError: If the source is not as expected, pairs are unusable, or `out` cannot be written.
    """
    if name not in SOURCES:
        raise UserError(f"got {name!r} as name of a data set, expected one of {', '.join(SOURCES)}")
    if command is None:
        given = {"seed": seed, "random_split": random_split, "fractions": fractions, "skip_unusable": skip_unusable}
        command = _call("build", name, str(source), str(out), **given, max_pixels=max_pixels, **options)
    if fractions is not None:
        check_fractions(fractions)
        random_split = True
    if seed < 0:
        raise UserError(f"got seed {seed}, expected 0 or more")
    if max_pixels < 1:
        raise UserError(f"got max-pixels {max_pixels}, expected 1 or more")
    if source is not None and not Path(source).is_dir():
        raise UserError(f"{source} is not a folder; expected the raw folder of {name}")
    facts = SOURCES[name]
    with new_data_set(out, overwrite) as folder:
        pairs = FINDERS[name](source if source is None else Path(source), **options)
        random_split = random_split or not any(pair.split for pair in pairs)
        unlisted = [] if random_split else [pair.id for pair in pairs if not pair.split]
        load = partial(load_pair, max_pixels=max_pixels, resize_masks=facts.resize_masks)
        checked = check_pairs((pair for pair in pairs if random_split or pair.split), load)
        _report_problems(checked, len(pairs) - len(unlisted), skip_unusable)
        if random_split:
            fractions = fractions or facts.fractions
            usable = split_at_random(checked.usable, fractions, seed)
            shares = ", ".join(f"{split} {share:.4g}" for split, share in fractions.items())
            split_rule = f"random with seed {seed}, shares {shares}, equal in each class"
            _refuse_empty_splits(usable, fractions)
        else:
            usable = checked.usable
            split_rule = "the official lists or folders of the raw data"
        report = Report(
            **vars(checked),
            splits=write_splits(folder, _rows(usable, load)),
            split_rule=split_rule,
            unlisted=unlisted,
            repeats=find_repeats(usable, checked.digests),
        )
        write_card(folder, _card(name, facts, report, command), report.splits)
    if report.unlisted:
        logger.warning("%d names are in none of the lists and are left out", len(report.unlisted))
    if report.repeats:
        logger.warning(
            "%d images are in more than one split, such as %s", len(report.repeats), " = ".join(report.repeats[0])
        )
    return report


def build_synthetic(
    kind: str,
    out: str | Path,
    counts: dict[str, int],
    *,
    size: int = 256,
    seed: int = 0,
    empty_ratio: float = 0.0,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Split]:
    """Generate a data set of one kind of scene.

    Args:
        kind: A key of `KINDS`.
        out: Folder to make.
        counts: Images of each split, by `train`, `val`, `test`. Splits of 0 are left out.
        size: Side of the images in pixels.
        seed: Another seed gives other images.
        empty_ratio: Share of images without an object.
        overwrite: Replace `out` if it is a data set built before.
        command: Command line for the card; by default this call.

    Returns:
        Split name -> pairs and bytes written.

    Raises:
        UserError: If a value is out of range or `out` cannot be written.
    """
    for split, count in counts.items():
        if split not in SYNTHETIC_SPLITS or count < 0:
            raise UserError(
                f"got {count} images for split {split}, expected 0 or more of {', '.join(SYNTHETIC_SPLITS)}"
            )
    counts = {split: counts[split] for split in SYNTHETIC_SPLITS if counts.get(split)}
    if not counts:
        raise UserError("got no number of images; give --train, --val or --test a number above 0")
    if command is None:
        command = _call("build_synthetic", kind, str(out), counts, size=size, seed=seed, empty_ratio=empty_ratio)

    def rows() -> Iterator[tuple[str, dict]]:
        with tqdm(total=sum(counts.values()), desc="generating", unit="image", disable=None) as bar:
            for split, count in counts.items():
                for i in range(count):
                    index = SYNTHETIC_SPLITS.index(split) * SPLIT_STRIDE + i
                    image, mask = generate(kind, size, seed, index, empty_ratio)
                    buffer = io.BytesIO()
                    image.save(buffer, format="PNG")
                    id = f"{split}-{i:06d}"
                    mask_bytes = encode_mask(np.asarray(mask) > 0)
                    yield split, make_row(buffer.getvalue(), f"{id}.png", mask_bytes, id, f"synthetic/{kind}")
                    bar.update()

    card = Card(
        title=f"Unconceal generated scenes: {kind}",
        license="apache-2.0",
        tags=["unconceal", "synthetic", kind],
        paragraphs={
            "Source": "Generated by a program. It shows no photograph, no patient and no person.",
            "Terms": "Apache-2.0, as Unconceal itself.",
            "How it was built": f"{_built_by(command)}\n"
            f"Images of {size}x{size} pixels, seed {seed}. A share of {empty_ratio:g} has no object. "
            "The same command gives the same images.",
        },
    )
    with new_data_set(out, overwrite) as folder:
        splits = write_splits(folder, rows())
        write_card(folder, card, splits)
    return splits


def _call(function: str, *args, **options) -> str:
    given = [*map(repr, args), *(f"{key}={value!r}" for key, value in options.items())]
    return f"unconceal.data.builders.{function}({', '.join(given)})"


def _built_by(command: str) -> str:
    return f"Built with Unconceal {__version__}:\n\n    {command}\n"


def _report_problems(checked: Checked, num_pairs: int, skip: bool):
    for id, reason in checked.problems:
        logger.warning("unusable: %s: %s", id, reason)
    if checked.problems and not skip:
        raise UserError(
            f"{len(checked.problems)} of {num_pairs} pairs are unusable, see the list above; "
            "fix them, or pass --skip-unusable to leave them out"
        )
    if not checked.usable:
        raise UserError(f"none of {num_pairs} pairs is usable, expected at least one; fix the files listed above")


def _refuse_empty_splits(pairs: list[Pair], fractions: dict[str, float]):
    filled = {pair.split for pair in pairs}
    for split, share in fractions.items():
        if split not in filled:
            raise UserError(
                f"split {split} would be empty: {share:.3g} of {len(pairs)} pairs; give other shares with --fractions"
            )


def _rows(pairs: list[Pair], load: Callable[[Pair], LoadedPair]) -> Iterator[tuple[str, dict]]:
    for pair in tqdm(pairs, desc="writing", unit="pair", disable=None):
        yield pair.split, _row(load(pair))  # in a function of its own, which drops the pair from memory


def _row(loaded: LoadedPair) -> dict:
    pair = loaded.pair
    return make_row(loaded.image_bytes, pair.image.name, encode_mask(loaded.mask), pair.id, pair.source)


def _card(name: str, facts: Source, report: Report, command: str) -> Card:
    built = [
        _built_by(command),
        f"- Splits: {report.split_rule}.",
        "- Images are the bytes of the original files.",
        "- Masks are PNG, one channel, 0 and 255. A pixel is object if the brightest channel of the mask file is "
        "above 127 of 255. In 16-bit files, and if the largest value is 1, that means above half. Transparency "
        "counts as black. In a palette of colors, index 0 is background. Several masks of an image are joined.",
        f"- {report.num_changed_masks} mask(s) held other values than 0 and 255 and were changed by this rule.",
        f"- {report.num_empty_masks} mask(s) show no object.",
        f"- {len(report.unlisted)} name(s) are in no list and were left out.",
        f"- {len(report.repeats)} image(s) are, pixel for pixel, in more than one split"
        + (": " + "; ".join(" = ".join(names) for names in report.repeats) + "." if report.repeats else "."),
    ]
    if facts.resize_masks:
        built.append(
            f"- {report.num_resized_masks} mask(s) had another size than their image, of the same aspect. Their gray "
            "values were resized to the image, linearly, before the rule was applied."
        )
    skipped = "\n".join(f"- `{id}`: {reason}" for id, reason in report.problems) or "None."
    return Card(
        title=facts.title,
        license=facts.license,
        tags=["unconceal", name],
        paragraphs={
            "Source": facts.home,
            "Terms": facts.terms,
            "How it was built": "\n".join(built),
            "Pairs left out": skipped,
        },
    )
