"""The rows of the next batch are asked for while this one is at work: which ones, how, and in what order."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selectkd.data.examples import record_key
from selectkd.teachers.cache.shard import Shard, shard_bytes
from selectkd.training.feed import BatchFeed

CACHE = bytes(16)


def batches(epoch: int) -> list[int]:
    return list(range(10 * epoch, 10 * epoch + 5))


def test_the_feed_tells_of_each_batch_before_the_one_before_it_is_given_out() -> None:
    told: list[int] = []
    feed, plain = iter(BatchFeed(batches, told.append)), iter(BatchFeed(batches))
    for step in range(12):
        given = next(feed)
        assert given == next(plain)
        assert told[: step + 1] == [batches(n // 5)[n % 5] for n in range(step + 1)]
        assert len(told) == step + 2  # at the end of an epoch, of the first one of the next


def test_a_feed_that_tells_goes_on_from_its_state_as_one_that_does_not() -> None:
    for taken in range(7):
        told, plain = BatchFeed(batches, lambda batch: None), BatchFeed(batches)
        here, there = iter(told), iter(plain)
        assert [next(here) for _ in range(taken)] == [next(there) for _ in range(taken)]
        assert told.state_dict() == plain.state_dict()
        again = BatchFeed(batches, lambda batch: None)
        again.load_state_dict(told.state_dict())
        assert [next(iter(again))] == [next(there)]


def test_a_rank_hears_of_its_own_batches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[int, list[int]] = {0: [], 1: []}
    for me, heard in told.items():
        monkeypatch.setattr("selectkd.training.feed.ranks", lambda: 2)
        monkeypatch.setattr("selectkd.training.feed.rank", lambda me=me: me)
        feed = iter(BatchFeed(batches, heard.append))
        given = [next(feed) for _ in range(5)]  # two epochs of 5: the second rank begins the second epoch
        assert heard[:5] == given
    assert told[0][:5] == [0, 2, 4, 11, 13] and told[1][:5] == [1, 3, 10, 12, 14]


def resident(shard: Shard) -> np.ndarray[Any, Any]:
    """Which pages of a shard are in memory, by the system's own word."""
    size = shard.path.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with mmap.mmap(shard.handle, 0, access=mmap.ACCESS_READ) as seen:
        whole = np.frombuffer(seen, np.uint8)
        place = ctypes.c_void_p(whole.ctypes.data)
        assert ctypes.CDLL(None, use_errno=True).mincore(place, ctypes.c_size_t(size), pages) == 0
        del whole
    return np.frombuffer(pages, np.uint8) & 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are in memory")
def test_rows_that_are_read_ahead_come_into_memory_and_no_thread_is_left(tmp_path: Path) -> None:
    count, width = 40_000, 1152  # 46 MB: what the system reads ahead by itself, up to 8 MB, is a part of it
    rows = np.random.default_rng(0).integers(0, 256, (count, width), np.uint8)
    path = tmp_path / "000000.shard"
    path.write_bytes(shard_bytes(0, [record_key([1])], [np.arange(count, dtype=np.uint32)], rows, CACHE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    shard, threads = Shard(path, 0, CACHE), threading.active_count()
    begin, end = 20_000, 24_000
    wanted = slice(
        (shard.start + begin * width) // mmap.PAGESIZE, (shard.start + end * width) // mmap.PAGESIZE
    )
    if resident(shard)[wanted].any():
        pytest.skip("this file system keeps its pages in memory")
    shard.ahead(begin, end)
    until = time.monotonic() + 20
    while not resident(shard)[wanted].all() and time.monotonic() < until:
        time.sleep(0.01)
    assert resident(shard)[wanted].all()  # all of it, and not the first piece alone
    assert not resident(shard).all()
    assert threading.active_count() == threads
    assert (shard.rows(np.arange(begin, end)) == rows[begin:end]).all()
