"""What happens to a cache in the world: flipped bits, lost and exchanged files, builders that are killed."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import yaml

from faults.forked import fork_server
from faults.tiny_cache import EXAMPLES, build
from selectkd.cli import cache as cache_verbs
from selectkd.cli import main
from selectkd.data.collate import collate
from selectkd.data.supervised import supervised
from selectkd.errors import CacheError
from selectkd.teachers.cache import open_cache, repair, verify
from selectkd.teachers.cache.reader import CachedTeacher
from selectkd.teachers.cache.shard import BLOCK, HEADER, RECORD
from training.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: Any) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama(1, layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole(teacher: str, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "whole"
    build(teacher, folder)
    return folder


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "cache")


def use(folder: Path) -> None:
    """Reads every row as a run does."""
    read = CachedTeacher(open_cache(folder))
    for start in range(0, len(EXAMPLES), 8):
        batch = collate(EXAMPLES[start : start + 8], pad_id=0)
        read(batch, supervised(batch).position)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def broken_then_repaired(folder: Path, whole: Path, file: Path, damage: Callable[[], None]) -> None:
    damage()
    if file.name not in ("plan.json", "text.bin"):  # a run reads neither
        with pytest.raises(CacheError):
            use(folder)
    assert verify(folder), file
    shutil.copy2(whole / file.relative_to(folder), file)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_sound_cache_reads_and_verifies(cache: Path) -> None:
    use(cache)
    assert not verify(cache)


def test_every_flipped_bit_is_detected_before_use(cache: Path, whole: Path) -> None:
    dice = random.Random(0)
    for _ in range(300):
        file = dice.choice(files(cache))
        content = bytearray(file.read_bytes())
        bit = dice.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        broken_then_repaired(cache, whole, file, lambda f=file, c=content: f.write_bytes(c) and None)


def test_every_truncation_and_every_zeroed_block_is_detected_before_use(cache: Path, whole: Path) -> None:
    dice = random.Random(1)
    for turn in range(120):
        file = dice.choice(files(cache))
        content = bytearray(file.read_bytes())
        cut = dice.randrange(len(content))
        if turn % 2:
            content = content[:cut]
        else:
            content[cut : cut + 4096] = bytes(len(content[cut : cut + 4096]))
            if bytes(content) == file.read_bytes():
                continue  # it was zero there
        broken_then_repaired(cache, whole, file, lambda f=file, c=content: f.write_bytes(c) and None)


def test_shards_that_are_lost_exchanged_or_of_another_cache_are_detected(
    cache: Path, whole: Path, teacher: str, tmp_path: Path
) -> None:
    one, two = sorted((cache / "shards").iterdir())[:2]
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(CacheError, match="shard 0"):
        use(cache)
    assert verify(cache).shards == [0, 1]
    one.unlink()
    two.write_bytes(second)
    with pytest.raises(CacheError, match="shard 0 is missing"):
        use(cache)


def test_a_build_keeps_no_shard_of_another_place(cache: Path, whole: Path, teacher: str) -> None:
    shards = sorted((cache / "shards").iterdir())
    shards[0].write_bytes(shards[1].read_bytes())
    (cache / "index.json").unlink()
    build(teacher, cache)
    assert contents(cache) == contents(whole)


def test_the_command_line_names_the_shard_and_ends_with_5(cache: Path, capsys: Any) -> None:
    (cache / "shards" / "000002.shard").unlink()
    assert main(["cache", "verify", str(cache)]) == 5
    assert "shard 2" in capsys.readouterr().err


def test_repair_computes_what_is_broken_and_nothing_else(cache: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in files(cache)}
    broken = [cache / "shards" / "000001.shard", cache / "index.json", cache / "head.safetensors"]
    for path in broken:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    found = repair(cache, say=lambda _: None)
    assert (found.shards, sorted(found.files)) == ([1], ["head.safetensors", "index.json"])
    assert contents(cache) == contents(whole)
    assert all(path.stat().st_mtime_ns == before[path] for path in files(cache) if path not in broken)


def test_a_build_killed_twenty_times_leaves_the_bytes_of_one_that_was_not(
    teacher: str, whole: Path, tmp_path: Path
) -> None:
    folder, dice = tmp_path / "cache", random.Random(2)
    for _ in range(20):
        builder = fork_server().Process(target=build, args=(teacher, folder, 0.05))
        builder.start()
        there = sorted(folder.glob("shards/*.shard"))
        kept = {path: path.stat().st_mtime_ns for path in there}
        deadline = time.monotonic() + 20
        while (
            builder.is_alive()
            and time.monotonic() < deadline
            and len(list(folder.glob("shards/*.shard"))) <= len(there)
        ):
            time.sleep(0.005)
        time.sleep(dice.random() * 0.05)
        os.kill(builder.pid or 0, signal.SIGKILL)
        builder.join()
        assert builder.exitcode == -signal.SIGKILL, "it was still at work"
        assert all(path.stat().st_mtime_ns == kept[path] for path in kept), "a shard that was there is kept"
    build(teacher, folder)
    assert contents(folder) == contents(whole)


def exchanged(shard: Path, what: str) -> bytes:
    """The bytes of a shard whose first two records have exchanged their keys or their rows, checksums as they were."""
    content = bytearray(shard.read_bytes())
    header = HEADER.unpack(content[: HEADER.size])
    records, width = header[3], header[5]
    sizes = np.frombuffer(content, RECORD, records, HEADER.size)["rows"].tolist()
    table = HEADER.size + records * RECORD.itemsize
    at = HEADER.size if what == "keys" else table + 4 * sum(sizes)
    size, half = (RECORD.itemsize, 16) if what == "keys" else (sizes[0] * width, min(sizes[:2]) * width)
    first, second = content[at : at + half], content[at + size : at + size + half]
    content[at : at + half], content[at + size : at + size + half] = second, first
    return bytes(content)


@pytest.mark.parametrize("what", ["keys", "rows"])
@pytest.mark.parametrize("hashed_anew", [False, True])
def test_records_exchanged_inside_a_shard_are_detected_before_use(
    teacher: str, tmp_path: Path, what: str, hashed_anew: bool
) -> None:
    """hashed_anew: the shard's own checksums are made right again, as by someone who rewrote it; the index knows."""
    cache = tmp_path / "cache"
    build(teacher, cache, shard_rows=60)
    whole, shard = contents(cache), cache / "shards" / "000001.shard"
    assert HEADER.unpack(shard.read_bytes()[: HEADER.size])[3] >= 2
    content = exchanged(shard, what)
    assert content != shard.read_bytes()
    if hashed_anew:
        blocks = -(-len(content) // BLOCK)
        body = content[: len(content) - 16 - 8 * blocks]
        hashes = b"".join(xxhash.xxh3_64(body[i : i + BLOCK]).digest() for i in range(0, len(body), BLOCK))
        content = body + hashes + xxhash.xxh3_128(hashes).digest()
        assert len(content) == shard.stat().st_size
    shard.write_bytes(content)
    with pytest.raises(CacheError, match=f"shard {int(shard.stem)}"):
        use(cache)
    assert verify(cache).shards == [int(shard.stem)]
    assert repair(cache, say=lambda _: None).shards == [int(shard.stem)]
    assert contents(cache) == whole


@pytest.fixture
def building(teacher: str, tmp_path: Path) -> str:
    """A recipe whose cache has some 20 shards."""
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3} w{i + 4}"} for i in range(20)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    content = {
        "teacher": {"cache": str(tmp_path / "built"), "model": teacher, "shard_rows": 4},
        "student": {"model": teacher},
        "data": {"sources": [{"path": str(tmp_path / "text.jsonl")}]},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "batch_size": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    return str(path)


