"""Building a cache: the teacher's rows for every trained token of a text, a shard at a time, resumable.

A shard is a function of its records and the teacher alone, so a build that was killed and finished, one over
several ranks and one in a single go leave the same bytes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from selectkd.data.alignment import tokenizer_fingerprint
from selectkd.data.durable import write_whole
from selectkd.data.template import ChatTemplate
from selectkd.errors import CacheError, ConfigError, NumericsError, ResourceError
from selectkd.teachers.cache.builders import fill
from selectkd.teachers.cache.index import (
    HEAD,
    INDEX,
    PLAN,
    SHARDS,
    TEXT,
    Record,
    Records,
    cut_into_shards,
    fingerprint,
    read_index,
    records_of,
    text_bytes,
    write_index,
)
from selectkd.teachers.cache.origin import Origin, head_bytes
from selectkd.teachers.cache.payloads import Stored, payload_of, unsound_head
from selectkd.teachers.cache.shard import Shard, ShardEntry, shard_bytes, shard_name

SHARD_BYTES, SHARD_ROWS = 1 << 28, 1 << 16
"""A shard's rows have at most so many bytes, and are at most so many: what a killed build computes again."""


@dataclass(frozen=True)
class CacheOptions:
    """Options of a build: the payload, its K where it has one, the precision, and the most rows a shard (None: by
    their bytes).
    """

    payload: str = "hidden"
    k: int | None = None
    precision: str | None = None
    shard_rows: int | None = None

    def __post_init__(self) -> None:
        if (self.k is None) != (self.payload == "hidden"):
            raise ConfigError(
                f"teacher.payload = {self.payload} with k = {self.k}: top_k and sampled need teacher.k, "
                "hidden has none."
            )
        allowed = {"hidden": ("bfloat16", "float32"), "top_k": ("packed", "float32"), "sampled": ("packed",)}
        if self.precision is not None and self.precision not in allowed[self.payload]:
            raise ConfigError(
                f"teacher.precision = {self.precision} does not fit payload {self.payload}; "
                f"use {' or '.join(allowed[self.payload])}."
            )


