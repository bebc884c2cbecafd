"""When a run saves, which parts a checkpoint holds, and how the run goes on from it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from selectkd.errors import ResourceError
from selectkd.training.checkpoint.encoding import gather
from selectkd.training.checkpoint.folder import (
    Found,
    all_in,
    has_part,
    name_of,
    read_part,
    rotate,
    write,
    write_part,
)
from selectkd.training.checkpoint.generators import Generators
from selectkd.training.counts import rank, ranks, total
from selectkd.training.stopping import StopRequests, stopped

AUTO_SECONDS = 600.0
AUTO_SHARE = 0.02
"""``every="auto"`` saves each AUTO_SECONDS, and less often where saving would take more than AUTO_SHARE of the
time."""


@runtime_checkable
class Stateful(Protocol):
    """A part of a run that a checkpoint holds; states are nests of what ``encoding.split`` takes."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one run. A part joins by ``register`` and gets its state back there if the run goes on.

    folder: where they are. keep: how many stay (2 or more). every: steps between two, "auto" (see AUTO_SECONDS) or
    None for none but at a stop. recipe: what the manifest says the run is. opened: the checkpoint to go on from.
    A stop that was asked for is acted on at the end of the step, after saving.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        every: int | Literal["auto"] | None = None,
        recipe: str = "",
        opened: Found | None = None,
        stop: StopRequests | None = None,
    ) -> None:
        self.folder, self.keep, self.every, self.recipe = folder, keep, every, recipe
        self.opened, self.stop = opened, stop
        self.step = 0 if opened is None else opened.step
        self._parts: dict[str, tuple[Stateful, bool]] = {}
        self._own = [f"generators-{rank()}"]
        self._noted: dict[str, Any] = {}
        self._generators = Generators()
        self._saved_at, self._cost, self._failed = time.monotonic(), 0.0, False

    def register(self, name: str, part: Stateful, *, heavy: bool = False, own: bool = False) -> None:
        """Adds a part, a plain word for its name; where the run goes on, ``part`` has its state afterwards.

        heavy: only a finished step changes it (weights, optimizer), so it is read when it is saved. Everything else is
        read at each step's end as well, so that a step that breaks off can be taken back. own: each rank has another
        state, which it writes itself (a buffer of texts); never heavy.
        """
        if own:
            name = f"{name}-{rank()}"
            self._own.append(name)
        self._parts[name] = (part, heavy)
        if self.opened is not None:
            part.load_state_dict(read_part(self.opened.path, name))

    def begin(self) -> None:
        """Right before the first step: the generators are where the saved step left them."""
        own = f"generators-{rank()}"
        if self.opened is not None and has_part(self.opened.path, own):
            self._generators.load_state_dict(read_part(self.opened.path, own))
        self._note()
        self._saved_at = time.monotonic()

    def after(self, step: int, *, last: bool = False) -> None:
        """At the end of each step: saves where it is time, and ends the run where a stop was asked for.

        Raises Preempted or Interrupted then, ResourceError where the disk is full. On several ranks a collective call.
        """
        self.step = step
        asked, due = self._agreed(self._due(step, last))
        if asked is not None or due:
            self.save()
        if asked is not None:
            raise stopped(asked, f"the state of step {step} is in {self.folder / name_of(step)}")
        self._note()

    def save(self) -> Path:
        """Writes the checkpoint of the step that has just ended, and lets old ones go."""
        self._note()
        return self._write(self._noted)

    def rescue(self) -> Path | None:
        """Saves the last finished step after a step that broke off before the optimizer; None where none is.

        On one rank alone: what other ranks were doing is not known, and their last checkpoint stands.
        """
        if self.step == 0 or ranks() > 1 or not self._noted or self._failed:
            return None
        return self._write(self._noted)

    def _write(self, light: dict[str, Any]) -> Path:
        path = self.folder / name_of(self.step)
        if path in all_in(self.folder):
            return path
        started, self._failed = time.monotonic(), True
        states: dict[str, Callable[[], Any]] = {}
        for name, (part, heavy) in self._parts.items():
            states[name] = part.state_dict if heavy else lambda name=name: light[name]
        if ranks() == 1:
            states["generators-0"] = lambda: light["generators-0"]
            write(self.folder, self.step, states, recipe=self.recipe)
            rotate(self.folder, self.keep)
        else:
            self._write_together(states, light)
        self._saved_at, self._failed = time.monotonic(), False
        self._cost = self._saved_at - started
        return path

    def _write_together(self, states: dict[str, Callable[[], Any]], light: dict[str, Any]) -> None:
        """Rank 0 writes what all share, each rank its own parts. They meet three times (the folder is there, all
        have written, it is sealed), and where one fails all end at that meeting.
        """
        states = {name: state_of for name, state_of in states.items() if name not in self._own}
        if rank() == 0:

            def others(partial: Path) -> None:
                for name in self._own:
                    write_part(partial, name, light[name])
                _meet()
                _meet()

            try:
                write(self.folder, self.step, states, recipe=self.recipe, beside=others)
                rotate(self.folder, self.keep)
            except _ElsewhereError:
                raise
            except ResourceError:
                total([1])
                raise
            _meet()
            return
        for state_of in states.values():
            gather(state_of())  # sharded tensors are gathered by all ranks at once
        _meet()
        failed = 0
        try:
            for name in self._own:
                write_part(self.folder / f".{name_of(self.step)}.partial", name, light[name])
        except OSError:
            failed = 1
        _meet(failed)
        _meet()

    def _due(self, step: int, last: bool) -> bool:
        if self.every == "auto":
            since = time.monotonic() - self._saved_at
            return since >= max(AUTO_SECONDS, self._cost / AUTO_SHARE)
        return isinstance(self.every, int) and (last or step % self.every == 0)

    def _agreed(self, due: bool) -> tuple[int | None, bool]:
        """(the signal any rank has heard, whether rank 0 finds it time to save), the same on all ranks."""
        asked = None if self.stop is None else self.stop.asked
        if ranks() == 1:
            return asked, due
        term, interrupt, time_to = total(
            [asked == signal.SIGTERM, asked == signal.SIGINT, due and rank() == 0]
        )
        return signal.SIGTERM if term else signal.SIGINT if interrupt else None, bool(time_to)

    def _note(self) -> None:
        self._noted = {name: part.state_dict() for name, (part, heavy) in self._parts.items() if not heavy}
        self._noted[f"generators-{rank()}"] = self._generators.state_dict()


class _ElsewhereError(ResourceError):
    """Another rank could not write its part."""


def _meet(failed: int = 0) -> None:
    """Waits for all ranks; ResourceError on each where one has failed."""
    if total([failed])[0]:
        raise _ElsewhereError("a rank could not write its part of the checkpoint; see its own message.")
