"""The benchmark for a real GPU is the program that runs there: its small form runs here, part by part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_its_small_form(tmp_path: Path) -> None:
    found = tmp_path / "rows.json"
    ran = subprocess.run(
        [
            sys.executable, "gpu.py", "--tiny", "--device", "cpu", "--json", str(found),
            "--parts", "correctness", "loss", "steps", "generation",
        ],
        cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(found.read_text())
    assert {row[0] for row in rows} == {"correctness", "loss", "steps", "generation"}
    errors = [row[4] for row in rows if row[0] == "correctness"]
    assert len(errors) >= 12 and max(errors) <= 1.05
