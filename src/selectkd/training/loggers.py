"""The loggers of ``training.report_to``, each beside the run: whatever one raises, however long it takes, the run goes
on, and one warning tells.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from operator import methodcaller
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

WAIT = 10.0
"""Seconds a run waits for a logger; a call that takes longer is left behind, and is not waited for again."""

MOST_BEHIND = 10_000
"""Calls kept for a logger that is behind; more are dropped, and metrics.jsonl holds every number either way."""

_LOG = logging.getLogger("selectkd")
_EVENTS = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))


class Loggers(TrainerCallback):
    """A Trainer's callback that hands each event to every logger named; names: as of ``training.report_to``.

    settings: by key, what a logger notes as the configuration of the run beside the Trainer's own arguments.
    """

    def __init__(
        self, names: Sequence[str], settings: Mapping[str, Any] | None = None, *, wait: float = WAIT
    ) -> None:
        self._loggers = [_Logger(name, wait) for name in names]
        self._settings = dict(settings or {})

    def hear(self, event: str, args: Any, state: Any, control: Any, **named: Any) -> None:
        """Hands an event on; what a logger says of ``control`` is not asked for."""
        given = {key: dict(value) if key == "logs" else value for key, value in named.items()}
        args = _with_settings(args, self._settings)
        for logger in self._loggers:
            logger.hear(event, args, copy.copy(state), copy.copy(control), **given)


def _with_settings(args: Any, settings: Mapping[str, Any]) -> Any:
    """The arguments of a Trainer, whose ``to_dict``, which every logger notes, has the settings too."""
    named = copy.copy(args)
    named.to_dict = lambda: {**args.to_dict(), **settings}
    return named


def _hears(event: str) -> Any:
    def on_event(self: Loggers, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.hear(event, args, state, control, **named)

    return on_event


for _event in _EVENTS:
    setattr(Loggers, _event, _hears(_event))


class _Logger:
    """One logger, made and called in a thread of its own, which nothing waits for at the end of the process."""

    def __init__(self, name: str, wait: float) -> None:
        self.name, self.wait = name, wait
        (self.kind,) = get_reporting_integration_callbacks([name])
        self.error: Exception | None = None
        self._warned = False
        self._calls: queue.Queue[tuple[str, Any, Any, threading.Event]] = queue.Queue(MOST_BEHIND)
        self._last = threading.Event()
        self._last.set()
        threading.Thread(target=self._work, daemon=True, name=f"logger {name}").start()

    def hear(self, event: str, *given: Any, **named: Any) -> None:
        """Calls the logger, and waits for it unless it is behind already."""
        if self.error is None and getattr(self.kind, event, None) is not getattr(TrainerCallback, event):
            waits, done = self._last.is_set(), threading.Event()
            if not self._calls.full():
                self._calls.put((event, given, named, done))
                self._last = done
            if waits and not done.wait(self.wait):
                self._tell(f"has not answered {event} for {self.wait:.0f} s; the call is left behind")
        if self.error is not None:
            kind = type(self.error).__name__
            self._tell(f"failed, and hears no more: {kind}: {str(self.error)[:200]}")

    def _tell(self, what: str) -> None:
        if not self._warned:
            _LOG.warning(
                f"training.report_to: {self.name} {what}. Training continues, and metrics.jsonl holds every number."
            )
        self._warned = True

    def _work(self) -> None:
        callback = None
        while self.error is None:
            event, given, named, done = self._calls.get()
            try:
                callback = self.kind() if callback is None else callback
                methodcaller(event, *given, **named)(callback)
            except Exception as error:  # other people's code; it is logged, and must not end the run
                self.error = error
            done.set()
