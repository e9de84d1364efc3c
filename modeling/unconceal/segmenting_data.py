"""Segment rows of a data set; write masks as one.

Both sides are cut into shards. A shard is the unit of sharing and of going on: a process writes it completely or not
at all. Names and contents of shards do not depend on the number of processes.
"""

import hashlib
import logging
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import SplitInfo, load_dataset
from datasets.exceptions import DatasetsError

from .data.write import FEATURES, make_row, row_groups, write_card
from .hub.card_on_hub import CARD, kept_license
from .hub.push import Upload, check_token, list_files, open_file, push, read_card
from .segmenting import (
    INPUT,
    PNG_OPTIONS,
    Job,
    Runner,
    Tally,
    digest_of,
    draw,
    mark,
    mark_of_png,
    other_mark,
    unfinished,
)
from .utils.errors import UserError, one_line
from .utils.files import data_set_path, is_folder, is_hub_id, printable, replacing
from .utils.signatures import is_unedited
from .utils.threads import map_ahead


if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


logger = logging.getLogger(__name__)

FILES_PER_SHARD = 100
# A row group of a Parquet file holds about 100 images. Fewer groups a shard let more processes share a small data set.
GROUPS_PER_SHARD, MANY_SHARDS = 4, 64
SHARD_NAME = re.compile(r"(.+)-\d{5}-of-(\d{5})\.parquet")
MARK_KEY = b"unconceal segment"  # in the metadata of each shard
NUM_ATTEMPTS = 8
TITLE = "Masks predicted by Unconceal"
HEADING = f"\n# {TITLE}"


@dataclass(frozen=True)
class Shard:
    """Part of the input; `jobs` reads it."""

    name: str  # of its file
    jobs: Callable[[], Iterator[Job]]


def shards_of_files(jobs: dict[Path, dict[str, Path]], out: Path, split: str) -> list[Shard]:
    """Cut the files of `plan_jobs` into shards."""

    def read(part: list[Path]) -> Iterator[Job]:
        for path in part:
            id = jobs[path]["mask"].relative_to(out.resolve()).with_suffix("").as_posix()
            yield Job(path, path, row={"id": id, "source": path.parent.name, "path": path.name})

    paths = list(jobs)
    parts = [paths[start : start + FILES_PER_SHARD] for start in range(0, len(paths), FILES_PER_SHARD)]
    return [Shard(_shard_name(split, i, len(parts)), lambda part=part: read(part)) for i, part in enumerate(parts)]


