"""What happens to a cache in the world: flipped bits, lost and exchanged files, builders that are killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.tiny_cache import EXAMPLES, build
from selectkd.cli import main
from selectkd.data.collate import collate
from selectkd.data.supervised import supervised
from selectkd.errors import CacheError
from selectkd.teachers.cache import open_cache, repair, verify
from selectkd.teachers.cache.reader import CachedTeacher
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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["selectkd.models.load", "transformers.models.llama.modeling_llama", "pytest"]
    )
    for _ in range(20):
        builder = context.Process(target=build, args=(teacher, folder, 0.05))
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
