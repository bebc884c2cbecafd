"""A cache is checked, and its broken parts alone are computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from selectkd.data.durable import write_whole
from selectkd.errors import CacheError
from selectkd.models.load import load_model
from selectkd.teachers.cache.build import compute_shard
from selectkd.teachers.cache.index import (
    HEAD,
    INDEX,
    PLAN,
    SHARDS,
    TEXT,
    Record,
    Records,
    cut_into_shards,
    described,
    fingerprint,
    read_index,
    text_bytes,
    text_of,
    write_index,
)
from selectkd.teachers.cache.origin import ModelOrigin, Origin, head_bytes
from selectkd.teachers.cache.payloads import Examined, payload_of
from selectkd.teachers.cache.shard import Shard, ShardEntry, shard_name

EXAMINED = 4096
"""Rows that are checked together."""


@dataclass
class Findings:
    """The broken parts of a cache: in words, and as shards and other files."""

    problems: list[str] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.problems)


def verify(folder: Path) -> Findings:
    """Every byte of a cache checked against its checksums, every record against the text, and every row against what a
    teacher can give.
    """
    found = Findings()
    index = _description(folder, found)
    if index is None:
        return found
    if index["payload"] == "hidden":
        path = folder / HEAD
        content = path.read_bytes() if path.is_file() else b""
        if xxhash.xxh3_128(content).hexdigest() != index["head"]["checksum"]:
            found.problems.append(f"{path} is missing or damaged.")
            found.files.append(HEAD)
    if INDEX not in found.files:
        try:
            described(folder / INDEX)
        except CacheError as error:
            found.problems.append(str(error))
            return found
    records: Records | None = None
    try:
        records = text_of(folder, index)
    except CacheError as error:
        found.problems.append(str(error))
        found.files.append(TEXT)
    shards = None if records is None else cut_into_shards(records, index["shard_rows"])
    plan_bytes = fingerprint(index)
    entries = index.get("shards")
    for number in range(len(shards or entries or ())):
        entry = None if entries is None else ShardEntry(**entries[number])
        damaged = _looked_over(
            folder, number, plan_bytes, entry, index, None if shards is None else shards[number]
        )
        if damaged:
            found.problems += damaged
            found.shards.append(number)
    return found


def _looked_over(
    folder: Path,
    number: int,
    plan_bytes: bytes,
    entry: ShardEntry | None,
    index: dict[str, Any],
    records: Any,
) -> list[str]:
    """What is wrong with a shard: bytes, records other than the text's, rows that no teacher gives."""
    payload = payload_of(index)
    try:
        with closing(Shard(folder / SHARDS / shard_name(number), number, plan_bytes, entry)) as shard:
            damaged = shard.damaged()
            if damaged:
                return damaged
            if shard.width != payload.row_bytes:
                return [str(shard.broken(f"has rows of {shard.width} bytes, not {payload.row_bytes}"))]
            if records is not None and (
                shard.keys != [record.key for record in records]
                or shard.places.tolist() != [place for record in records for place in record.places]
            ):
                return [str(shard.broken("holds other records than the text"))]
            rows = nonfinite = 0
            for low in range(0, shard.count, EXAMINED):
                high = min(low + EXAMINED, shard.count)
                seen = payload.examined(shard.rows(np.arange(low, high)))
                if seen.wrong is not None:
                    row, fault = low + seen.wrong[0], f"{seen.wrong[1]}: no teacher gives that"
                    return [str(shard.broken(f"row {row} {fault}", shard.record_of(row)))]
                rows, nonfinite = rows + seen.rows, nonfinite + seen.nonfinite
            fault = Examined(rows, nonfinite).fault()
            return [] if fault is None else [str(shard.broken(f"has a broken teacher's rows: {fault}"))]
    except CacheError as error:
        return [str(error)]


