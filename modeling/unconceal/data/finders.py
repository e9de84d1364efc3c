"""List the pairs of each raw data set with their official splits."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import printable
from ..utils.images import IMAGE_SUFFIXES
from .names import by_name, list_images, read_list, say_unused, spell
from .pairs import Pair
from .sources import COD_TEST_SETS, DIS5K_SPLITS, TILE_CLASSES
from .splits import TILE_NAME


def match(id: str, source: str, images: list[Path], masks: list[Path], split: str | None = None, **where: str) -> Pair:
    """Make a pair, or say what is missing or surplus.

    The keywords `image` and `mask` name the searched places for the message.
    """
    if id != printable(id):
        return Pair(printable(id), source, split=split, problem="its name is not UTF-8 text; rename the files")
    for kind, files in (("image", images), ("mask", masks)):
        if not files:
            return Pair(id, source, split=split, problem=f"no {kind} {where[kind]}")
        if len(files) > 1:
            return Pair(id, source, split=split, problem=f"{len(files)} {kind}s: {', '.join(f.name for f in files)}")
    return Pair(id, source, images[0], tuple(masks), split)


def find_listed(source: Path, name: str, lists: str, mask_suffix: str = "") -> list[Pair]:
    """List pairs of `images/` and `masks/` by the lists `<split>.txt`.

    A listed name without files comes back with its problem. Files in no list come back without a split.
    """
    images, masks, folder = source / "images", source / "masks", source / lists
    files = by_name(list_images(images), list_images(masks, re.escape(mask_suffix)))
    there = {path.name.lower(): path for path in sorted(folder.iterdir())} if folder.is_dir() else {}
    expected = {split: there.get(f"{split}.txt", folder / f"{split}.txt") for split in ("train", "val", "test")}
    if folder == source:
        say_unused(source, [images, masks, *expected.values()])
    else:
        say_unused(source, [images, masks, folder])
        say_unused(folder, list(expected.values()))
    listed = [
        (id, split)
        for split, path in expected.items()
        if f"{split}.txt" in there
        for id in spell(read_list(path), files)
    ]
    rest = [(id, None) for id in sorted(files.keys() - dict(listed).keys())]
    return [
        match(id, name, *files.get(id, ([], [])), split, image=f"images/{id}.*", mask=f"masks/{id}{mask_suffix}.*")
        for id, split in listed + rest
    ]


def find_pack(images: Path, masks: Path, source: str, split: str | None = None) -> list[Pair]:
    """List pairs of equal names; ids start with the split."""
    pairs = []
    for name, files in by_name(list_images(images), list_images(masks)).items():
        where = {"image": f"{images.name}/{name}.*", "mask": f"{masks.name}/{name}.*"}
        pairs.append(match(f"{split}/{name}" if split else name, source, *files, split, **where))
    say_unused(images.parent, [images, masks])
    return pairs


def find_subfolder(parent: Path, names: Sequence[str]) -> Path:
    """Return the first existing subfolder, in any case; otherwise the first name."""
    there = {path.name.lower(): path for path in sorted(parent.iterdir()) if path.is_dir()}
    return next((there[name.lower()] for name in names if name.lower() in there), parent / names[0])


def find_root(source: Path, inner: Path, *others: Path) -> Path:
    """Return the inner folder if it exists, otherwise the source.

    `others` are further parts of the source that are used.
    """
    if not inner.is_dir():
        return source
    say_unused(source, [inner, *others])
    return inner


BUSI_CLASSES = ("benign", "malignant", "normal")


def find_busi(source: Path, more: str | None = None) -> list[Pair]:
    """List the pairs of BUSI; an image may have several masks.

    `more` is a folder of further cases, as `images/benign (1).png` and one mask of that name in `masks/`.

    Raises:
        UserError: If a name in `more` does not tell its class.
    """
    others = [Path(more)] if more else []
    root = find_root(source, source / "Dataset_BUSI_with_GT", *others)
    pairs = []
    for label in BUSI_CLASSES:
        both = list_images(root / label, r"_mask(_\d+)?")
        plain = {id: [file for file in files if file.stem == id] for id, files in both.items()}
        ended = {id: [file for file in files if file.stem != id] for id, files in both.items()}
        for id, (images, masks) in by_name(plain, ended).items():
            # One image may have several lesions, each in a mask of its own.
            several = len({file.stem.casefold() for file in masks}) == len(masks)
            where = {"image": f"{label}/{id}.*", "mask": f"{label}/{id}_mask.*"}
            pair = match(id, f"busi/{label}", images, masks[:1] if several else masks, **where)
            pairs.append(pair if pair.problem else replace(pair, masks=tuple(masks)))
    say_unused(root, [*(root / label for label in BUSI_CLASSES), *others])
    if more is None:
        return pairs
    if not Path(more).is_dir():
        raise UserError(f"--more {more} is not a folder; expected images/ and masks/ in it")
    for pair in find_pack(Path(more) / "images", Path(more) / "masks", "busi"):
        label = pair.id.partition(" ")[0]
        if label not in BUSI_CLASSES:
            raise UserError(f"--more: got the name {pair.id}, expected it to begin with {', '.join(BUSI_CLASSES)}")
        pairs.append(replace(pair, source=f"busi/{label}"))
    return pairs


def find_kvasir(source: Path) -> list[Pair]:
    """List the pairs of Kvasir-SEG by lists or by folders.

    With folders, ids start with the folder, because two images in different folders may share a name.
    """
    folders = {source / "train": "train", source / "validation": "val"}
    if any(folder.is_dir() for folder in folders):
        say_unused(source, list(folders))
        return [
            replace(pair, id=f"{folder.name}/{pair.id}", split=split)
            for folder, split in folders.items()
            if folder.is_dir()
            for pair in find_listed(folder, "kvasir", ".")
        ]
    return find_listed(find_root(source, source / "Kvasir-SEG"), "kvasir", ".")


COD_SOURCES = {"COD10K-": "cod/COD10K", "camourflage_": "cod/CAMO"}  # its makers spell the second so
COD_IMAGES, COD_MASKS = ("Imgs", "Image", "Images"), ("GT", "Mask", "Masks")


def find_cod_pack(folder: Path, split: str | None = None) -> list[Pair]:
    """List the pairs of one set; training images name their source."""
    images, masks = find_subfolder(folder, COD_IMAGES), find_subfolder(folder, COD_MASKS)
    if split in COD_TEST_SETS:
        return find_pack(images, masks, f"cod/{split}", split)
    pairs = []
    for pair in find_pack(images, masks, "cod", split):
        name = pair.id.rpartition("/")[2]
        source = next((source for prefix, source in COD_SOURCES.items() if name.startswith(prefix)), "cod")
        pairs.append(replace(pair, source=source))
    return pairs


def find_cod(source: Path) -> list[Pair]:
    """List the pairs of the camouflaged object sets.

    The splits are `train` and one for each test set. A folder of images and masks alone has no official split. Edges
    are not read: the network derives them from the masks.

    Raises:
        UserError: If none of the expected folders exists.
    """
    train, tests = find_subfolder(source, ["TrainDataset"]), find_subfolder(source, ["TestDataset"])
    packs = []
    if tests.is_dir():
        packs = [(find_subfolder(tests, [name]), name) for name in COD_TEST_SETS]
        say_unused(tests, [folder for folder, _ in packs])
    packs = [(folder, split) for folder, split in [(train, "train"), *packs] if folder.is_dir()]
    if packs:
        say_unused(source, [train, tests])
        return [pair for folder, split in packs for pair in find_cod_pack(folder, split)]
    if not any(find_subfolder(source, names).is_dir() for names in (COD_IMAGES, COD_MASKS)):
        raise UserError(
            f"{source} holds no pairs; expected the folders TrainDataset, TestDataset with one of "
            f"{', '.join(COD_TEST_SETS)}, or Imgs and GT"
        )
    return find_cod_pack(source)


def find_dis5k(source: Path) -> list[Pair]:
    """List the pairs of DIS5K in the folders that exist.

    Raises:
        UserError: If none of the expected folders exists.
    """
    root = find_root(source, find_subfolder(source, ["DIS5K"]))
    packs = [(find_subfolder(root, [name]), name, split) for name, split in DIS5K_SPLITS.items()]
    say_unused(root, [folder for folder, *_ in packs])
    packs = [pack for pack in packs if pack[0].is_dir()]
    if not packs:
        raise UserError(f"{source} holds no pairs; expected one or more of the folders {', '.join(DIS5K_SPLITS)}")
    return [
        pair
        for folder, name, split in packs
        for pair in find_pack(find_subfolder(folder, ["im"]), find_subfolder(folder, ["gt"]), f"dis5k/{name}", split)
    ]


def find_magnetic_tiles(source: Path) -> list[Pair]:
    """List the pairs of the magnetic tiles; free tiles need no mask.

    Raises:
        UserError: If none of the expected folders exists.
    """
    folders = {label: find_subfolder(source, [label]) for label in TILE_CLASSES}
    say_unused(source, list(folders.values()))
    folders = {label: folder for label, folder in folders.items() if folder.is_dir()}
    if not folders:
        raise UserError(f"{source} holds no pairs; expected one or more of the folders {', '.join(TILE_CLASSES)}")
    pairs = []
    for label, folder in folders.items():
        inner = find_subfolder(folder, ["Imgs"])
        both = list_images(inner)
        say_unused(folder, [inner])
        images = {name: [file for file in files if file.suffix.lower() != ".png"] for name, files in both.items()}
        masks = {name: [file for file in files if file.suffix.lower() == ".png"] for name, files in both.items()}
        for name, files in by_name(images, masks).items():
            id, where = f"{label}/{name}", {"image": f"{label}/Imgs/{name}.jpg", "mask": f"{label}/Imgs/{name}.png"}
            pair = match(id, f"magnetic_tiles/{label}", *files, **where)
            if label == "MT_Free" and len(files[0]) == 1 and not files[1]:
                pair = replace(pair, image=files[0][0], problem=None)
            if not TILE_NAME.fullmatch(name):  # a split by tile needs them
                pair = replace(pair, problem="the name is not expE_num_N, with the exposure and the number of a photo")
            pairs.append(pair)
    return pairs


def find_folder(
    source: Path | None = None,
    images: str | Path | None = None,
    masks: str | Path | None = None,
    list_file: str | Path | None = None,
    mask_suffix: str = "",
) -> list[Pair]:
    """List the pairs of two folders, of a list, or of both.

    Args:
        source: Folder that `images` and `masks` are in.
        images: Folder of images; `images` by default.
        masks: Folder of masks; `masks` by default.
        list_file: Text file. A line is the name of an image and its mask, with or without suffix, or two paths with a
            tab or blanks between them. Paths start at the folders of images and masks if any folder is given,
            otherwise at the folder of the list.
        mask_suffix: What the mask of `NAME` has after its name, such as `_mask`.

    Raises:
        UserError: If nothing is given, folders are missing or a line has not one or two entries.
    """
    if not (source or list_file or (images and masks)):
        raise UserError("got nothing to build from; give --images and --masks, --list, or --source")
    if list_file is None or source or images or masks:
        root = source or Path()
        images, masks = root / (images or "images"), root / (masks or "masks")
        files = find_names(images, masks, mask_suffix)
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


def find_names(images: Path, masks: Path, mask_suffix: str) -> dict[str, tuple[list[Path], list[Path]]]:
    """Join images and masks by their names, also in one folder.

    Raises:
        UserError: If a folder holds no images, or both are one and `mask_suffix` does not tell images from masks.
    """
    if not (images.is_dir() and masks.is_dir() and images.samefile(masks)):
        return by_name(list_images(images), list_images(masks, re.escape(mask_suffix)))
    found, ending = list_images(images), mask_suffix.casefold()
    marked = {name: files for name, files in found.items() if ending and name.casefold().endswith(ending)}
    if not marked:
        raise UserError(
            f"{images} holds images and masks; give what the names of masks end in, such as _mask"
            + f" ({mask_suffix!r} ends no name)" * bool(ending)
        )
    named = {name[: -len(mask_suffix)]: files for name, files in marked.items()}
    return by_name({name: files for name, files in found.items() if name not in marked}, named)


FINDERS: dict[str, Callable[..., list[Pair]]] = {
    "sirst": partial(find_listed, name="sirst", lists="idx_427", mask_suffix="_pixels0"),
    "bus": partial(find_listed, name="bus", lists="."),
    "kbt": partial(find_listed, name="kbt", lists="."),
    "busi": find_busi,
    "kvasir": find_kvasir,
    "cod": find_cod,
    "dis5k": find_dis5k,
    "people": lambda source: find_pack(source / "Training_Images", source / "Ground_Truth", "people"),
    "ccp": lambda source: find_pack(source / "images", source / "masks", "ccp"),
    "magnetic_tiles": find_magnetic_tiles,
    "folder": find_folder,
}
