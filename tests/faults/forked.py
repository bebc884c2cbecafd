"""Programs in forks of multiprocessing's fork server, which has torch, transformers and selectkd imported: a program
starts in milliseconds instead of the seconds that its imports take.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PRELOADED = ["selectkd.evals.studies.preloaded", "pytest"]
"""A fork server keeps what it was started with, so all tests name the same modules."""


def fork_server() -> Any:
    """The context of multiprocessing whose processes are such forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Forked:
    """A program in a fork: a script, a module after ``-m`` or code after ``-c``, with arguments; what it prints goes
    into files.

    environment: added to this process's. ``end`` is its exit code, or minus the signal that ended it, and its output.
    """

    def __init__(self, *command: str, environment: dict[str, str] | None = None) -> None:
        self.command = command
        self.printed = [tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2)]  # noqa: SIM115
        files = [file.name for file in self.printed]
        around = {**os.environ, **(environment or {})}
        self.process = fork_server().Process(target=_program, args=(command, around, files))
        self.process.start()

    def end(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """What became of it; TimeoutExpired where it is still at work after so many seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.command, timeout)
        said, errors = (file.read() for file in self.printed)
        return subprocess.CompletedProcess(self.command, self.process.exitcode, said, errors)

    def kill(self) -> None:
        """Ends it where it is still at work; what it printed goes."""
        self.process.kill()
        self.process.join()
        for file in self.printed:
            file.close()


def run_forked(*command: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a fork, as ``subprocess.run`` runs it."""
    program = Forked(*command, environment=environment)
    try:
        return program.end(timeout)
    finally:
        program.kill()


def _program(command: tuple[str, ...], environment: dict[str, str], files: list[str]) -> None:
    for number, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # two forks would draw alike; of Python's own generator Python takes care
    if command[0] == "-c":
        sys.argv[:] = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    elif command[0] == "-m":
        sys.argv[:] = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
