"""A run folder as data: what is there is read, what is not there or damaged is None, and nothing raises for it.

Only files are read: metrics.jsonl, timings.jsonl, manifest.json, run.json, stopped.json, the looks in probe/, the names
of checkpoints, and results in JSON that verbs have written into the folder or the user names.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selectkd.data.durable import unsealed
from selectkd.errors import ConfigError, DataError
from selectkd.report.escapes import shortened
from selectkd.report.lenient import (
    Growing,
    Kind,
    is_number,
    mapping,
    measures,
    note,
    number,
    read_json,
    read_object,
    streams,
    whole,
    wholes,
)
from selectkd.report.looks import Looks, read_looks

METRICS, TIMINGS, MANIFEST, RUN, STOPPED, LOCK = (
    "metrics.jsonl", "timings.jsonl", "manifest.json", "run.json", "stopped.json", ".lock",
)  # fmt: skip
RESUMABLE = (75, 130)
"""Exit codes of a run that was stopped from outside: its state is saved, and the same command goes on."""
OURS = (MANIFEST, RUN, STOPPED)
FORMAT = 1
"""Of run.json, as this version writes it."""
LONGEST_NAME = 120
LINE: dict[str, Kind] = {
    "evaluation": measures, "streams": streams,
    **dict.fromkeys(("loss", "kl", "tar", "bite", "lr", "grad_norm", "probe_tar", "skipped"), number),
}  # fmt: skip
CLOCK: dict[str, Kind] = dict.fromkeys(("time", "tokens_per_second", "peak_bytes"), number)
SUMMARY: dict[str, Kind] = {
    "before": measures, "after": measures, "steps": whole, "seconds": number, "skipped_steps": wholes,
    **dict.fromkeys(("versions", "teacher", "student", "data", "config"), mapping),
}  # fmt: skip
"""What the page uses of metrics.jsonl, timings.jsonl and manifest.json, and of which kind it is."""


@dataclass(frozen=True)
class RunFiles:
    """What a run left behind. steps: the lines of training. evaluations: those with held-out or probe measures.

    state: running, finished, broken off or failed. results: (file name, content) of JSON results beside it. unread:
    files that were there and could not be read, each with the reason. growing: metrics.jsonl and timings.jsonl, for
    the next reading.
    """

    folder: Path
    name: str
    state: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    manifest: dict[str, Any] | None
    settings: dict[str, Any]
    stopped: dict[str, Any] | None
    looks: Looks | None
    checkpoints: list[int]
    growing: tuple[Growing, Growing]
    results: list[tuple[str, Any]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        return max((line["step"] for line in [*self.steps, *self.evaluations]), default=0)

    @property
    def planned(self) -> int | None:
        """The steps the run was to have; None where its recipe counts epochs and it is not over."""
        if self.manifest is not None and not self.manifest.get("stopped_early"):
            return self.manifest.get("steps")
        return whole(self.settings.get("training.max_steps"))

    @property
    def held_out(self) -> list[dict[str, Any]]:
        """Step and measures of each evaluation on held-out text."""
        return [
            {"step": line["step"], **line["evaluation"]}
            for line in self.evaluations
            if line.get("evaluation")
        ]

    @property
    def before(self) -> dict[str, Any] | None:
        """Held-out measures of the student before the first step."""
        found = self.held_out
        return found[0] if found and found[0]["step"] == 0 else (self.manifest or {}).get("before")

    @property
    def after(self) -> dict[str, Any] | None:
        """Held-out measures of the student the run left, or the newest of one that is not over."""
        left = (self.manifest or {}).get("after")
        found = self.held_out
        return left or (found[-1] if found and found[-1]["step"] > 0 else None)

    def column(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of each training line that has a number there."""
        return [(line["step"], line[name]) for line in self.steps if is_number(line.get(name))]

    def clock(self, name: str) -> list[tuple[int, float]]:
        """The same of timings.jsonl."""
        return [(line["step"], line[name]) for line in self.timings if is_number(line.get(name))]

    @property
    def seconds(self) -> float | None:
        """Wall time from the first to the last note of the clock, or the manifest's where the run was in one piece."""
        times = [line["time"] for line in self.timings if is_number(line.get("time"))]
        whole = (self.manifest or {}).get("seconds")
        if whole is not None and not self.resumes:
            return whole
        return max(times[-1] - times[0], 0) if len(times) > 1 else None

    @property
    def resumes(self) -> list[int]:
        """The steps the run went on from."""
        return [line["step"] for line in self.timings if line.get("resumed")]

    @property
    def skipped(self) -> list[int]:
        """The steps that were left out because a number was not finite."""
        noted = (self.manifest or {}).get("skipped_steps")
        if noted is not None:
            return list(noted)
        counts = [(line["step"], line.get("skipped") or 0) for line in self.steps]
        return [at for (at, now), (_, before) in zip(counts, [(0, 0), *counts], strict=False) if now > before]


