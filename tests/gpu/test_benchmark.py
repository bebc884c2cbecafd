"""The benchmark for a real GPU is the program that runs there: its small form runs here, part by part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faults.forked import run_forked

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_its_small_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tmp_path / "rows.json"
    monkeypatch.chdir(ROOT / "benchmarks")
    parts = ("correctness", "loss", "steps", "generation")
    ran = run_forked("gpu.py", "--tiny", "--device", "cpu", "--json", str(found), "--parts", *parts)
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(found.read_text())
    assert {row[0] for row in rows} == {*parts}
    errors = [row[4] for row in rows if row[0] == "correctness"]
    assert len(errors) >= 12 and max(errors) <= 1.05
