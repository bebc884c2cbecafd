"""The lock of a run folder: one process works in it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from selectkd.errors import ConfigError

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the run folder for this process; ConfigError where another one does.

    The lock goes with the process that holds it, however that ends, so a killed run leaves none behind.
    """
    path = folder / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    _close_in_forks()
    _HANDLES.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            who = os.read(handle, 200).decode("utf-8", "replace").strip()
            raise ConfigError(
                f"training.output_dir = {folder} is in use by {who or 'another process'}. "
                "Wait for it, stop it, or name another folder."
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        if handle in _HANDLES:
            _HANDLES.remove(handle)
            os.close(handle)


_HANDLES: set[int] = set()
"""Locks of this process."""


@cache
def _close_in_forks() -> None:
    """Lets go of the locks in processes that are forked: one that outlives a killed run would hold its folder."""
    os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    while _HANDLES:
        os.close(_HANDLES.pop())
