"""Files that are there whole or not at all, whatever dies meanwhile: written aside, synced, renamed, sealed.

Everything that must survive a kill goes through here: the student, the cache's shards, the checkpoints, and files that
grow by a line at a time (written text, an evaluation's answers and verdicts).
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from selectkd.errors import ResourceError

if sys.platform == "win32":
    raise ImportError("selectkd's runs, caches and evaluations need Linux or macOS. On Windows use WSL 2.")
import fcntl

READ = 1 << 22
"""Bytes read at once where a file is hashed."""

FAULT = "SELECTKD_FAULT"
"""For tests alone: ``NAME@N=kill`` kills the process where the N-th ``fault_point(NAME)`` is, ``=enospc`` makes
the disk full there."""

_passed: Counter[str] = Counter()


def write_whole(path: Path, content: bytes | bytearray, *, partial: Path | None = None) -> None:
    """``content`` at ``path``, whole or not at all: written beside it, synced, renamed, the folder synced.

    partial: where it is written first, a file of the same folder; default one of this process alone.
    ResourceError where it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}") if partial is None else partial
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise disk_error(error, path, needed=len(content)) from error


def write_plain(path: Path, content: bytes) -> None:
    """``content`` into a file the user named, which may be a device; ResourceError where it cannot be written."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise disk_error(error, path, needed=len(content)) from error


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that grows by ``add_lines``, without their ends; [] where there is none.

    A last line that a kill cut short is taken off the file, so that the next one begins where a line begins.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # a line that another process is writing now is not cut short
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
    return content[:whole].split(b"\n")[:-1]


def add_lines(path: Path, rows: Iterable[Mapping[str, Any]], *, point: str = "lines") -> None:
    """Appends a JSON object a line; they are on the disk when this returns. ResourceError for a full disk.

    point: the ``fault_point`` behind them.
    """
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(
        "utf-8", "surrogatepass"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = os.fstat(file.fileno()).st_size
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
            if not before:
                sync(path.parent)
    except OSError as error:
        raise disk_error(error, path, needed=len(content)) from error
    fault_point(point)


def sync(path: Path) -> None:
    """Forces a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Force every file of a folder, and the folder itself, to the disk, so a rename publishes whole files."""
    for path in [*sorted(folder.rglob("*")), folder]:
        sync(path)


def clear_left(path: Path) -> None:
    """Deletes what killed processes left beside ``path``: its partial copies, and an old one that was moved aside; that
    goes back first where nothing has taken its place.
    """
    for kind in ("old", "partial"):
        for left in path.parent.glob(f".{glob.escape(path.name)}.{kind}-*"):
            number = left.name.rpartition("-")[2]
            if not number.isdecimal() or (int(number) != os.getpid() and _alive(int(number))):
                continue
            if kind == "old" and not path.exists():
                left.rename(path)
            elif left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def replace_folder(partial: Path, folder: Path) -> None:
    """Put ``partial`` in the place of ``folder``; what stood there is moved aside first and deleted last."""
    aside = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(aside)
        fault_point("moved aside")
    partial.rename(folder)
    fault_point("replaced")
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def checksum(path: Path) -> str:
    """The xxh3-128 of a file's bytes, 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(READ):
            digest.update(block)
    return digest.hexdigest()


def sealed(content: Mapping[str, Any]) -> bytes:
    """``content`` as JSON with its own checksum; the same content gives the same bytes."""
    plain = {key: value for key, value in content.items() if key != "checksum"}
    return json_bytes({**plain, "checksum": xxhash.xxh3_128(json_bytes(plain)).hexdigest()})


def unsealed(raw: bytes) -> dict[str, Any] | None:
    """The content of bytes written by ``sealed``, its checksum included; None where any byte differs.

    >>> unsealed(sealed({"step": 3}))["step"], unsealed(sealed({"step": 3}).replace(b"3", b"4", 1))
    (3, None)
    """
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and sealed(content) == raw else None


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """JSON that depends on the content alone."""
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def disk_error(error: OSError, path: Path, *, needed: int | None = None) -> ResourceError:
    """The ResourceError for a failed write: the path, the system's error, the bytes needed and the bytes free."""
    above = path
    while not above.exists():
        above = above.parent
    free = shutil.disk_usage(above).free
    need = "" if needed is None else f"{needed:,} bytes are needed, "
    return ResourceError(
        f"cannot write {path}: {error.strerror or error}; {need}{free:,} bytes are free. "
        "Free some space or name another folder."
    )


def os_error_of(error: Exception) -> OSError:
    """The system's error in a library's message, ``... (os error 28)``."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found.group(1)) if found else errno.EIO
    return OSError(number, os.strerror(number) if found else str(error))


def fault_point(name: str) -> None:
    """A place where a test may kill the process or fill the disk, see ``FAULT``; otherwise nothing."""
    wanted = os.environ.get(FAULT)
    if wanted is None:
        return
    place, _, what = wanted.partition("=")
    where, _, count = place.partition("@")
    if where != name:
        return
    _passed[name] += 1
    if _passed[name] == int(count or 1):
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
