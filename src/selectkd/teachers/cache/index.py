"""index.json of a cache, which says all that is in it, and the text it was built for."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from selectkd.data.durable import json_bytes, sealed, unsealed, write_whole
from selectkd.data.examples import record_key
from selectkd.errors import CacheError

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
    left = 0
    for record in records:
        if not shards or len(record.places) > left:
            shards.append([])
            left = rows
        shards[-1].append(record)
        left -= len(record.places)
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
