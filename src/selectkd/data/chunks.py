"""A source in chunks: raw records that lie together, which whoever renders them parses.

JSON Lines, JSON arrays, tables and plain text (each plain, gzip or zstd), Parquet and Arrow files, saved data sets and
those of the Hugging Face hub. The chunks of a source are the same each time it is read.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa

from selectkd.data.formats import VERDICTS
from selectkd.data.json_array import DECODER, ArrayItems, is_one_row, object_of
from selectkd.data.places import DataFile, Place, Rows
from selectkd.errors import DataError, SelectKDError

Item = tuple[str, Any]  # (origin, record) or (origin, DataError)
FIRST, CHUNK, TABLE_ROWS = 1 << 18, 1 << 22, 1024
"""Bytes of a file's first chunk and of the others, about; rows of a chunk of a table. Small enough that a killed build
loses a second of work, large enough that handing one to another process costs nothing beside rendering it."""


@dataclass(frozen=True)
class Lines:
    """Lines of JSON, or of text (``plain``). number: of the first one; offset: its byte in the file."""

    name: str
    number: int
    offset: int
    raw: bytes
    plain: bool = False

    def lines(self) -> Iterator[tuple[bytes, int, int, bool]]:
        """(line, its number, its byte in the file, whether a line end follows it) of each line that is not blank."""
        offset, lines = self.offset, self.raw.split(b"\n")
        for index, line in enumerate(lines):
            if line.strip():
                yield line, self.number + index, offset, index < len(lines) - 1
            offset += len(line) + 1

    def item(self, line: tuple[bytes, int, int, bool]) -> Item:
        """The item of one of ``lines``."""
        raw, number, offset, whole = line
        return _line(self.name, raw, number, offset, whole=whole, plain=self.plain)

    def items(self) -> Iterator[Item]:
        return map(self.item, self.lines())

    def __len__(self) -> int:
        return sum(bool(line.strip()) for line in self.raw.split(b"\n"))


@dataclass(frozen=True)
class TableRows:
    """Rows of Arrow as an IPC stream. number: of the first one."""

    name: str
    number: int
    raw: bytes
    rows: int

    def items(self) -> Iterator[Item]:
        number = self.number
        for batch in self.batches():
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:  # it does not say which row
                yield from (self.item(batch, index, number + index) for index in range(batch.num_rows))
            else:
                yield from (
                    (f"{self.name}:row {number + i}", without_nulls(row)) for i, row in enumerate(rows)
                )
            number += batch.num_rows

    def batches(self) -> list[pa.RecordBatch]:
        """The rows in Arrow."""
        with pa.ipc.open_stream(self.raw) as reader:
            return list(reader)

    def item(self, batch: pa.RecordBatch, index: int, number: int) -> Item:
        """The item of a row of a batch; number: of it in the table."""
        origin = f"{self.name}:row {number}"
        try:
            return origin, without_nulls(batch.slice(index, 1).to_pylist()[0])
        except UnicodeDecodeError as error:
            return origin, DataError(f"{origin}: not UTF-8: {error.reason}. Write the file with UTF-8 text.")

    def __len__(self) -> int:
        return self.rows


@dataclass(frozen=True)
class Given:
    """Records as they are, with their origins."""

    pairs: tuple[Item, ...]

    def items(self) -> Iterator[Item]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)


Chunk = Lines | TableRows | Given


def chunks(place: Place) -> Iterator[Chunk]:
    """The chunks of a source in order. Raises DataError for a file that cannot be read."""
    found = place.open()
    if isinstance(found, Rows):
        yield from of_table(found.name, found.batches())
        return
    for file in found:
        yield from of_file(file)


def given(items: Iterable[Item], size: int = TABLE_ROWS) -> Iterator[Given]:
    """Items at hand in chunks of ``size``."""
    part: list[Item] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield Given(tuple(part))
            part = []
    if part:
        yield Given(tuple(part))


def of_file(file: DataFile, size: int | None = None) -> Iterator[Chunk]:
    """The chunks of one file, of about ``size`` bytes each."""
    name, bare, size = file.name, file.kind, size or CHUNK
    try:
        if bare == ".parquet":
            yield from _parquet(file, size)
        elif bare == ".arrow":
            yield from _arrow(file, size)
        else:
            with file.stream() as stream:
                if bare == ".txt":
                    yield from _lines(name, stream, size, plain=True)
                elif bare in (".csv", ".tsv"):
                    yield from given(_table(name, stream, "\t" if bare == ".tsv" else ","), rows_of(size))
                else:
                    yield from _json(name, stream, size)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read: {error}. Fetch or write the file again.") from error
    except SelectKDError:
        raise
    except Exception as error:  # of the libraries behind a file system
        if file.local:
            raise
        raise DataError(
            f"{name}: cannot be read: {str(error)[:200]}. Check the network and try again."
        ) from error


def _json(name: str, stream: BinaryIO, size: int) -> Iterator[Chunk]:
    number, offset = 1, 0
    while raw := stream.read(min(size, FIRST)):
        if not offset and raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{name}:1: the file is UTF-16. Save it as UTF-8.")
        body = raw if offset else raw.removeprefix(codecs.BOM_UTF8)
        if body.strip():
            if body.lstrip()[:1] == b"[" and not is_one_row(body.lstrip().partition(b"\n")[0]):
                yield from given(ArrayItems(name, stream, body, number), rows_of(size))
            else:
                yield from _lines(name, stream, size, body, number, offset + len(raw) - len(body))
            return
        number, offset = number + raw.count(b"\n"), offset + len(raw)


def _lines(
    name: str,
    stream: BinaryIO,
    size: int,
    head: bytes = b"",
    number: int = 1,
    offset: int = 0,
    *,
    plain: bool = False,
) -> Iterator[Chunk]:
    raw = head + stream.readline() if head else b"".join(stream.readlines(min(size, FIRST)))
    while raw:
        yield Lines(name, number, offset, raw, plain)
        number, offset = number + raw.count(b"\n"), offset + len(raw)
        raw = b"".join(stream.readlines(size))


def _line(name: str, raw: bytes, number: int, offset: int, *, whole: bool, plain: bool) -> Item:
    origin = f"{name}:{number}"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return origin, DataError(
            f"{origin}: not UTF-8 at byte {offset + error.start} of the file. Save it as UTF-8."
        )
    if plain:
        return origin, {"text": text.removeprefix("\ufeff").removesuffix("\r")}
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        cut = "" if whole else " (the last line may be cut short)"
        open_end = whole and text.lstrip()[:1] == "{" and error.pos >= len(text.rstrip())
        lines = " A record of several lines belongs into a JSON array." if open_end else ""
        return origin, DataError(
            f"{origin}: not valid JSON: {error.msg} at column {error.colno}{cut}.{lines}"
        )
    except (ValueError, RecursionError) as error:
        return origin, DataError(f"{origin}: not usable JSON: {str(error)[:80]}.")
    return origin, object_of(value, origin)


def _table(name: str, stream: BinaryIO, delimiter: str) -> Iterator[Item]:
    """The rows of a table with a header, its fields as text; a label that is true or false is that."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    end = 1
    try:
        width = len(_once(name, rows.fieldnames or ()))
        for row in rows:
            origin, end = f"{name}:{end + 1}", rows.line_num
            fields: dict[Any, Any] = row
            count = width + len(fields.get(None) or ()) - sum(value is None for value in fields.values())
            if count != width:
                yield origin, DataError(f"{origin}: has {count} fields, and the header has {width}.")
                continue
            for label in VERDICTS:
                value = str(fields.get(label)).lower()
                fields |= {label: value == "true"} if value in ("true", "false") else {}
            yield origin, fields
    except UnicodeDecodeError as error:
        raise DataError(f"{name}:{end + 1}: not UTF-8: {error.reason}. Save the file as UTF-8.") from error
    except csv.Error as error:
        raise DataError(
            f"{name}:{end + 1}: not a table: {error}. Quote fields that hold quotes or line ends."
        ) from error
    finally:
        text.detach()


