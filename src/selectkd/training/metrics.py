"""metrics.jsonl: the source of truth of a run, one JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

REQUIRED = ("step", "loss", "kl", "tar", "bite", "lr", "tokens", "tokens_per_second", "skipped")


class MetricsLog:
    """Appends lines to ``path`` and hands each to ``listeners``; numbers that are not finite are written as
    null.

    A training line holds at least REQUIRED; an evaluation line holds step and ``evaluation``.
    """

    def __init__(self, path: Path, *listeners: Callable[[dict[str, Any]], None]) -> None:
        self.path, self.listeners = path, listeners
        self.lines: list[dict[str, Any]] = []

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line and tells the listeners."""
        line = _clean(line)
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        for listener in self.listeners:
            listener(line)


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
