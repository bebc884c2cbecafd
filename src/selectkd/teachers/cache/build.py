"""Building a cache: the teacher's rows for every trained token of a text, a shard at a time, resumable.

A shard is a function of its records and the teacher alone, so a build that was killed and finished, one over
several ranks and one in a single go leave the same bytes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import save
from torch import nn

from selectkd.data.alignment import template_fingerprint, tokenizer_fingerprint
from selectkd.data.collate import collate
from selectkd.data.render import Example
from selectkd.data.supervised import supervised
from selectkd.durable import write_whole
from selectkd.errors import CacheError, ConfigError, ResourceError
from selectkd.models.head import backbone, head_of
from selectkd.models.load import Loaded
from selectkd.rows import Head
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
    records_of,
    text_bytes,
    write_index,
)
from selectkd.teachers.cache.payloads import payload_of
from selectkd.teachers.cache.shard import Shard, shard_bytes, shard_name

BATCH = 8
"""Samples the teacher reads at once: the shortest of a shard together, so that little is padding."""

SHARD_ROWS = 4096


@dataclass(frozen=True)
class Wish:
    """What is to be stored: the payload, its K where it has one, how precisely, rows a shard at most."""

    payload: str = "hidden"
    k: int | None = None
    precision: str | None = None
    shard_rows: int = SHARD_ROWS

    def __post_init__(self) -> None:
        if (self.k is None) != (self.payload == "hidden"):
            raise ConfigError(
                f"teacher.payload = {self.payload} with k = {self.k}: top_k and sampled need teacher.k, "
                "hidden has none."
            )
        allowed = {"hidden": ("bfloat16", "float32"), "top_k": ("packed", "float32"), "sampled": ("packed",)}
        if self.precision is not None and self.precision not in allowed[self.payload]:
            raise ConfigError(
                f"teacher.precision = {self.precision} is not for payload {self.payload}; "
                f"use {' or '.join(allowed[self.payload])}."
            )


def plan_of(
    loaded: Loaded,
    *,
    model: str,
    dtype: str,
    quantization: str | None,
    tokenizer: Any,
    examples: Sequence[Any],
    wish: Wish,
) -> tuple[dict[str, Any], list[Record]]:
    """(everything the index says but the shards, the records): whose numbers, of what text, stored how."""
    head = head_of(loaded.model)
    if wish.k is not None and wish.k > head.width:
        raise ConfigError(f"teacher.k = {wish.k} is more than the teacher's {head.width} tokens.")
    records = records_of(examples)
    text = text_bytes(records)
    plan = {
        "format": 1,
        "payload": wish.payload,
        "k": wish.k,
        "precision": wish.precision or ("bfloat16" if wish.payload == "hidden" else "packed"),
        "temperature": 1.0,
        "teacher": {
            "model": model,
            "revision": loaded.revision,
            "dtype": dtype,
            "quantization": quantization,
            "weights": weights_checksum(loaded.model),
        },
        "head": {
            "vocabulary": head.width,
            "width": head.weight.shape[1],
            "scale": head.scale,
            "softcap": head.softcap,
            "checksum": xxhash.xxh3_128(head_bytes(head)).hexdigest() if wish.payload == "hidden" else None,
        },
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": template_fingerprint(tokenizer),
        "engine": {
            "selectkd": metadata.version("selectkd"),
            "torch": torch.__version__,
            "device": head.weight.device.type,
        },
        "data": xxhash.xxh3_128(b"".join(record.key for record in records)).hexdigest(),
        "records": len(records),
        "rows": sum(len(record.places) for record in records),
        "tokens": sum(len(record.ids) for record in records),
        "shard_rows": wish.shard_rows,
        "text": {"size": len(text), "checksum": xxhash.xxh3_128(text).hexdigest()},
    }
    plan["row_bytes"] = payload_of(plan).row_bytes
    return plan, records


def build_cache(
    folder: Path,
    plan: Mapping[str, Any],
    records: Sequence[Record],
    model: nn.Module,
    *,
    rank: int = 0,
    ranks: int = 1,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Builds or finishes the cache of ``plan``; returns its index, or None where other ranks are not done.

    Rank r computes the shards r, r + ranks, ...; whoever finds all of them there writes the index. What is
    there and sound is kept. CacheError where the folder holds another cache, ResourceError where the disk is
    too small, both before anything is computed.
    """
    shards = cut_into_shards(records, plan["shard_rows"])
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    _claim(folder, plan)
    needed = plan["rows"] * plan["row_bytes"]
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{folder} needs {needed:,} bytes and the disk has {free:,} free. Name another folder, or store less."
        )
    head = head_of(model)
    if plan["payload"] == "hidden" and not (folder / HEAD).is_file():
        write_whole(folder / HEAD, head_bytes(head))
    if not (folder / TEXT).is_file():
        write_whole(folder / TEXT, text_bytes(records))
    own = fingerprint(plan)
    seconds = estimate(model, records)
    say(
        f"{plan['rows']:,} rows of {plan['row_bytes']} bytes in {len(shards)} shards: {needed / 1e6:,.1f} MB, "
        f"about {seconds / ranks:,.0f} s"
    )
    for number in range(rank, len(shards), ranks):
        path = folder / SHARDS / shard_name(number)
        if _sound(path, number, own):
            continue
        for left in path.parent.glob(f".{path.name}.partial-*"):  # of a builder that was killed
            left.unlink(missing_ok=True)
        write_whole(path, compute_shard(model, plan, number, shards[number]))
        say(f"shard {number + 1} of {len(shards)}")
    found = [_sound(folder / SHARDS / shard_name(number), number, own) for number in range(len(shards))]
    there = [shard for shard in found if shard is not None]
    if len(there) < len(shards):
        return None
    index = {**plan, "shards": entries_of(there)}
    write_index(folder / INDEX, index)
    return index


