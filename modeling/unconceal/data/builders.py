"""Data sets by name: from the raw folders that people download to a `DatasetDict` on disk.

To add one, write a function that lists its pairs and put `@register(...)` above it.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from .. import __version__
from ..utils.errors import UserError
from ..utils.files import IMAGE_SUFFIXES
from ..utils.images import MAX_PIXELS
from .pairs import (
    Checked,
    LoadedPair,
    Pair,
    by_name,
    check_pairs,
    encode_mask,
    find_repeats,
    list_images,
    load_pair,
    match,
    read_list,
    spell,
    split_at_random,
)
from .splits import check_fractions
from .write import Card, Split, make_row, new_data_set, write_card, write_splits


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Builder:
    """A data set that can be built.

    Attributes:
        name: Name on the command line.
        title: Name for people.
        fractions: Shares of a random split, those of the paper where it states them.
        license: Identifier of the Hub's list.
        terms: What the makers ask, in a sentence.
        home: Where the raw data and its paper are found.
        find: Lists every pair of a raw folder, in an official split or in none.
        resize_masks: Whether masks of the image's aspect are resized to the image; elsewhere they are unusable.
    """

    name: str
    title: str
    fractions: dict[str, float]
    license: str
    terms: str
    home: str
    find: Callable[..., list[Pair]]
    resize_masks: bool = False


@dataclass
class Report:
    """What `build` did.

    Attributes:
        splits: Split name -> pairs and bytes written.
        split_rule: How the splits were made.
        skipped: (id, reason) of each unusable pair that was left out.
        unlisted: Names in none of the official lists, left out.
        repeats: Names that hold one picture and lie in several splits.
        num_changed_masks: Masks that held other values than 0 and 255.
        num_resized_masks: Masks that were resized to their image.
        num_empty_masks: Masks without foreground.
    """

    splits: dict[str, Split]
    split_rule: str
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    repeats: list[tuple[str, ...]] = field(default_factory=list)
    num_changed_masks: int = 0
    num_resized_masks: int = 0
    num_empty_masks: int = 0


BUILDERS: dict[str, Builder] = {}


def register(name: str, **facts) -> Callable:
    """Put a function that lists pairs into `BUILDERS`, with the other fields of `Builder`."""

    def keep(find: Callable[..., list[Pair]]) -> Callable[..., list[Pair]]:
        BUILDERS[name] = Builder(name=name, find=find, **facts)
        return find

    return keep


def find_listed(source: Path, name: str, lists: str, mask_suffix: str = "") -> list[Pair]:
    """List pairs of `images/NAME.*` and `masks/NAME<mask_suffix>.*` with the lists `<split>.txt` of a folder.

    A name in a list without any file, and a file in no list, are both returned: the first with its problem, the second
    without a split.
    """
    files = by_name(list_images(source / "images"), list_images(source / "masks", re.escape(mask_suffix)))
    listed = [
        (id, split)
        for split in ("train", "val", "test")
        if (source / lists / f"{split}.txt").exists()
        for id in spell(read_list(source / lists / f"{split}.txt"), files)
    ]
    rest = [(id, None) for id in sorted(files.keys() - dict(listed).keys())]
    return [
        match(
            id,
            name,
            *files.get(id, ([], [])),
            split,
            image=f"images/{id}.*",
            mask=f"masks/{id}{mask_suffix}.*",
        )
        for id, split in listed + rest
    ]


@register(
    "sirst",
    title="SIRST (NUAA-SIRST): small targets in single infrared frames",
    fractions={"train": 256 / 427, "val": 85 / 427, "test": 86 / 427},
    license="other",
    terms="The makers ask for a citation of their paper (Dai et al., WACV 2021).",
    home="https://github.com/YimianDai/sirst",
)
def find_sirst(source: Path) -> list[Pair]:
    """`images/NAME.png`, `masks/NAME_pixels0.png`, lists in `idx_427/`."""
    return find_listed(source, "sirst", "idx_427", "_pixels0")


@register(
    "bus",
    title="BUS: breast lesions in ultrasound, 562 cases",
    fractions={"train": 393 / 562, "val": 169 / 562},
    license="unknown",
    terms="The makers state none that this project knows of.",
    home="https://arxiv.org/abs/2312.01741 (the SRS paper names the set and its split)",
)
def find_bus(source: Path) -> list[Pair]:
    """`images/case0001.png`, `masks/case0001.png`, `train.txt`, `val.txt`."""
    return find_listed(source, "bus", ".")


@register(
    "kbt",
    title="NUDT-KBT2019: small targets in infrared sequences",
    fractions={"train": 4194 / 5993, "val": 1799 / 5993},
    license="unknown",
    terms="The makers state none that this project knows of.",
    home="https://arxiv.org/abs/2312.01741 (the SRS paper names the set and its split)",
)
def find_kbt(source: Path) -> list[Pair]:
    """`images/0.bmp`, `masks/0.bmp`, `train.txt`, `val.txt`. Neighbouring frames fall into both splits."""
    return find_listed(source, "kbt", ".")


@register(
    "busi",
    title="BUSI: breast ultrasound images",
    fractions={"train": 0.8, "val": 0.2},
    license="unknown",
    terms="The makers ask for a citation of their paper (Al-Dhabyani et al., Data in Brief 2020).",
    home="https://scholar.cu.edu.eg/?q=afahmy/pages/dataset",
)
def find_busi(source: Path) -> list[Pair]:
    """`benign/benign (1).png`, `benign (1)_mask.png`, `benign (1)_mask_1.png`, ...; also `malignant` and `normal`."""
    inner = source / "Dataset_BUSI_with_GT"
    root = inner if inner.is_dir() else source
    pairs = []
    for label in ("benign", "malignant", "normal"):
        both = list_images(root / label, r"_mask(_\d+)?")
        by_kind = [
            {id: [file for file in files if (file.stem == id) is is_image] for id, files in both.items()}
            for is_image in (True, False)
        ]
        for id, (images, masks) in by_name(*by_kind).items():
            # One image may have several lesions, each in a mask of its own.
            several = len({file.stem.casefold() for file in masks}) == len(masks)
            where = {"image": f"{label}/{id}.*", "mask": f"{label}/{id}_mask.*"}
            pair = match(id, f"busi/{label}", images, masks[:1] if several else masks, **where)
            pairs.append(pair if pair.problem else replace(pair, masks=tuple(masks)))
    return pairs


@register(
    "kvasir",
    title="Kvasir-SEG: polyps in colonoscopy",
    fractions={"train": 880 / 1000, "val": 120 / 1000},
    license="other",
    terms="For research and education only; the makers ask for a citation of their paper (Jha et al., MMM 2020).",
    home="https://datasets.simula.no/kvasir-seg/",
)
def find_kvasir(source: Path) -> list[Pair]:
    """`images/NAME.jpg`, `masks/NAME.jpg`, lists `train.txt`, `val.txt`; or `train` and `validation` of such folders.

    The makers give their 880 + 120 lists apart from the pictures; without them the split is this project's, at random in
    the same shares. Where the split is made by folders, one name may stand in both for two pictures, so the ids begin
    with the folder.
    """
    folders = [
        (folder, split) for folder, split in (("train", "train"), ("validation", "val")) if (source / folder).is_dir()
    ]
    if folders:
        return [
            replace(pair, id=f"{folder}/{pair.id}", split=split)
            for folder, split in folders
            for pair in find_listed(source / folder, "kvasir", ".")
        ]
    inner = source / "Kvasir-SEG"
    return find_listed(inner if inner.is_dir() else source, "kvasir", ".")


COD_TEST_SETS = ("CHAMELEON", "CAMO", "COD10K", "NC4K")
COD_SOURCES = {"COD10K-": "cod/COD10K", "camourflage_": "cod/CAMO"}  # the second is spelt so by its makers
COD_IMAGES, COD_MASKS = ("Imgs", "Image", "Images"), ("GT", "Mask", "Masks")


def find_subfolder(parent: Path, names: Sequence[str]) -> Path:
    """Return the first of some names that a subfolder has, in upper or lower case; the first name if none has."""
    there = {path.name.lower(): path for path in sorted(parent.iterdir()) if path.is_dir()}
    return next((there[name.lower()] for name in names if name.lower() in there), parent / names[0])


def find_pack(images: Path, masks: Path, source: str, split: str | None = None) -> list[Pair]:
    """List pairs of the same names in two folders; the split, where there is one, stands before the name in the ids."""
    return [
        match(
            f"{split}/{name}" if split else name,
            source,
            *files,
            split,
            image=f"{images.name}/{name}.*",
            mask=f"{masks.name}/{name}.*",
        )
        for name, files in by_name(list_images(images), list_images(masks)).items()
    ]


def find_cod_pack(folder: Path, split: str | None = None) -> list[Pair]:
    """List pairs of `Imgs/NAME.jpg` and `GT/NAME.png`; a test set names their source, else their own names do."""
    images, masks = find_subfolder(folder, COD_IMAGES), find_subfolder(folder, COD_MASKS)
    if split in COD_TEST_SETS:
        return find_pack(images, masks, f"cod/{split}", split)
    pairs = []
    for pair in find_pack(images, masks, "cod", split):
        name = pair.id.rpartition("/")[2]
        source = next((source for prefix, source in COD_SOURCES.items() if name.startswith(prefix)), "cod")
        pairs.append(replace(pair, source=source))
    return pairs


@register(
    "cod",
    title="COD: camouflaged objects (COD10K, CAMO, CHAMELEON, NC4K)",
    fractions={"train": 1.0},
    license="unknown",
    terms="Each of the four sets has its makers' own terms: ask them before you publish a copy.",
    home="https://github.com/DengPingFan/SINet (COD10K, and CAMO and CHAMELEON in the same layout), "
    "https://github.com/JingZhang617/COD-Rank-Localize-and-Segment (NC4K)",
)
def find_cod(source: Path) -> list[Pair]:
    """`TrainDataset/{Imgs,GT}`, `TestDataset/{CHAMELEON,CAMO,COD10K,NC4K}/{Imgs,GT}`; or `Imgs` and `GT` alone.

    `Imgs` may be `Image` or `Images`, and `GT` may be `Mask` or `Masks`. The splits are `train` and one of its name for
    each test set that is there. A folder of `Imgs` and `GT` alone has no official split: all of it is `train`, or what
    `--fractions` says, such as `NC4K=1`. Edges are not read: the network derives them from the masks. Pictures without a
    camouflaged object (COD10K-NonCAM) that lie among the others without masks are unusable pairs.

    Raises:
        UserError: If none of these folders is there.
    """
    train, tests = find_subfolder(source, ["TrainDataset"]), find_subfolder(source, ["TestDataset"])
    packs = [(train, "train")] if train.is_dir() else []
    if tests.is_dir():
        packs += [(find_subfolder(tests, [name]), name) for name in COD_TEST_SETS]
        others = {path.name for path in tests.iterdir() if path.is_dir()} - {folder.name for folder, _ in packs}
        if others:
            logger.warning(
                "%s holds %s; left out, expected only %s", tests, ", ".join(sorted(others)), ", ".join(COD_TEST_SETS)
            )
    packs = [(folder, split) for folder, split in packs if folder.is_dir()]
    if packs:
        return [pair for folder, split in packs for pair in find_cod_pack(folder, split)]
    if not any(find_subfolder(source, names).is_dir() for names in (COD_IMAGES, COD_MASKS)):
        raise UserError(
            f"{source} holds no pairs; expected the folders TrainDataset, TestDataset with one of "
            f"{', '.join(COD_TEST_SETS)}, or Imgs and GT"
        )
    return find_cod_pack(source)


DIS5K_SPLITS = {"DIS-TR": "train", "DIS-VD": "val"} | {f"DIS-TE{i}": f"DIS_TE{i}" for i in range(1, 5)}


@register(
    "dis5k",
    title="DIS5K: highly accurate dichotomous segmentation",
    fractions={"train": 3000 / 5470, "val": 470 / 5470, "test": 2000 / 5470},
    license="other",
    terms="The makers' own terms of use, for non-commercial purposes only; they ask for a citation of their paper (Qin et "
    "al., ECCV 2022).",
    home="https://github.com/xuebinqin/DIS",
)
def find_dis5k(source: Path) -> list[Pair]:
    """`DIS-TR`, `DIS-VD`, `DIS-TE1` to `DIS-TE4`, those that are there, each with `im/NAME.jpg` and `gt/NAME.png`.

    The splits are `train`, `val` and `DIS_TE1` to `DIS_TE4`: a split's name may hold no hyphen.

    Raises:
        UserError: If none of these folders is there.
    """
    root = find_subfolder(source, ["DIS5K"])
    root = root if root.is_dir() else source
    packs = [(find_subfolder(root, [name]), name, split) for name, split in DIS5K_SPLITS.items()]
    packs = [pack for pack in packs if pack[0].is_dir()]
    if not packs:
        raise UserError(f"{source} holds no pairs; expected one or more of the folders {', '.join(DIS5K_SPLITS)}")
    return [
        pair
        for folder, name, split in packs
        for pair in find_pack(find_subfolder(folder, ["im"]), find_subfolder(folder, ["gt"]), f"dis5k/{name}", split)
    ]


@register(
    "people",
    title="Human Segmentation Dataset: people in photographs",
    fractions={"train": 200 / 241, "val": 41 / 241},
    license="unknown",
    terms="The maker states none. Most images come from an image search and the masks from an online service (remove.bg), so "
    "ask before you publish a copy.",
    home="https://github.com/VikramShenoy97/Human-Segmentation-Dataset",
    resize_masks=True,
)
def find_people(source: Path) -> list[Pair]:
    """`Training_Images/N.jpg`, `Ground_Truth/N.png`; masks that are smaller copies are resized to their image."""
    return find_pack(source / "Training_Images", source / "Ground_Truth", "people")


@register(
    "folder",
    title="Images with masks",
    fractions={"train": 1.0},
    license="unknown",
    terms="Not stated: write them here before you publish this data set.",
    home="Not stated.",
)
def find_folder(
    source: Path | None = None,
    images: str | Path | None = None,
    masks: str | Path | None = None,
    list_file: str | Path | None = None,
    mask_suffix: str = "",
) -> list[Pair]:
    """Any two folders whose files share their names, any list of `image mask` lines, or both.

    Args:
        source: Folder that `images` and `masks` are in.
        images: Folder of images; `images` by default.
        masks: Folder of masks; `masks` by default.
        list_file: Text file. A line is the name of an image and its mask, with or without ending, or two paths with a
            tab or blanks between them. Paths start at the folders of images and masks where any folder is given, else at
            the folder of the list.
        mask_suffix: What the mask of `NAME` has after its name, such as `_mask`.

    Raises:
        UserError: If folders are missing or a line has not one or two entries.
    """
    if list_file is None or source or images or masks:
        root = source or Path()
        images, masks = root / (images or "images"), root / (masks or "masks")
        files = by_name(list_images(images), list_images(masks, re.escape(mask_suffix)))
    else:
        images = masks = Path(list_file).parent
        files = {}
    lines = read_list(Path(list_file)) if list_file else list(files)
    bare = [line.removesuffix(Path(line).suffix) for line in lines]
    pairs = []
    for line, whole_name, bare_name in zip(lines, spell(lines, files), spell(bare, files), strict=True):
        fields = [part.strip() for part in line.split("\t")] if "\t" in line else line.split()
        # A name may hold dots of its own.
        has_suffix = whole_name not in files and Path(line).suffix.lower() in IMAGE_SUFFIXES
        name = bare_name if has_suffix else whole_name
        if name in files or len(fields) == 1:
            where = {"image": str(images / f"{name}.*"), "mask": str(masks / f"{name}{mask_suffix}.*")}
            pairs.append(match(name, "folder", *files.get(name, ([], [])), **where))
        elif len(fields) == 2:
            image, mask = images / fields[0], masks / fields[1]
            id = Path(fields[0]).stem if Path(fields[0]).is_absolute() else str(Path(fields[0]).with_suffix(""))
            where = {"image": str(image), "mask": str(mask)}
            found = [[file] if file.is_file() else [] for file in (image, mask)]
            pairs.append(match(id, "folder", *found, **where))
        else:
            raise UserError(
                f"{list_file}: {line!r} has {len(fields)} entries; expected `image mask`, a tab between them"
            )
    return pairs


def get_builder(name: str) -> Builder:
    """Look a builder up.

    Raises:
        UserError: If there is none of that name.
    """
    if name not in BUILDERS:
        raise UserError(f"no builder named {name!r}; there are {', '.join(sorted(BUILDERS))}")
    return BUILDERS[name]


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
    """Build a data set from its raw folder into a folder for `datasets.load_dataset` and the Hub.

    Every pair is opened before the first is written; the unusable ones are logged by name and reason. Only one pair is
    held in memory at a time, and `out` appears when all is written or not at all.

    Args:
        name: A key of `BUILDERS`.
        source: Raw folder.
        out: Folder to make.
        seed: Seed of a random split.
        random_split: Split at random even where the raw folder has official lists or folders.
        fractions: Share of each split of a random split; the builder's own by default. Giving it asks for one.
        skip_unusable: Leave unusable pairs out instead of stopping.
        max_pixels: Width times height above which a file is refused, and its pair unusable.
        overwrite: Replace `out` where it is a data set that was built before.
        command: Command line to put into the card; the equal call of this function by default.
        options: Further arguments of the builder's `find`.

    Returns:
        What was written, and what was not.

    Raises:
        UserError: If the source is not what the builder expects, pairs are unusable, or `out` cannot be written.
    """
    builder = get_builder(name)
    if command is None:
        given = {"seed": seed, "random_split": random_split, "fractions": fractions, "skip_unusable": skip_unusable}
        given["max_pixels"] = max_pixels
        words = "".join(f", {key}={value!r}" for key, value in (given | options).items())
        command = f"unconceal.data.build({name!r}, {str(source)!r}, {str(out)!r}{words})"
    if fractions is not None:
        check_fractions(fractions)
        random_split = True
    if seed < 0:
        raise UserError(f"seed {seed}; expected 0 or more")
    if max_pixels < 1:
        raise UserError(f"max-pixels {max_pixels}; expected 1 or more")
    if source is not None and not Path(source).is_dir():
        raise UserError(f"{source} is no folder; expected the raw folder of {name}")
    with new_data_set(out, overwrite) as folder:
        pairs = builder.find(source if source is None else Path(source), **options)
        random_split = random_split or not any(pair.split for pair in pairs)
        unlisted = [] if random_split else [pair.id for pair in pairs if not pair.split]
        load = partial(load_pair, max_pixels=max_pixels, resize_masks=builder.resize_masks)
        checked = check_pairs((pair for pair in pairs if random_split or pair.split), load)
        _tell_problems(checked, len(pairs) - len(unlisted), skip_unusable)
        if random_split:
            fractions = fractions or builder.fractions
            usable = split_at_random(checked.usable, fractions, seed)
            shares = ", ".join(f"{split} {share:.4g}" for split, share in fractions.items())
            split_rule = f"at random with seed {seed}, shares {shares}, equal in each class"
            _refuse_empty_splits(usable, fractions)
        else:
            usable = checked.usable
            split_rule = "the official lists or folders of the raw data"
        report = Report(
            splits=write_splits(folder, _rows(usable, load)),
            split_rule=split_rule,
            skipped=checked.problems,
            unlisted=unlisted,
            repeats=find_repeats(usable, checked.digests),
            num_changed_masks=checked.num_changed_masks,
            num_resized_masks=checked.num_resized_masks,
            num_empty_masks=checked.num_empty_masks,
        )
        write_card(folder, _card(builder, report, command), report.splits)
    if report.unlisted:
        logger.warning("%d names stand in none of the lists and are left out", len(report.unlisted))
    if report.repeats:
        logger.warning(
            "%d pictures lie in more than one split, such as %s", len(report.repeats), " = ".join(report.repeats[0])
        )
    return report


def _tell_problems(checked: Checked, num_pairs: int, skip: bool):
    for id, reason in checked.problems:
        logger.warning("unusable: %s: %s", id, reason)
    if checked.problems and not skip:
        raise UserError(
            f"{len(checked.problems)} of {num_pairs} pairs cannot be used, see the list above; "
            "mend them, or pass --skip-unusable to leave them out"
        )
    if not checked.usable:
        raise UserError(f"none of {num_pairs} pairs can be used; expected at least one")


def _refuse_empty_splits(pairs: list[Pair], fractions: dict[str, float]):
    filled = {pair.split for pair in pairs}
    for split, share in fractions.items():
        if split not in filled:
            raise UserError(
                f"split {split} would be empty: {share:.3g} of {len(pairs)} pairs; give other shares with --fractions"
            )


def _rows(pairs: list[Pair], load: Callable[[Pair], LoadedPair]) -> Iterator[tuple[str, dict]]:
    for pair in tqdm(pairs, desc="writing", unit="pair", disable=None):
        yield pair.split, _row(load(pair))


def _row(loaded: LoadedPair) -> dict:
    pair = loaded.pair
    return make_row(loaded.image_bytes, pair.image.name, encode_mask(loaded.mask), pair.id, pair.source)


def _card(builder: Builder, report: Report, command: str) -> Card:
    built = [
        f"Built with Unconceal {__version__}:\n\n    {command}\n",
        f"- Splits: {report.split_rule}.",
        "- Images are the bytes of the original files.",
        "- Masks are PNG, one channel, 0 and 255. A pixel is foreground where the brightest channel of the mask file is "
        "above 127 of 255 (above half where the file's largest value is 1, and in 16-bit files); transparency counts "
        "as black; in a palette of colours index 0 is background. Where an image has several masks the mask is "
        "their union.",
        f"- {report.num_changed_masks} mask(s) held other values than 0 and 255 and were changed by this rule.",
        f"- {report.num_empty_masks} mask(s) have no foreground.",
        f"- {len(report.unlisted)} name(s) stand in no list and were left out.",
        f"- {len(report.repeats)} picture(s) lie, pixel for pixel, in more than one split"
        + (": " + "; ".join(" = ".join(names) for names in report.repeats) + "." if report.repeats else "."),
    ]
    if builder.resize_masks:
        built.append(
            f"- {report.num_resized_masks} mask(s) had another size than their image, of the same aspect. Their values were "
            "resized to the image, linearly, before they were compared."
        )
    skipped = "\n".join(f"- `{id}`: {reason}" for id, reason in report.skipped) or "None."
    return Card(
        title=builder.title,
        license=builder.license,
        tags=["unconceal", builder.name],
        paragraphs={
            "Source": builder.home,
            "Terms": builder.terms,
            "How it was built": "\n".join(built),
            "Pairs left out": skipped,
        },
    )
