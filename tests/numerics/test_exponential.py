"""e^z both ways: by exp, and by exp2 where the processor's exp is slow."""

import pytest
import torch

from selectkd.loss import block_steps


@pytest.mark.parametrize("by_two", [False, True])
def test_both_ways_are_e_to_the_z(monkeypatch, by_two):
    monkeypatch.setattr(block_steps, "exp2_is_faster", lambda: by_two)
    z = torch.linspace(-60, 60, 4099)
    found = block_steps.exp_into(z, torch.empty_like(z)).double()
    error = (found / z.double().exp() - 1).abs()
    assert (error <= 2**-22 + z.double().abs() * 1.5 * 2**-24).all(), error.max()
    assert not torch.equal(found.float(), z.exp()) or not by_two  # the way by two was taken


@pytest.mark.parametrize("by_two", [False, True])
def test_a_forbidden_token_gets_nothing_and_a_row_of_nan_stays_one(monkeypatch, by_two):
    monkeypatch.setattr(block_steps, "exp2_is_faster", lambda: by_two)
    z = torch.tensor([-torch.inf, -1e4, torch.nan, 0.0])
    found = block_steps.exp_into(z, torch.empty_like(z))
    assert found[0] == 0 and found[1] == 0 and found[2].isnan() and found[3] == 1


def test_fp64_is_never_taken_by_two(monkeypatch):
    monkeypatch.setattr(block_steps, "exp2_is_faster", lambda: True)
    z = torch.linspace(-300, 300, 999, dtype=torch.float64)
    assert torch.equal(block_steps.exp_into(z, torch.empty_like(z)), z.exp())
