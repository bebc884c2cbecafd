"""metrics.jsonl: the source of truth of a run, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import get_available_reporting_integrations

from selectkd.data.durable import disk_error, sync
from selectkd.errors import ConfigError
from selectkd.training.counts import rank

REQUIRED = ("step", "loss", "kl", "tar", "bite", "lr", "tokens", "tokens_per_second", "skipped")


CLOCK = ("tokens_per_second", "writing_seconds", "peak_bytes")
"""What depends on the machine: null in metrics.jsonl, so that a run and its resumption leave the same bytes,
and a number in timings.jsonl beside it.
"""


class MetricsLog:
    """Appends lines to ``path`` and hands each to ``listeners``; numbers that are not finite are written as
    null.

    A training line holds at least REQUIRED; an evaluation line holds step and ``evaluation``. What ``CLOCK`` names
    goes to timings.jsonl, {"step": ..., "time": seconds since 1970, ...}. A part of a checkpoint: its state is the
    length of both files, and loading it cuts them there; on several ranks the first one does that.
    """

    def __init__(self, path: Path, *listeners: Callable[[dict[str, Any]], None]) -> None:
        self.path, self.listeners = path, listeners
        self.timings = path.with_name("timings.jsonl")

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line and tells the listeners; ResourceError where the disk is full."""
        line = _clean(line)
        clock = {key: line[key] for key in CLOCK if key in line}
        _append(self.path, {**line, **dict.fromkeys(clock)})
        if clock:
            _append(self.timings, {"step": line["step"], "time": round(time.time(), 3), **clock})
        for listener in self.listeners:
            listener(line)

    def resumed(self, step: int) -> None:
        """Notes in timings.jsonl that the run went on from ``step``."""
        if rank() == 0:
            _append(self.timings, {"step": step, "time": round(time.time(), 3), "resumed": True})

    def state_dict(self) -> dict[str, int]:
        """The length of each file in bytes, which is on the disk by then."""
        lengths = {}
        for path in (self.path, self.timings):
            lengths[path.name] = path.stat().st_size if path.is_file() else 0
            if path.is_file():
                sync(path)
        return lengths

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Cuts both files to the saved length; what a killed run wrote after it goes."""
        for path in (self.path, self.timings):
            if rank() == 0 and path.is_file():
                os.truncate(path, min(state.get(path.name, 0), path.stat().st_size))


def _append(path: Path, line: dict[str, Any]) -> None:
    text = json.dumps(line, allow_nan=False) + "\n"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise disk_error(error, path, needed=len(text)) from error


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def check_loggers(names: Sequence[str]) -> None:
    """ConfigError unless the library of each logger is installed."""
    missing = sorted(set(names) - set(get_available_reporting_integrations()))
    if missing:
        raise ConfigError(
            f"training.report_to names {', '.join(missing)}, which is not installed, or lacks its settings "
            "(Comet: COMET_API_KEY). Install it, or leave it out: metrics.jsonl holds every number."
        )
