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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from selectkd.data import jinja_process

SECONDS = 1.0
"""Processor time of a record whose messages are small: a template renders in microseconds to milliseconds."""
SECONDS_A_MEGABYTE = 0.3
"""More for long messages; plain templates need a tenth of it."""
MEMORY = 512 * 2**20
"""Bytes of memory of the process beside what messages need; it holds some 60 MB itself."""
MEMORY_A_BYTE = 40
MOST, MOST_A_BYTE = 4_000_000, 16
"""Characters a template may write: so many, and so many more for each one it is given."""

START = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"


class Job(NamedTuple):
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


class Renderings(NamedTuple):
    """Asks for the text of each job of a record by a template."""

    template: str
    jobs: Sequence[Job]

    def in_json(self, template: int) -> tuple[bytes, float, int]:
        """The record of a request, its seconds of processor time, and its size in bytes. A turn is in it once;
        template: the number of its template in the request.
        """
        turns: dict[int, Any] = {id(turn): turn for job in self.jobs for turn in job.messages}
        numbers = {key: number for number, key in enumerate(turns)}
        jobs = [([numbers[id(turn)] for turn in job.messages], job.tools, job.prompt) for job in self.jobs]
        body = jinja_process.in_json({"template": template, "turns": list(turns.values()), "jobs": jobs})
        seconds = SECONDS + SECONDS_A_MEGABYTE * len(body) / 1e6
        limits = b', "seconds": %f, "most": %d}' % (seconds, MOST + MOST_A_BYTE * len(body))
        return body[:-1] + limits, seconds, len(body)


Answer = str | Failure


class Renderer:
    """Renders with a process of its own; one request at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def __call__(
        self, asks: Sequence[Renderings], variables: Mapping[str, Any], moment: str
    ) -> Iterator[list[Answer]]:
        """For each record the text of each job, or why there is none, when it is wanted. moment: ISO date and time that
        a template may ask for. Records whose request ends the process are asked for one by one.
        """
        found = self._ask(asks, variables, moment)
        if not isinstance(found, Failure):
            yield from found
        elif len(asks) == 1:
            yield [found] * len(asks[0].jobs)
        else:
            for ask in asks:
                yield from self([ask], variables, moment)

    def _ask(
        self, asks: Sequence[Renderings], variables: Mapping[str, Any], moment: str
    ) -> list[list[Answer]] | Failure:
        """The answers to some records, or why they ended the process."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys(ask.template for ask in asks))}
        bodies, seconds, sizes = zip(*(ask.in_json(numbers[ask.template]) for ask in asks), strict=True)
        about = {
            "templates": list(numbers),
            "variables": dict(variables),
            "moment": moment,
            "memory": MEMORY + MEMORY_A_BYTE * sum(sizes),
        }
        request = jinja_process.in_json(about)[:-1] + b', "records": [' + b",".join(bodies) + b"]}"
        with self._lock:
            answers = self._asked(request, sum(seconds))
        if isinstance(answers, Failure):
            return answers
        return list(map(_answers, answers))

    def _asked(self, request: bytes, seconds: float) -> Any:
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
            return _failure(code)
        return answers

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


def _answers(record: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """The answers to a record's jobs as the process writes them: see ``jinja_process.rendered``."""
    answers, text = list[Answer](), ""
    for each in record:
        if "error" in each:
            text = ""
            answers.append(Failure(each["error"], each["message"]))
        else:
            text = (text if each.get("behind") else "") + each["text"]
            answers.append(text)
    return answers


def _failure(code: int) -> Failure:
    if sys.platform == "win32" or -code in (signal.SIGPROF, signal.SIGXCPU):
        return Failure("time")
    return Failure(
        "memory" if -code in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT) else "process", str(code)
    )


render = Renderer()
"""The renderer of this process."""
atexit.register(render.close)
