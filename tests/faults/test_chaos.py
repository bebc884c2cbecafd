"""Fifty runs killed at random, by the command that ``make chaos`` runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_of_fifty_kills_at_random_none_leaves_a_run_stuck_or_different() -> None:
    room = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    harness = [sys.executable, str(Path(__file__).with_name("chaos.py")), "--kills", "50", "--seed", "50"]
    ran = subprocess.run(harness, env=room, capture_output=True, text=True, check=False)
    assert ran.stdout.splitlines()[-1] == "kills 50, stuck 0, different 0", ran.stdout
