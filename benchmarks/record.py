"""Rows of results.csv: what was measured, on what, with which versions, at which commit."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).with_name("results.csv")
COMMIT = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
).stdout.strip()
"""Of the code this process has loaded, which may be older than the last one when its rows are written."""
Row = tuple[str, str, str, float, float | str, int]
"""case, implementation, metric, value, spread or interval ("": neither), seeds or repeats."""


def record(benchmark: str, rows: Iterable[Row], *, beside: str = "", device: str = "") -> None:
    """Appends rows of a benchmark; ``beside`` names the version of another package that was measured, ``device`` the
    accelerator: without it the rows are of this processor."""
    device = device or f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    versions = f"torch {torch.__version__} transformers {transformers.__version__} {beside}".rstrip()
    today = datetime.date.today().isoformat()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        for case, implementation, metric, value, spread, seeds in rows:
            about = spread if isinstance(spread, str) else f"{spread:.3g}"
            row = [benchmark, case, implementation, metric, f"{value:.5g}", about, seeds, device, versions]
            writer.writerow([*row, COMMIT, today])
