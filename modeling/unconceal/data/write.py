"""Write a data set as Parquet shards with a card."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, permutations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetInfo, Features, Image, SplitDict, SplitInfo, Value
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData

from ..utils.errors import UserError
from ..utils.files import is_taken, make_folder, refuse_pattern, replacing, restore
from ..utils.signatures import is_unedited, sign
from .cards import read_data_card, split_counts


FEATURES = Features({"image": Image(), "mask": Image(mode="L"), "id": Value("string"), "source": Value("string")})
DATA_COLUMNS = {
    "image": "the image, as its file",
    "mask": "PNG, one channel, 0 background and 255 object, of the image's size",
    "id": "name of the pair",
    "source": "where it comes from",
}
# The column `background` is there only if the builder knows what is behind the object.
BACKGROUND_FEATURES = Features({**FEATURES, "background": Image()})
TAG = "unconceal"  # in the card of every data set that is written here
BACKGROUND = "the same image without the object"
SHARD_BYTES = 500 * 2**20
# Memory holds one row group at a time. The Hub's viewer wants at most 100 rows in each.
GROUP_ROWS, GROUP_BYTES = 100, 64 * 2**20


def make_row(
    image_bytes: bytes, image_name: str, mask_bytes: bytes, id: str, source: str, background_bytes: bytes | None = None
) -> dict:
    """Make one row of the data set from encoded files."""
    background = {"background": {"bytes": background_bytes, "path": image_name}} if background_bytes else {}
    return {
        "image": {"bytes": image_bytes, "path": image_name},
        "mask": {"bytes": mask_bytes, "path": f"{id}.png".replace("/", "_")},
        "id": id,
        "source": source,
        **background,
    }


def write_splits(folder: Path, rows: Iterable[tuple[str, dict]]) -> dict[str, SplitInfo]:
    """Write rows as `folder/data/<split>-00000-of-0000N.parquet`.

    `rows` are split name and row of `make_row`, one split after the other, all with a background or none. Memory holds
    one row group at a time.

    Returns:
        Split name -> pairs and bytes written.
    """
    data = folder / "data"
    data.mkdir(parents=True)
    by_split = groupby(rows, key=lambda row: row[0])
    return {split: _write_split(data, split, (row for _, row in its_rows)) for split, its_rows in by_split}


def _write_split(folder: Path, split: str, rows: Iterable[dict]) -> SplitInfo:
    info, shards, groups = SplitInfo(split), [], row_groups(rows)
    group = next(groups, None)
    schema = (BACKGROUND_FEATURES if group and "background" in group[0] else FEATURES).arrow_schema
    while group:
        shards.append(folder / f"{split}-{len(shards):05d}.parquet")
        with pq.ParquetWriter(shards[-1], schema, write_page_index=True) as writer:
            end = info.num_bytes + SHARD_BYTES
            while group and info.num_bytes < end:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                info.num_examples += len(group)
                info.num_bytes += sum(map(_num_bytes, group))
                group = next(groups, None)
    for i, path in enumerate(shards):  # their number is known only now
        path.rename(path.with_name(f"{split}-{i:05d}-of-{len(shards):05d}.parquet"))
    return info


def row_groups(rows: Iterable[dict]) -> Iterator[list[dict]]:
    """Collect rows into groups that memory can hold."""
    group, size = [], 0
    for row in rows:
        group.append(row)
        size += _num_bytes(row)
        if len(group) >= GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group.clear()  # its memory is free before the next is read
            size = 0
    if group:
        yield group


def _num_bytes(row: dict) -> int:
    return sum(len(row[name]["bytes"]) for name in ("image", "mask", "background") if name in row)


def write_card(
    folder: Path,
    splits: dict[str, SplitInfo],
    title: str,
    license: str,
    tags: list[str],
    sections: dict[str, str],
    path: Path | None = None,
    background: bool = False,
):
    """Write `README.md`, signed: a header for `load_dataset` and the Hub, then text.

    `splits` are the result of `write_splits`, `license` and `tags` those of the Hub, `sections` titles with texts. If
    a split is empty, the card has no counts. It is written to `path`, by default in the folder. `background` says
    whether the rows have one.
    """
    header = DatasetCardData(
        license=license, pretty_name=title, task_categories=["image-segmentation"], tags=[TAG, *tags]
    )
    if counted := all(split.num_examples for split in splits.values()):
        info = DatasetInfo(
            features=BACKGROUND_FEATURES if background else FEATURES,
            splits=SplitDict(splits),
            download_size=sum(path.stat().st_size for path in (folder / "data").iterdir()),
            dataset_size=sum(split.num_bytes for split in splits.values()),
        )
        DatasetInfosDict(default=info).to_dataset_card_data(header)
    files = [{"split": name, "path": f"data/{name}-*"} for name in splits]
    MetadataConfigs(default={"data_files": files}).to_dataset_card_data(header)
    counts = "\n".join(f"| {name} | {split.num_examples} |" for name, split in splits.items())
    held = DATA_COLUMNS | ({"background": BACKGROUND} if background else {})
    columns = "\n".join(f"| `{name}` | {what} |" for name, what in held.items())
    body = [
        f"# {title}",
        *([f"| split | pairs |\n|---|---|\n{counts}"] if counted else []),
        f"## Features\n\n| column | holds |\n|---|---|\n{columns}",
    ]
    body += [f"## {name}\n\n{text}" for name, text in sections.items()]
    text = f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"
    (path or folder / "README.md").write_text(sign(text), encoding="utf-8")


def _is_data_set(path: Path) -> bool:
    """Return whether a folder is a data set written here."""
    if path.is_symlink() or not path.is_dir():
        return False
    # A hidden file such as .DS_Store does not count, but a hidden folder such as .git is somebody's work.
    names = {one.name for one in path.iterdir() if one.is_dir() or one.name[0] != "."}
    if names != {"README.md", "data"}:
        return False
    try:
        card = read_data_card(path)
    except UserError:  # not of this package
        return False
    # A file of another split is not ours.
    splits = "|".join(map(re.escape, split_counts(card)))
    shards = (path / "data").glob("[!.]*")
    is_own = all(re.fullmatch(rf"({splits})-\d{{5}}-of-\d{{5}}\.parquet", one.name) for one in shards)
    return is_own and TAG in (card.data.get("tags") or [])


@contextmanager
def new_data_set(out: str | Path, overwrite: bool, sources: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` on success.

    After any failure `out` is unchanged. `sources` are the data sets that it is made of.

    Raises:
        UserError: If `out` cannot be written, exists and `overwrite` is false, or is not a data set written here, with
            its card as it was written. If it is one of the sources, or one lies in the other.
    """
    out = Path(out).absolute()
    for source in sources:
        pair = out.resolve(), Path(source).resolve()
        if Path(source).exists() and any(one.is_relative_to(other) for one, other in permutations(pair)):
            raise UserError(f"got --out {out}, which is, holds or lies in the input {source}; choose another --out")
    restore(out)
    if is_taken(out):
        if not overwrite:
            raise UserError(f"{out} exists already; choose another --out, or pass --overwrite to replace it")
        if not _is_data_set(out):
            raise UserError(f"{out} is not a data set of this command, so it is not replaced; choose another --out")
        card = out / "README.md"
        if not is_unedited(card.read_text(encoding="utf-8", errors="replace")):
            got = f"got {card}, which was edited or is of an earlier version, expected it as this command wrote it"
            raise UserError(f"{got}; save what you need of it and remove {out}, or choose another --out")
    refuse_pattern(out)
    make_folder(out.parent)
    with replacing(out) as folder:
        try:
            folder.mkdir()
            yield folder
        except OSError as error:
            reason = error.strerror or error
            if error.filename and not Path(os.fsdecode(error.filename)).absolute().is_relative_to(folder):
                raise UserError(f"cannot open {os.fsdecode(error.filename)}: {reason}") from error
            raise UserError(f"cannot write {out}: {reason}; free space or choose another --out") from error
