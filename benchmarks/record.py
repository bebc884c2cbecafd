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


def record(benchmark: str, rows: Iterable[tuple[str, str, str, float | str, float | str, int | str]]) -> None:
    """Appends rows (case, implementation, metric, value, spread, seeds) of a benchmark."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    device = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    versions = f"torch {torch.__version__} transformers {transformers.__version__}"
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        for case, implementation, metric, value, spread, seeds in rows:
            shown = f"{value:.5g}" if isinstance(value, float) else value
            about = f"{spread:.3g}" if isinstance(spread, float) else spread
            writer.writerow(
                [benchmark, case, implementation, metric, shown, about, seeds, device, versions, commit,
                 datetime.date.today().isoformat()]
            )  # fmt: skip
