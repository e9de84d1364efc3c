"""Read the training split as a stream, without downloading it."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from PIL.Image import DecompressionBombError

from ..utils.errors import UserError, one_line
from ..utils.files import data_set_path
from .loading import UnreadableSample, check_columns, check_pair, open_pair, opening, with_names
from .transforms import ImageAndMask, TrainingSet, TransformRecipe


HEAD_ROWS = 64  # that are checked before training starts
READ_ROWS = 16  # at once
MOST_UNEVEN = 1.1  # rows of the largest file, as a multiple of the smallest, if processes read files of their own

Item = tuple[int, dict[str, Any]]  # position in the epoch and row, not decoded


@dataclass
class Stream:
    """A split in Parquet files, read from start to end.

    Attributes:
        path: The data set, for messages.
        files: The files, local or on the Hub.
        counts: Rows of each.
        features: Types of the columns that are read.
        head: The first rows.
    """

    path: str
    files: list[str]
    counts: list[int]
    features: Features
    head: Dataset

    def __len__(self) -> int:
        return sum(self.counts)

    def read(self, file: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of a file, not decoded.

        Raises:
            UserError: If it cannot be read, for example without a connection.
        """
        try:
            yield from read_rows(self.files[file], list(self.features))
        except (OSError, ValueError, pa.ArrowException) as error:
            advice = "--resume goes on from the last checkpoint"
            raise UserError(f"cannot read {self.path}: {one_line(error)}; {advice}") from error


