"""index.json of a cache, which says all that is in it, and the text it was built for."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from selectkd.durable import json_bytes, sealed, unsealed, write_whole
from selectkd.errors import CacheError
from selectkd.teachers.cache.shard import Shard, ShardEntry, record_key, shard_name

INDEX, PLAN, TEXT, HEAD, SHARDS = "index.json", "plan.json", "text.bin", "head.safetensors", "shards"


@dataclass(frozen=True)
class Record:
    """One sample of the text: its token ids and the places whose hidden state predicts a trained token."""

    ids: list[int]
    places: list[int]

    @property
    def key(self) -> bytes:
        return record_key(self.ids)


def records_of(examples: Iterable[Any]) -> list[Record]:
    """A record for each different sample that trains a token; equal samples share one, with the places of all."""
    found: dict[tuple[int, ...], set[int]] = {}
    for example in examples:
        places = {i - 1 for i, trained in enumerate(example.completion) if trained and i}
        if places:
            found.setdefault(tuple(example.input_ids), set()).update(places)
    return [Record(list(ids), sorted(places)) for ids, places in found.items()]


def cut_into_shards(records: Sequence[Record], rows: int) -> list[list[Record]]:
    """Consecutive records, a new shard where the next record would take one over ``rows`` rows."""
    shards: list[list[Record]] = []
    room = 0
    for record in records:
        if not shards or len(record.places) > room:
            shards.append([])
            room = rows
        shards[-1].append(record)
        room -= len(record.places)
    return shards


def text_bytes(records: Sequence[Record]) -> bytes:
    """The records as bytes: lengths, ids and which places are stored, compressed."""
    parts = [np.array([len(records), *(len(r.ids) for r in records)], "<u4")]
    for record in records:
        tokens = np.array(record.ids, "<u4")
        tokens[record.places] |= np.uint32(1 << 31)
        parts.append(tokens)
    return zlib.compress(np.concatenate(parts).tobytes(), 6)


def text_of(folder: Path, index: Mapping[str, Any]) -> list[Record]:
    """The records the cache was built for; CacheError where the file is missing or damaged."""
    path = folder / TEXT
    content = path.read_bytes() if path.is_file() else b""
    if xxhash.xxh3_128(content).hexdigest() != index["text"]["checksum"]:
        raise CacheError(f"{path} is missing or damaged. `selectkd cache repair RECIPE` writes it again.")
    flat: NDArray[np.uint32] = np.frombuffer(zlib.decompress(content), "<u4")
    count = int(flat[0])
    ends = 1 + count + np.cumsum(flat[1 : 1 + count], dtype=np.int64)
    records, start = [], 1 + count
    for end in ends.tolist():
        tokens = flat[start:end]
        ids = (tokens & 0x7FFFFFFF).tolist()
        records.append(Record(ids, np.nonzero(tokens >> 31)[0].tolist()))
        start = end
    return records


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


def open_shards(folder: Path, index: Mapping[str, Any]) -> list[Shard]:
    """All shards of a finished cache, each checked in size, place and header."""
    own = fingerprint(index)
    return [
        Shard(folder / SHARDS / shard_name(number), number, own, ShardEntry(**entry))
        for number, entry in enumerate(index["shards"])
    ]


def entries_of(shards: Iterable[Shard]) -> list[dict[str, Any]]:
    """What the index says of shards."""
    return [asdict(shard.entry) for shard in shards]
