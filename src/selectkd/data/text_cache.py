"""Tokenised text on disk, under a key of everything it rests on: built once, by one process of a node and its workers,
and mapped into memory by all.

A folder holds ``text.arrow``, an Arrow stream that grows by a message a chunk, ``journal.jsonl``, a line for each chunk
that is in it whole, and at last ``manifest.json``. A build that was killed goes on behind the last line of the journal.
"""

from __future__ import annotations

import fcntl
import gc
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from selectkd.data.chunks import Chunk
from selectkd.data.durable import (
    add_lines,
    disk_error,
    json_bytes,
    sealed,
    unsealed,
    whole_lines,
    write_whole,
)
from selectkd.data.examples import SCHEMA, Table
from selectkd.data.files import Found
from selectkd.data.image_check import check_images
from selectkd.data.rendering import Part, Rendering, part_of
from selectkd.errors import DataError, ResourceError

DATA, JOURNAL, MANIFEST, LOCK = "text.arrow", "journal.jsonl", "manifest.json", "lock"
END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""The end of an Arrow stream."""
ALONE = 1
"""Chunks that the process itself renders: the first is small, and starting others takes as long."""
AHEAD = 2
"""Chunks a worker has waiting or at work."""
GARBAGE = 50_000
"""New objects between two searches for garbage: a record is a thousand, and hardly any are garbage in a circle."""
SECONDS = 10.0
"""Between two lines on how far a build is."""


@dataclass(frozen=True)
class TextCache:
    """Where tokenised text is kept, and who builds it. workers: processes, by default one for each core that this one
    may use; say: hears how far a build is.
    """

    folder: Path
    workers: int | None = None
    say: Callable[[str], None] | None = None

    @classmethod
    def at(
        cls,
        folder: str | Path | None = None,
        *,
        workers: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> TextCache:
        """The cache in ``folder``, by default ``$SELECTKD_CACHE`` or the user's ``~/.cache/selectkd/text``."""
        if folder is None:
            user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "selectkd" / "text"
            folder = os.environ.get("SELECTKD_CACHE") or user
        return cls(Path(folder).expanduser(), workers, say)

    @property
    def processes(self) -> int:
        """How many processes render."""
        if self.workers is not None:
            return max(1, self.workers)
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def tell(self, message: str) -> None:
        """Passes a message on how far a build is to whoever listens."""
        (self.say or logging.getLogger("selectkd").info)(message)


@dataclass(frozen=True)
class Text:
    """The examples of a source in the cache, and what was found and counted on the way to them."""

    table: Table
    part: Part
    folder: Path


def text_of(
    name: str,
    identity: Any,
    parts: Callable[[], Iterable[Chunk]],
    how: Rendering,
    cache: TextCache,
    *,
    limit: int | None = None,
) -> Text:
    """The examples of a source, from the cache where they are there, else built.

    name: of the source in messages. identity: what changes when its content does, as plain data. parts: its chunks.
    limit: the most good records. Raises DataError for what cannot be trained on, ResourceError for a full disk,
    IntegrityError for an image that has changed since.
    """
    about = {"source": name, "identity": identity, "limit": limit, "rendering": how.identity()}
    folder = cache.folder / xxhash.xxh3_128(json_bytes(about)).hexdigest()
    found = _finished(folder)
    if found is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder, name, cache):
                found = _finished(folder)
                if found is None:
                    found = _build(folder, name, parts, how, cache, limit)
        except OSError as error:
            raise disk_error(error, folder) from error
    with suppress(OSError):  # a folder of somebody else's; when it was last used is not noted there
        os.utime(folder / MANIFEST)
    # the ends of turns that rendering found belong to the template, in a run that renders nothing as well
    how.template.ends[(str(folder),)] = frozenset(found.ends)
    table = Table.mapped(folder / DATA)
    if how.sight is not None:
        lock = folder / LOCK  # as old as the first of the build
        check_images(table.table, lock.stat().st_mtime if lock.is_file() else 0.0)
    return Text(table, found, folder)


def _finished(folder: Path) -> Part | None:
    """What was counted in a finished text; None where it is not finished, or not as long as it was."""
    path = folder / MANIFEST
    content = unsealed(path.read_bytes()) if path.is_file() else None
    if content is None or not (folder / DATA).is_file() or (folder / DATA).stat().st_size != content["size"]:
        return None
    return Part.from_dict(content["part"])


@contextmanager
def _alone(folder: Path, name: str, cache: TextCache) -> Iterator[None]:
    """Holds the lock of a text; while another process has it, says how far that one is."""
    with (folder / LOCK).open("a+b") as lock:
        began = shown = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - shown >= SECONDS or shown == began:
                    shown = time.monotonic() + 1e-3
                    cache.tell(f"{name}: another process tokenises this text; {_line(_journal(folder)[0])}")
                time.sleep(0.1)
        yield


