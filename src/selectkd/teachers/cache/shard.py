"""One shard of a cache: a file of fixed-width rows that knows whose they are and can tell when it is damaged.

header (64 bytes) | record keys and row counts | places | rows | xxh3-64 of each block before | xxh3-128 of those.
"""

from __future__ import annotations

import os
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


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"{number:06d}.shard"


def shard_bytes(
    number: int,
    keys: Sequence[bytes],
    places: Sequence[NDArray[np.uint32]],
    rows: NDArray[np.uint8],
    cache: bytes,
) -> bytearray:
    """The whole file: records by ``keys``, each with the places of its rows, and all rows [n, w] in order."""
    table = np.zeros(len(keys), RECORD)
    for i, (key, own) in enumerate(zip(keys, places, strict=True)):
        table[i] = (np.void(key), len(own))
    header = HEADER.pack(MAGIC, FORMAT, number, len(keys), rows.shape[0], rows.shape[1], cache)
    joined = np.concatenate(places).astype("<u4") if places else np.zeros(0, "<u4")
    size = len(header) + table.nbytes + joined.nbytes + rows.nbytes
    blocks = -(-size // BLOCK)
    whole = bytearray(size + 8 * blocks + 16)  # filled in place: a shard may take a quarter of a gigabyte
    at = 0
    for part in (header, table.tobytes(), joined.tobytes()):
        whole[at : at + len(part)] = part
        at += len(part)
    if rows.nbytes:
        np.frombuffer(whole, np.uint8, rows.nbytes, at)[:] = rows.reshape(-1)
    view = memoryview(whole)
    for block in range(blocks):
        digest = xxhash.xxh3_64(view[block * BLOCK : min((block + 1) * BLOCK, size)]).digest()
        whole[size + 8 * block : size + 8 * block + 8] = digest
    whole[-16:] = xxhash.xxh3_128(view[size : size + 8 * blocks]).digest()
    return whole


class Shard:
    """A shard, open for reading. Every block is checked whenever it is read, before its bytes are used.

    Nothing is mapped into memory: a file that is cut short under a reader is an error of its read, not the end of the
    process. Raises CacheError, naming shard and record, for a file that is missing, of another size, of another place
    or cache, or damaged where it is read. entry None: the shard's own trailer is believed (while building).
    """

    def __init__(self, path: Path, number: int, cache: bytes, entry: ShardEntry | None = None) -> None:
        self.path, self.number = path, number
        self.keys: list[bytes] = []
        self.handle = -1
        if not path.is_file():
            raise self.broken("is missing")
        self.handle = os.open(path, os.O_RDONLY)
        size = os.fstat(self.handle).st_size
        if entry is not None and size != entry.size:
            raise self.broken(f"has {size:,} bytes, not {entry.size:,}")
        if size < HEADER.size + 24:
            raise self.broken(f"has only {size:,} bytes")
        magic, form, own, records, rows, width, whose = HEADER.unpack(self._read(0, HEADER.size))
        start = HEADER.size + records * RECORD.itemsize + rows * 4
        self.end = start + rows * width
        blocks = -(-self.end // BLOCK)
        if magic != MAGIC or form != FORMAT or size != self.end + 8 * blocks + 16:
            raise self.broken("is damaged in its header")
        hashes = self._read(self.end, 8 * blocks)
        checksum = xxhash.xxh3_128(hashes).digest()
        if checksum != self._read(size - 16, 16) or (entry is not None and checksum.hex() != entry.checksum):
            raise self.broken("does not match its checksum in index.json")
        self.hashes, self.blocks = hashes, blocks
        self.count, self.start, self.width = rows, start, width
        described = self._checked(0, start)
        if own != number or whose != cache:
            raise self.broken(f"is shard {own} of " + ("this cache" if whose == cache else "another cache"))
        table = np.frombuffer(described, RECORD, records, HEADER.size)
        self.keys = [bytes(key) for key in table["key"]]
        self.first = np.concatenate([[0], np.cumsum(table["rows"], dtype=np.int64)])
        self.places = np.frombuffer(described, "<u4", rows, start - 4 * rows)
        self.entry = ShardEntry(records, rows, size, checksum.hex())
        if int(self.first[-1]) != rows or not self._ascending():
            raise self.broken("has records whose places are not ascending, one for each of its rows")

    def close(self) -> None:
        """Gives the file back; a shard that is closed reads nothing more."""
        if self.handle >= 0:
            os.close(self.handle)
        self.handle = -1

    def __del__(self) -> None:
        self.close()

    def broken(self, how: str, record: int | None = None) -> CacheError:
        """The error that names this shard, the record where it is known, and what to do."""
        where = "" if record is None else f", record {record}"
        return CacheError(
            f"{self.path}: shard {self.number}{where} {how}. "
            f"`selectkd cache repair {self.path.parent.parent}` computes it again."
        )

    def rows(self, wanted: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The rows at ``wanted``, ascending or not, [n, w]: a copy."""
        if len(wanted) == 0:
            return np.zeros((0, self.width), np.uint8)
        low, high = int(wanted.min()), int(wanted.max())
        inside = self._checked(self.start + low * self.width, self.start + (high + 1) * self.width)
        return np.frombuffer(inside, np.uint8).reshape(-1, self.width)[wanted - low]

    def ahead(self, low: int, high: int) -> None:
        """Has the system read rows low to high into memory, and returns at once."""
        begin = self.start + low * self.width
        end = min(self.start + high * self.width, self.end)
        if hasattr(os, "posix_fadvise"):
            for place in range(begin, end, AHEAD):
                os.posix_fadvise(self.handle, place, min(AHEAD, end - place), os.POSIX_FADV_WILLNEED)

    def damaged(self) -> list[str]:
        """Every block that does not match, in words; empty where the shard is sound."""
        found = []
        for block in range(self.blocks):
            try:
                self._checked(block * BLOCK, min((block + 1) * BLOCK, self.end))
            except CacheError as error:
                found.append(str(error))
        return found

    def record_of(self, row: int) -> int:
        """The record that a row belongs to."""
        return int(np.searchsorted(self.first, row, "right")) - 1

    def _checked(self, begin: int, end: int) -> memoryview:
        """The bytes begin to end of the part before the checksums, every block they lie in checked."""
        first = begin // BLOCK
        last = -(-end // BLOCK)
        read = memoryview(self._read(first * BLOCK, min(last * BLOCK, self.end) - first * BLOCK))
        for block in range(first, last):
            place = (block - first) * BLOCK
            digest = xxhash.xxh3_64(read[place : place + BLOCK]).digest()
            if digest != self.hashes[8 * block : 8 * block + 8]:
                raise self.broken(
                    f"does not match the checksum of block {block}", self._record_at(block * BLOCK)
                )
        return read[begin - first * BLOCK : end - first * BLOCK]

    def _read(self, begin: int, size: int) -> bytes:
        """``size`` bytes from ``begin`` on; CacheError where the file has been cut short, or its disk fails."""
        parts, left = [], size
        try:
            while left > 0:
                part = os.pread(self.handle, left, begin + size - left)
                if not part:
                    raise self.broken(f"ends at byte {begin + size - left:,} while it is read")
                parts.append(part)
                left -= len(part)
        except OSError as error:
            raise self.broken(f"cannot be read ({error.strerror})") from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _ascending(self) -> bool:
        """Whether the places of every record ascend."""
        rises = np.diff(self.places.astype(np.int64)) > 0
        begins = self.first[1:-1]
        rises[begins[(begins > 0) & (begins < self.count)] - 1] = True  # from one record to the next
        return bool(rises.all())

    def _record_at(self, byte: int) -> int | None:
        if not self.keys or byte < self.start:
            return None
        return self.record_of((byte - self.start) // self.width)
