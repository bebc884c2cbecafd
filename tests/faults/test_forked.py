"""A program in a fork ends and prints as one that was started: what the tests of two ranks rest on."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from faults.forked import Forked, run_forked
from faults.on_two_ranks import run_on_two_ranks
from selectkd import __version__

PROGRAM = """
import os, random, signal, sys, threading, time
import numpy
if __name__ == "__main__":
    print(sys.argv[1:], os.environ.get("GIVEN"), threading.active_count(), random.random(), numpy.random.rand())
    print("said", file=sys.stderr)
    what = sys.argv[1]
    if what == "raises":
        raise ValueError("this one")
    if what == "sleeps":
        time.sleep(100)
    if what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(what))
"""


def test_a_program_in_a_fork_ends_and_prints_as_one_that_was_started(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, "utf-8")
    printed = []
    for what, code in (("0", 0), ("7", 7), ("raises", 1), ("dies", -signal.SIGKILL)):
        ended = run_forked(str(script), what, GIVEN="a b")
        assert (ended.returncode, ended.stderr.splitlines()[:1]) == (code, ["said"])
        assert what == "dies" or ended.stdout.startswith(f"['{what}'] a b 1 ")
        assert what != "raises" or "ValueError: this one" in ended.stderr
        printed.append(ended.stdout.split()[-2:])
    assert printed[0] != printed[1], "each draws from a generator of its own"
    slow = Forked(str(script), "sleeps", environment={"GIVEN": ""})
    with pytest.raises(subprocess.TimeoutExpired):
        slow.end(0.2)
    slow.kill()
    assert slow.process.exitcode == -signal.SIGKILL
    assert run_forked("-m", "selectkd", "--version").stdout == f"{__version__}\n"
    with pytest.raises(AssertionError, match=r"\[1, 1\][\s\S]*ValueError: this one"):
        run_on_two_ranks(script, "raises")