def plan_of(
    origin: Origin,
    *,
    tokenizer: Any,
    examples: Sequence[Any],
    options: CacheOptions,
    template: ChatTemplate | None = None,
    ends: Collection[int] = (),
) -> tuple[dict[str, Any], Records]:
    """(the index without its shards, the records): the teacher, the text, and the way its rows are stored.

    template, ends: of the rendered text; the tokenizer's template unless given.
    """
    template = ChatTemplate.of(tokenizer) if template is None else template
    head = origin.head
    strange = None if head is None else unsound_head(head)
    if strange is not None:
        raise NumericsError(
            f"the teacher {origin.teacher['model']} has a head that {strange}. Check its weights."
        )
    if options.k is not None and options.k > origin.vocabulary:
        raise ConfigError(f"teacher.k = {options.k} is more than the teacher's {origin.vocabulary} tokens.")
    records = records_of(examples)
    text = text_bytes(records)
    plan = {
        "format": 1,
        "payload": options.payload,
        "k": options.k,
        "precision": options.precision or ("bfloat16" if options.payload == "hidden" else "packed"),
        "temperature": 1.0,
        "teacher": origin.teacher,
        "head": {
            "vocabulary": origin.vocabulary,
            "width": None if head is None else head.weight.shape[1],
            "scale": None if head is None else head.scale,
            "softcap": None if head is None else head.softcap,
            "checksum": xxhash.xxh3_128(head_bytes(head)).hexdigest()
            if head is not None and options.payload == "hidden"
            else None,
        },
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": template.fingerprint,
        **({"date": template.moment} if template.dated else {}),
        **({"ends": sorted(ends)} if ends else {}),
        **_images(records),
        "engine": {"selectkd": metadata.version("selectkd"), **origin.engine},
        "data": _hash_of_keys(records),
        "records": len(records),
        "rows": int(records.counts.sum()),
        "tokens": int(records.lengths.sum()),
        "shard_rows": 0,
        "text": {"size": len(text), "checksum": xxhash.xxh3_128(text).hexdigest()},
    }
    width = plan["row_bytes"] = payload_of(plan).row_bytes
    plan["shard_rows"] = options.shard_rows or max(1, min(SHARD_ROWS, SHARD_BYTES // width))
    return plan, records


def _hash_of_keys(records: Records) -> str:
    digest = xxhash.xxh3_128()
    for record in records:
        digest.update(record.key)
    return digest.hexdigest()


def _images(records: Records) -> dict[str, str]:
    """The processor of the records' images, where they have some."""
    for record in records:
        if record.images is not None and record.seen:
            return {"images": record.images.reader.fingerprint}
        if record.images is None:  # of a model that sees nothing
            break
    return {}


def build_cache(
    folder: Path,
    plan: Mapping[str, Any],
    records: Records,
    origin: Origin,
    *,
    rank: int = 0,
    ranks: int = 1,
    say: Callable[[str], None],
    before_shard: Callable[[], None] | None = None,
) -> dict[str, Any] | None:
    """Builds or finishes the cache of ``plan``; returns its index, or None where other ranks are not done.

    before_shard: called before each shard; an error it raises ends the build, and whole shards are left.

    Rank r computes the shards r, r + ranks, ...; the rank that finds all of them there writes the index. Sound shards
    are kept, and a shard that another builder works on is waited for. CacheError where the folder holds another
    cache, ResourceError where the disk is too small, both before anything is computed.
    """
    shards = cut_into_shards(records, plan["shard_rows"])
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    _claim(folder, plan)
    needed = plan["rows"] * plan["row_bytes"]
    _check_disk(folder, needed)
    if plan["payload"] == "hidden" and not (folder / HEAD).is_file():
        assert origin.head is not None  # what has no head gives no hidden states
        write_whole(folder / HEAD, head_bytes(origin.head))
    if not (folder / TEXT).is_file():
        write_whole(folder / TEXT, text_bytes(records))
    seconds = estimate(origin, records, payload_of(dict(plan)))
    say(
        f"{plan['rows']:,} rows of {plan['row_bytes']} bytes in {len(shards)} shards: {needed / 1e6:,.1f} MB, "
        f"about {seconds / ranks:,.0f} s"
    )
    shard = _Shards(folder, plan, shards, origin, before_shard or _nothing, say)
    others = [number for number in range(rank, len(shards), ranks) if not shard.make(number)]
    if others:
        say(f"waiting for another process that builds {len(others)} shards")
    for number in others:
        shard.make(number, wait=shard.before)
    entries = [entry for number in range(len(shards)) if (entry := shard.sound(number)) is not None]
    if len(entries) < len(shards):
        return None
    index = {**plan, "shards": [asdict(entry) for entry in entries]}
    write_index(folder / INDEX, index)
    return index


@dataclass(frozen=True)
class _Shards:
    """The shards of one build: which are there, and the making of the others."""

    folder: Path
    plan: Mapping[str, Any]
    records: Sequence[Sequence[Record]]
    origin: Origin
    before: Callable[[], None]
    say: Callable[[str], None]

    def make(self, number: int, wait: Callable[[], None] | None = None) -> bool:
        """Computes a shard unless it is there; False where another builder is at work on it and ``wait`` is None."""
        if self.sound(number):
            return True
        self.before()

        def content() -> bytearray | None:
            if self.sound(number):  # another builder may have been faster
                return None
            return compute_shard(self.origin, self.plan, number, self.records[number])

        filled = fill(self.folder / SHARDS / shard_name(number), content, wait=wait)
        if filled:
            self.say(f"shard {number + 1} of {len(self.records)}")
        return filled

    def sound(self, number: int) -> ShardEntry | None:
        """The index entry of a shard, if it is there and whole."""
        path = self.folder / SHARDS / shard_name(number)
        try:
            with closing(Shard(path, number, fingerprint(self.plan))) as shard:
                return None if shard.damaged() else shard.entry
        except CacheError:
            return None


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{folder} needs {needed:,} bytes and the disk has {free:,} free. Name another folder, or store less."
        )


@torch.no_grad()
def compute_shard(
    origin: Origin, plan: Mapping[str, Any], number: int, records: Sequence[Record]
) -> bytearray:
    """The bytes of one shard; NumericsError for rows that no teacher gives, or too many that are not finite."""
    payload = payload_of(dict(plan))
    rows: list[np.ndarray[Any, Any] | None] = [None] * len(records)
    order = sorted(range(len(records)), key=lambda i: len(records[i].ids))
    for start in range(0, len(order), origin.batch):
        chosen = order[start : start + origin.batch]
        for i, of_record in zip(chosen, origin.rows([records[i] for i in chosen], payload), strict=True):
            rows[i] = of_record
    whole = np.concatenate([part for part in rows if part is not None])
    fault = payload.examined(whole).fault()
    if fault is not None:
        raise NumericsError(
            f"the teacher {origin.teacher['model']}: {fault}, in shard {number}. Load it in float32 or bfloat16, or "
            "check its weights."
        )
    return shard_bytes(
        number,
        [record.key for record in records],
        [np.array(record.places, np.uint32) for record in records],
        whole,
        fingerprint(plan),
    )


def estimate(origin: Origin, records: Records, payload: Stored) -> float:
    """Seconds the teacher needs for all records, from one batch of middling length."""
    if not records:
        return 0.0
    by_length = np.argsort(records.lengths, kind="stable")
    middle = [records[one] for one in by_length[len(by_length) // 2 :][: origin.batch].tolist()]
    started = time.perf_counter()
    origin.rows(middle, payload)
    took = time.perf_counter() - started
    return took * int(records.lengths.sum()) / sum(len(record.ids) for record in middle)


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], *, under: str = "") -> list[str]:
    """``key: stored, not wanted`` for every key of ``wanted`` that the cache has otherwise."""
    found = []
    for key, value in wanted.items():
        have, name = stored.get(key), f"{under}{key}"
        if isinstance(value, Mapping) and isinstance(have, Mapping):
            found += differences(have, value, under=f"{name}.")
        elif have != value:
            found.append(f"{name}: {have} in the cache, {value} wanted")
    return found


def _claim(folder: Path, plan: Mapping[str, Any]) -> None:
    """Writes plan.json, or checks that the folder is being filled by the same plan."""
    path = folder / PLAN
    if path.is_file():
        other = differences(read_index(path), plan)
        if other:
            shown = "; ".join(other[:4])
            raise CacheError(f"{folder} holds another cache: {shown}. Name a new folder, or delete this one.")
    else:
        write_index(path, plan)


def _nothing() -> None:
    """The ``before_shard`` of a build without one."""
