"""Whether the images of a tokenised text are still those that were tokenised, looked at before any model is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selectkd.data.images import BY_PATH, ImageRef

LOOKED_AT = 10_000
"""Files of a text whose times are looked at, evenly over it: a tenth of a second on a disk. A batch reads each file
again and compares it, so that one that is missed here is noticed there."""
READ = 500
"""Files that are newer than their text and are read: at most some hundred megabytes."""


def check_images(table: pa.Table, since: float) -> None:
    """IntegrityError naming an image that is gone, or newer than ``since`` and not the one that was tokenised.

    table: of ``examples.SCHEMA``. since: seconds of the epoch.
    """
    flat = pa.chunked_array([chunk.flatten() for chunk in table.column("images").chunks], pa.large_binary())
    places = np.flatnonzero(np.concatenate([np.empty(0, bool), *map(_by_path, flat.chunks)]))
    if len(places) > LOOKED_AT:
        places = places[np.linspace(0, len(places) - 1, LOOKED_AT).astype(np.int64)]
    refs = dict.fromkeys(flat.take(pa.array(places)).to_pylist())
    newer = [ref for ref in map(ImageRef.unpacked, refs) if _is_newer(Path(ref.payload.decode()), since)]
    for ref in newer[:READ]:
        ref.content()


def _by_path(refs: pa.Array) -> NDArray[np.bool_]:
    """Which packed references [n] are to files, from the first byte of each."""
    _, offsets, content = refs.buffers()
    if not len(refs):
        return np.empty(0, bool)
    begins = np.frombuffer(offsets, np.int64)[refs.offset : refs.offset + len(refs)]
    return np.frombuffer(content, np.uint8)[begins] == ord(BY_PATH)


def _is_newer(path: Path, since: float) -> bool:
    """Whether a file was written, or put there, after ``since``, or is gone."""
    try:
        return path.stat().st_ctime >= since
    except OSError:
        return True
