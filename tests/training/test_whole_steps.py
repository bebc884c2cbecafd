"""One optimizer step gives one gradient, however its texts are cut into micro-batches and dealt to ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from training.tiny import padded
from training.whole_steps import EXAMPLES, cases, model, step_of

CASES = cases()


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """Every case as one micro-batch of eight texts."""
    student, loss_of = model()
    return {name: step_of(made(), padded(EXAMPLES, 8), student, loss_of) for name, made in CASES.items()}


def same(found: Tensor, whole: Tensor) -> None:
    assert whole[1:].abs().max() > 0
    # row scales are fp32, and so is 1 / |y|: equal in both, but sums of fp64 come in another order
    torch.testing.assert_close(found, whole, rtol=1e-7, atol=1e-9)


def test_eight_micro_batches_give_the_gradient_of_one(whole: dict[str, Tensor]) -> None:
    student, loss_of = model()
    wrong = []
    for name, made in CASES.items():
        try:
            same(step_of(made(), padded(EXAMPLES, 1), student, loss_of), whole[name])
        except AssertionError as error:
            wrong.append(f"{name}: {str(error).splitlines()[-1]}")
    assert not wrong, "\n".join(wrong)


def test_two_ranks_give_the_gradient_of_one(whole: dict[str, Tensor], tmp_path: Path) -> None:
    script = Path(__file__).with_name("whole_steps.py")
    room = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)], env=room) for rank in (0, 1)
    ]
    try:
        assert [one.wait(timeout=500) for one in both] == [0, 0]
    finally:
        for one in both:
            one.kill()
            one.wait()
    wrong = []
    for rank in (0, 1):
        for name, found in load_file(tmp_path / f"{rank}.safetensors").items():
            try:
                same(found, whole[name])
            except AssertionError as error:
                wrong.append(f"rank {rank}, {name}: {str(error).splitlines()[-1]}")
    assert not wrong, "\n".join(wrong)
