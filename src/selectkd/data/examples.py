"""Examples in Arrow: a row for each, in memory or mapped from a file, read when it is wanted.

n examples. Columns are the fields of ``Example``, and beside them each example's length, its count of trained tokens,
its key (the hash of its token ids) and a check (a hash of ids and mask, compared at every read).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from selectkd.data.example import Example
from selectkd.data.prompts import KEYS, unpacked
from selectkd.data.vision import Images, Vision
from selectkd.errors import IntegrityError

TYPES = {
    "tuple[int, ...]": pa.list_(pa.uint64()), "list[int]": pa.list_(pa.int32()), "list[bool]": pa.list_(pa.bool_()),
    "list[float]": pa.list_(pa.float32()), "int": pa.int64(), "bool": pa.bool_(), "float": pa.float64(),
    "str": pa.string(), "bytes": pa.binary(),
}  # fmt: skip
ELSEWHERE = ("stream", "images")
FIELDS = {field.name: TYPES[str(field.type)] for field in fields(Example) if field.name not in ELSEWHERE}
"""The columns of ``Example``; its stream belongs to the recipe, not to the text, and images have ``IMAGES``."""
IMAGES = {
    "images": pa.list_(pa.large_binary()),
    "images_key": pa.binary(),
    "image_spans": pa.list_(pa.int32()),
}
"""The columns of a sample's images: references, what they are known by, and where their tokens stand."""
SCHEMA = pa.schema(
    [
        *FIELDS.items(),
        *IMAGES.items(),
        ("length", pa.int32()), ("trained", pa.int32()), ("key", pa.binary(16)), ("check", pa.uint64()),
    ]
)  # fmt: skip
LISTS = {
    field.name: tuple if str(field.type).startswith("tuple") else list
    for field in fields(Example)
    if field.name in FIELDS and pa.types.is_list(FIELDS[field.name])
}
"""The columns of several values, and what holds them in an ``Example``."""
PLAIN = tuple(name for name in FIELDS if name not in LISTS)


def record_key(ids: Sequence[int] | NDArray[Any], images: bytes = b"") -> bytes:
    """What a sample is known by: the 16 bytes of the xxh3-128 of its token ids and of ``Images.identity``."""
    return xxhash.xxh3_128(np.ascontiguousarray(ids, dtype="<i4").tobytes() + images).digest()


def sample_key(example: Example) -> bytes:
    """``record_key`` of an example with its images."""
    return record_key(example.input_ids, b"" if example.images is None else example.images.identity)


def _check(ids: NDArray[np.int32], mask: NDArray[np.bool_], images: bytes = b"") -> int:
    digest = xxhash.xxh3_64(np.ascontiguousarray(ids, "<i4").tobytes())
    digest.update(np.packbits(mask, bitorder="little").tobytes())
    digest.update(images)
    return digest.intdigest()


def _of_images(example: Example) -> tuple[tuple[bytes, ...], bytes, tuple[int, ...]]:
    """The columns ``IMAGES`` of an example."""
    one = example.images
    return ((), b"", ()) if one is None else (one.refs, one.key, one.spans)


def _seen(refs: Sequence[bytes], key: bytes, spans: Sequence[int]) -> bytes:
    """The columns ``IMAGES`` as bytes for ``_check``; empty without images."""
    return b"".join([key, np.array(spans, "<i4").tobytes(), *refs])


def batch_of(examples: Sequence[Example]) -> pa.RecordBatch:
    """The rows of ``SCHEMA`` for examples."""
    ids = [np.array(example.input_ids, np.int32) for example in examples]
    masks = [np.frombuffer(bytes(example.completion), bool) for example in examples]
    known: dict[str, list[Any]] = {"input_ids": ids, "completion": masks}
    columns: list[pa.Array] = []
    for name, kind in FIELDS.items():
        values = known.get(name) or [getattr(example, name) for example in examples]
        columns.append(_lists(values, kind) if name in LISTS else pa.array(values, kind))
    seen = [_of_images(example) for example in examples]
    of_images = zip(*seen, strict=True) if seen else ((), (), ())
    columns += [pa.array(list(some), kind) for some, kind in zip(of_images, IMAGES.values(), strict=True)]
    identities = (b"" if one.images is None else one.images.identity for one in examples)
    keys = [record_key(*row) for row in zip(ids, identities, strict=True)]
    checks = [_check(one, mask, _seen(*images)) for one, mask, images in zip(ids, masks, seen, strict=True)]
    columns += [
        pa.array([len(one) for one in ids], pa.int32()),
        pa.array([np.count_nonzero(mask) for mask in masks], pa.int32()),
        pa.array(keys, pa.binary(16)),
        pa.array(checks, pa.uint64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _lists(values: Sequence[Any], kind: Any) -> pa.Array:
    """A column of lists of numbers."""
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(one) for one in values], out=offsets[1:])
    width = kind.value_type.to_pandas_dtype()
    flat = np.concatenate([np.asarray(one, width) for one in values]) if values else np.empty(0, width)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, kind.value_type))


