"""Filtering leaves the loss alone, keeps its stated bound, and costs less than the dense products."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from selectkd import Head, LiveRows, Objective, distillation_loss
from selectkd.errors import ConfigError
from selectkd.loss.products import Strong, hidden_gradient, strong_columns

N, V, D = 96, 3000, 24


def peaked(dtype=torch.float64, *, scale=6.0):
    """Two models that are sure of most tokens, and agree on most."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64) / D**0.5
    hidden = scale * torch.randn(8, D, generator=g, dtype=torch.float64).repeat(N // 8, 1)
    hidden += 0.3 * torch.randn(N, D, generator=g, dtype=torch.float64)
    other = hidden + 0.5 * torch.randn(N, D, generator=g, dtype=torch.float64)
    return (x.to(dtype) for x in (hidden, weight, other))


def run(share, *, dtype=torch.float64, name="forward_kl", chunk=32, scale=6.0, bias=False):
    hidden, weight, other = peaked(dtype, scale=scale)
    leaves = [hidden.requires_grad_(), weight.clone().requires_grad_()]
    if bias:
        leaves.append(torch.zeros(V, dtype=dtype, requires_grad=True))
    head = Head(leaves[1], leaves[2] if bias else None)
    with FlopCounterMode(display=False) as counted:
        loss, _ = distillation_loss(
            leaves[0], head, LiveRows(other, weight), Objective(name, "greedy_topk", beta=0.5), chunk=chunk,
            gradient_filter=share,
        )  # fmt: skip
        gradients = torch.autograd.grad(loss, leaves)
    return loss, gradients, counted.get_total_flops() / (2 * N * V * D)


def distance(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd", "skew_kl"])
def test_filtering_changes_no_loss_and_costs_fewer_products(name):
    exact_loss, exact, _ = run(0.0, name=name)
    loss, gradients, cost = run(2.0**-10, name=name)
    assert torch.equal(loss, exact_loss)
    assert cost < 3.0  # of four; the two of the logits are always there
    assert all(0 < distance(x, y) < 0.02 for x, y in zip(gradients, exact, strict=True))


def test_what_filtering_leaves_out_stays_below_the_stated_bound():
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(16, V, generator=generator, dtype=torch.float64) * 1e-5
    gradient[:, :50] += torch.randn(16, 50, generator=generator, dtype=torch.float64)
    share = 1e-3
    strong = strong_columns(gradient, share)
    assert strong is not None
    left_out = gradient.clone()
    left_out[:, strong.ids] = 0.0
    assert left_out.abs().max() < share * gradient.abs().max()
    torch.testing.assert_close(strong.rest, left_out.sum(-1))
    assert strong.profile.sum().item() == pytest.approx(1.0) and not strong.profile[strong.ids].any()
    bound = share * gradient.abs().max() * gradient.numel() ** 0.5
    assert left_out.norm() <= bound


def test_the_tail_brings_back_a_mass_that_every_row_lost_alike():
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    mass, shape = (
        torch.rand(16, generator=g, dtype=torch.float64),
        torch.rand(V, generator=g, dtype=torch.float64),
    )
    gradient = 1e-4 * mass[:, None] * shape
    gradient[:, :20] = torch.randn(16, 20, generator=g, dtype=torch.float64)
    strong = strong_columns(gradient, 1e-2)
    assert isinstance(strong, Strong) and set(strong.ids.tolist()) <= set(range(20))
    torch.testing.assert_close(hidden_gradient(gradient, weight, strong), gradient @ weight)  # rank 1: exact


def test_flat_distributions_fall_back_to_the_dense_products():
    exact = run(0.0, scale=0.1)
    dense = run(2.0**-14, scale=0.1)
    assert dense[2] == pytest.approx(4.0)
    assert all(torch.equal(x, y) for x, y in zip(dense[1], exact[1], strict=True))


def test_filtering_errs_less_than_the_plain_bf16_program():
    _, truth, _ = run(0.0)
    _, filtered, cost = run(2.0**-14)
    hidden, weight, other = peaked(torch.bfloat16)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    objective = Objective("forward_kl", "greedy_topk", beta=0.5)
    plain = torch.autograd.grad(
        distillation_loss(h, w, LiveRows(other, weight.detach()), objective)[0], (h, w)
    )
    assert cost < 4.0
    for ours, rounded, exact in zip(filtered, plain, truth, strict=True):
        assert distance(ours, exact) < 0.5 * distance(rounded, exact)


@pytest.mark.parametrize("chunk", [32, 96])
def test_a_bf16_head_is_filtered_as_well(chunk):
    _, exact, _ = run(0.0, dtype=torch.bfloat16, chunk=chunk)
    _, ours, cost = run(2.0**-10, dtype=torch.bfloat16, chunk=chunk)
    assert cost < 3.0 and all(distance(x, y) < 0.02 for x, y in zip(ours, exact, strict=True))


def test_the_bias_keeps_its_whole_gradient():
    assert torch.equal(run(2.0**-10, bias=True)[1][2], run(0.0, bias=True)[1][2])


def test_a_share_outside_its_range_is_refused():
    with pytest.raises(ConfigError, match=r"gradient_filter = 1\.5"):
        run(1.5)