def _journal(folder: Path) -> tuple[Part, int, int]:
    """What the chunks so far came to, how many they are, and where the last one ends in the file of rows."""
    part, count, end = Part(Found()), 0, 0
    for line in whole_lines(folder / JOURNAL):
        content = json.loads(line)
        part.add(Part.from_dict(content["part"]))
        count, end = count + 1, content["end"]
    return part, count, end


def _build(
    folder: Path, name: str, parts: Callable[[], Iterable[Chunk]], how: Rendering, cache: TextCache, limit: int | None
) -> Part:  # fmt: skip
    (folder / MANIFEST).unlink(missing_ok=True)
    path = folder / DATA
    whole, count, end = _journal(folder)
    if end > (path.stat().st_size if path.is_file() else 0):
        (folder / JOURNAL).unlink()
        whole, count, end = Part(Found()), 0, 0
    began = shown = time.monotonic()
    before, here = whole.found.good, time.monotonic()
    try:
        with path.open("r+b" if path.is_file() else "w+b") as file:
            file.truncate(end)
            file.seek(end)
            if not end:
                file.write(SCHEMA.serialize().to_pybytes())
            for part in _rendered(islice(parts(), count, None), how, cache, limit, whole.found):
                whole.add(part)
                file.write(part.rows)
                file.flush()
                os.fsync(file.fileno())
                add_lines(
                    folder / JOURNAL, [{"end": file.tell(), "part": part.as_dict()}], point="text chunk"
                )
                if time.monotonic() - shown >= SECONDS:
                    shown = time.monotonic()
                    rate = (whole.found.good - before) / (shown - here)
                    cache.tell(f"{name}: {_line(whole)}, {rate:,.0f} records a second")
            file.write(END)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    except DataError:
        for file in (path, folder / JOURNAL):  # the lock stays: others may wait for it
            file.unlink(missing_ok=True)
        raise
    write_whole(folder / MANIFEST, sealed({"size": size, "part": whole.as_dict(), "name": name}))
    (folder / JOURNAL).unlink(missing_ok=True)
    if time.monotonic() - began >= SECONDS:
        cache.tell(f"{name}: {_line(whole)}, in {time.monotonic() - began:,.0f} s")
    return whole


def _line(part: Part) -> str:
    return f"{part.found.good + part.found.bad:,} records read, {part.examples:,} samples tokenised"


def _rendered(
    parts: Iterator[Chunk], how: Rendering, cache: TextCache, limit: int | None, found: Found
) -> Iterator[Part]:
    """The parts of chunks in their order; ``found`` grows by each before the next one is rendered here."""
    waiting: deque[Future[Part]] = deque()
    claimed = found.good  # good records of the chunks so far, those at work included
    # how many of a chunk's records are good is known before it is rendered unless bad ones are skipped
    most = 1 if limit is not None and how.rules.on_bad_record == "skip" else cache.processes * AHEAD
    number, processes = 0, cache.processes
    pool: ProcessPoolExecutor | None = None
    try:
        for chunk in parts:
            if limit is not None and claimed >= limit:
                break
            left = None if limit is None else limit - claimed
            if number < ALONE or processes == 1:
                part = part_of(chunk, how, limit=left, before=found)
                claimed += part.found.good
                yield part
            else:
                pool = pool or _pool(how, processes)
                before = replace(found, problems=[], aside=[], files=[])
                waiting.append(pool.submit(_in_worker, chunk, left, before))
                claimed += len(chunk)
                if len(waiting) >= most:
                    part = waiting.popleft().result()
                    claimed += 0 if most > 1 else part.found.good - len(chunk)
                    yield part
            number += 1
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ResourceError(
            "a process that tokenises text was ended from outside, most often for want of memory. The same command "
            "goes on where it was; set data.workers to fewer."
        ) from error
    finally:
        if pool is not None:
            # waited for: a process of multiprocessing that ended meanwhile would wait for its workers for ever
            pool.shutdown(cancel_futures=True)


_how: Rendering | None = None
"""How a worker renders, which it is shown once."""


def _pool(how: Rendering, processes: int) -> ProcessPoolExecutor:
    # Workers touch no device. A fork needs no second import of all packages, and no guard in the user's program.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of a tokenizer do not survive a fork
    try:
        pool = ProcessPoolExecutor(processes, context, _begin, (how,))
        pool.submit(os.getpid).result()
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
    return pool


def _begin(how: Rendering) -> None:
    global _how
    _how = how
    gc.freeze()  # a search for garbage among what the fork has of its parent would copy all of it
    gc.set_threshold(GARBAGE)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this worker when its parent has been killed: nobody else would."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(chunk: Chunk, limit: int | None, before: Found) -> Part:
    assert _how is not None
    return part_of(chunk, _how, limit=limit, before=before)
