"""Runs killed at random go on with the samples that were next: a small form of tests/faults/sample_order.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_runs_killed_at_random_repeat_and_lose_no_sample() -> None:
    room = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = str(Path(__file__).with_name("sample_order.py"))
    ways = ["map-style", "streaming, packed"]
    ran = subprocess.run(
        [sys.executable, script, "--kills", "2", "--ways", *ways],
        env=room,
        capture_output=True,
        text=True,
        check=False,
    )
    for way, line in zip(ways, ran.stdout.splitlines(), strict=True):
        assert line.startswith(f"{way}: kills 2,") and line.endswith("repeated 0, lost 0"), (
            ran.stdout + ran.stderr
        )