class _Batch:
    """One record batch as numpy views, nothing copied."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.plain = {name: batch.column(name) for name in (*PLAIN, *IMAGES)}
        self.check = batch.column("check").to_numpy()
        self.lists: dict[str, tuple[NDArray[Any], Any]] = {}
        for name in LISTS:
            column = batch.column(name)
            values = column.values
            if pa.types.is_boolean(values.type):
                bits = np.frombuffer(values.buffers()[1] or b"", np.uint8)
                self.lists[name] = column.offsets.to_numpy() + values.offset, bits
            else:
                self.lists[name] = column.offsets.to_numpy(), values.to_numpy()

    def row(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = {name: column[index].as_py() for name, column in self.plain.items()}
        for name, (offsets, values) in self.lists.items():
            start, stop = int(offsets[index]), int(offsets[index + 1])
            if FIELDS[name].value_type == pa.bool_():
                bits = np.unpackbits(values[start // 8 : -(-stop // 8)], bitorder="little")
                found[name] = bits[start % 8 : start % 8 + stop - start].astype(bool)
            else:
                found[name] = values[start:stop]
        return found


class Table:
    """Examples of one text. path: the Arrow stream they are mapped from, None in memory; vision: reads their images."""

    def __init__(
        self, table: pa.Table, path: Path | None = None, stream: int = 0, vision: Vision | None = None
    ) -> None:
        self.table, self.path, self.stream, self.vision = table, path, stream, vision
        self._batches = table.to_batches()
        self._starts = [0]
        for batch in self._batches:
            self._starts.append(self._starts[-1] + batch.num_rows)
        self._views: dict[int, _Batch] = {}

    @classmethod
    def mapped(cls, path: Path, stream: int = 0, vision: Vision | None = None) -> Table:
        """The examples of an Arrow stream on disk; the system reads its pages when they are wanted."""
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                table = reader.read_all()
        except (OSError, pa.ArrowException) as error:
            raise _damaged(path) from error
        if table.schema != SCHEMA:
            raise _damaged(path)
        return cls(table, path, stream, vision)

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None:
            return Table, (self.table, None, self.stream, self.vision)
        return Table.mapped, (self.path, self.stream, self.vision)

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers, [n]; of keys, [n, 16] bytes."""
        column = self.table.column(name)
        if name != "key":
            return column.to_numpy()
        parts = [
            np.frombuffer(chunk.buffers()[1], np.uint8)[16 * chunk.offset : 16 * (chunk.offset + len(chunk))]
            for chunk in column.chunks
            if len(chunk)
        ]
        return np.concatenate([*parts, np.empty(0, np.uint8)]).reshape(-1, 16)

    @property
    def prompts(self) -> NDArray[np.int64]:
        """The keys of each example's prompt, [n, KEYS]."""
        parts = [np.empty(0, np.uint8)]
        for chunk in self.table.column("prompt").chunks:
            _, offsets, values = chunk.buffers()
            if len(chunk):
                ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
                parts.append(np.frombuffer(values, np.uint8)[ends[0] : ends[-1]])
        return unpacked(np.concatenate(parts))

    def example(self, index: int) -> Example:
        """The example of a row. IntegrityError where its bytes are not those that were written."""
        number = bisect_right(self._starts, index) - 1
        view = self._views.get(number)
        if view is None:
            view = self._views[number] = _Batch(self._batches[number])
        place = index - self._starts[number]
        row = view.row(place)
        refs, key, spans = (row.pop(name) for name in IMAGES)
        if _check(row["input_ids"], row["completion"], _seen(refs, key, spans)) != int(view.check[place]):
            raise _damaged(self.path)
        for name, kind in LISTS.items():
            row[name] = kind(row[name].tolist())
        images = None
        if self.vision is not None:
            trained = row["completion"]
            prefix = trained.index(True) if True in trained else len(trained)
            images = Images(tuple(refs), key, tuple(spans), prefix, self.vision)
        return Example(stream=self.stream, images=images, **row)


