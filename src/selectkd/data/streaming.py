"""Text that is never tokenised as a whole: records are read, rendered and batched as training goes on.

An index says how many records each chunk of a source has and where it begins, so the order of an epoch is a function of
(seed, epoch, index) alone: chunks are shuffled, and the records of every ``WINDOW`` chunks in a row among each other. A
run goes on at any batch by reading the chunks of its window. c chunks.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from selectkd.data.chunks import TABLE_ROWS, Chunk, Item, Lines, of_file, of_table
from selectkd.data.collate import Batch, collate
from selectkd.data.durable import json_bytes, write_whole
from selectkd.data.files import Checked, Found
from selectkd.data.order import BatchOptions, draw, shuffled
from selectkd.data.places import DataFile
from selectkd.data.render import Example
from selectkd.data.rendering import Rendering, code_identity, rendered
from selectkd.errors import DataError

WINDOW = 16
"""Chunks whose records are shuffled among each other: 64 MB of JSON Lines, some 30,000 records of 2 KB."""
COLUMNS = ("file", "place", "number", "size", "records")
"""Of a chunk: its file; where it begins, as a byte, a row group, or the count of chunks before it in its file; the
number of its first line or row; its bytes, or its first row in the group; its records."""


@dataclass(frozen=True)
class Index:
    """The chunks of files in order, a row of ``COLUMNS`` for each: [c, 5]."""

    files: tuple[DataFile, ...]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, files: Sequence[DataFile], folder: Path) -> Index:
        """The index of ``files``, kept in ``folder``. JSON Lines and tables of text are read once for it; Parquet and
        Arrow files say themselves how many rows they have.
        """
        key = xxhash.xxh3_128(
            json_bytes({"files": [file.identity() for file in files], "code": code_identity()})
        )
        path = folder / f"{key.hexdigest()}.index"
        if path.is_file() and path.stat().st_size % (8 * len(COLUMNS)) == 0:
            return cls(tuple(files), np.fromfile(path, "<i8").reshape(-1, len(COLUMNS)).astype(np.int64))
        rows = [[number, *row] for number, file in enumerate(files) for row in _rows_of(file)]
        found = np.array(rows, np.int64).reshape(-1, len(COLUMNS))
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, found.astype("<i8").tobytes())
        return cls(tuple(files), found)

    def __len__(self) -> int:
        """How many records there are."""
        return int(self.rows[:, 4].sum())

    def first(self, limit: int) -> Index:
        """The index of the first ``limit`` records."""
        rows = self.rows.copy()
        rows[:, 4] = np.diff(np.minimum(np.cumsum(rows[:, 4]), limit), prepend=0)
        return Index(self.files, rows[rows[:, 4] > 0])

    @cached_property
    def units(self) -> list[NDArray[np.int64]]:
        """Chunks that an epoch has one after the other: each alone where its file can be read anywhere, else all of its
        file.
        """
        found: list[NDArray[np.int64]] = []
        for number, file in enumerate(self.files):
            chunks = np.nonzero(self.rows[:, 0] == number)[0]
            found += (
                [chunks] if not _anywhere(file) and len(chunks) else [np.array([chunk]) for chunk in chunks]
            )
        return found

    @property
    def fingerprint(self) -> str:
        """A hash of where the chunks are and of how many records they have; 32 hexadecimal digits."""
        digest = xxhash.xxh3_128(self.rows.astype("<i8").tobytes())
        digest.update("\n".join(file.name for file in self.files).encode())
        return digest.hexdigest()


def _anywhere(file: DataFile) -> bool:
    """Whether a chunk of the file can be read without those before it."""
    return file.seekable and file.kind in (".jsonl", ".ndjson", ".txt", ".parquet")


def _rows_of(file: DataFile) -> Iterator[list[int]]:
    """The rows of ``COLUMNS`` for a file, without its number."""
    if file.kind == ".parquet":
        import pyarrow.parquet as pq

        number = 0
        try:
            with file.plain() as stream, pq.ParquetFile(stream) as table:
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    for start in range(0, rows, TABLE_ROWS):
                        yield [group, number + start, start, min(TABLE_ROWS, rows - start)]
                    number += rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file.name}: not readable as Parquet: {str(error)[:120]}.") from error
        return
    number = 0
    for count, chunk in enumerate(of_file(file)):
        if isinstance(chunk, Lines):
            place = chunk.offset if _anywhere(file) else count
            yield [place, chunk.number, len(chunk.raw), len(chunk)]
        else:
            yield [count, number, 0, len(chunk)]
        number += len(chunk)


class Chunks:
    """The chunks of an index, read when they are wanted; the last ``WINDOW`` stay. Each process reads for itself."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._forget()

    def _forget(self) -> None:
        self._owner = os.getpid()
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._group: tuple[tuple[int, int], pa.Table] | None = None
        self._cursor: tuple[int, int, Iterator[Chunk]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Chunks, (self.index,)

    def item(self, chunk: int, record: int) -> Item:
        """A record of a chunk."""
        if self._owner != os.getpid():  # a fork shares its parent's files, and where they are read
            self._forget()
        kept = self._kept.pop(chunk, None)
        if kept is None:
            read = self.read(chunk)
            entries: list[Any] = list(read.lines()) if isinstance(read, Lines) else list(read.items())
            kept = read if isinstance(read, Lines) else None, entries
        self._kept[chunk] = kept
        while len(self._kept) > WINDOW:
            self._kept.popitem(last=False)
        lines, items = kept
        return items[record] if lines is None else lines.item(items[record])

    def read(self, chunk: int) -> Chunk:
        """A chunk. DataError where its file has another length than when it was indexed."""
        number, place, first, size, records = self.index.rows[chunk].tolist()
        file = self.index.files[number]
        if not _anywhere(file):
            found = self._next(number, place)
        elif file.kind == ".parquet":
            found = next(
                iter(of_table(file.name, self._rows(number, place).slice(size, records).to_batches(), first))
            )
        else:
            try:
                with file.plain() as stream:
                    stream.seek(place)
                    raw = stream.read(size)
            except OSError as error:
                raise DataError(f"{file.name}: cannot be read: {error}.") from error
            found = Lines(file.name, first, place, raw, file.kind == ".txt")
        if len(found) < records:
            raise DataError(
                f"{file.name} has changed since it was indexed. Leave a file alone that a run streams."
            )
        return found

    def _rows(self, number: int, group: int) -> pa.Table:
        import pyarrow.parquet as pq

        if self._group is None or self._group[0] != (number, group):
            file = self.index.files[number]
            try:
                with file.plain() as stream, pq.ParquetFile(stream) as table:
                    self._group = (number, group), table.read_row_group(group).combine_chunks()
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{file.name}: not readable as Parquet: {str(error)[:120]}.") from error
        return self._group[1]

    def _next(self, number: int, place: int) -> Chunk:
        """The chunk with ``place`` others before it in its file, which is read from where it is, or again."""
        if self._cursor is None or self._cursor[0] != number or self._cursor[1] > place:
            self._cursor = number, 0, of_file(self.index.files[number])
        _, at, chunks = self._cursor
        for found in chunks:
            at += 1
            if at > place:
                self._cursor = number, at, chunks
                return found
        raise DataError(f"{self.index.files[number].name} has fewer records than when it was indexed.")


@dataclass(frozen=True)
class Streamed:
    """A source that is read as training goes on. before: what was found in its first chunk."""

    chunks: Chunks
    how: Rendering
    before: Found
    stream: int = 0

    def examples(self, chunk: int, record: int) -> list[Example]:
        """The examples of a record; none where it is dropped, or bad and skipped, which is a line of the log."""
        how = self.how
        checked = Checked(
            [self.chunks.item(chunk, record)],
            format=how.format,
            on_bad_record=how.rules.on_bad_record,
            before=self.before,
        )
        found = [one for each in rendered(checked, how) for one in each or ()]
        for message in checked.found.problems:
            logging.getLogger("selectkd").warning(message)
        return [replace(one, stream=self.stream) for one in found if isinstance(one, Example)]


class StreamEpoch(Sequence[Batch]):
    """The batches of an epoch of streamed sources. A batch has ``batch_size`` records; it has fewer samples where some
    are dropped, and one of a token that is not trained where all are.
    """

    def __init__(
        self, sources: Sequence[Streamed], weights: Sequence[float], options: BatchOptions, epoch: int
    ) -> None:
        self.sources, self.options, self.epoch = sources, options, epoch
        units = [
            (number, unit) for number, source in enumerate(sources) for unit in source.chunks.index.units
        ]
        sizes = [len(source.chunks.index.units) for source in sources]
        drawn = draw(sizes, weights, seed=options.seed, epoch=epoch)
        chosen = [units[one] for one in drawn.tolist()]
        self._chunks = np.concatenate([*(unit for _, unit in chosen), np.empty(0, np.int64)])
        self._source = np.repeat([number for number, _ in chosen], [len(unit) for _, unit in chosen]).astype(
            np.int64
        )
        counts = np.array(
            [
                sources[number].chunks.index.rows[chunk, 4]
                for number, chunk in zip(self._source.tolist(), self._chunks.tolist(), strict=True)
            ],
            np.int64,
        )
        self._first = np.concatenate([[0], np.cumsum(counts)])  # the records before each chunk
        if not self._first[-1]:
            raise DataError("This epoch has no records. Raise the sources' weight, or add data.")
        self._windows: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        return int(-(-self._first[-1] // self.options.batch_size))

    def records(self, index: int) -> list[tuple[int, int, int]]:
        """(source, chunk, record) of each record of a batch."""
        start = index * self.options.batch_size
        stop = min(start + self.options.batch_size, int(self._first[-1]))
        return [self._record(position) for position in range(start, stop)]

    def _record(self, position: int) -> tuple[int, int, int]:
        chunk = int(np.searchsorted(self._first, position, side="right")) - 1
        window = chunk // WINDOW
        low = int(self._first[window * WINDOW])
        order = self._windows.get(window)
        if order is None:
            high = int(self._first[min((window + 1) * WINDOW, len(self._chunks))])
            order = shuffled(high - low, "selectkd/window", self.options.seed, self.epoch, window)
            self._windows[window] = order
            while len(self._windows) > 2:
                self._windows.popitem(last=False)
        there = low + int(order[position - low])
        chunk = int(np.searchsorted(self._first, there, side="right")) - 1
        return int(self._source[chunk]), int(self._chunks[chunk]), there - int(self._first[chunk])

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        examples = [
            example
            for source, chunk, record in self.records(index)
            for example in self.sources[source].examples(chunk, record)
        ]
        return collate(
            examples or [Example([self.options.pad_id], [False])],
            pad_id=self.options.pad_id,
            pad_to_multiple_of=self.options.multiple,
        )

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))
