"""Fifty runs killed at random, by the command that ``make chaos`` runs; and what that rests on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tqdm.auto import tqdm

from faults.chaos import in_fork
from faults.forked import run_forked


def test_of_fifty_kills_at_random_none_leaves_a_run_stuck_or_different() -> None:
    ran = run_forked(str(Path(__file__).with_name("chaos.py")), "--kills", "50", "--seed", "50")
    assert ran.stdout.splitlines()[-1] == "kills 50, stuck 0, different 0", ran.stdout + ran.stderr


def test_a_run_killed_while_it_shows_progress_hangs_no_later_one() -> None:
    tqdm(total=1, disable=True).close()  # as in a process that has shown progress before

    def killed() -> None:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_fork(killed) == -signal.SIGKILL
    assert in_fork(lambda: tqdm.get_lock().acquire()) == 0