def read_run(
    folder: str | os.PathLike[str],
    extra: Iterable[Path] = (),
    *,
    with_looks: bool = True,
    before: RunFiles | None = None,
) -> RunFiles:
    """The run in ``folder`` with the results in ``extra``; ConfigError where it is no run folder.

    before: the same run as it was read last, of whose growing files only what is new is read.
    """
    path = Path(folder).expanduser()
    if not (path / METRICS).is_file() and not (path / RUN).is_file():
        raise ConfigError(f"{folder} has no {METRICS}, so it is no run folder. Name a run's output_dir.")
    growing = (
        before.growing
        if before is not None
        else (Growing(path / METRICS, LINE), Growing(path / TIMINGS, CLOCK))
    )
    lines, timings = (one.read() for one in growing)
    unread = [text for one in growing for text in one.unread]
    manifest = read_object(path / MANIFEST, SUMMARY, unread)
    stopped = read_object(path / STOPPED, {"exit_code": whole}, unread)
    inside = [one for one in sorted(path.glob("*.json")) if one.name not in OURS]
    results = [(one.name, content) for one in inside if (content := read_json(one, unread)) is not None]
    return RunFiles(
        folder=path,
        name=shortened(path.resolve().name, LONGEST_NAME, keep=""),
        state=_state(path, manifest, stopped),
        steps=[line for line in lines if "loss" in line],
        evaluations=[line for line in lines if "loss" not in line],
        timings=timings,
        manifest=manifest,
        settings=_settings(path / RUN, unread),
        stopped=stopped,
        looks=_looks(path, unread) if with_looks else None,
        checkpoints=_checkpoints(path / "checkpoints"),
        growing=growing,
        results=[*results, *((one.name, _named(one)) for one in extra)],
        unread=unread,
    )


def run_folders(folder: Path, depth: int = 3) -> list[Path]:
    """The run folders in ``folder``, itself included, by name; nothing inside a run is looked at."""
    if (folder / RUN).is_file() or (folder / METRICS).is_file():
        return [folder]
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:  # of another user
        return []
    return [found for path in inside for found in run_folders(path, depth - 1)] if depth else []


def _state(folder: Path, manifest: Any, stopped: Any) -> str:
    if at_work(folder):
        return "running"
    if manifest is not None:
        return "finished"
    if stopped is not None and stopped.get("exit_code") not in RESUMABLE:
        return "failed"
    return "broken off"


def at_work(folder: Path) -> bool:
    """Whether the process that the lock names is alive and holds it; a lock of another host counts for an hour."""
    lock = folder / LOCK
    try:
        _, process, _, host = lock.read_text("utf-8").split() if lock.is_file() else []
        number_of = int(process)
    except (OSError, ValueError):
        return False
    if host != socket.gethostname():
        newest = max((f.stat().st_mtime for f in (folder / METRICS, lock) if f.is_file()), default=0.0)
        return not (folder / MANIFEST).is_file() and newest > _now() - 3600
    table = Path(f"/proc/{number_of}/fd")
    try:
        if Path("/proc/self/fd").is_dir():
            return any(os.path.samefile(one, lock) for one in table.iterdir() if one.exists())
        os.kill(number_of, 0)
    except (OSError, OverflowError):
        return False
    return not (folder / MANIFEST).is_file()


def _now() -> float:
    import time

    return time.time()


def _named(path: Path) -> Any:
    unread: list[str] = []
    content = read_json(path, unread)
    if content is None:
        raise DataError(f"{path} cannot be read as JSON. {' '.join(unread)} Name a file that --json wrote.")
    return content


def _settings(path: Path, unread: list[str]) -> dict[str, Any]:
    """The recipe and facts of run.json, one level deep."""
    if not path.is_file():
        return {}
    try:
        content = unsealed(path.read_bytes())
    except (OSError, RecursionError):
        content = None
    if content is None:
        note(unread, f"{path.name} is damaged")
        return {}
    if content.get("format") != FORMAT:
        note(
            unread, f"{path.name} is of another version of selectkd; what this one does not know is left out"
        )
    return mapping(content.get("run")) or {}


def _looks(folder: Path, unread: list[str]) -> Looks | None:
    try:
        return read_looks(folder / "probe")
    except DataError as error:
        note(unread, str(error).rstrip("."))
        return None


def _checkpoints(folder: Path) -> list[int]:
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*")] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())
