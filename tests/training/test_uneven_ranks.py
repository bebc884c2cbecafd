"""A micro-batch that reaches no head row, or not every parameter, on one rank or on all: two ranks are one process."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from faults.on_two_ranks import run_on_two_ranks
from training.uneven_ranks import CASES, student_of, trained


def test_a_parameter_without_a_gradient_on_one_rank_trains_as_in_one_process(tmp_path: Path) -> None:
    """A head of its own where a micro-batch teaches nothing, and a parameter that one rank's batch does not reach."""
    run_on_two_ranks(Path(__file__).with_name("uneven_ranks.py"), str(tmp_path))
    for case, spread in CASES:
        alone = trained(case, spread, accumulation=4, folder=tmp_path / "alone")
        both = load_file(tmp_path / f"{case}-{spread}.safetensors")
        assert alone.keys() == both.keys()
        if case == "text_alone":
            begun = student_of(case).state_dict()
            assert not any(
                torch.equal(alone[name], begun[name]) for name in alone if "vision_tower.enc" in name
            )
        for name, weight in alone.items():
            # AdamW's first step is the gradient's sign: 2e-5 is 2e-3 of a step of 1e-2
            torch.testing.assert_close(
                both[name], weight, rtol=1e-4, atol=2e-5, msg=f"{case} {spread} {name}"
            )
