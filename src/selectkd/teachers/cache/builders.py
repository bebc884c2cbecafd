"""Several builders of one cache: each shard is one's at a time, by a lock that ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from selectkd.data.durable import disk_error, write_whole

POLL = 0.1
"""Seconds from one look at another builder's lock to the next."""


def fill(
    path: Path, content_of: Callable[[], bytes | bytearray | None], *, wait: Callable[[], None] | None
) -> bool:
    """Writes what ``content_of`` gives to ``path``, whole or not at all; False where another builder is at work on it.

    The partial file beside ``path`` is locked meanwhile: what a killed builder left is taken over, what a living one
    writes is left alone. content_of: None where there is nothing to write any more. wait: called again and again until
    the other builder is done; what it raises ends the waiting. ResourceError where the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial-build")
    handle = _locked(partial)
    while handle is None:
        if wait is None:
            return False
        wait()
        time.sleep(POLL)
        handle = _locked(partial)
    try:
        content = content_of()
        if content is None:
            partial.unlink()
        else:
            write_whole(path, content, partial=partial)
    except BaseException:
        partial.unlink(missing_ok=True)  # its lock is ours
        raise
    finally:
        os.close(handle)
    return True


def _locked(partial: Path) -> int | None:
    """The partial file, open and locked; None where another process holds it. ResourceError where it cannot be made."""
    while True:
        try:
            handle = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise disk_error(error, partial) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = partial.stat().st_ino == os.fstat(handle).st_ino
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:  # another builder has renamed it meanwhile
            there = False
        if there:
            return handle
        os.close(handle)