def read_rows(file: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield rows of a Parquet file."""
    with fsspec.open(file, "rb") as opened:
        for batch in pq.ParquetFile(opened).iter_batches(READ_ROWS, columns=columns):
            yield from batch.to_pylist()


def open_streams(path: str, train_split: str, eval_split: str) -> dict[str, Stream | Dataset]:
    """Open the training split as a stream, and load the evaluation split.

    Only the files of the evaluation split are downloaded.

    Args:
        path: Folder of Parquet files, or id of such a data set on the Hub.
        train_split: Split to train on.
        eval_split: Split to evaluate on.

    Raises:
        UserError: If the data set, a split, or the column `image` or `mask` is missing, or if it is not Parquet.
    """
    with opening(path):
        files = parquet_files(path)
        if files is None:
            raise UserError(f"data set {path} is not stored as Parquet files; set data.streaming=false")
        absent = [split for split in (train_split, eval_split) if split not in files]
        if absent:
            raise UserError(f"data set {path} has no split {', '.join(absent)}; it has {', '.join(files)}")
        # With the features that its card declares.
        splits = (train_split, eval_split)
        rows = {split: load_dataset(data_set_path(path), split=split, streaming=True) for split in splits}
        for split, found in rows.items():
            check_columns(found, split, path)
        columns = [name for name in ("image", "mask", "id") if name in rows[train_split].column_names]
        features = Features({name: rows[train_split].features[name] for name in columns})
        counts = [sum(count_rows(file)) for file in files[train_split]]
        first = chain.from_iterable(read_rows(file, columns) for file in files[train_split])
        head = Dataset.from_list(list(islice(first, HEAD_ROWS)), features=features)
        options = {"data_files": {eval_split: files[eval_split]}, "features": rows[eval_split].features}
        evaluated = load_dataset("parquet", split=eval_split, **options)
    for split, number in ((train_split, sum(counts)), (eval_split, len(evaluated))):
        if not number:
            raise UserError(f"split {split} of data set {path} is empty, expected at least one pair")
    stream = Stream(path, files[train_split], counts, features, head)
    return {train_split: stream, eval_split: with_names(evaluated, eval_split, path)}


def parquet_files(path: str) -> dict[str, list[str]] | None:
    """Return the files of each split, or None for other formats."""
    builder = load_dataset_builder(data_set_path(path))
    if not isinstance(builder.config, ParquetConfig):
        return None
    return {str(split): list(map(str, files)) for split, files in builder.config.data_files.items()}


def count_rows(file: str) -> list[int]:
    """Return the rows of each row group of a Parquet file."""
    with fsspec.open(file, "rb") as opened:
        metadata = pq.read_metadata(opened)
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


class StreamBatches:
    """Batches of rows of a stream, shuffled, for one of several processes.

    Processes read files of their own if the files can be dealt evenly. Otherwise each reads all files and takes every
    n-th row. All have equally many batches: one with fewer rows begins again.

    Args:
        stream: The split.
        batch_size: Rows of a batch.
        buffer_size: Rows among which the next one is drawn. The order of the files is drawn, too.
        seed: Seed of the order. It also depends on the epoch.
        rank: Number of this process.
        num_processes: Number of processes.
    """

    def __init__(
        self, stream: Stream, batch_size: int, buffer_size: int, seed: int, rank: int = 0, num_processes: int = 1
    ):
        self.stream, self.batch_size, self.buffer_size, self.seed = stream, batch_size, buffer_size, seed
        self.rank, self.num_processes, self.epoch = rank, num_processes, 0
        self.names: list[str] = []  # of the rows of this epoch so far
        counts = stream.counts
        self.has_own_files = len(counts) % num_processes == 0 and max(counts) <= MOST_UNEVEN * min(counts)
        self.num_rows = -(-len(stream) // num_processes)
        if self.num_rows > batch_size and self.num_rows % batch_size == 1:
            self.num_rows -= 1  # batch normalization can fail on a last batch of one

    def set_epoch(self, epoch: int):
        """Select the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[list[Item]]:
        self.names.clear()
        endless = chain.from_iterable(self._pass(number) for number in count())
        rows = islice(endless, self.num_rows)
        numbered = ((self.rank + self.num_processes * number, row) for number, row in enumerate(rows))
        while batch := list(islice(numbered, self.batch_size)):
            self.names += [item_name(item) for item in batch]
            yield batch

    def _pass(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield all rows of this process once."""
        rng = np.random.default_rng([self.seed, self.epoch, number])  # the same in all processes
        files = rng.permutation(len(self.stream.files)).tolist()
        if self.has_own_files:
            files = files[self.rank :: self.num_processes]
        rows = chain.from_iterable(map(self.stream.read, files))
        if not self.has_own_files:
            rows = islice(rows, self.rank, None, self.num_processes)
        buffer = []
        for row in rows:
            if len(buffer) < self.buffer_size:
                buffer.append(row)
                continue
            place = int(rng.integers(self.buffer_size))
            yield buffer[place]
            buffer[place] = row
        yield from (buffer[place] for place in rng.permutation(len(buffer)).tolist())


def item_name(item: Item) -> str:
    """Return the id of an item, or else its position, for messages."""
    position, row = item
    id = row.get("id")
    return f"row {position} of the epoch" if id in (None, "") else str(id)


class StreamedTrainingSet(TrainingSet):
    """Rows of a stream, changed at random for training.

    A loader asks it for the batches of `StreamBatches`. If a row is unreadable, the batch has another of
    its rows twice, or else one of the first rows of the stream.
    """

    def __init__(
        self,
        stream: Stream,
        processor: Any,
        recipe: TransformRecipe,
        seed: int,
        max_unreadable: float = 0.0,
        buffer_size: int = 1000,
    ):
        super().__init__(stream.head, processor, recipe, seed)
        self.stream, self.buffer_size = stream, buffer_size
        self.sampler: StreamBatches | None = None
        # By position.
        self.unreadable, self.faint = (
            torch.zeros(2 * len(stream), dtype=torch.bool).share_memory_() for _ in range(2)
        )
        self.limit = int(max_unreadable * len(stream))

    def __len__(self) -> int:
        return len(self.stream)

    def batches(self, batch_size: int, rank: int, num_processes: int) -> StreamBatches:
        """Return the batches of a process."""
        self.sampler = StreamBatches(self.stream, batch_size, self.buffer_size, self.seed, rank, num_processes)
        return self.sampler

    def set_epoch(self, epoch: int):
        """Select the random numbers of an epoch; call it before iterating."""
        super().set_epoch(epoch)
        self.unreadable.fill_(False)
        self.faint.fill_(False)

    def batch_names(self, batches: Any, number: int) -> list[str]:
        """Return the ids of a batch that was read, counted from 0."""
        size = self.sampler.batch_size
        return self.sampler.names[number * size : (number + 1) * size]

    def _names(self, marked: torch.Tensor) -> list[str]:
        """Return the ids of this epoch's rows that are marked."""
        positions = marked.nonzero().flatten().tolist()
        return [self.sampler.names[position // self.sampler.num_processes] for position in positions]

    def __getitems__(self, items: Sequence[Item]) -> list[dict[str, torch.Tensor]]:
        """Return the samples of a batch, as `TrainingSet` returns one.

        Raises:
            UnreadableSample: If more rows than allowed cannot be used.
        """
        pairs = []
        for item in items:
            try:
                pairs.append(self.decode(item))
                self.mark_faint(item[0], pairs[-1][1])
            except UnreadableSample as error:
                self.count_unreadable(item[0], error)
                pairs.append(None)
        usable = [pair for pair in pairs if pair] or [self.first_readable()]
        filled = [pair or usable[place % len(usable)] for place, pair in enumerate(pairs)]
        return [self.change(*pair, position) for pair, (position, _) in zip(filled, items, strict=True)]

    def first_readable(self) -> ImageAndMask:
        """Return image and mask of the first readable row.

        Raises:
            UnreadableSample: If the first rows are all unreadable.
        """
        for row in range(len(self.dataset)):
            with suppress(UnreadableSample):
                return self.read_row(row)
        raise UnreadableSample(f"the first {len(self.dataset)} rows are all unreadable")

    def decode(self, item: Item) -> ImageAndMask:
        """Return image and mask of an item.

        Raises:
            UnreadableSample: If they cannot be decoded, or differ in size.
        """
        try:
            row = self.stream.features.decode_example(item[1])
        except (ValueError, OSError, DecompressionBombError, DatasetsError) as error:
            raise UnreadableSample(f"{item_name(item)}: {one_line(error)}") from error
        image, mask = open_pair(row, lambda: item_name(item))
        check_pair(image, mask, lambda: item_name(item))
        return image, mask
