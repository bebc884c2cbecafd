"""Every row of DIVERGENCES keeps the contract of the table."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selectkd.objective.contract import check_divergence, example_log_dists
from selectkd.objective.divergences import DIVERGENCES
from selectkd.objective.divergences.closed_form import closed_form_of

# the data-processing inequality holds for f-divergences (and for -log of an overlap); these seven are none
NOT_AN_F_DIVERGENCE = {
    "adaptive_kl", "taid", "alpha_beta", "kl_tv_hybrid", "uld", "router", "token_temperature",
}  # fmt: skip
BOUNDS = {
    "skew_kl": -math.log(0.1),
    "skew_reverse_kl": -math.log(0.1),
    "generalized_jsd": math.log(2.0),
    "total_variation": 1.0,
    "uld": 2.0,
    "neg_log_acceptance": 87.0,
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_keeps_the_contract(name):
    check_divergence(DIVERGENCES[name], merging=name not in NOT_AN_F_DIVERGENCE, bound=BOUNDS.get(name))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("jeffreys", {"weight": 0.2}),
        ("skew_kl", {"alpha": 0.3}),
        ("skew_reverse_kl", {"alpha": 0.3}),
        ("skew_reverse_kl", {"alpha": 0.3, "detach_mixture": True}),
        ("generalized_jsd", {"beta": 0.1}),
        ("generalized_jsd", {"beta": 1.0}),
        ("alpha_beta", {"alpha": 1.0, "beta": 0.0}),
        ("alpha_beta", {"alpha": 0.0, "beta": 0.5}),
        ("alpha_beta", {"alpha": 0.3, "beta": 0.9}),
        ("adaptive_kl", {"mu": 0.8}),
    ],
)
def test_the_closed_form_equals_the_formula_at_other_parameters(name, params):
    divergence = functools.partial(DIVERGENCES[name], **params)
    merging = name not in NOT_AN_F_DIVERGENCE
    if params.get("beta") == 1.0 and name == "generalized_jsd":
        with pytest.raises(AssertionError, match="does not lower it"):  # it is 0 everywhere
            check_divergence(divergence, merging=merging)
    else:
        check_divergence(divergence, merging=merging)


def test_every_divergence_of_the_paper_states_its_gradient():
    without = {name for name, function in DIVERGENCES.items() if closed_form_of(function) is None}
    assert without == {"taid", "kl_tv_hybrid", "uld", "router", "token_temperature"}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_gradient_equals_the_numerical_one(name):
    generator = torch.Generator().manual_seed(0)
    logp = torch.log_softmax(torch.randn(3, 6, generator=generator, dtype=torch.float64), -1)
    logits = torch.randn(3, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    frozen = {
        "adaptive_kl",
        "todi",
        "taid",
        "kl_tv_hybrid",
        "token_temperature",
    }  # these stop the gradient through their weights
    if name in frozen:
        (grad,) = torch.autograd.grad(DIVERGENCES[name](logp, torch.log_softmax(logits, -1)).sum(), logits)
        assert grad.abs().max() > 0
        assert grad.sum(-1).abs().max() < 1e-12  # along the simplex
    else:
        assert torch.autograd.gradcheck(
            lambda z: DIVERGENCES[name](logp, torch.log_softmax(z, -1)), (logits,)
        )


@pytest.mark.parametrize("name", DIVERGENCES)
@settings(derandomize=True, deadline=None, max_examples=25)
@given(scale=st.floats(0.0, 200.0), seed=st.integers(0, 10_000), masked=st.integers(0, 4))
def test_no_input_makes_it_negative_or_not_finite_in_bf16(name, scale, seed, masked):
    generator = torch.Generator().manual_seed(seed)
    p, q = (scale * torch.randn(4, 9, generator=generator) for _ in range(2))
    p[:, :masked] = -torch.inf
    q[:, masked : 2 * masked] = -torch.inf
    logp = torch.log_softmax(p, -1).bfloat16()
    leaf = q.clone().requires_grad_()
    logq = torch.log_softmax(leaf, -1).bfloat16()
    value = DIVERGENCES[name](logp, logq)
    assert bool((value >= 0).all()) and bool(torch.isfinite(value).all())
    (grad,) = torch.autograd.grad(value.float().sum(), leaf)
    assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize(
    "name", ["forward_kl", "reverse_kl", "skew_kl", "skew_reverse_kl", "generalized_jsd"]
)
def test_a_token_the_teacher_forbids_costs_a_finite_amount_and_is_pushed_down(name):
    logp = torch.tensor([[0.5, 0.5, 0.0]]).log()
    leaf = torch.tensor([[0.0, 0.0, 50.0]], requires_grad=True)
    value = DIVERGENCES[name](logp, torch.log_softmax(leaf, -1))
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    assert bool(torch.isfinite(value).all()) and bool(torch.isfinite(grad).all())


def test_adaptive_kl_keeps_its_head_in_vocabulary_order():
    # the teacher's head (token 2) lies last: a mask left in sorted order would weigh token 0 instead
    logp = torch.tensor([[0.1, 0.2, 0.7]], dtype=torch.float64).log()
    logq = torch.tensor([[0.1, 0.3, 0.6]], dtype=torch.float64).log()
    forward, reverse = (DIVERGENCES[n](logp, logq) for n in ("forward_kl", "reverse_kl"))
    head, tail = abs(0.7 - 0.6), abs(0.2 - 0.3)
    expected = (head * forward + tail * reverse) / (head + tail)
    assert DIVERGENCES["adaptive_kl"](logp, logq, mu=0.5).item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_example_distributions_sum_to_one(dtype):
    total = example_log_dists(dtype=dtype).exp().sum(-1)
    assert (total - 1).abs().max() < 1e-6
