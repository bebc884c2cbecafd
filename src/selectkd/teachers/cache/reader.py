"""A teacher that is read from a cache. n supervised rows, w bytes a row."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from selectkd.data.collate import sent
from selectkd.data.examples import record_key
from selectkd.data.supervised import in_memory
from selectkd.errors import CacheError
from selectkd.loss.head import Head
from selectkd.loss.teacher_rows import CachedRows, LiveRows, TeacherRows
from selectkd.teachers.cache.index import HEAD, INDEX, SHARDS, described, fingerprint
from selectkd.teachers.cache.payloads import HiddenPayload, payload_of, unsound_head
from selectkd.teachers.cache.shard import Shard, ShardEntry, shard_name
from selectkd.teachers.protocol import Teacher

OPEN = 64
"""Shards that are open at once: a process may have some hundreds of files."""


class CacheReader:
    """The rows of a cache by sample and place. Several readers, in one process or many, share the system's pages.

    Every shard's header and table are read once, when the reader is made; after that a shard is opened when a row of it
    is wanted, and the one that was wanted longest ago is closed again.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder, self.index = folder, index
        self.payload = payload_of(index)
        self.own = fingerprint(index)
        self.entries = [ShardEntry(**entry) for entry in index["shards"]]
        self.open: OrderedDict[int, Shard] = OrderedDict()
        self.sound = [np.zeros(entry.records, bool) for entry in self.entries]
        self.where: dict[bytes, tuple[int, int]] = {}
        for number in range(len(self.entries)):
            for record, key in enumerate(self.shard(number).keys):
                self.where[key] = number, record

    def shard(self, number: int) -> Shard:
        """A shard, opened where it is not; CacheError where it is missing, another one or damaged in its table."""
        found = self.open.pop(number, None)
        if found is None:
            path = self.folder / SHARDS / shard_name(number)
            found = Shard(path, number, self.own, self.entries[number])
            if found.width != self.payload.row_bytes:
                raise found.broken(f"has rows of {found.width} bytes, not {self.payload.row_bytes}")
        self.open[number] = found
        while len(self.open) > OPEN:
            self.open.popitem(last=False)[1].close()
        return found

    def find(self, key: bytes, places: NDArray[np.int64], origin: str) -> tuple[int, int, NDArray[np.int64]]:
        """(shard, record, rows of the shard) of the places of a sample; CacheError for one that is not there."""
        at = self.where.get(key)
        if at is None:
            raise CacheError(
                f"the cache {self.folder} does not hold {origin}. Build one for this text: selectkd cache build RECIPE."
            )
        shard, record = self.shard(at[0]), at[1]
        low, high = int(shard.first[record]), int(shard.first[record + 1])
        own = shard.places[low:high]
        rows = np.searchsorted(own, places)
        if len(own) == 0 or (own[np.minimum(rows, len(own) - 1)] != places).any():
            raise CacheError(
                f"the cache {self.folder} holds {origin}, but other tokens of it are trained here. "
                "Build one for this recipe: selectkd cache build RECIPE."
            )
        return *at, rows + low

    def rows(self, batch: Any, position: Tensor) -> NDArray[np.uint8]:
        """The stored rows at ``position`` [n] of a batch, checked: [n, w]."""
        here, position = in_memory(batch, position)
        owner = here.sequence.flatten()[position].cpu().numpy()
        place = here.position_ids.flatten()[position].cpu().numpy()
        out = np.empty((len(owner), self.payload.row_bytes), np.uint8)
        found = []
        for sample, key in enumerate(_keys(batch)):
            chosen = np.nonzero(owner == sample)[0]
            if len(chosen):
                found.append((chosen, *self.find(key, place[chosen], f"sample {sample} of the batch")))
        for chosen, number, record, rows in found:
            self._examine(number, record)
            out[chosen] = self.shard(number).rows(rows)
        return out

    def _examine(self, number: int, record: int) -> None:
        """Looks at the rows of a record when it is first wanted; CacheError where no teacher gives them."""
        if self.sound[number][record]:
            return
        shard = self.shard(number)
        low, high = int(shard.first[record]), int(shard.first[record + 1])
        wrong = self.payload.examined(shard.rows(np.arange(low, high))).wrong
        if wrong is not None:
            raise shard.broken(f"row {low + wrong[0]} {wrong[1]}: no teacher gives that", record)
        self.sound[number][record] = True

    def ahead(self, batch: Any) -> None:
        """Has the system read the rows of a batch's samples into memory, and returns at once; no thread, no copy."""
        for key in _keys(batch):
            at = self.where.get(key)
            if at is not None:  # else ``rows`` says what is missing
                shard = self.shard(at[0])
                shard.ahead(int(shard.first[at[1]]), int(shard.first[at[1] + 1]))

    def head(self) -> Head:
        """The teacher's head of a hidden payload, checked."""
        path, entry = self.folder / HEAD, self.index["head"]
        content = path.read_bytes() if path.is_file() else b""
        if xxhash.xxh3_128(content).hexdigest() != entry["checksum"]:
            raise CacheError(
                f"{path} is missing or damaged. `selectkd cache repair {self.folder}` writes it again."
            )
        tensors = load(content)
        head = Head(tensors["weight"], tensors.get("bias"), entry["scale"], entry["softcap"])
        wrong = unsound_head(head)
        if wrong is not None or tuple(head.weight.shape) != (entry["vocabulary"], entry["width"]):
            fault = wrong or f"is {tuple(head.weight.shape)}, not {(entry['vocabulary'], entry['width'])}"
            raise CacheError(f"{path} {fault}. Build the cache again: selectkd cache build RECIPE.")
        return head


def _keys(batch: Any) -> list[bytes]:
    """What each sample of a batch is known by."""
    return [
        record_key(ids.cpu().numpy(), seen) for ids, seen in zip(batch.samples(), batch.keys(), strict=True)
    ]


class CachedTeacher:
    """The teacher of a cache at the supervised positions of a batch: what a live one would give, from disk.

    hidden: LiveRows with the stored head. top_k and sampled: CachedRows. shared, reference: as for LiveTeacher;
    shared of best tokens: of the student's head.
    """

    def __init__(
        self, reader: CacheReader, *, shared: Tensor | None = None, reference: Teacher | None = None
    ) -> None:
        self.reader, self.shared, self.reference = reader, shared, reference
        self.head = reader.head() if isinstance(reader.payload, HiddenPayload) else None

    def ahead(self, batch: Any) -> None:
        """Has the system read a batch's rows into memory while another batch is at work."""
        self.reader.ahead(batch)

    def __call__(self, batch: Any, position: Tensor) -> TeacherRows:
        """The rows at ``position`` [n]; CacheError before a damaged or foreign row is used."""
        device = batch.input_ids.device
        raw = self.reader.rows(batch, position)
        payload = self.reader.payload
        if self.head is None or not isinstance(payload, HiddenPayload):
            rows = payload.decode(raw)
            shared = None if self.shared is None else self.shared.to(device)
            return CachedRows(sent(rows.ids, device), sent(rows.logp, device), shared=shared)  # type: ignore[union-attr]
        self.head = self.head.to(device)
        hidden = sent(payload.decode(raw), device)  # type: ignore[arg-type]
        shared = None if self.shared is None else self.shared.to(device)
        reference = None if self.reference is None else self.reference(batch, position)
        return LiveRows(hidden, self.head, shared=shared, reference=reference)


def open_cache(folder: Path) -> CacheReader:
    """The reader of a finished cache; CacheError where any of it is missing, of another size or damaged ahead of
    its rows, which are checked as they are read.
    """
    return CacheReader(folder, described(folder / INDEX))
