"""Requests to stop: SIGTERM from a scheduler, SIGINT from a person. The first is heard at the end of the step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from selectkd.errors import Interrupted, Preempted, SelectKDError

SIGNALS = {signal.SIGTERM: Preempted, signal.SIGINT: Interrupted}


class StopRequests:
    """A context in which a first SIGTERM or SIGINT is noted and a second one acts at once, as it would without us.

    asked: the signal that came, or None. ``at_once``: while True (before training, where there is nothing to save) a
    first signal raises right away. Signals reach the main thread alone; in any other this context does nothing.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.at_once = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        if self.at_once:
            raise stopped(number)


def stopped(number: int, saved: str = "nothing was trained yet") -> SelectKDError:
    """The error a signal ends a run with; its exit code is 75 or 130."""
    error = SIGNALS[signal.Signals(number)]
    return error(f"stopped by {signal.Signals(number).name}: {saved}. The same command goes on from there.")
