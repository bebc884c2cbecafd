"""Runs killed at random go on with the samples that were next: a small form of tests/faults/sample_order.py."""

from __future__ import annotations

from pathlib import Path

from faults.forked import run_forked


def test_runs_killed_at_random_repeat_and_lose_no_sample() -> None:
    script = str(Path(__file__).with_name("sample_order.py"))
    ways = ["map-style", "streaming, packed"]
    ran = run_forked(script, "--kills", "2", "--ways", *ways)
    for way, line in zip(ways, ran.stdout.splitlines(), strict=True):
        assert line.startswith(f"{way}: kills 2,") and line.endswith("repeated 0, lost 0"), (
            ran.stdout + ran.stderr
        )
