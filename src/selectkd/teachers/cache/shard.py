"""One shard of a cache: a file of fixed-width rows that knows whose they are and can tell when it is damaged.

header (64 bytes) | record keys and row counts | places | rows | xxh3-64 of each block before | xxh3-128 of those.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from selectkd.errors import CacheError

BLOCK = 1 << 16
"""Bytes a checksum covers: hashed in about 10 microseconds, and small beside what a batch reads."""

AHEAD = 1 << 17
"""Bytes of one request to read ahead: Linux cuts a larger one to the device's read-ahead, by default this."""

MAGIC = b"SELECTKD"
HEADER = struct.Struct("<8sIIIII16s16x")  # magic, format, number, records, rows, bytes a row, cache
FORMAT = 1
RECORD = np.dtype([("key", "V16"), ("rows", "<u4")])


@dataclass(frozen=True)
class ShardEntry:
    """What the index says of a shard: its size in bytes and the checksum of its checksums."""

    records: int
    rows: int
    size: int
    checksum: str


def record_key(ids: Sequence[int] | NDArray[np.int64]) -> bytes:
    """What a sample is known by: the 16 bytes of the xxh3-128 of its token ids."""
    return xxhash.xxh3_128(np.ascontiguousarray(ids, dtype="<i4").tobytes()).digest()


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"{number:06d}.shard"


def shard_bytes(
    number: int,
    keys: Sequence[bytes],
    places: Sequence[NDArray[np.uint32]],
    rows: NDArray[np.uint8],
    cache: bytes,
) -> bytes:
    """The whole file: records by ``keys``, each with the places of its rows, and all rows [n, w] in order."""
    table = np.zeros(len(keys), RECORD)
    for i, (key, own) in enumerate(zip(keys, places, strict=True)):
        table[i] = (np.void(key), len(own))
    header = HEADER.pack(MAGIC, FORMAT, number, len(keys), rows.shape[0], rows.shape[1], cache)
    joined = np.concatenate(places).astype("<u4") if places else np.zeros(0, "<u4")
    body = b"".join((header, table.tobytes(), joined.tobytes(), np.ascontiguousarray(rows).tobytes()))
    hashes = b"".join(
        xxhash.xxh3_64(body[start : start + BLOCK]).digest() for start in range(0, len(body), BLOCK)
    )
    return b"".join((body, hashes, xxhash.xxh3_128(hashes).digest()))


class Shard:
    """A shard, memory-mapped. A block is checked the first time it is touched, before its bytes are used.

    Raises CacheError, naming shard and record, for a file that is missing, of another size, of another place
    or cache, or damaged where it is read. entry None: the shard's own trailer is believed (while building).
    """

    def __init__(self, path: Path, number: int, cache: bytes, entry: ShardEntry | None = None) -> None:
        self.path, self.number = path, number
        self.keys: list[bytes] = []
        if not path.is_file():
            raise self.broken("is missing")
        size = path.stat().st_size
        if entry is not None and size != entry.size:
            raise self.broken(f"has {size:,} bytes, not {entry.size:,}")
        if size < HEADER.size + 24:
            raise self.broken(f"has only {size:,} bytes")
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.bytes = np.frombuffer(self.map, np.uint8)
        magic, form, own, records, rows, width, whose = HEADER.unpack(self.map[: HEADER.size])
        start = HEADER.size + records * RECORD.itemsize + rows * 4
        self.end = start + rows * width
        blocks = -(-self.end // BLOCK)
        if magic != MAGIC or form != FORMAT or size != self.end + 8 * blocks + 16:
            raise self.broken("is damaged in its header")
        hashes = self.map[self.end : self.end + 8 * blocks]
        checksum = xxhash.xxh3_128(hashes).digest()
        if checksum != self.map[-16:] or (entry is not None and checksum.hex() != entry.checksum):
            raise self.broken("does not match its checksum in index.json")
        self.hashes, self.checked = hashes, np.zeros(blocks, bool)
        self.count, self.start, self.width = rows, start, width
        self._touch(0, start)
        if own != number or whose != cache:
            raise self.broken(f"is shard {own} of " + ("this cache" if whose == cache else "another cache"))
        table = np.frombuffer(self.map[HEADER.size : HEADER.size + records * RECORD.itemsize], RECORD)
        self.keys = [bytes(key) for key in table["key"]]
        self.first = np.concatenate([[0], np.cumsum(table["rows"], dtype=np.int64)])
        self.places = np.frombuffer(self.map, "<u4", rows, start - 4 * rows)
        self.entry = ShardEntry(records, rows, size, checksum.hex())

    def broken(self, how: str, record: int | None = None) -> CacheError:
        """The error that names this shard, the record where it is known, and what to do."""
        where = "" if record is None else f", record {record}"
        return CacheError(
            f"{self.path}: shard {self.number}{where} {how}. "
            f"`selectkd cache repair {self.path.parent.parent}` computes it again."
        )

    def rows(self, wanted: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The rows at ``wanted``, ascending or not, [n, w]: a copy."""
        if len(wanted):
            low, high = int(wanted.min()), int(wanted.max())
            self._touch(self.start + low * self.width, self.start + (high + 1) * self.width)
        inside = self.bytes[self.start : self.end].reshape(self.count, self.width)
        return inside[wanted]

    def ahead(self, low: int, high: int) -> None:
        """Has the system read rows low to high into memory, and returns at once."""
        begin = (self.start + low * self.width) // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(self.start + high * self.width, self.end)
        if hasattr(self.map, "madvise"):
            for place in range(begin, end, AHEAD):
                self.map.madvise(mmap.MADV_WILLNEED, place, min(AHEAD, end - place))

    def damaged(self) -> list[str]:
        """Every block that does not match, in words; empty where the shard is sound."""
        found = []
        for block in range(len(self.checked)):
            try:
                self.checked[block] = False
                self._touch(block * BLOCK, block * BLOCK + 1)
            except CacheError as error:
                found.append(str(error))
        return found

    def _touch(self, begin: int, end: int) -> None:
        """Checks the blocks of bytes begin to end that have not been checked."""
        for block in range(begin // BLOCK, -(-min(end, self.end) // BLOCK)):
            if self.checked[block]:
                continue
            place = slice(block * BLOCK, min((block + 1) * BLOCK, self.end))
            if xxhash.xxh3_64(memoryview(self.map)[place]).digest() != self.hashes[8 * block : 8 * block + 8]:
                raise self.broken(
                    f"does not match the checksum of block {block}", self._record_at(place.start)
                )
            self.checked[block] = True

    def _record_at(self, byte: int) -> int | None:
        if not self.keys or byte < self.start:
            return None
        return int(np.searchsorted(self.first, (byte - self.start) // self.width, "right")) - 1
