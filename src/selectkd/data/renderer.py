"""The way to the process that renders chat templates (``jinja_process``): started when first needed, replaced when a
template has ended it.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectkd.data import jinja_process

SECONDS = 1.0
"""Processor time of a request whose messages are small: a template renders in microseconds to milliseconds."""
SECONDS_A_MEGABYTE = 0.3
"""More for long messages; plain templates need a tenth of it."""
MEMORY = 512 * 2**20
"""Bytes of memory of the process beside what messages need; it holds some 60 MB itself."""
MEMORY_A_BYTE = 40
MOST, MOST_A_BYTE = 4_000_000, 16
"""Characters a template may write: so many, and so many more for each byte it is given."""

START = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"


@dataclass(frozen=True)
class Job:
    """One rendering: messages and tools, and whether the generation prompt follows them."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    prompt: bool = False


@dataclass(frozen=True)
class Failure:
    """Why a rendering is not there. kind: the name of the exception, ``template`` for one that the template raises
    itself, ``time``, ``memory`` or ``process``.
    """

    kind: str
    message: str = ""


Answer = str | Failure


class Renderer:
    """Renders with a process of its own; one request at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def __call__(
        self, template: str, variables: Mapping[str, Any], moment: str, jobs: Sequence[Job]
    ) -> list[Answer]:
        """The text of each job, or why there is none. moment: ISO date and time that a template may ask for."""
        size = len(template) + sum(_size(job.messages) + _size(job.tools) for job in jobs)
        seconds = SECONDS + SECONDS_A_MEGABYTE * size / 1e6
        request = {
            "template": template,
            "variables": dict(variables),
            "moment": moment,
            "jobs": [{"messages": job.messages, "tools": job.tools, "prompt": job.prompt} for job in jobs],
            "seconds": seconds,
            "memory": MEMORY + MEMORY_A_BYTE * size,
            "most": MOST + MOST_A_BYTE * size,
        }
        with self._lock:
            return self._ask(request, seconds)

    def _ask(self, request: dict[str, Any], seconds: float) -> list[Answer]:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        # Windows has no limit of processor time: there the clock on the wall ends the process.
        clock = threading.Timer(4 * seconds, process.kill) if sys.platform == "win32" else None
        if clock is not None:
            clock.start()
        answered = False
        try:
            jinja_process.send(process.stdin, request)
            answers = jinja_process.read(process.stdout)
            answered = True
        except OSError:  # the pipe broke: the process has ended, and its exit code is read below
            answers, answered = None, True
        finally:
            if clock is not None:
                clock.cancel()
            if not answered:  # an interrupt between question and answer: a half-read answer is of no use
                self.close()
        if answers is None:
            code = process.wait()
            self._drop()
            return [_ended(code)] * len(request["jobs"])
        return [
            each["text"] if "text" in each else Failure(each["error"], each["message"]) for each in answers
        ]

    def _started(self) -> subprocess.Popen[bytes]:
        process = self._process
        if (
            process is None or process.poll() is not None or self._owner != os.getpid()
        ):  # a fork has its parent's
            self._drop()
            script = str(Path(jinja_process.__file__))
            process = self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", START, script, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt from the keyboard is for us alone
            )
            self._owner = os.getpid()
        return process

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._drop()

    def _drop(self) -> None:
        """Closes our ends of the pipes; the process ends when its input does."""
        process, self._process = self._process, None
        for pipe in (None, None) if process is None else (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # unsent bytes to a process that has ended
                    pipe.close()


def _ended(code: int) -> Failure:
    if sys.platform == "win32" or -code in (signal.SIGPROF, signal.SIGXCPU):
        return Failure("time")
    return Failure(
        "memory" if -code in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT) else "process", str(code)
    )


def _size(value: Any) -> int:
    """About how many bytes a value has as JSON."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(str(key)) + _size(each) + 6 for key, each in value.items())
    if isinstance(value, list | tuple):
        return sum(_size(each) + 2 for each in value)
    return 8


render = Renderer()
"""The renderer of this process."""
atexit.register(render.close)
