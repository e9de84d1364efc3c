"""Build data sets on disk, from raw folders or from generated scenes."""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from datasets import SplitInfo
from tqdm import tqdm

from .. import __version__
from ..models.reading import Foreground
from ..utils.errors import UserError
from ..utils.images import MAX_PIXELS
from .composites import Composites
from .finders import FINDERS
from .loading import UnreadableSample, load_splits
from .masks import encode_mask
from .names import find_images, first_names
from .pairs import LoadedPair, Report, check_pairs, find_repeats, load_pair
from .photos import PhotoScenes, read_photos, share_out
from .silhouettes import read_shapes
from .sources import SOURCES, SYNTHETIC_SPLITS
from .splits import TRAIN, check_fractions, shares_to_deal, split_at_random
from .synthetic import MIN_SIZE, generate
from .write import make_row, new_data_set, write_card, write_splits


logger = logging.getLogger(__name__)

# Distance between the first image numbers of two splits. A larger split only adds images to a smaller one.
SPLIT_STRIDE = 10**9


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
    command: str = "",
    foreground: Foreground | None = None,
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
        random_split: Split at random, even if the raw folder has official lists or folders. Then `train` and the
            official splits that have a share are split again. The others stay. A test split is never split again.
        fractions: Shares of a random split. If given, the split is random. The default is the source's own shares.
        skip_unusable: Leave unusable pairs out instead of stopping.
        max_pixels: Limit on width times height of a file. Larger ones are unusable.
        overwrite: Replace `out` if it is a data set built before whose card is not edited.
        command: Command line for the card.
        foreground: What is object if the masks are maps of classes, as for `to_mask`.
        options: Further arguments of the function in `FINDERS`.

    Raises:
        UserError: If the source is not as expected, pairs are unusable, or `out` cannot be written.
    """
    if name not in SOURCES:
        raise UserError(f"got {name!r} as name of a data set, expected one of {', '.join(SOURCES)}")
    if fractions is not None:
        check_fractions(fractions)
        random_split = True
    if source is not None and not Path(source).is_dir():
        raise UserError(f"{source} is not a folder; expected the raw folder of {name}")
    facts = SOURCES[name]
    with new_data_set(out, overwrite) as folder:
        pairs = FINDERS[name](source if source is None else Path(source), **options)
        official = {pair.split for pair in pairs} - {None}
        random_split = random_split or not official
        if random_split:
            fractions = shares_to_deal(fractions, facts, official)
        wanted = [pair for pair in pairs if pair.split or not official]
        load = partial(load_pair, max_pixels=max_pixels, resize_masks=facts.resize_masks, foreground=foreground)
        report = check_pairs(wanted, load)
        report.unlisted = [pair.id for pair in pairs if official and not pair.split]
        for id, reason in report.problems:
            logger.warning("unusable: %s: %s", id, reason)
        if report.problems and not skip_unusable:
            raise UserError(
                f"{len(report.problems)} of {len(wanted)} pairs are unusable, see the list above; "
                "fix them, or pass --skip-unusable to leave them out"
            )
        if not report.usable:
            raise UserError(f"none of {len(wanted)} pairs is usable; fix the files listed above")
        _report_masks(report, foreground)
        report.split_rule = "the official lists or folders of the raw data"
        if random_split:
            kept = [pair for pair in report.usable if pair.split not in (None, TRAIN, *fractions)]
            dealt = [pair for pair in report.usable if pair.split in (None, TRAIN, *fractions)]
            report.usable = split_at_random(dealt, fractions, seed, report.hashes) + kept
            shares = ", ".join(f"{split} {share:.4g}" for split, share in fractions.items())
            report.split_rule = f"random with seed {seed}, shares {shares}, equal in each class"
            if official:
                again = [split for split in official if split in (TRAIN, *fractions)]
                report.split_rule += f". The official splits {', '.join(sorted(again))} are split again"
                report.split_rule += f"; left as they are: {', '.join(sorted(official - set(again))) or 'none'}"
            if facts.kept_together:
                report.split_rule += f". {facts.kept_together}"
            empty = sorted(fractions.keys() - {pair.split for pair in report.usable})
            if empty:
                few = f"{len(dealt)} pairs are too few for these shares"
                raise UserError(f"split {empty[0]} would be empty: {few}; give others with --fractions")
        rows = tqdm(report.usable, desc="writing", unit="pair", disable=None)
        report.splits = write_splits(folder, ((pair.split, _row(load(pair))) for pair in rows))
        report.repeats = find_repeats(report.usable, report.digests)
        sections = {
            "Source": facts.home,
            "Terms": facts.terms,
            "How it was built": f"{_built_by(command)}\n{_facts(report, facts.resize_masks, foreground)}",
            "Pairs left out": "\n".join(f"- `{id}`: {reason}" for id, reason in report.problems) or "None.",
        }
        write_card(folder, report.splits, facts.title, facts.license, [name], sections)
    if report.unlisted:
        logger.warning("%d names are in none of the lists and are left out", len(report.unlisted))
    if report.repeats:
        example = " = ".join(report.repeats[0])
        logger.warning("%d images are in more than one split, such as %s", len(report.repeats), example)
    return report


def _row(loaded: LoadedPair) -> dict:
    pair = loaded.pair
    return make_row(loaded.image_bytes, pair.image.name, encode_mask(loaded.mask), pair.id, pair.source)


def _report_masks(report: Report, foreground: Foreground | None):
    """Log what the rule for masks does to a whole set.

    Raises:
        UserError: If no mask holds a class of `foreground`.
    """
    if len(report.usable) == report.num_empty_masks:
        if foreground is not None:
            raise UserError(
                f"no mask holds a class of --foreground {_spelled(foreground)}; give ids that the masks hold"
            )
        logger.warning("no mask shows an object; if that is wrong, check the mask files")
    if len(report.usable) == report.num_full_masks:
        logger.warning("every pixel of every mask is object; if that is wrong, check the mask files")
    if report.vanished:
        logger.warning(
            "%d masks hold gray levels but none above half, so they show no object (%s); if wrong, stretch them",
            *(len(report.vanished), first_names(report.vanished)),
        )
    if foreground is None and len(report.object_values) > 1 and report.object_values - {255, 65535}:
        values = ", ".join(f"{value:g}" for value in sorted(report.object_values))
        logger.warning("the object has the value %s, one in each mask; for a map of classes give --foreground", values)


def _spelled(foreground: Foreground) -> str:
    return foreground if foreground == "any" else ",".join(map(str, foreground))


def _facts(report: Report, resize_masks: bool, foreground: Foreground | None) -> str:
    """List for the card how images and masks became what they are."""
    repeats = ": " + "; ".join(" = ".join(names) for names in report.repeats) if report.repeats else ""
    rule = (
        "If a mask file holds one value beside 0, that is object. Otherwise a pixel is object above half of white. Of "
        "colors the brightest channel counts."
    )
    if foreground is not None:
        rule = f"The object is the classes {_spelled(foreground)} of the mask files."
    facts = [
        f"Splits: {report.split_rule}.",
        "Images are the bytes of the original files.",
        f"Masks are PNG, one channel, 0 and 255. {rule} Several masks of an image are joined.",
        f"{report.num_changed_masks} mask(s) held other values than 0 and 255 and were changed by this rule.",
        f"{report.num_empty_masks} mask(s) show no object.",
        f"{len(report.unlisted)} name(s) are in no list and were left out.",
        f"{len(report.repeats)} image(s) are, pixel for pixel, in more than one split{repeats}.",
    ]
    if resize_masks:
        facts.append(
            f"{report.num_resized_masks} mask(s) had another size than their image, of the same aspect. Their gray "
            "values were resized to the image, linearly, before the rule was applied."
        )
    return "\n".join(f"- {fact}" for fact in facts)


def _built_by(command: str) -> str:
    return f"Built with Unconceal {__version__}" + (f":\n\n    {command}\n" if command else ".\n")


def build_synthetic(
    kind: str,
    out: str | Path,
    counts: dict[str, int],
    *,
    size: int = 256,
    seed: int = 0,
    empty_ratio: float = 0.0,
    overwrite: bool = False,
    command: str = "",
) -> dict[str, SplitInfo]:
    """Generate a data set of one kind of scene.

    `kind`, `size`, `seed` and `empty_ratio` are those of `generate`. `out`, `overwrite` and `command` are those of
    `build`. `counts` are the images of each split, by `train`, `val`, `test`. Splits of 0 are left out.

    Returns:
        Split name -> pairs and bytes written.

    Raises:
        UserError: If a value is out of range or `out` cannot be written.
    """
    counts = _positive(counts)

    def row(split: str, number: int, id: str) -> dict:
        index = SYNTHETIC_SPLITS.index(split) * SPLIT_STRIDE + number
        image, mask = generate(kind, size, seed, index, empty_ratio)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return make_row(buffer.getvalue(), f"{id}.png", encode_mask(np.asarray(mask) > 0), id, f"synthetic/{kind}")

    sections = {
        "Source": "Generated by a program. It shows no photograph, no patient and no person.",
        "Terms": "Apache-2.0, as Unconceal itself.",
        "How it was built": f"{_built_by(command)}\n"
        f"Images of {size}x{size} pixels, seed {seed}. A share of {empty_ratio:g} has no object. "
        "The same command gives the same images.",
    }
    with new_data_set(out, overwrite) as folder:
        splits = write_splits(folder, _generated(counts, row))
        title = f"Unconceal generated scenes: {kind}"
        write_card(folder, splits, title, "apache-2.0", ["synthetic", kind], sections)
    return splits


def build_camouflage(
    photos: Sequence[str | Path],
    out: str | Path,
    counts: dict[str, int],
    *,
    shapes: Sequence[str | Path] = (),
    avoid: Sequence[str | Path] = (),
    size: int = 256,
    seed: int = 0,
    skip_unusable: bool = False,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
    command: str = "",
) -> dict[str, SplitInfo]:
    """Hide objects in photos; write a data set with the column `background`.

    A photo is used in one split only, and so is a shape. `photos` are folders. Each is used for equally many images. A
    folder that is named twice is used for twice as many. `shapes` are folders of masks whose silhouettes are used;
    without any, all silhouettes are drawn. `avoid` are folders of masks that have the photos' names: few images show
    what these masks mark. The other arguments are those of `build` and `build_synthetic`.

    Returns:
        Split name -> pairs and bytes written.

    Raises:
        UserError: If photos or shapes are unusable or too few, or `out` cannot be written.
    """
    counts = _positive(counts)
    _check_size(size)
    with new_data_set(out, overwrite) as folder:
        marked = {path.stem: path for place in avoid for path in find_images(Path(place))}
        by_folder = {place: read_photos(Path(place), marked, size, max_pixels) for place in dict.fromkeys(photos)}
        silhouettes = [read_shapes(Path(place), max_pixels) for place in shapes]
        problems = [problem for _, found in (*by_folder.values(), *silhouettes) for problem in found]
        for name, reason in problems:
            logger.warning("unusable: %s: %s", name, reason)
        if problems and not skip_unusable:
            raise UserError(
                f"{len(problems)} files are unusable, see the list above; "
                "fix them, or pass --skip-unusable to leave them out"
            )
        pieces = [piece for found, _ in silhouettes for piece in found]
        usable = [(place, found) for place, (found, _) in by_folder.items()] + [("shapes", pieces)] * bool(shapes)
        for what, items in usable:
            if len(items) < len(counts):
                few = f"{what}: {len(items)} usable for the {len(counts)} splits {', '.join(counts)}"
                raise UserError(f"{few}, expected one or more for each; add files")
        shared = [share_out(by_folder[place][0], list(counts), seed) for place in photos]
        its_photos = {split: [share[split] for share in shared] for split in counts}
        scenes = PhotoScenes(its_photos, share_out(pieces, list(counts), seed), size, seed)

        def row(split: str, number: int, id: str) -> dict:
            image, background, mask = scenes.draw(split, number)
            return make_row(image, f"{id}.jpg", encode_mask(mask), id, "camouflage/photos", background)

        splits = write_splits(folder, _generated(counts, row))
        num_photos = sum(len(found) for found, _ in by_folder.values())
        sections = {
            "Source": f"Made by a program out of {num_photos} photos: another patch of the photo, or of one alike, "
            f"fills a silhouette. {len(pieces)} silhouettes come from masks, the others are drawn.",
            "Terms": "Those of the photos and masks: write them here before you publish this data set.",
            "How it was built": f"{_built_by(command)}\n"
            f"Images of {size}x{size} pixels, seed {seed}. A photo serves one split, and so does a silhouette from a "
            "mask. Some images have unlabelled decoys: faint patches, borders of textures, spots of light and shadow. "
            "The same command and files give the same images.",
            "Files left out": "\n".join(f"- `{name}`: {reason}" for name, reason in problems) or "None.",
        }
        title = "Unconceal camouflage made from photos"
        write_card(folder, splits, title, "unknown", ["synthetic", "camouflage"], sections, background=True)
    return splits


def build_composites(
    objects: Sequence[str],
    out: str | Path,
    counts: dict[str, int],
    *,
    scenes: Sequence[str] = (),
    size: int = 512,
    seed: int = 0,
    overwrite: bool = False,
    command: str = "",
) -> dict[str, SplitInfo]:
    """Paste the objects of data sets onto other scenes.

    `objects` and `scenes` are prepared data sets apart from `out`. Without `scenes`, the scenes are from `objects`. A
    split is made of the rows of that split alone. The other arguments are those of `build` and `build_synthetic`.

    Returns:
        Split name -> pairs and bytes written.

    Raises:
        UserError: If a data set lacks a split, a row cannot be read, or `out` cannot be written.
    """
    counts = _positive(counts)
    _check_size(size)
    opened = {path: load_splits(path, list(counts)) for path in dict.fromkeys((*objects, *scenes))}
    with new_data_set(out, overwrite, list(opened)) as folder:
        parts = (
            {split: [opened[path][split] for path in paths] for split in counts}
            for paths in (objects, scenes or objects)
        )
        composites = Composites(*parts, size, seed)
        source = "composites/" + "+".join(map(_base_name, objects))

        def row(split: str, number: int, id: str) -> dict:
            try:
                image, mask = composites.draw(split, number)
            except UnreadableSample as error:
                raise UserError(f"cannot read the data: {error}") from error
            return make_row(image, f"{id}.jpg", encode_mask(mask), id, source)

        splits = write_splits(folder, _generated(counts, row))
        sections = {
            "Source": f"A program pastes objects of {_quoted(objects)} onto scenes of {_quoted(scenes or objects)}. "
            "The objects of the scenes are painted over.",
            "Terms": "Those of these data sets: write them here before you publish this one.",
            "How it was built": f"{_built_by(command)}\n"
            f"Images of {size}x{size} pixels, seed {seed}. A split is made of the same split of the data sets. "
            "The same command and data give the same images.",
        }
        write_card(folder, splits, "Unconceal composites", "unknown", ["synthetic", "composites"], sections)
    return splits


def _base_name(path: str) -> str:
    return Path(path).name


def _quoted(paths: Sequence[str]) -> str:
    return ", ".join(f"`{_base_name(path)}`" for path in paths)


def _check_size(size: int):
    if size < MIN_SIZE:
        raise UserError(f"got image size {size}, expected {MIN_SIZE} or more")


def _positive(counts: dict[str, int]) -> dict[str, int]:
    counts = {split: counts[split] for split in SYNTHETIC_SPLITS if counts.get(split)}
    if not counts:
        raise UserError("got no number of images; give --train, --val or --test a number above 0")
    return counts


def _generated(counts: dict[str, int], row: Callable[[str, int, str], dict]) -> Iterator[tuple[str, dict]]:
    """Yield split and row; `row` takes split, number and id."""
    numbers = ((split, number) for split, count in counts.items() for number in range(count))
    total = sum(counts.values())
    for split, number in tqdm(numbers, total=total, desc="generating", unit="image", disable=None):
        yield split, row(split, number, f"{split}-{number:06d}")