def _damaged(path: Path | None) -> IntegrityError:
    where = None if path is None else path.parent
    return IntegrityError(
        f"{path}: the tokens in this file are not those that were written. "
        f"Delete the folder {where}; the next start tokenises the text again."
    )


class Examples(Sequence[Example]):
    """Examples of one text or several, all of them or some, read one at a time. A slice is a view."""

    def __init__(self, tables: Sequence[Table], rows: NDArray[np.int64] | None = None) -> None:
        self.tables = tuple(tables)
        self.rows = rows
        self._starts = [0]
        for table in self.tables:
            self._starts.append(self._starts[-1] + len(table))
        self._columns: dict[str, NDArray[Any]] = {}

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """``examples`` themselves where they are that, else a table in memory of each stream's run of them."""
        if isinstance(examples, Examples):
            return examples
        given = list(examples)
        streams = list(dict.fromkeys(example.stream for example in given))
        vision = next((example.images.reader for example in given if example.images is not None), None)
        tables = [
            Table(
                pa.Table.from_batches([batch_of([e for e in given if e.stream == stream])]),
                None,
                stream,
                vision,
            )
            for stream in streams
        ]
        order = np.array([streams.index(example.stream) for example in given], np.int64)
        rows = np.empty(len(given), np.int64)
        rows[np.argsort(order, kind="stable")] = np.arange(len(given))
        return cls(tables, rows)

    @classmethod
    def joined(cls, parts: Iterable[Examples]) -> Examples:
        """The examples of several one after the other."""
        tables: list[Table] = []
        rows: list[NDArray[np.int64]] = []
        start = 0
        for part in parts:
            tables += part.tables
            rows.append(part.places + start)
            start += part._starts[-1]
        return cls(tables, np.concatenate([*rows, np.empty(0, np.int64)]))

    @property
    def places(self) -> NDArray[np.int64]:
        """Where each example stands among those of all tables, [n]."""
        return np.arange(self._starts[-1]) if self.rows is None else self.rows

    def __len__(self) -> int:
        return self._starts[-1] if self.rows is None else len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self.tables, self.places[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = int(index) % len(self) if self.rows is None else int(self.rows[index])
        number = bisect_right(self._starts, place) - 1
        return self.tables[number].example(place - self._starts[number])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def where(self, chosen: NDArray[np.bool_]) -> Examples:
        """The examples for which ``chosen`` [n] holds, as a view."""
        return Examples(self.tables, self.places[chosen])

    def column(self, name: str) -> NDArray[Any]:
        """``length``, ``trained``, ``check`` or another number of each example, [n]; ``key``: [n, 16] bytes."""
        if name not in self._columns:
            parts = [table.column(name) for table in self.tables]
            whole = np.concatenate(parts) if parts else np.empty((0, 16) if name == "key" else 0, np.int64)
            self._columns[name] = whole if self.rows is None else whole[self.rows]
        return self._columns[name]

    @property
    def prompts(self) -> NDArray[np.int64]:
        """The keys of each example's prompt (``data.prompts``), [n, KEYS]."""
        whole = np.concatenate([*(table.prompts for table in self.tables), np.empty((0, KEYS), np.int64)])
        return whole if self.rows is None else whole[self.rows]

    @property
    def records(self) -> int:
        """How many records the examples are of; one may be several examples."""
        chunks = [chunk for table in self.tables for chunk in table.table.column("origin").chunks]
        whole = pa.chunked_array(chunks, FIELDS["origin"])
        return len((whole if self.rows is None else whole.take(pa.array(self.rows))).unique())

    @property
    def streams(self) -> NDArray[np.int64]:
        """The stream of each example, [n]."""
        whole = np.repeat([table.stream for table in self.tables], [len(table) for table in self.tables])
        return whole.astype(np.int64) if self.rows is None else whole.astype(np.int64)[self.rows]

    @property
    def longest(self) -> Example | None:
        """The first of the examples with the most tokens."""
        return self[int(np.argmax(self.lengths))] if len(self) else None

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each example, [n]."""
        return self.column("length")

    @property
    def fingerprint(self) -> str:
        """A hash of every token id and mask in order; 32 hexadecimal digits. It reads no token."""
        return xxhash.xxh3_128(np.ascontiguousarray(self.column("check"), "<u8").tobytes()).hexdigest()
