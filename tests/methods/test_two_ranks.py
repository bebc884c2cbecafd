"""On two ranks each writes its own text, keeps its own buffer and sums of its own, and goes on with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from faults.on_two_ranks import run_on_two_ranks
from faults.tiny_run import left
from selectkd.training.checkpoint.folder import all_in, read_part


@pytest.mark.slow
def test_two_ranks_that_write_text_go_on_to_the_same_bytes(pair: Path, tmp_path: Path) -> None:
    run_on_two_ranks(Path(__file__).with_name("two_rank_writers.py"), str(tmp_path), str(pair))
    for name in ("distillm2", "imitkd", "distillm"):
        whole = left(tmp_path / name / "whole")
        assert left(tmp_path / name / "stops") == whole
        assert {"writer-0.json", "writer-1.json"} <= set(whole)
    for name in ("imitkd", "distillm"):
        assert (
            parts_of(tmp_path / name, "writer-0")["buffers"]
            != parts_of(tmp_path / name, "writer-1")["buffers"]
        )
    mine, other = (parts_of(tmp_path / "distillm2", f"term-0-{rank}") for rank in (0, 1))
    assert mine["sums"] != other["sums"] and mine["anchor"] == other["anchor"]
    for key, anchor in mine["anchor"].items():  # the mean over the sequences of both ranks
        gaps, count = (a + b for a, b in zip(mine["sums"][key], other["sums"][key], strict=True))
        assert anchor == gaps / count


def parts_of(runs: Path, part: str) -> Any:
    """A part of the newest checkpoint of the whole run."""
    return read_part(all_in(runs / "whole" / "checkpoints")[0], part)
