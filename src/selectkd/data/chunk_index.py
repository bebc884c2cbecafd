"""Where the records of files lie, so that any chunk can be had without most of what stands before it.

c chunks, u units. A unit is what is read from its beginning: some lines, a row group of a Parquet file, or a whole file
of another kind.
"""

from __future__ import annotations

import fcntl
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from selectkd.data.chunks import (
    Chunk,
    Given,
    Item,
    Lines,
    TableRows,
    footer_of,
    of_file,
    of_row_group,
    row_groups,
)  # fmt: skip
from selectkd.data.durable import disk_error, json_bytes, write_whole
from selectkd.data.places import DataFile
from selectkd.data.rendering import code_identity
from selectkd.errors import DataError

SIZE = 1 << 18
"""Bytes of a chunk, about: some 128 records of 2 KB. A store is asked for so much at once."""
KEPT = 1 << 27
"""Bytes of chunks that a process keeps, twice those of the windows that an epoch has open."""
OPEN = 64
"""Units that are read on from where they are."""
FOOTERS = 8
"""Parquet files of which a process remembers what they say of their row groups."""
COLUMNS = ("file", "place", "number", "size", "records", "held", "content")
"""Of a chunk: its file; where it begins, as a byte, a row group, or the count of chunks before it in its file; the
number of its first line or row; its bytes, or its first row in the group; its records; the bytes in memory while its
unit is read; a hash of its bytes, or of what a Parquet file says of its row groups."""