def repair(
    folder: Path,
    *,
    records: Records | None = None,
    origin: Origin | None = None,
    say: Callable[[str], None],
) -> Findings:
    """Computes again what ``verify`` finds broken, byte for byte as it was, and returns what that was.

    records, origin: the text and where its rows come from, where a recipe gives them; else the cache's own copy,
    and the model it names. CacheError where neither is
    sound, where the teacher's weights are others, or where this machine computes other bytes.
    """
    found = verify(folder)
    if not found:
        return found
    if not found.files and not found.shards:
        raise CacheError(found.problems[0])
    index = _description(folder, Findings())
    if index is None:
        raise CacheError(
            f"{folder} has lost index.json and plan.json. Build it again: selectkd cache build RECIPE."
        )
    if TEXT in found.files:
        if records is None or xxhash.xxh3_128(text_bytes(records)).hexdigest() != index["text"]["checksum"]:
            raise CacheError(
                f"{folder / TEXT} is damaged, and no other copy of its text is available. "
                "Name the recipe the cache was built from: selectkd cache repair RECIPE."
            )
        write_whole(folder / TEXT, text_bytes(records))
    records = _with_images(text_of(folder, index), records if "images" in index else None)
    if found.shards or HEAD in found.files:
        _compute_again(
            folder, index, found, records, _origin(folder, index) if origin is None else origin, say
        )
    plan = {key: value for key, value in index.items() if key not in ("shards", "checksum")}
    if PLAN in found.files:
        write_index(folder / PLAN, plan)
    if INDEX in found.files:
        plan_bytes = fingerprint(plan)
        count = len(cut_into_shards(records, index["shard_rows"]))
        there = []
        for number in range(count):
            with closing(Shard(folder / SHARDS / shard_name(number), number, plan_bytes)) as shard:
                there.append(asdict(shard.entry))
        write_index(folder / INDEX, {**plan, "shards": there})
    return found


def _with_images(text: Records, given: Records | None) -> Records:
    """The records of a cache with the images that the recipe's own have: no cache keeps any."""
    if given is None:
        return text
    number = {record.key: index for index, record in enumerate(given)}

    def make(index: int) -> Record:
        record = text[index]
        place = number.get(record.key)
        return record if place is None else given[place]

    return Records(make, text.lengths, text.counts)


def _compute_again(
    folder: Path,
    index: Mapping[str, Any],
    found: Findings,
    records: Records,
    origin: Origin,
    say: Callable[[str], None],
) -> None:
    """The broken shards, and the head where it is broken; CacheError where a byte would differ."""
    teacher, entries = index["teacher"], index.get("shards")
    if any(origin.teacher.get(key) != teacher[key] for key in ("weights", "fingerprint") if key in teacher):
        raise CacheError(
            f"{teacher['model']} has other weights than the cache was built with. Build it again: "
            "selectkd cache build RECIPE."
        )
    if HEAD in found.files and origin.head is not None:
        write_whole(folder / HEAD, head_bytes(origin.head))
    cut = cut_into_shards(records, index["shard_rows"])
    (folder / SHARDS).mkdir(exist_ok=True)
    for number in found.shards:
        content = compute_shard(origin, index, number, cut[number])
        if entries is not None and content[-16:].hex() != entries[number]["checksum"]:
            raise CacheError(
                f"shard {number} gets other bytes on this machine, which rounds differently (the cache was built with "
                f"{index['engine']}). Repair it there, or build the cache again."
            )
        write_whole(folder / SHARDS / shard_name(number), content)
        say(f"shard {number} computed again")


def _origin(folder: Path, index: Mapping[str, Any]) -> Origin:
    """The model that an index names."""
    teacher = index["teacher"]
    if "server" in index["engine"]:
        raise CacheError(
            f"{folder} was filled by a server, which is needed to repair it. Name the recipe with the server's "
            "address: selectkd cache repair RECIPE."
        )
    hub = teacher["revision"] if teacher["revision"] and len(teacher["revision"]) == 40 else None
    loaded = load_model(
        teacher["model"], dtype=teacher["dtype"], quantization=teacher["quantization"], revision=hub
    )
    return ModelOrigin(
        loaded, model=teacher["model"], dtype=teacher["dtype"], quantization=teacher["quantization"]
    )


def _description(folder: Path, found: Findings) -> dict[str, Any] | None:
    """index.json, or plan.json where that is damaged; None where both are."""
    description = None
    for name in (PLAN, INDEX):
        try:
            description = read_index(folder / name)
        except CacheError as error:
            found.problems.append(str(error))
            found.files.append(name)
    return description
