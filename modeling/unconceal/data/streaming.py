"""Read the training split as a stream, without downloading it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, IterableDataset, load_dataset, load_dataset_builder
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from PIL.Image import DecompressionBombError

from ..utils.errors import UserError, one_line
from ..utils.files import data_set_path, is_hub_id
from .loading import ADVICE, UnreadableSample, check_columns, check_pair, open_pair, with_names
from .transforms import ImageAndMask, TrainingSet, TransformRecipe


HEAD_ROWS = 64  # that are checked before training starts

Item = tuple[int, dict[str, Any]]  # position in the epoch and row, not decoded


@dataclass
class Stream:
    """A split that is read from its start to its end.

    Attributes:
        rows: The rows, not decoded.
        features: Types of their columns.
        num_rows: Their number.
        head: The first rows.
    """

    rows: IterableDataset
    features: Features
    num_rows: int
    head: Dataset

    def __len__(self) -> int:
        return self.num_rows


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
    if not Path(path).exists() and not is_hub_id(path):
        raise UserError(f"data set {path} does not exist; {ADVICE}")
    try:
        builder = load_dataset_builder(data_set_path(path))
        if not isinstance(builder.config, ParquetConfig):
            raise UserError(f"data set {path} is not stored as Parquet files; set data.streaming=false")
        files = builder.config.data_files
        absent = [split for split in (train_split, eval_split) if split not in files]
        if absent:
            raise UserError(f"data set {path} has no split {', '.join(absent)}; it has {', '.join(files)}")
        files = {split: list(map(str, files[split])) for split in (train_split, eval_split)}
        rows = load_dataset("parquet", data_files=files, split=train_split, streaming=True)
        evaluated = load_dataset("parquet", data_files={eval_split: files[eval_split]}, split=eval_split)
        num_rows = sum(map(count_rows, files[train_split]))
        for split, found in ((train_split, rows), (eval_split, evaluated)):
            check_columns(found, split, path)
        columns = [name for name in ("image", "mask", "id") if name in rows.column_names]
        rows = rows.select_columns(columns)
        features, rows = rows.features, rows.decode(False)
        head = Dataset.from_list(list(islice(rows, HEAD_ROWS)), features=features)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"cannot open data set {path}: {one_line(error)}; {ADVICE}") from error
    return {train_split: Stream(rows, features, num_rows, head), eval_split: with_names(evaluated, eval_split, path)}


def count_rows(file: str) -> int:
    """Return the number of rows of a Parquet file."""
    with fsspec.open(file, "rb") as opened:
        return pq.read_metadata(opened).num_rows


class StreamBatches:
    """Batches of rows of a stream, shuffled, for one of several processes.

    A process reads its own files, if there are at least as many as processes. All have equally many batches: one with
    fewer rows begins again.

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
        self.rank, self.num_processes, self.epoch, self.batch_size = rank, num_processes, 0, batch_size
        self.rows = split_dataset_by_node(stream.rows.shuffle(seed=seed, buffer_size=buffer_size), rank, num_processes)
        self.names: dict[int, str] = {}  # position -> id, of the rows so far
        self.num_rows = -(-len(stream) // num_processes)
        if self.num_rows > batch_size and self.num_rows % batch_size == 1:
            self.num_rows -= 1  # batch normalization can fail on a last batch of one

    def set_epoch(self, epoch: int):
        """Select the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[list[Item]]:
        self.rows.set_epoch(self.epoch)
        self.names.clear()
        rows = islice(chain.from_iterable(self.rows for _ in count()), self.num_rows)
        numbered = ((self.rank + self.num_processes * number, row) for number, row in enumerate(rows))
        while batch := list(islice(numbered, self.batch_size)):
            self.names |= {position: item_name((position, row)) for position, row in batch}
            yield batch


def item_name(item: Item) -> str:
    """Return the id of an item, or else its position, for messages."""
    position, row = item
    return str(row.get("id") or f"row {position} of the epoch")


class StreamedTrainingSet(TrainingSet):
    """Rows of a stream, changed at random for training.

    A loader asks it for the batches of `StreamBatches`. In place of an unreadable row the batch has another of its
    rows twice.
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
        # By position. The last process can have positions beyond the number of rows.
        self.unreadable = torch.zeros(2 * len(stream), dtype=torch.bool).share_memory_()
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

    def name(self, index: Item) -> str:
        """Return the id of an item, for messages."""
        return item_name(index)

    def unreadable_names(self) -> list[str]:
        """Return the ids of this epoch's rows that were unreadable."""
        return [self.sampler.names[position] for position in self.unreadable.nonzero().flatten().tolist()]

    def __getitems__(self, items: Sequence[Item]) -> list[dict[str, torch.Tensor]]:
        """Return the samples of a batch, as `TrainingSet` returns one.

        Raises:
            UnreadableSample: If too many rows, or all of the batch, cannot be used.
        """
        pairs = []
        for item in items:
            try:
                pairs.append(self.decode(item))
            except UnreadableSample as error:
                self.count_unreadable(item[0], error)
                pairs.append(None)
        if not any(pairs):
            raise UnreadableSample(f"no image of a batch can be read, such as {self.name(items[0])}")
        usable = [pair for pair in pairs if pair]
        filled = [pair or usable[place % len(usable)] for place, pair in enumerate(pairs)]
        return [self.change(*pair, position) for pair, (position, _) in zip(filled, items, strict=True)]

    def decode(self, item: Item) -> ImageAndMask:
        """Return image and mask of an item.

        Raises:
            UnreadableSample: If they cannot be decoded, or differ in size.
        """
        try:
            row = self.stream.features.decode_example(item[1])
        except (ValueError, OSError, DecompressionBombError) as error:
            raise UnreadableSample(f"{self.name(item)}: {one_line(error)}") from error
        image, mask = open_pair(row, lambda: self.name(item))
        check_pair(image, mask, lambda: self.name(item))
        return image, mask