@dataclass(frozen=True)
class Index:
    """The chunks of files in order, a row of ``COLUMNS`` for each: [c, 7]."""

    files: tuple[DataFile, ...]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, files: Sequence[DataFile], folder: Path) -> Index:
        """The index of ``files``, kept in ``folder``. One process of a node makes it and reads all files for it, but
        Parquet files, which say how many rows they have.
        """
        key = xxhash.xxh3_128(
            json_bytes({"files": [file.identity() for file in files], "code": code_identity()})
        )
        path = folder / f"{key.hexdigest()}.index"
        if not _is_whole(path):  # one that is there may lie in a folder of somebody else's
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with path.with_suffix(".lock").open("ab") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if not _is_whole(path):
                        rows = [[number, *row] for number, file in enumerate(files) for row in _rows_of(file)]
                        write_whole(path, np.array(rows, "<i8").tobytes())
            except OSError as error:
                raise disk_error(error, path) from error
        return cls(tuple(files), np.fromfile(path, "<i8").reshape(-1, len(COLUMNS)).astype(np.int64))

    def __len__(self) -> int:
        """How many records there are."""
        return int(self.rows[:, 4].sum())

    def first(self, limit: int) -> Index:
        """The index of the first ``limit`` records."""
        rows = self.rows.copy()
        rows[:, 4] = np.diff(np.minimum(np.cumsum(rows[:, 4]), limit), prepend=0)
        return Index(self.files, rows[rows[:, 4] > 0])

    @cached_property
    def units(self) -> NDArray[np.int64]:
        """The first chunk of each unit, [u]."""
        if not len(self.rows):
            return np.empty(0, np.int64)
        file, place = self.rows[:, 0], self.rows[:, 1]
        apart = np.array([_anywhere(each) for each in self.files])[file[1:]] & (place[1:] != place[:-1])
        return np.concatenate([[0], 1 + np.nonzero((file[1:] != file[:-1]) | apart)[0]])

    @property
    def fingerprint(self) -> str:
        """A hash of the files' names and contents; 32 hexadecimal digits."""
        digest = xxhash.xxh3_128(self.rows.astype("<i8").tobytes())
        digest.update("\n".join(file.name for file in self.files).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def _is_whole(path: Path) -> bool:
    """Whether an index is there and was not cut short."""
    return path.is_file() and path.stat().st_size % (8 * len(COLUMNS)) == 0


def _anywhere(file: DataFile) -> bool:
    """Whether parts of the file can be read without those before them."""
    return file.kind == ".parquet" or (file.seekable and file.kind in (".jsonl", ".ndjson", ".txt"))


def _rows_of(file: DataFile) -> Iterator[list[int]]:
    """The rows of ``COLUMNS`` for a file, without its number."""
    number = 0
    if file.kind == ".parquet":
        footer = footer_of(file)
        footer.write_metadata_file(sink := pa.BufferOutputStream())
        content = _hash(sink.getvalue())
        for group, rows, step in row_groups(footer, SIZE):
            columns = [footer.row_group(group).column(index) for index in range(footer.num_columns)]
            held = sum(one.total_compressed_size for one in columns)
            for start in range(0, rows, step):
                yield [group, number + start, start, min(step, rows - start), held, content]
            number += rows
        return
    for count, chunk in enumerate(of_file(file, SIZE)):
        if isinstance(chunk, Lines):
            place = chunk.offset if _anywhere(file) else count
            yield [place, chunk.number, len(chunk.raw), len(chunk), len(chunk.raw), _hash(chunk.raw)]
        else:
            yield [count, number, 0, len(chunk), SIZE, _content_of(chunk)]
        number += len(chunk)


def _content_of(chunk: Chunk) -> int:
    if isinstance(chunk, Given):
        return _hash(repr(chunk.pairs).encode("utf-8", "surrogatepass"))
    return _hash(chunk.raw)


def _hash(content: Any) -> int:
    return xxhash.xxh3_64_intdigest(content) >> 1


class Chunks:
    """The chunks of an index, read when they are wanted; the last ones stay. Each process reads for itself."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._forget()

    def _forget(self) -> None:
        self._owner = os.getpid()
        self._kept: OrderedDict[int, tuple[Chunk, Sequence[Any], int]] = OrderedDict()
        self._size = 0
        self._open: OrderedDict[int, tuple[int, Iterator[Chunk]]] = OrderedDict()
        self._footers: OrderedDict[int, Any] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Chunks, (self.index,)

    def load(self, chunk: int) -> None:
        """Reads a chunk that is not at hand; those of a unit are best read in order."""
        if self._owner != os.getpid():  # a fork shares its parent's files, and where they are read
            self._forget()
        if chunk not in self._kept:
            self._keep(chunk, self.read(chunk))
        self._kept.move_to_end(chunk)

    def _keep(self, chunk: int, read: Chunk) -> None:
        size = SIZE if isinstance(read, Given) else len(read.raw)
        if isinstance(read, Lines):
            entries: Sequence[Any] = list(read.lines())
            read = replace(read, raw=b"")
        else:
            entries = read.batches() if isinstance(read, TableRows) else read.pairs
        self._kept[chunk] = read, entries, size
        self._size += size
        while self._size > KEPT and len(self._kept) > 1:
            self._size -= self._kept.popitem(last=False)[1][2]

    def item(self, chunk: int, record: int) -> Item:
        """A record of a chunk."""
        self.load(chunk)
        read, entries, _ = self._kept[chunk]
        if isinstance(read, TableRows):
            return read.item(entries[0], record, read.number + record)
        return read.item(entries[record]) if isinstance(read, Lines) else entries[record]

    def read(self, chunk: int) -> Chunk:
        """A chunk. DataError where it is not what it was when its file was indexed."""
        number, place, first, size, records, _, content = self.index.rows[chunk].tolist()
        file = self.index.files[number]
        if _anywhere(file) and file.kind != ".parquet":
            found: Chunk = Lines(file.name, first, place, file.part(place, size), file.kind == ".txt")
        else:
            found = self._next(chunk)
        same = file.kind == ".parquet" or _content_of(found) == content
        if len(found) < records or not same:
            raise DataError(
                f"{file.name} has changed since it was indexed. Leave a file alone that a run streams."
            )
        return found

    def _next(self, chunk: int) -> Chunk:
        """A chunk of a unit that is read from its beginning, or on from where it is."""
        unit = int(np.searchsorted(self.index.units, chunk, side="right")) - 1
        first = int(self.index.units[unit])
        at, chunks = self._open.pop(unit, (chunk + 1, iter(())))
        if at > chunk:
            at, chunks = first, self._unit(first)
        for found in chunks:
            at += 1
            if at > chunk:
                self._open[unit] = at, chunks
                while len(self._open) > OPEN:
                    self._open.popitem(last=False)
                return found
        name = self.index.files[int(self.index.rows[chunk, 0])].name
        raise DataError(
            f"{name} has fewer records than when it was indexed. Leave a file alone that a run streams."
        )

    def _unit(self, first: int) -> Iterator[Chunk]:
        """The chunks of the unit that begins with chunk ``first``."""
        number, place, row, _, step = self.index.rows[first, :5].tolist()
        file = self.index.files[number]
        if file.kind != ".parquet":
            return of_file(file, SIZE)
        if number not in self._footers:
            self._footers[number] = footer_of(file)
            while len(self._footers) > FOOTERS:
                self._footers.popitem(last=False)
        return of_row_group(file, self._footers[number], place, step, row)