def rows_of(size: int, rows: int = TABLE_ROWS, held: int = 0) -> int:
    """Rows of a chunk of about ``size`` bytes; ``rows`` rows have ``held`` bytes, 2 KB each where 0."""
    return min(TABLE_ROWS, max(1, size * rows // (held or rows << 11)))


def _parquet(file: DataFile, size: int) -> Iterator[Chunk]:
    number, about = 0, footer_of(file)
    for group, rows, step in row_groups(about, size):
        yield from of_row_group(file, about, group, step, number)
        number += rows


def footer_of(file: DataFile) -> Any:
    """What a Parquet file says of its row groups."""
    import pyarrow.parquet as pq

    with _reading(file, "Parquet"), file.plain() as stream, pq.ParquetFile(stream) as table:
        return table.metadata


def row_groups(footer: Any, size: int) -> Iterator[tuple[int, int, int]]:
    """(number, rows, rows of a chunk) of each row group of a Parquet file."""
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        yield number, group.num_rows, rows_of(size, group.num_rows, group.total_byte_size)


def of_row_group(file: DataFile, footer: Any, group: int, step: int, number: int) -> Iterator[Chunk]:
    """The chunks of a row group of a Parquet file, ``step`` rows each; number: of its first row."""
    import pyarrow.parquet as pq

    with (
        _reading(file, "Parquet", number),
        file.plain() as stream,
        pq.ParquetFile(stream, metadata=footer) as table,
    ):
        for batch in table.iter_batches(batch_size=step, row_groups=[group]):
            yield _rows(file.name, number, batch)
            number += batch.num_rows


def _arrow(file: DataFile, size: int) -> Iterator[Chunk]:
    with _reading(file, "Arrow"), file.plain() as stream:
        yield from of_table(file.name, arrow_batches(stream), size)


@contextmanager
def _reading(file: DataFile, kind: str, row: int = 0) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        where = f"{file.name}:row {row}" if row else file.name
        raise DataError(f"{where}: not readable as {kind}: {str(error)[:120]}.") from error


def arrow_batches(stream: Any) -> Iterable[pa.RecordBatch]:
    """The record batches of an Arrow file, which can be had in any order, or of an Arrow stream."""
    try:
        reader = pa.ipc.open_file(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        return pa.ipc.open_stream(stream)
    return map(reader.get_batch, range(reader.num_record_batches))


def of_table(name: str, batches: Iterable[pa.RecordBatch], size: int | None = None) -> Iterator[Chunk]:
    """The chunks of a table, of about ``size`` bytes each."""
    number = 0
    for batch in batches:
        step = rows_of(size or CHUNK, batch.num_rows, batch.nbytes)
        for start in range(0, batch.num_rows, step):
            yield _rows(name, number, part := batch.slice(start, step))
            number += part.num_rows


def _once(name: str, columns: Sequence[str]) -> Sequence[str]:
    """The names of a table's columns. DataError where two are the same: a row would have the last one alone."""
    for column, count in Counter(columns).items():
        if count > 1:
            raise DataError(
                f"{name}: has {count} columns with the name {column!r}. Rename all but one of them."
            )
    return columns


def _rows(name: str, number: int, batch: pa.RecordBatch) -> TableRows:
    _once(name, batch.schema.names)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return TableRows(name, number, sink.getvalue().to_pybytes(), batch.num_rows)


def without_nulls(value: Any) -> Any:
    """A row of Arrow without the nulls it invents: a struct has the fields of all rows of its column.

    >>> without_nulls({"a": [{"x": 1, "y": None}, {"x": None, "y": 2}], "b": {"z": None}})
    {'a': [{'x': 1}, {'y': 2}]}
    """
    if isinstance(value, dict):
        kept = {name: without_nulls(each) for name, each in value.items() if each is not None}
        return {name: each for name, each in kept.items() if each != {} or value[name] == {}}
    return [without_nulls(each) for each in value] if isinstance(value, list | tuple) else value
