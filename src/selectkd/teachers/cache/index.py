"""index.json of a cache, which says all that is in it, and the text it was built for."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from selectkd.data.durable import json_bytes, sealed, unsealed, write_whole
from selectkd.data.examples import Examples, record_key
from selectkd.data.vision import Images
from selectkd.errors import CacheError

INDEX, PLAN, TEXT, HEAD, SHARDS = "index.json", "plan.json", "text.bin", "head.safetensors", "shards"


@dataclass(frozen=True)
class Record:
    """One sample of the text: its token ids, the places whose hidden state predicts a trained token, its images.

    seen: ``Images.identity``, also where the images themselves are not at hand.
    """

    ids: list[int]
    places: list[int]
    images: Images | None = None
    seen: bytes = b""

    @property
    def key(self) -> bytes:
        return record_key(self.ids, self.seen)


class Records(Sequence[Record]):
    """The records of a text, each made when it is wanted; a slice is a view.

    lengths, counts: tokens and places of each, [n]. make: the record of a number, of which the first is ``start``.
    """

    def __init__(
        self, make: Callable[[int], Record], lengths: NDArray[Any], counts: NDArray[Any], start: int = 0
    ) -> None:
        self.lengths, self.counts = lengths, counts
        self._make, self._start = make, start

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            start, _, step = index.indices(len(self))
            assert step == 1  # nobody takes every other record
            return Records(self._make, self.lengths[index], self.counts[index], self._start + start)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._make(self._start + index % len(self))


def records_of(examples: Iterable[Any]) -> Records:
    """A record for each different sample that trains a token; equal samples share one, with the places of all."""
    text = Examples.of(examples)
    counts = np.fromiter((len(_places(example)) for example in text), np.int64, len(text))
    used = np.flatnonzero(counts)
    keys = text.column("key")[used].view("V16").ravel()
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))  # in the order in which they first come
    number = rank[group.ravel()]
    rows = used[np.argsort(number, kind="stable")]
    bounds = np.concatenate([np.zeros(1, np.int64), np.bincount(number, minlength=len(first)).cumsum()])

    def make(index: int) -> Record:
        same = [text[int(row)] for row in rows[bounds[index] : bounds[index + 1]]]
        places = sorted(set().union(*map(_places, same)))
        images = same[0].images
        return Record(same[0].input_ids, places, images, b"" if images is None else images.identity)

    found = counts[rows[bounds[:-1]]]
    for index in np.flatnonzero(np.diff(bounds) > 1).tolist():
        found[index] = len(make(index).places)
    return Records(make, text.lengths[rows[bounds[:-1]]].astype(np.int64), found)


def _places(example: Any) -> set[int]:
    return {place - 1 for place, trained in enumerate(example.completion) if trained and place}


def cut_into_shards(records: Records, rows: int) -> list[Records]:
    """Consecutive records, a new shard where the next record would take one over ``rows`` rows."""
    starts: list[int] = []
    left = 0
    for number, count in enumerate(records.counts.tolist()):
        if not starts or count > left:
            starts.append(number)
            left = rows
        left -= count
    return [records[start:stop] for start, stop in pairwise([*starts, len(records)])]


def text_bytes(records: Records) -> bytes:
    """The records as bytes: lengths, ids and which places are stored, then what tells images apart; compressed."""
    packer = zlib.compressobj(6)
    parts = [packer.compress(np.array([len(records), *records.lengths], "<u4").tobytes())]
    seen: list[bytes] = []
    for record in records:
        tokens = np.array(record.ids, "<u4")
        tokens[record.places] |= np.uint32(1 << 31)
        parts.append(packer.compress(tokens.tobytes()))
        seen.append(record.seen)
    if any(seen):
        sizes = np.array([len(one) for one in seen], "<u4").tobytes()
        parts.append(packer.compress(b"".join([sizes, *seen])))
    return b"".join([*parts, packer.flush()])


def text_of(folder: Path, index: Mapping[str, Any]) -> Records:
    """The records the cache was built for; CacheError where the file is missing or damaged."""
    path = folder / TEXT
    content = path.read_bytes() if path.is_file() else b""
    if xxhash.xxh3_128(content).hexdigest() != index["text"]["checksum"]:
        raise CacheError(f"{path} is missing or damaged. `selectkd cache repair RECIPE` writes it again.")
    flat: NDArray[np.uint32] = np.frombuffer(zlib.decompress(content), "<u4")
    count = int(flat[0])
    lengths = flat[1 : 1 + count].astype(np.int64)
    starts = 1 + count + np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])

    last = int(starts[-1])
    sizes = flat[last : last + count] if len(flat) > last else np.zeros(count, "<u4")
    images = flat[last + count :].tobytes()
    ends = sizes.astype(np.int64).cumsum()

    def make(index: int) -> Record:
        tokens = flat[starts[index] : starts[index + 1]]
        seen = images[int(ends[index]) - int(sizes[index]) : int(ends[index])]
        return Record((tokens & 0x7FFFFFFF).tolist(), np.nonzero(tokens >> 31)[0].tolist(), None, seen)

    counts = np.fromiter((np.count_nonzero(flat[a:b] >> 31) for a, b in pairwise(starts)), np.int64, count)
    return Records(make, lengths, counts)


def fingerprint(plan: Mapping[str, Any]) -> bytes:
    """16 bytes that every shard of a cache carries: two caches share them only where all of the plan agrees."""
    return xxhash.xxh3_128(
        json_bytes({k: v for k, v in plan.items() if k not in ("shards", "checksum")})
    ).digest()


def write_index(path: Path, content: Mapping[str, Any]) -> None:
    """``content`` as JSON with its own checksum; the same content gives the same bytes."""
    write_whole(path, sealed(content))


def read_index(path: Path) -> dict[str, Any]:
    """What ``write_index`` wrote; CacheError where one byte is another."""
    if not path.is_file():
        raise CacheError(
            f"{path} does not exist: no cache, or one that was not finished. "
            "`selectkd cache build RECIPE` builds or finishes it."
        )
    content = unsealed(path.read_bytes())
    if content is not None:
        return content
    raise CacheError(
        f"{path} does not match its own checksum. `selectkd cache repair {path.parent}` writes it again."
    )


def described(path: Path) -> dict[str, Any]:
    """The index of a finished cache; CacheError where it is missing or damaged, or says what no cache can be."""
    index = read_index(path)
    wrong = _undescribed(index)
    if wrong is not None:
        raise CacheError(
            f"{path}: {wrong}, which no build writes. Build the cache again: selectkd cache build RECIPE."
        )
    return index


def _undescribed(index: Mapping[str, Any]) -> str | None:
    """What an index says that no cache can be, in words."""
    for section, names in (("head", ("vocabulary",)), ("text", ("size", "checksum")), ("teacher", ("model",)),
                           ("engine", ())):  # fmt: skip
        part = index.get(section)
        missing = [name for name in names if not isinstance(part, dict) or name not in part]
        if not isinstance(part, dict) or missing:
            return f"{section} is not described"
    k, payload, head = index.get("k"), index.get("payload"), index["head"]
    precisions = {"hidden": ("bfloat16", "float32"), "top_k": ("packed", "float32"), "sampled": ("packed",)}
    if payload not in precisions or index.get("precision") not in precisions[payload]:
        return f"payload {payload!r} in {index.get('precision')!r}"
    if not _count(head["vocabulary"]) or (payload == "hidden") != (k is None):
        return f"{payload} with k = {k!r} of {head['vocabulary']!r} tokens"
    if k is not None and not (_count(k) and k <= head["vocabulary"]):
        return f"k = {k!r} of {head['vocabulary']} tokens"
    if payload == "hidden" and not (
        _count(head.get("width"))
        and _real(head.get("scale"))
        and (head.get("softcap") is None or _real(head["softcap"]))
    ):
        return "a head that is none"
    entries = index.get("shards")
    fields = {"records", "rows", "size", "checksum"}
    if not isinstance(entries, list) or not all(
        isinstance(one, dict) and set(one) == fields for one in entries
    ):
        return "shards that are not described"
    for name in ("records", "rows"):
        if sum(one[name] for one in entries if _count(one[name])) != index.get(name):
            return f"{index.get(name)!r} {name}, and its shards have others"
    return None if _count(index.get("shard_rows")) else f"shard_rows = {index.get('shard_rows')!r}"


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
