"""Whether a program passes its tests: program and tests in two locked processes, and a deadline on both."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from selectkd.errors import ResourceError
from selectkd.evals.sandbox.level import LOCKED_OUT, Level, command

CPU_SECONDS = 10
WALL_SECONDS = 30.0
"""A program gets ten seconds of a core, whatever else the machine does; thrice that on the clock, against sleepers."""
MEMORY = 1 << 30


@dataclass(frozen=True)
class Verdict:
    """Whether all tests held; why not, in the tests' own words."""

    passed: bool
    why: str


def run_tests(
    source: str,
    *,
    setup: str,
    tests: str,
    names: Sequence[str],
    level: Level,
    wall_seconds: float = WALL_SECONDS,
    cpu_seconds: int = CPU_SECONDS,
) -> Verdict:
    """Runs ``source``, and ``setup`` then ``tests`` beside it; the tests see the source's functions ``names``.

    Arguments and results travel as plain data: a test cannot see that an argument was changed in place. ResourceError
    where a process could not be locked in at ``level``.
    """
    limits = {
        "cpu_seconds": cpu_seconds,
        "memory": MEMORY,
        "demand": list(level.kept),
        "locked_out": LOCKED_OUT,
    }
    with contextlib.ExitStack() as stack:
        verdict_out, verdict_in = os.pipe()
        stack.callback(os.close, verdict_out)
        with contextlib.ExitStack() as theirs:  # the ends that only the two processes may hold
            calls_out, calls_in = os.pipe()
            answers_out, answers_in = os.pipe()
            for end in (calls_out, calls_in, answers_out, answers_in, verdict_in):
                theirs.callback(os.close, end)
            answering = stack.enter_context(
                _cell("answer", (calls_out, answers_in), {**limits, "source": source})
            )
            job = {**limits, "setup": setup, "tests": tests, "names": list(names)}
            testing = stack.enter_context(_cell("test", (calls_in, answers_out, verdict_in), job))
        report = _read(verdict_out, time.monotonic() + wall_seconds)
        for process in (answering, testing):
            if process.poll() == LOCKED_OUT:
                raise ResourceError(f"a process could not be locked in as before ({level}). Nothing was run.")
    if not report:
        return Verdict(False, "no verdict in time")
    verdict = json.loads(report)
    return Verdict(bool(verdict["passed"]), str(verdict["why"]))


@contextlib.contextmanager
def _cell(role: str, fds: tuple[int, ...], job: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """A locked process with its job; at the end it, and all of its session, is killed."""
    process = subprocess.Popen(
        command(role, *fds), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        pass_fds=fds, env={}, cwd="/", start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdin is not None  # it was asked for
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(json.dumps(job).encode())
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _read(handle: int, deadline: float) -> bytes:
    """What the tests report before they end or the deadline passes."""
    report = b""
    while (left := deadline - time.monotonic()) > 0 and len(report) < 1 << 16:
        ready, _, _ = select.select([handle], [], [], left)
        piece = os.read(handle, 1 << 16) if ready else b""
        if not piece:
            break
        report += piece
    return report
