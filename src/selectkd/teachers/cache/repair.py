"""Looking a cache over, and computing again what is broken in it: nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from selectkd.durable import write_whole
from selectkd.errors import CacheError
from selectkd.models.head import head_of
from selectkd.models.load import load_model
from selectkd.teachers.cache.build import compute_shard, head_bytes, weights_checksum
from selectkd.teachers.cache.index import (
    HEAD,
    INDEX,
    PLAN,
    SHARDS,
    TEXT,
    Record,
    cut_into_shards,
    entries_of,
    fingerprint,
    read_index,
    text_bytes,
    text_of,
    write_index,
)
from selectkd.teachers.cache.shard import Shard, ShardEntry, shard_name


@dataclass
class Findings:
    """What is broken: in words, and as shards and other files."""

    told: list[str] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.told)


def verify(folder: Path) -> Findings:
    """Every byte of a cache checked against its checksums, every record against the text."""
    found = Findings()
    index = _description(folder, found)
    if index is None:
        return found
    if index["payload"] == "hidden":
        path = folder / HEAD
        content = path.read_bytes() if path.is_file() else b""
        if xxhash.xxh3_128(content).hexdigest() != index["head"]["checksum"]:
            found.told.append(f"{path} is missing or damaged.")
            found.files.append(HEAD)
    records: list[Record] | None = None
    try:
        records = text_of(folder, index)
    except CacheError as error:
        found.told.append(str(error))
        found.files.append(TEXT)
    shards = None if records is None else cut_into_shards(records, index["shard_rows"])
    own = fingerprint(index)
    entries = index.get("shards")
    for number in range(len(shards or entries or ())):
        try:
            entry = None if entries is None else ShardEntry(**entries[number])
            shard = Shard(folder / SHARDS / shard_name(number), number, own, entry)
            damaged = shard.damaged()
            if not damaged and shards is not None and shard.keys != [r.key for r in shards[number]]:
                damaged = [str(shard.broken("holds other records than the text"))]
        except CacheError as error:
            damaged = [str(error)]
        if damaged:
            found.told += damaged
            found.shards.append(number)
    return found


def repair(folder: Path, *, records: Sequence[Record] | None = None, say: Callable[[str], None]) -> Findings:
    """Computes again what ``verify`` finds broken, byte for byte as it was, and returns what that was.

    records: the text, where a recipe gives it; else the cache's own copy is used. CacheError where neither is
    sound, where the teacher's weights are others, or where this machine computes other bytes.
    """
    found = verify(folder)
    if not found:
        return found
    index = _description(folder, Findings())
    if index is None:
        raise CacheError(
            f"{folder} has lost index.json and plan.json. Build it again: selectkd cache build RECIPE."
        )
    if TEXT in found.files:
        if records is None or xxhash.xxh3_128(text_bytes(records)).hexdigest() != index["text"]["checksum"]:
            raise CacheError(
                f"{folder / TEXT} is damaged and the text it held is not at hand. "
                "Name the recipe the cache was built from: selectkd cache repair RECIPE."
            )
        write_whole(folder / TEXT, text_bytes(records))
    records = text_of(folder, index)
    entries = index.get("shards")
    if found.shards or HEAD in found.files:
        said = index["teacher"]
        hub = said["revision"] if said["revision"] and len(said["revision"]) == 40 else None
        model = load_model(
            said["model"], dtype=said["dtype"], quantization=said["quantization"], revision=hub
        ).model
        if weights_checksum(model) != said["weights"]:
            raise CacheError(
                f"{said['model']} has other weights than the cache was built with. Build it again: "
                "selectkd cache build RECIPE."
            )
        model.requires_grad_(False)
        if HEAD in found.files:
            write_whole(folder / HEAD, head_bytes(head_of(model)))
        cut = cut_into_shards(records, index["shard_rows"])
        (folder / SHARDS).mkdir(exist_ok=True)
        for number in found.shards:
            content = compute_shard(model, index, number, cut[number])
            if entries is not None and content[-16:].hex() != entries[number]["checksum"]:
                raise CacheError(
                    f"shard {number} comes out otherwise than it was built: this machine computes other digits "
                    f"(built with {index['engine']}). Repair it there, or build the cache again."
                )
            write_whole(folder / SHARDS / shard_name(number), content)
            say(f"shard {number} computed again")
    plan = {key: value for key, value in index.items() if key not in ("shards", "checksum")}
    if PLAN in found.files:
        write_index(folder / PLAN, plan)
    if INDEX in found.files:
        own = fingerprint(plan)
        count = len(cut_into_shards(records, index["shard_rows"]))
        there = [Shard(folder / SHARDS / shard_name(i), i, own) for i in range(count)]
        write_index(folder / INDEX, {**plan, "shards": entries_of(there)})
    return found


def _description(folder: Path, found: Findings) -> dict[str, Any] | None:
    """index.json, or plan.json where that is damaged; None where both are."""
    description = None
    for name in (PLAN, INDEX):
        try:
            description = read_index(folder / name)
        except CacheError as error:
            found.told.append(str(error))
            found.files.append(name)
    return description
