"""How many threads the command line computes with, settled before torch loads and where the user has not."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def settle_threads(environment: MutableMapping[str, str] = os.environ, *, cgroup: Path = CGROUP) -> None:
    """Has idle threads sleep, where by default they spin and take the time of whatever else runs; and has no more of
    them than the processors a container may use, where torch counts the machine's.

    A run that goes on takes the number it began with, see ``training.run_folder``.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    most = processors(cgroup)
    if most is not None and most < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(most))


def processors(cgroup: Path) -> int | None:
    """The whole processors that a control group grants; None where it sets no limit."""
    try:
        if (two := cgroup / "cpu.max").is_file():
            quota, period = two.read_text().split()
        else:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        return max(1, math.floor(int(quota) / int(period))) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no control groups here
        return None
