"""A progress bar for people: step, loss, TAR, tokens a second, time left. The command line makes one and
passes it in.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 10
"""Steps between two plain lines."""


class TrainingProgress:
    """A rich progress bar fed with log lines; a context manager. Where the console is no terminal, plain lines."""

    def __init__(self, console: Console | None = None) -> None:
        console = console if console is not None else Console(stderr=True)
        self.plain = None if console.is_terminal else console
        self.name = ""
        self.total: int | None = None
        self.bar = Progress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=None, numbers="")

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Says what is going on, how many parts it has, and how many are done; the time left counts from part 0."""
        if done:
            self.bar.update(self.task, description=name, completed=done)
        else:  # a task of its own: rich keeps the total of an old one
            self.bar.remove_task(self.task)
            self.task = self.bar.add_task(name, total=total, numbers="")
        if self.plain is not None and name != self.name:
            self.plain.out(name)
        self.name, self.total = name, total

    def line(self, line: dict[str, Any]) -> None:
        """Shows a line of metrics.jsonl; what held-out text says stays on the screen."""
        if line.get("evaluation"):
            measures = line["evaluation"]
            numbers = "  ".join(f"{name} {_number(measures[name])}" for name in ("kl", "perplexity", "tar"))
            self.bar.console.out(f"held-out text after step {line['step']}: {numbers}")
        if "loss" in line:
            numbers = (
                f"loss {_number(line['loss'])}  TAR {_number(line['tar'])}  "
                f"{line['tokens_per_second']:.0f} tokens/s"
                + (f"  skipped {line['skipped']}" if line["skipped"] else "")
            )
            self.bar.update(self.task, completed=line["step"], numbers=numbers)
            if self.plain is not None and (line["step"] % EVERY == 0 or line["step"] == self.total):
                self.plain.out(f"step {line['step']}/{self.total or '?'}  {numbers}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