@torch.no_grad()
def compute_shard(model: nn.Module, plan: Mapping[str, Any], number: int, records: Sequence[Record]) -> bytes:
    """The bytes of one shard."""
    payload = payload_of(dict(plan))
    rows: list[np.ndarray[Any, Any] | None] = [None] * len(records)
    order = sorted(range(len(records)), key=lambda i: len(records[i].ids))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        for i, hidden in zip(chosen, hidden_of(model, [records[i] for i in chosen]), strict=True):
            seed = int.from_bytes(records[i].key[:8], "little") >> 1
            rows[i] = payload.encode(hidden, head_of(model), seed)
    return shard_bytes(
        number,
        [record.key for record in records],
        [np.array(record.places, np.uint32) for record in records],
        np.concatenate([part for part in rows if part is not None]),
        fingerprint(plan),
    )


@torch.no_grad()
def hidden_of(model: nn.Module, records: Sequence[Record]) -> list[torch.Tensor]:
    """The last hidden states of each record at its places."""
    examples = []
    for record in records:
        chosen = {place + 1 for place in record.places}
        examples.append(Example(record.ids, [i in chosen for i in range(len(record.ids))]))
    batch = collate(examples, pad_id=0).to(head_of(model).weight.device)
    seen = supervised(batch)
    hidden = backbone(model)(**batch.model_inputs(dtype=head_of(model).weight.dtype))
    rows = hidden.reshape(-1, hidden.shape[-1])[seen.position]
    return list(rows.split([len(record.places) for record in records]))


def estimate(model: nn.Module, records: Sequence[Record]) -> float:
    """Seconds the teacher needs for all records, from one batch of middling length."""
    if not records:
        return 0.0
    by_length = sorted(records, key=lambda record: len(record.ids))
    middle = by_length[len(by_length) // 2 : len(by_length) // 2 + BATCH]
    started = time.perf_counter()
    hidden_of(model, middle)
    took = time.perf_counter() - started
    return took * sum(len(r.ids) for r in records) / sum(len(r.ids) for r in middle)


def head_bytes(head: Head) -> bytes:
    """The head as safetensors."""
    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    return save(tensors)


def weights_checksum(model: nn.Module) -> str:
    """The xxh3-128 of every weight and buffer, in order of their names."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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


def _sound(path: Path, number: int, own: bytes) -> Shard | None:
    """The shard, if it is there and whole."""
    try:
        shard = Shard(path, number, own)
    except CacheError:
        return None
    return None if shard.damaged() else shard
