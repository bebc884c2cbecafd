"""The loggers of ``training.report_to``, and the report at the end: whatever one raises, however long it takes, the run
goes on, and one warning tells.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

WAIT = 10.0
"""Seconds a run waits for a logger; one that takes longer is left behind, and is waited for once more at the end."""

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
        self._at_end: tuple[Any, ...] | None = None

    def hear(self, event: str, args: Any, state: Any, control: Any, **named: Any) -> None:
        """Hands an event on; what a logger says of ``control`` is not asked for."""
        if event == "on_train_end":
            self._at_end = (args, state, control, named)  # a logger may close there: the report comes first
            return
        self._hand_on(event, args, state, control, named)

    def close(self, report: Path | None = None) -> None:
        """The end of the run for every logger, which gets the file ``report`` as an artefact before."""
        for logger in self._loggers:
            if report is not None:
                logger.attach(report)
        if self._at_end is not None:
            args, state, control, named = self._at_end
            self._hand_on("on_train_end", args, state, control, named)
        self._at_end = None
        for logger in self._loggers:
            logger.finish()

    def _hand_on(self, event: str, args: Any, state: Any, control: Any, named: Mapping[str, Any]) -> None:
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
        self._calls: queue.Queue[tuple[Callable[[Any], Any], threading.Event]] = queue.Queue(MOST_BEHIND)
        self._last = threading.Event()
        self._last.set()
        threading.Thread(target=self._work, daemon=True, name=f"logger {name}").start()

    def hear(self, event: str, *given: Any, **named: Any) -> None:
        """Calls the logger, and waits for it unless it is behind already."""
        if getattr(self.kind, event, None) is not getattr(TrainerCallback, event):
            self._ask(event, methodcaller(event, *given, **named))

    def attach(self, report: Path) -> None:
        """Hands a file to the logger, where it takes files."""
        attach = ATTACH.get(self.name)
        if attach is not None:
            self._ask("the report", lambda callback: attach(callback, report))

    def finish(self) -> None:
        """Waits once more for a logger that is behind: the process may end next, and takes its thread along."""
        if not self._last.wait(self.wait) and self.error is None:
            self._tell("had not taken all of the run when it ended")
        self._tell_of_error()

    def _ask(self, event: str, call: Callable[[Any], Any]) -> None:
        if self.error is None:
            waits, done = self._last.is_set(), threading.Event()
            if not self._calls.full():
                self._calls.put((call, done))
                self._last = done
            if waits and not done.wait(self.wait):
                self._tell(
                    f"has not answered {event} for {self.wait:.0f} s; it is waited for once more at the end"
                )
        self._tell_of_error()

    def _tell_of_error(self) -> None:
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
            call, done = self._calls.get()
            try:
                callback = self.kind() if callback is None else callback
                call(callback)
            except Exception as error:  # other people's code; it is logged, and must not end the run
                self.error = error
            done.set()
        while not self._calls.empty():
            self._calls.get()[1].set()


def _to_wandb(callback: Any, report: Path) -> None:
    run = callback._wandb and callback._wandb.run
    if run:
        artifact = callback._wandb.Artifact(f"report-{run.id}", type="report")
        artifact.add_file(str(report))
        run.log_artifact(artifact)


def _to_mlflow(callback: Any, report: Path) -> None:
    if callback._initialized:
        callback._ml_flow.log_artifact(str(report))


def _to_trackio(callback: Any, report: Path) -> None:
    callback._trackio.save(str(report))


def _to_comet(callback: Any, report: Path) -> None:
    if callback._experiment is not None:  # switched off by its own variables
        callback._experiment.log_asset(str(report), file_name=report.name)
        callback._experiment.flush()


def _to_clearml(callback: Any, report: Path) -> None:
    if callback._clearml_task is not None:
        callback._clearml_task.upload_artifact("report", str(report))


def _to_tensorboard(callback: Any, report: Path) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_text("report", f"the report of this run is {report.absolute()}")


def _to_swanlab(callback: Any, report: Path) -> None:
    callback._swanlab.log(
        {"report": callback._swanlab.Text(f"the report of this run is {report.absolute()}")}
    )


ATTACH: dict[str, Callable[[Any, Path], None]] = {
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
    "trackio": _to_trackio,
    "comet_ml": _to_comet,
    "clearml": _to_clearml,
    "tensorboard": _to_tensorboard,
    "swanlab": _to_swanlab,
}
"""How each logger of ``training.report_to`` takes the report; the last two take no files, and get its path."""


def written(write: Callable[[Path], Path], folder: Path) -> Path | None:
    """What ``write(folder)`` returns; None and one warning where it raises: a page about a run must not end it."""
    try:
        return write(folder)
    except Exception as error:  # whatever it is, the run's files are whole
        _LOG.warning(f"no report was written: {type(error).__name__}: {str(error)[:200]}")
        return None
