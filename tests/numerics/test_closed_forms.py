"""Divergences against formulas written out here in fp64, and against their limits."""

from __future__ import annotations

import math

import pytest
import torch

from selectkd.objective.divergences import DIVERGENCES as D

P = torch.softmax(torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64), -1)
Q = torch.softmax(torch.randn(5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64), -1)


def kl(a, b):
    return (a * (a / b).log()).sum(-1)


def jsd(beta):
    m = beta * P + (1 - beta) * Q
    return beta * kl(P, m) + (1 - beta) * kl(Q, m)


def ab(a, b):
    terms = P**a * Q**b - a / (a + b) * P ** (a + b) - b / (a + b) * Q ** (a + b)
    return -terms.sum(-1) / (a * b)


def todi_value():
    w = P / (P + Q)
    return (w * P * (P / Q).log() + (1 - w) * Q * (Q / P).log()).sum(-1)


def taid_value(t):
    m = torch.softmax((1 - t) * Q.log() + t * P.log(), -1)
    return kl(m, Q)


def hybrid():
    alpha = torch.minimum(P, Q).sum(-1)
    share = (-3 * alpha).exp()
    return share * kl(P, Q) + (1 - share) * 0.5 * (P - Q).abs().sum(-1)


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("forward_kl", {}, kl(P, Q)),
        ("reverse_kl", {}, kl(Q, P)),
        ("jeffreys", {"weight": 0.3}, 0.7 * kl(P, Q) + 0.3 * kl(Q, P)),
        ("skew_kl", {"alpha": 0.1}, kl(P, 0.1 * P + 0.9 * Q)),
        ("skew_reverse_kl", {"alpha": 0.1}, kl(Q, 0.9 * P + 0.1 * Q)),
        ("skew_reverse_kl", {"alpha": 0.1, "detach_mixture": True}, kl(Q, 0.9 * P + 0.1 * Q)),
        ("generalized_jsd", {"beta": 0.5}, jsd(0.5)),
        ("generalized_jsd", {"beta": 0.9}, jsd(0.9)),
        ("total_variation", {}, 0.5 * (P - Q).abs().sum(-1)),
        ("alpha_beta", {"alpha": 0.2, "beta": 0.7}, ab(0.2, 0.7)),
        ("alpha_beta", {"alpha": 0.7, "beta": 0.2}, ab(0.7, 0.2)),
        ("todi", {}, todi_value()),
        ("taid", {"t": 0.4}, taid_value(0.4)),
        ("neg_log_acceptance", {}, -torch.minimum(P, Q).sum(-1).log()),
        ("kl_tv_hybrid", {}, hybrid()),
    ],
)
def test_a_divergence_equals_its_formula(name, params, expected):
    torch.testing.assert_close(D[name](P.log(), Q.log(), **params), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("near", "limit"),
    [
        (lambda: D["alpha_beta"](P.log(), Q.log(), alpha=1.0, beta=1e-8), "forward_kl"),
        (lambda: D["alpha_beta"](P.log(), Q.log(), alpha=1e-8, beta=1.0), "reverse_kl"),
        (lambda: D["skew_kl"](P.log(), Q.log(), alpha=1e-8), "forward_kl"),
        (lambda: D["skew_reverse_kl"](P.log(), Q.log(), alpha=1e-8), "reverse_kl"),
        (lambda: D["generalized_jsd"](P.log(), Q.log(), beta=1e-8) / 1e-8, "forward_kl"),
        (lambda: D["generalized_jsd"](P.log(), Q.log(), beta=1 - 1e-8) / 1e-8, "reverse_kl"),
        (lambda: D["taid"](P.log(), Q.log(), t=1 - 1e-9), "forward_kl"),
    ],
)
def test_a_family_is_continuous_towards_its_limits(near, limit):
    # the distance to the limit is first order in the 1e-8 step: 1e-6 leaves a factor of 100
    torch.testing.assert_close(near(), D[limit](P.log(), Q.log()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_endpoints_of_the_jensen_shannon_family_are_its_own_limits(beta):
    assert D["generalized_jsd"](P.log(), Q.log(), beta=beta).abs().max() == 0.0


def test_detaching_the_mixture_changes_the_gradient_and_not_the_value():
    def run(detach):
        logits = Q.log().clone().requires_grad_()
        value = D["skew_reverse_kl"](P.log(), torch.log_softmax(logits, -1), alpha=0.1, detach_mixture=detach)
        return value.detach(), torch.autograd.grad(value.sum(), logits)[0]

    (value, grad), (detached_value, detached_grad) = run(False), run(True)
    assert torch.equal(value, detached_value)
    assert (grad - detached_grad).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted(set(D) - {"taid"}))
@pytest.mark.parametrize("dtype", [torch.float32])
def test_fp32_is_no_worse_than_the_plain_program(name, dtype):
    # near equality the plain formula in fp32 has lost all digits; ours must not be worse than 1.05 x its error
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = torch.log_softmax(logits, -1)
    q = torch.log_softmax(
        logits + 1e-2 * torch.randn(64, 500, generator=torch.Generator().manual_seed(1)), -1
    )
    exact = D[name](p, q)
    error = (D[name](p.to(dtype), q.to(dtype)).double() - exact).norm()
    plain = (D["forward_kl"](p, q) - _plain_kl(p.to(dtype), q.to(dtype)).double()).norm()
    if name in (
        "forward_kl",
        "reverse_kl",
        "jeffreys",
        "skew_kl",
        "skew_reverse_kl",
        "generalized_jsd",
        "adaptive_kl",
    ):
        assert error <= 1.05 * plain
    assert error <= 1e-4 * exact.norm() + 1e-6  # the conditioning of fp32 inputs 1e-2 apart


def _plain_kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum(-1)


def test_skew_kl_of_disjoint_distributions_is_minus_log_alpha():
    one, other = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log()
    assert D["skew_kl"](one, other, alpha=0.1).item() == pytest.approx(-math.log(0.1), rel=1e-6)