def shards_of_data(data: str, split: str) -> list[Shard]:
    """Open a split as a stream and cut it into shards.

    Raises:
        UserError: If the data set, the split or the column `image` is missing.
    """
    advice = "give a folder of Parquet files, or the id of a data set on the Hub"
    if not is_folder(data) and not is_hub_id(data):
        raise UserError(f"data set {data} does not exist; {advice}")
    path = data_set_path(data)
    try:
        rows = load_dataset(path, split=split, streaming=True)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"cannot open split {split} of data set {data}: {one_line(error)}; {advice}") from error
    if "image" not in (rows.column_names or ()):
        raise UserError(f"split {split} of data set {data} has no column image; {advice}")
    if rows.info.builder_name == "imagefolder":
        raise UserError(f"got {data} as --data, which holds image files; give it as PATH")
    rows = rows.decode(False)
    rows = rows.reshard() if hasattr(rows, "reshard") else rows  # one part for each row group
    number = min(rows.num_shards, max(MANY_SHARDS, -(-rows.num_shards // GROUPS_PER_SHARD)))
    has_ids = "id" in rows.column_names
    counts = {} if has_ids else dict(enumerate(count_shards(data, split, rows.num_shards, number)))

    def rows_before(i: int) -> int:
        """Count the rows of earlier shards: `load_splits` names rows by their number."""
        for j in set(range(i)) - counts.keys():  # no Parquet
            counts[j] = sum(1 for _ in rows.shard(num_shards=number, index=j))
        return sum(counts[j] for j in range(i))

    def read(i: int) -> Iterator[Job]:
        try:
            first = 0 if has_ids else rows_before(i)
            for number_in_shard, row in enumerate(rows.shard(num_shards=number, index=i)):
                place = f"{i:05d}-{number_in_shard:06d}" if has_ids else first + number_in_shard
                yield _row_job(row, f"{split}-{place}", Path(data).name)
        except (OSError, ValueError, DatasetsError, pa.ArrowException) as error:
            raise UserError(f"cannot read {data}: {one_line(error)}; run the command again to go on") from error

    return [Shard(_shard_name(split, i, number), lambda i=i: read(i)) for i in range(number)]


def count_shards(data: str, split: str, num_parts: int, num_shards: int) -> list[int]:
    """Return the rows of each shard by the files' metadata, or nothing.

    Args:
        data: The data set.
        split: The split.
        num_parts: Parts that `datasets` sees: files or row groups.
        num_shards: Shards, which are as even runs of parts as possible.
    """
    import numpy as np

    from .data.streaming import count_rows, parquet_files

    files = (parquet_files(data) or {}).get(split, [])
    groups = [count_rows(file) for file in files]
    for parts in (sum(groups, []), list(map(sum, groups))):
        if len(parts) == num_parts:
            return [int(run.sum()) for run in np.array_split(parts, num_shards)]
    return []


def _row_job(row: dict, default_id: str, default_source: str) -> Job:
    names = {"id": default_id, "source": default_source}
    names |= {column: str(row[column]) for column in names if row.get(column) not in (None, "")}
    id = names["id"]
    image = row["image"] or {}
    path = image.get("path")
    source = image.get("bytes") or (Path(path) if path else UserError("the row has no image"))
    name = PurePosixPath(path or f"{id}.png").name
    return Job(id, source, row={**names, "path": name})


def _shard_name(split: str, i: int, number: int) -> str:
    return f"{split}-{i:05d}-of-{number:05d}.parquet"


def file_jobs(
    shards: Iterable[Shard], out: Path, kinds: list[str], settings: str, overwrite: bool, tally: Tally
) -> Iterator[Job]:
    """Yield the rows of shards with output files `out/ID.png`.

    Rows whose outputs exist are counted as skipped. `settings` and `overwrite` are those of `unfinished`.
    """
    taken = set()
    for job in (job for shard in shards for job in shard.jobs()):
        id = PurePosixPath(job.name)
        if id.is_absolute() or ".." in id.parts or not id.name:
            yield Job(job.name, UserError("its id is no name for a file"))
            continue
        files = {kind: out / id.parent / f"{id.name}{'' if kind == 'mask' else f'_{kind}'}.png" for kind in kinds}
        paths = set(map(str, files.values()))
        if both := taken & paths:
            yield Job(job.name, UserError(f"an earlier row already gives {min(both)}; give it an id of its own"))
            continue
        taken |= paths
        if left := unfinished(replace(job, outputs=files), settings, overwrite, mark_of_png):
            yield left
        else:
            tally.skipped += 1


@dataclass(frozen=True)
class DataTarget:
    """Folder or Hub repository that receives the shards of one split.

    Attributes:
        name: The folder, or owner/name.
        split: Name of the split.
        settings: What the shards say of model and options.
    """

    name: str
    split: str
    settings: str

    @property
    def on_hub(self) -> bool:
        """Return whether it is a repository: owner/name, and no folder `owner` here."""
        return is_hub_id(self.name) and not is_folder(Path(self.name).parent)

    def finished(self, shards: list[Shard], overwrite: bool = False) -> set[str]:
        """Return the names of shards that need not be made again.

        Raises:
            UserError: If the place cannot be used, or holds something else. Without `overwrite`, also if a shard of
                this split has other settings or another input. On the Hub, only one shard is read for this check.
        """
        if self.on_hub:
            check_token()
        folder, held, ours = Path(self.name), self._held(), {shard.name for shard in shards}
        if self.on_hub:
            card = read_card(self.name, "dataset")
            kept_license(card, self.name)  # refuses an edited card before hours of work
            is_other = card and is_unedited(card) and HEADING not in card  # of `push dataset`
            others = {CARD} if is_other else set()
            read = {*_firsts(held).values(), *(held.keys() & ours if overwrite else ())}
        else:
            card, read = folder / CARD, held
            others = {file.name for file in folder.glob("[!.]*")} - {"data", CARD}
            if card.is_file() and HEADING not in card.read_text(encoding="utf-8", errors="replace"):
                others.add(CARD)
        marks = {name: self._mark(name) for name in read}
        others |= {name for name, found in marks.items() if found is None}
        if others:
            raise UserError(f"{self.name} holds {min(others)}, which is not of this command; choose another --to-data")
        for name, split in held.items():
            if split == self.split and name not in ours:
                raise UserError(f"{self.name} holds {name}, which is not of this data; choose another --to-data")
        if overwrite:
            return set()
        for shard in shards:
            found = marks.get(shard.name)
            if found in (None, self.settings):  # earlier versions marked without the input
                continue
            inputs = hashlib.sha256()
            for _ in _tracked(shard.jobs(), inputs):
                pass
            if found != mark(self.settings, inputs.hexdigest()):
                raise other_mark(folder / "data" / shard.name, found, self.settings, "--to-data")
        return set(held)

    def _held(self) -> dict[str, str]:
        """Return the names of all shards there, sorted, with their splits.

        Raises:
            UserError: If a file among them has another name.
        """
        if self.on_hub:
            names = [PurePosixPath(file).name for file in list_files(self.name, "dataset") if file.startswith("data/")]
        else:
            names = [file.name for file in Path(self.name).glob("data/[!.]*")]
        found = {name: SHARD_NAME.fullmatch(name) for name in sorted(names)}
        if odd := [name for name in found if not found[name]]:
            raise UserError(f"{self.name} holds {odd[0]}, which is not of this command; choose another --to-data")
        return {name: parts[1] for name, parts in found.items()}

    def _mark(self, name: str) -> str | None:
        """Return the mark in a shard, None for another file."""
        path = f"data/{name}"
        try:
            with open_file(self.name, "dataset", path) if self.on_hub else (Path(self.name) / path).open("rb") as file:
                found = (pq.read_metadata(file).metadata or {}).get(MARK_KEY)
        except (OSError, pa.ArrowException):
            return None
        return None if found is None else found.decode(errors="replace")

    def write(self, shards: Iterable[Shard], runner: Runner):
        """Segment shards; each appears when it is complete.

        Raises:
            UserError: If it cannot be written or sent.
        """

        def finish(job: Job, image: "Image.Image", mask: "np.ndarray") -> tuple[dict, list[str]]:
            png = BytesIO()
            draw("mask", image, mask, runner.threshold).save(png, **PNG_OPTIONS)
            row = {column: printable(value) for column, value in job.row.items()}
            source = job.source if isinstance(job.source, bytes) else job.source.read_bytes()
            return make_row(source, row["path"], png.getvalue(), row["id"], row["source"]), []

        for shard in shards:
            inputs = hashlib.sha256()
            rows = (row for _, row in runner.run(_tracked(shard.jobs(), inputs), finish))
            try:
                if not self.on_hub:
                    with replacing(Path(self.name) / "data" / shard.name) as path:
                        _write_shard(path, rows, self.settings, inputs)
                    continue
                with TemporaryDirectory() as folder:
                    path = Path(folder) / shard.name
                    _write_shard(path, rows, self.settings, inputs)
                    self._send(path)
            except OSError as error:
                raise UserError(f"cannot write {shard.name}: {error.strerror or error}; free space") from error

    def _send(self, shard: Path):
        license = kept_license(read_card(self.name, "dataset"), self.name)
        firsts = _firsts(self._held())
        splits = {split: SplitInfo(split) for split in sorted({*firsts, self.split})}
        others = {name: split for split, name in firsts.items() if split != self.split}
        self._write_card(shard.parent, splits, others, license or "other")
        files = {CARD: shard.parent / CARD, f"data/{shard.name}": shard}
        for attempt in range(NUM_ATTEMPTS):
            try:
                push(Upload(self.name, "dataset", files), f"Add {shard.name}")
                return
            except UserError as error:
                status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
                # Another process made a commit at the same time.
                if status not in (409, 412) or attempt + 1 == NUM_ATTEMPTS:
                    raise
                time.sleep(random.uniform(0, 2**attempt))

    def complete(self, shards: list[Shard]):
        """Write a complete folder's card.

        The Hub counts rows itself, so that its card has no counts.
        """
        if self.on_hub:
            return
        held, splits, card = self._held(), {}, Path(self.name) / CARD
        if not all(shard.name in held for shard in shards):
            return
        if card.exists() and not is_unedited(card.read_text(encoding="utf-8", errors="replace")):
            logger.warning("%s was edited, so it stays as it is; it may be of an earlier run", card)
            return
        for name, split in held.items():
            metadata = pq.read_metadata(Path(self.name) / "data" / name)
            info = splits.setdefault(split, SplitInfo(split))
            info.num_examples += metadata.num_rows
            info.num_bytes += sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        self._write_card(card.parent, splits, held)

    def _write_card(self, folder: Path, splits: dict[str, SplitInfo], shards: dict[str, str], license: str = "other"):
        """Write the card; the marks of `shards` tell what made them."""
        made = {self.settings: {self.split}}
        for name, split in shards.items():
            made.setdefault((self._mark(name) or "unknown").rsplit(INPUT, 1)[0], set()).add(split)
        by = [f"`{one}`" + f" ({', '.join(sorted(made[one]))})" * (len(made) > 1) for one in sorted(made)]
        sections = {
            "Source": f"Masks predicted by {', '.join(by)}. Gray: 255 is surely object, 0 surely background.",
            "Terms": "Those of the images and of the network.",
        }
        with replacing(folder / CARD) as path:
            write_card(folder, splits, TITLE, license, ["masks"], sections, path)


def _firsts(shards: dict[str, str]) -> dict[str, str]:
    """Return each split with its first shard."""
    return {split: name for name, split in reversed(shards.items())}


def _tracked(jobs: Iterable[Job], inputs: "hashlib._Hash") -> Iterator[Job]:
    """Yield jobs; add their ids and images to a digest."""
    for job, digest in map_ahead(lambda job: (job, digest_of(job.source)), jobs, 2):
        inputs.update(f"{job.row['id']} {digest}\n".encode(errors="replace"))
        yield job


def _write_shard(path: Path, rows: Iterable[dict], settings: str, inputs: "hashlib._Hash"):
    schema = FEATURES.arrow_schema
    with pq.ParquetWriter(path, schema, write_page_index=True) as writer:
        for group in row_groups(rows):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
        writer.add_key_value_metadata({MARK_KEY: mark(settings, inputs.hexdigest()).encode()})  # now all are read
