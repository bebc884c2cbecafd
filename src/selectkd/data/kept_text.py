"""The tokenised texts that a cache keeps, and the removal of those that were not used for long."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selectkd.data.durable import unsealed
from selectkd.data.text_cache import DATA, JOURNAL, LOCK, MANIFEST

DAY = 24 * 3600.0


@dataclass(frozen=True)
class KeptText:
    """A text of a cache. source: empty while it is not whole. used: when it was last used, in seconds since 1970; size
    in bytes.
    """

    folder: Path
    source: str
    samples: int
    size: int
    used: float


def kept_texts(folder: Path) -> list[KeptText]:
    """The texts of a cache and the indices of streamed ones, the last used first."""
    found: list[KeptText] = []
    for one in folder.iterdir() if folder.is_dir() else ():
        if one.suffix == ".index":
            about = one.stat()
            found.append(KeptText(one, "(index of a streamed text)", 0, about.st_size, about.st_mtime))
        files = [one / name for name in (MANIFEST, JOURNAL, DATA) if (one / name).is_file()]
        if not files:
            continue
        whole = unsealed(files[0].read_bytes()) if files[0].name == MANIFEST else None
        source, samples = ("", 0) if whole is None else (whole["name"], whole["part"]["examples"])
        size = sum(file.stat().st_size for file in files)
        found.append(KeptText(one, source, samples, size, max(file.stat().st_mtime for file in files)))
    return sorted(found, key=lambda one: (-one.used, str(one.folder)))


def superfluous(texts: Sequence[KeptText], *, days: float | None, size: float | None) -> list[KeptText]:
    """Of texts, the last used first, those that were not used for so many days, and those behind the first ``size``
    bytes.
    """
    found: list[KeptText] = []
    total, before = 0, None if days is None else time.time() - days * DAY
    for one in texts:
        total += one.size
        if (before is not None and one.used <= before) or (size is not None and total > size):
            found.append(one)
    return found


def remove(text: KeptText) -> bool:
    """Deletes a text, unless a process is building it. What has it mapped into memory keeps it until it ends."""
    if text.folder.is_file():
        text.folder.unlink(missing_ok=True)
        return True
    with (text.folder / LOCK).open("a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        for name in (
            MANIFEST,
            JOURNAL,
            DATA,
        ):  # without its manifest a text is not whole, whatever is left of it
            (text.folder / name).unlink(missing_ok=True)
    return True
