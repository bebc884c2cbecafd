"""A source in chunks: raw records that lie together, which whoever renders them parses.

JSON Lines, JSON arrays, tables and plain text (each plain, gzip or zstd), Parquet and Arrow files, saved data sets and
those of the Hugging Face hub. The chunks of a source are the same each time it is read.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa

from selectkd.data.formats import VERDICTS
from selectkd.data.places import DataFile, Place, Rows
from selectkd.errors import DataError

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
        with pa.ipc.open_stream(self.raw) as reader:
            number = self.number
            for batch in reader:
                for row in batch.to_pylist():
                    yield f"{self.name}:row {number}", without_nulls(row)
                    number += 1

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


def of_file(file: DataFile) -> Iterator[Chunk]:
    """The chunks of one file."""
    name, bare = file.name, file.kind
    try:
        if bare == ".parquet":
            yield from _parquet(file)
        elif bare == ".arrow":
            yield from _arrow(file)
        else:
            with file.stream() as stream:
                if bare == ".txt":
                    yield from _lines(name, stream, plain=True)
                elif bare in (".csv", ".tsv"):
                    yield from given(_table(name, stream, "\t" if bare == ".tsv" else ","))
                else:
                    yield from _json(name, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read: {error}. Fetch or write the file again.") from error


def _json(name: str, stream: BinaryIO) -> Iterator[Chunk]:
    number, offset = 0, 0
    while raw := stream.readline():
        number += 1
        if number == 1 and raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{name}:1: the file is UTF-16. Save it as UTF-8.")
        body = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if body.strip():
            if body.lstrip()[:1] == b"[" and not _is_one_row(body):
                yield from given(_array(name, body + stream.read(), number))
            else:
                yield from _lines(name, stream, body, number, offset + len(raw) - len(body))
            return
        offset += len(raw)


def _lines(
    name: str,
    stream: BinaryIO,
    head: bytes = b"",
    number: int = 1,
    offset: int = 0,
    *,
    plain: bool = False,
) -> Iterator[Chunk]:
    lines = [*([head] if head else []), *stream.readlines(max(1, FIRST - len(head)))]
    while lines:
        raw = b"".join(lines)
        yield Lines(name, number, offset, raw, plain)
        number, offset = number + len(lines), offset + len(raw)
        lines = stream.readlines(CHUNK)


def _is_one_row(body: bytes) -> bool:
    """Whether a first line with an opening bracket is a bad row of JSON Lines, not a JSON array of rows."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return not isinstance(value, list) or (bool(value) and not any(isinstance(item, dict) for item in value))


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
        value = json.loads(text)
    except json.JSONDecodeError as error:
        cut = "" if whole else " (the last line may be cut short)"
        return origin, DataError(f"{origin}: not valid JSON: {error.msg} at column {error.colno}{cut}.")
    except (ValueError, RecursionError) as error:
        return origin, DataError(f"{origin}: not usable JSON: {str(error)[:80]}.")
    return origin, _object(value, origin)


def _object(value: Any, origin: str) -> Any:
    if isinstance(value, dict):
        return value
    return DataError(f"{origin}: needs a JSON object, not {type(value).__name__} {repr(value)[:40]}.")


def _array(name: str, raw: bytes, number: int) -> Iterator[Item]:
    """The items of a JSON array, each with the line it begins on; ``number`` is the line of the bracket."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + raw[: error.start].count(b"\n")
        yield f"{name}:{line}", DataError(f"{name}:{line}: not UTF-8. Save the file as UTF-8.")
        return
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")

    def after_space(position: int) -> int:
        match = space.match(text, position)
        return match.end() if match else position

    position, counted, line = text.index("[") + 1, 0, number
    position = after_space(position)
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        origin = f"{name}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = line + (
                text.count("\n", counted, error.pos) if isinstance(error, json.JSONDecodeError) else 0
            )
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)[:80]
            yield f"{name}:{at}", DataError(f"{name}:{at}: the JSON array breaks off here: {reason}.")
            return
        yield origin, _object(value, origin)
        position = after_space(position)
        if text[position : position + 1] == ",":
            position = after_space(position + 1)
        elif text[position : position + 1] != "]":
            at = f"{name}:{line + text.count(chr(10), counted, position)}"
            yield at, DataError(f"{at}: the JSON array needs a comma or its closing bracket here.")
            return
    if text[position + 1 :].strip():
        at = f"{name}:{line + text.count(chr(10), counted, position)}"
        yield at, DataError(f"{at}: text after the end of the JSON array.")


def _table(name: str, stream: BinaryIO, delimiter: str) -> Iterator[Item]:
    """The rows of a table with a header, its fields as text; a label that is true or false is that."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    end = 1
    try:
        width = len(rows.fieldnames or ())
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


def _parquet(file: DataFile) -> Iterator[Chunk]:
    import pyarrow.parquet as pq

    number = 0
    try:
        with file.plain() as stream, pq.ParquetFile(stream) as table:
            for chunk in of_table(file.name, table.iter_batches(batch_size=TABLE_ROWS)):
                number += len(chunk)
                yield chunk
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file.name}:row {number}: not readable as Parquet: {str(error)[:120]}.") from error


def _arrow(file: DataFile) -> Iterator[Chunk]:
    number = 0
    try:
        with file.plain() as stream:
            for chunk in of_table(file.name, arrow_batches(stream)):
                number += len(chunk)
                yield chunk
    except pa.ArrowException as error:
        raise DataError(f"{file.name}:row {number}: not readable as Arrow: {str(error)[:120]}.") from error


def arrow_batches(stream: Any) -> Iterable[pa.RecordBatch]:
    """The record batches of an Arrow file, which can be had in any order, or of an Arrow stream."""
    try:
        reader = pa.ipc.open_file(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        return pa.ipc.open_stream(stream)
    return map(reader.get_batch, range(reader.num_record_batches))


def of_table(name: str, batches: Iterable[pa.RecordBatch], number: int = 0) -> Iterator[Chunk]:
    """The chunks of a table; number: of its first row."""
    for batch in batches:
        for start in range(0, batch.num_rows, TABLE_ROWS):
            part = batch.slice(start, TABLE_ROWS)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, part.schema) as writer:
                writer.write_batch(part)
            yield TableRows(name, number, sink.getvalue().to_pybytes(), part.num_rows)
            number += part.num_rows


def without_nulls(value: Any) -> Any:
    """A row of Arrow without the nulls it invents: a struct has the fields of all rows of its column.

    >>> without_nulls({"a": [{"x": 1, "y": None}, {"x": None, "y": 2}], "b": {"z": None}})
    {'a': [{'x': 1}, {'y': 2}]}
    """
    if isinstance(value, dict):
        kept = {name: without_nulls(each) for name, each in value.items() if each is not None}
        return {name: each for name, each in kept.items() if each != {} or value[name] == {}}
    return [without_nulls(each) for each in value] if isinstance(value, list | tuple) else value