def built_again(recipe: str, folder: Path) -> dict[str, bytes]:
    """What an uninterrupted build of the same recipe leaves, byte for byte."""
    assert main(["cache", "build", recipe, "--set", f"teacher.cache={folder}"]) == 0
    return contents(folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_build_stopped_by_a_signal_leaves_whole_shards_and_goes_on(
    building: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    folder, said = tmp_path / "built", cache_verbs.show_progress

    def signalling(text: object) -> None:
        said(text)
        if str(text).startswith("shard 3 of"):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(cache_verbs, "show_progress", signalling)
    assert main(["cache", "build", building]) == code
    assert "the shards that were done are in" in capsys.readouterr().err
    there = {path.name: path.read_bytes() for path in folder.glob("shards/*")}
    assert sorted(there) == [f"{i:06d}.shard" for i in range(3)]
    assert not (folder / "index.json").exists() and not list(folder.rglob("*.partial-*"))
    assert main(["train", building]) == 5  # half a cache is no cache
    monkeypatch.undo()
    assert main(["cache", "build", building]) == 0
    assert contents(folder) == built_again(building, tmp_path / "again")


@pytest.mark.parametrize("write", [1, 2, 4, 9])
def test_a_disk_that_fills_up_during_a_build_ends_it_with_7_and_nothing_half_written(
    building: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    folder, written, sync = tmp_path / "built", [0], os.fsync

    def full(handle: int) -> None:
        sync(handle)
        written[0] += 1
        if written[0] == 2 * write - 1:  # a file is synced, then its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert main(["data", "check", building]) == 0  # the tokens of the text lie on the disk before
    monkeypatch.setattr(os, "fsync", full)
    assert main(["cache", "build", building]) == 7
    told = capsys.readouterr().err
    assert "No space left on device" in told and str(folder) in told and "bytes are free" in told
    monkeypatch.undo()
    assert not list(folder.rglob("*.partial-*")) and not (folder / "index.json").exists()
    assert main(["cache", "build", building]) == 0
    assert contents(folder) == built_again(building, tmp_path / "again")
