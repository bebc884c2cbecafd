"""Fifty runs killed at random, by the command that ``make chaos`` runs; and what that rests on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tqdm.auto import tqdm

from faults.chaos import in_fork


def test_of_fifty_kills_at_random_none_leaves_a_run_stuck_or_different() -> None:
    room = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    harness = [sys.executable, str(Path(__file__).with_name("chaos.py")), "--kills", "50", "--seed", "50"]
    ran = subprocess.run(harness, env=room, capture_output=True, text=True, check=False)
    assert ran.stdout.splitlines()[-1] == "kills 50, stuck 0, different 0", ran.stdout


def test_a_run_killed_while_it_shows_progress_hangs_no_later_one() -> None:
    tqdm(total=1, disable=True).close()  # as in a process that has shown progress before

    def killed() -> None:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_fork(killed) == -signal.SIGKILL
    assert in_fork(lambda: tqdm.get_lock().acquire()) == 0
