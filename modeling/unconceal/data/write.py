"""Write a data set as Parquet shards with a card."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetInfo, Features, Image, SplitDict, SplitInfo, Value
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData

from ..utils.errors import UserError
from ..utils.files import make_folder, replacing


FEATURES = Features({"image": Image(), "mask": Image(mode="L"), "id": Value("string"), "source": Value("string")})
COLUMNS = {
    "image": "the image, as its file",
    "mask": "PNG, one channel, 0 background and 255 object, of the image's size",
    "id": "name of the pair",
    "source": "where it comes from",
}
SHARD_BYTES = 500 * 2**20
# Memory holds one row group at a time. The Hub's viewer wants at most 100 rows in each.
GROUP_ROWS, GROUP_BYTES = 100, 64 * 2**20


@dataclass
class Split:
    """Size of a written split."""

    num_examples: int = 0
    num_bytes: int = 0


@dataclass
class Card:
    """Content of the card besides counts and features.

    Attributes:
        title: Name for people.
        license: Identifier of the Hub's list: `unknown` if none is stated, `other` for the makers' own terms.
        tags: Tags of the Hub.
        paragraphs: Section title -> text, in order.
    """

    title: str
    license: str
    tags: list[str] = field(default_factory=list)
    paragraphs: dict[str, str] = field(default_factory=dict)


def make_row(image_bytes: bytes, image_name: str, mask_bytes: bytes, id: str, source: str) -> dict:
    """Make one row of the data set from encoded files."""
    return {
        "image": {"bytes": image_bytes, "path": image_name},
        "mask": {"bytes": mask_bytes, "path": f"{id}.png".replace("/", "_")},
        "id": id,
        "source": source,
    }


class _ShardWriter:
    """Writer of one split; holds at most one row group."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self.done = Split()
        self.shards: list[Path] = []
        self.rows: list[dict] = []
        self.group_bytes = self.shard_bytes = 0
        self.writer: pq.ParquetWriter | None = None

    def add(self, row: dict):
        size = len(row["image"]["bytes"]) + len(row["mask"]["bytes"])
        self.rows.append(row)
        self.group_bytes += size
        self.done.num_examples += 1
        self.done.num_bytes += size
        if len(self.rows) >= GROUP_ROWS or self.group_bytes >= GROUP_BYTES:
            self.flush()

    def flush(self):
        if not self.rows:
            return
        if self.writer is None:
            path = self.folder / f"{self.split}-{len(self.shards):05d}.parquet"
            self.writer = pq.ParquetWriter(path, FEATURES.arrow_schema, write_page_index=True)
            self.shards.append(path)
            self.shard_bytes = 0
        self.writer.write_table(pa.Table.from_pylist(self.rows, schema=FEATURES.arrow_schema))
        self.shard_bytes += self.group_bytes
        self.rows, self.group_bytes = [], 0
        if self.shard_bytes >= SHARD_BYTES:
            self.close()

    def close(self):
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def finish(self) -> Split:
        self.flush()
        self.close()
        for i, path in enumerate(self.shards):  # their number is known only now
            path.rename(path.with_name(f"{self.split}-{i:05d}-of-{len(self.shards):05d}.parquet"))
        return self.done


def write_splits(folder: Path, rows: Iterable[tuple[str, dict]]) -> dict[str, Split]:
    """Write rows as `folder/data/<split>-00000-of-0000N.parquet`.

    Args:
        folder: Folder of the data set.
        rows: Split name and row of `make_row`, in any order. Memory holds a few at a time.

    Returns:
        Split name -> pairs and bytes written.
    """
    data = folder / "data"
    data.mkdir(parents=True)
    writers: dict[str, _ShardWriter] = {}
    try:
        for split, row in rows:
            if split not in writers:
                writers[split] = _ShardWriter(data, split)
            writers[split].add(row)
        return {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()


def write_card(folder: Path, card: Card, splits: dict[str, Split]):
    """Write `README.md`: a header for `load_dataset` and the Hub, then text."""
    infos = SplitDict()
    for name, split in splits.items():
        infos.add(SplitInfo(name, num_bytes=split.num_bytes, num_examples=split.num_examples))
    info = DatasetInfo(
        features=FEATURES,
        splits=infos,
        download_size=sum(path.stat().st_size for path in (folder / "data").iterdir()),
        dataset_size=sum(split.num_bytes for split in splits.values()),
    )
    header = DatasetCardData(
        license=card.license, pretty_name=card.title, task_categories=["image-segmentation"], tags=card.tags
    )
    DatasetInfosDict(default=info).to_dataset_card_data(header)
    files = [{"split": name, "path": f"data/{name}-*"} for name in splits]
    MetadataConfigs(default={"data_files": files}).to_dataset_card_data(header)
    counts = "\n".join(f"| {name} | {split.num_examples} |" for name, split in splits.items())
    columns = "\n".join(f"| `{name}` | {what} |" for name, what in COLUMNS.items())
    body = [
        f"# {card.title}",
        f"| split | pairs |\n|---|---|\n{counts}",
        f"## Features\n\n| column | holds |\n|---|---|\n{columns}",
    ]
    body += [f"## {title}\n\n{text}" for title, text in card.paragraphs.items()]
    text = f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _is_data_set(folder: Path) -> bool:
    # A hidden file such as .DS_Store does not count, but a hidden folder such as .git is somebody's work.
    names = {path.name for path in folder.iterdir() if path.is_dir() or not path.name.startswith(".")}
    return names == {"README.md", "data"}


@contextmanager
def new_data_set(out: str | Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` on success.

    After any failure `out` is unchanged.

    Raises:
        UserError: If `out` exists and `overwrite` is false, if it is not a data set written here, or if it cannot be
            written.
    """
    out = Path(out).absolute()
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise UserError(f"{out} exists already; choose another --out, or pass --overwrite to replace it")
        if not out.is_dir() or out.is_symlink() or not _is_data_set(out):
            raise UserError(
                f"{out} is not a data set that this command wrote and is not replaced; choose another --out"
            )
    make_folder(out.parent)
    with replacing(out) as folder:
        try:
            folder.mkdir()
            yield folder
        except OSError as error:
            raise UserError(
                f"cannot write {out}: {error.strerror or error}; free space or choose another --out"
            ) from error
