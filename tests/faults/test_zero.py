"""DeepSpeed's ZeRO on two ranks: the numbers of DDP, a step left out by both, and going on to the same bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from faults.on_two_ranks import run_on_two_ranks
from faults.tiny_run import left
from faults.zero_runs import ROWS

ROUNDING = 2e-6
"""fp32, six steps: another order of the sum over ranks, another way to clip; seen 8e-8."""


@pytest.mark.parametrize("stage", ["2", "3"])
def test_zero_trains_as_ddp_skips_the_same_step_on_both_ranks_and_goes_on_to_the_same_bytes(
    pair: Path, tmp_path: Path, stage: str
) -> None:
    """Losses, gradient norms, held-out measures and weights of DDP; the student it leaves is a plain folder."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'selectkd[deepspeed]'")
    script = Path(__file__).with_name("zero_runs.py")
    run_on_two_ranks(script, str(tmp_path / "ddp"), str(pair), "ddp")
    told = run_on_two_ranks(script, str(tmp_path / stage), str(pair), stage)
    assert "gone on from step" in told
    for name in (*ROWS, "whole"):
        ours, theirs = tmp_path / stage / name, tmp_path / "ddp" / name
        close(lines(ours), lines(theirs), name)
        weights, wanted = (load_file(run / "student" / "model.safetensors") for run in (ours, theirs))
        assert weights.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(weights[key], value, rtol=ROUNDING, atol=ROUNDING)
        AutoModelForCausalLM.from_pretrained(ours / "student")
    assert left(tmp_path / stage / "stops") == left(tmp_path / stage / "whole")
    bad = {path.name for path in (tmp_path / stage / "whole" / "bad_batches").iterdir()}
    assert bad == {"step-000002-rank-0.json", "step-000002-rank-1.json"}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def close(ours: Any, theirs: Any, where: str) -> None:
    """The same nest of the same numbers, to fp32 rounding."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            close(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            close(mine, other, f"{where}.{number}")
    elif isinstance(theirs, float):
        assert math.isclose(ours, theirs, rel_tol=ROUNDING, abs_tol=ROUNDING), f"{where}: {ours}, {theirs}"
    else:
        assert ours == theirs, where
