"""How well this machine can lock a program in, found by locking one in and letting it try."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from selectkd.errors import ConfigError

CELL = Path(__file__).with_name("cell.py")
DEMANDED = ("rlimits", "unprivileged", "landlock", "seccomp")
"""Below this, a model's code is not run unless the user says so. Namespaces of its own come on top where they work."""
LOCKED_OUT = 98
"""The exit code of a process that could not lock itself in as its job demands."""
PATIENCE = 60.0
"""Seconds for a probe, which takes a tenth of one on an idle machine."""


@dataclass(frozen=True)
class Level:
    """What locks a program in here, by name, and what it could do all the same."""

    kept: tuple[str, ...]
    leaks: tuple[str, ...]

    @property
    def safe(self) -> bool:
        """Whether all of DEMANDED is kept and nothing leaks."""
        return set(DEMANDED) <= set(self.kept) and not self.leaks

    def __str__(self) -> str:
        open_to = f"; it {', '.join(self.leaks)}" if self.leaks else ""
        return " + ".join(self.kept or ("nothing",)) + open_to


@functools.cache
def level() -> Level:
    """The level of this machine; a system without the means (anything but Linux) keeps nothing."""
    if not sys.platform.startswith("linux"):
        return Level((), ("reads files", "writes files", "starts processes", "opens sockets"))
    read, write = os.pipe()
    try:
        job = {"cpu_seconds": 10, "memory": 1 << 30, "demand": [], "locked_out": LOCKED_OUT}
        done = subprocess.run(
            command("probe", write), input=json.dumps(job).encode(), pass_fds=(write,), env={}, cwd="/",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=PATIENCE, check=False, start_new_session=True,
        )  # fmt: skip
        os.close(write)
        report = os.read(read, 1 << 16)
    finally:
        os.close(read)
    if done.returncode != 0 or not report:
        return Level((), ("cannot be probed",))
    seen = json.loads(report)
    return Level(tuple(seen["kept"]), tuple(seen["leaks"]))


def require(*, unsafe: bool) -> Level:
    """The level, or ConfigError where it is too low and ``unsafe`` does not say to go on all the same."""
    found = level()
    if not found.safe and not unsafe:
        raise ConfigError(
            f"this machine locks a program in with {found} only; {', '.join(DEMANDED)} are needed (a Linux kernel "
            "with Landlock, and libseccomp2).\nRun this on such a machine, or in a throw-away container with "
            "--unsafe-exec."
        )
    return found


def command(role: str, *fds: int) -> list[str]:
    """How a cell is started: an interpreter without its environment, its user's packages and its site."""
    return [sys.executable, "-I", "-S", "-B", str(CELL), role, *map(str, fds)]
