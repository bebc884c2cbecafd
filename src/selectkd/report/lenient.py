"""Files of a run as this version knows them: a value of another kind is left out and named, and nothing raises.

A run may be of a later version, damaged, or written by somebody who means harm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LARGEST = 1e300
"""Beyond it a number counts as none: differences of two would overflow."""
LARGEST_JSON, LARGEST_LINES = 64 << 20, 1 << 30
"""Bytes; a larger file is left out and named."""
DEEPEST = 40
"""Levels of a nested value; what lies deeper is left out."""

Kind = Callable[[Any], Any]
"""A value as it is used, or None where it is of another kind."""


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be drawn: no boolean, finite, and of a size that a float has.

    >>> [is_number(one) for one in (1, 2.5, np.int64(3), True, float("nan"), 10**400, "1", None)]
    [True, True, True, False, False, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return -LARGEST < (value.item() if isinstance(value, np.generic) else value) < LARGEST


def number(value: Any) -> float | None:
    return value if is_number(value) else None


def whole(value: Any) -> int | None:
    """A whole number that counts something."""
    return value if is_number(value) and isinstance(value, int) and 0 <= value < 1 << 53 else None


def wholes(value: Any) -> list[int] | None:
    return [one for one in value if whole(one) is not None] if isinstance(value, list) else None


def mapping(value: Any) -> dict[str, Any] | None:
    return shallow(value) if isinstance(value, dict) else None


def measures(value: Any) -> dict[str, float] | None:
    """The numbers of a mapping, by name."""
    return {key: one for key, one in value.items() if is_number(one)} if isinstance(value, dict) else None


def streams(value: Any) -> dict[str, dict[str, float]] | None:
    """The measures of each stream."""
    if not isinstance(value, dict):
        return None
    return {name: found for name, one in value.items() if (found := measures(one)) is not None}


def shallow(value: Any, depth: int = DEEPEST) -> Any:
    """A nested value without what lies deeper than ``depth``."""
    if not isinstance(value, dict | list):
        return value
    if not depth:
        return "..."
    if isinstance(value, list):
        return [shallow(one, depth - 1) for one in value]
    return {key: shallow(one, depth - 1) for key, one in value.items()}


def of_kinds(
    content: Mapping[str, Any], kinds: Mapping[str, Kind], name: str, unread: list[str]
) -> dict[str, Any]:
    """``content`` with each value of ``kinds`` as that reads it; one that it does not read is left out and named."""
    found = dict(content)
    for key in [key for key in kinds if found.get(key) is not None]:
        value = kinds[key](found[key])
        if value is None:
            note(unread, f"{name}: {key} is {type(found[key]).__name__}, which is left out")
        found[key] = value
    return found


def note(unread: list[str], text: str) -> None:
    """Adds a text that is not there yet: a fault of a thousand lines is one sentence."""
    if text not in unread:
        unread.append(text)


def read_json(path: Path, unread: list[str]) -> Any:
    """The content of a JSON file; None where there is none, or none that can be read."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON >> 20} MiB")
        return json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        note(unread, f"{path.name}: {type(error).__name__}: {error}")
        return None


def read_object(path: Path, kinds: Mapping[str, Kind], unread: list[str]) -> dict[str, Any] | None:
    """The object in a JSON file, its values of ``kinds``; None where there is none."""
    content = read_json(path, unread)
    if content is not None and not isinstance(content, dict):
        note(unread, f"{path.name} holds no object")
    return of_kinds(content, kinds, path.name, unread) if isinstance(content, dict) else None


@dataclass
class Growing:
    """The lines of a JSONL file that grows, each an object with a ``step``: what was read once is not read again.

    A line that is none is left out; a last one without its end is being written, and waits.
    """

    path: Path
    kinds: Mapping[str, Kind]
    lines: list[dict[str, Any]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    _end: int = 0
    _last: bytes = b""
    _count: int = 0

    def read(self) -> list[dict[str, Any]]:
        """All lines up to now."""
        try:
            if self.path.is_file():
                self._read_on()
        except OSError as error:
            note(self.unread, f"{self.path.name}: {type(error).__name__}: {error}")
        return self.lines

    def _read_on(self) -> None:
        with self.path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(self._end - len(self._last), 0))
            if file.read(len(self._last)) != self._last:  # a resumed run cuts its files and goes on elsewhere
                self._end = self._count = file.seek(0)
                self.lines, self.unread, self._last = [], [], b""
            if size - self._end > LARGEST_LINES:
                note(self.unread, f"{self.path.name} has more than {LARGEST_LINES >> 20} MiB and is left out")
                return
            content = file.read(size - self._end)
        pieces = content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]
        for piece in pieces:
            self._add(piece)
        self._end += sum(len(piece) + 1 for piece in pieces)
        self._last = pieces[-1] + b"\n" if pieces else self._last

    def _add(self, piece: bytes) -> None:
        self._count += 1
        try:
            line = json.loads(piece)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or whole(line.get("step")) is None:
            if not any("no object with a step" in one for one in self.unread):
                note(
                    self.unread,
                    f"{self.path.name}:{self._count} is no object with a step; such lines are left out",
                )
            return
        self.lines.append(of_kinds(line, self.kinds, self.path.name, self.unread))
