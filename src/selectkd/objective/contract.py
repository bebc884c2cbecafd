"""The contracts of the tables, for other people's functions: check_divergence and check_verifier.

Each raises AssertionError, naming the property that fails and the input that shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from selectkd.objective.divergences.closed_form import Block, Column, closed_form_of
from selectkd.objective.pair import dense_pair
from selectkd.objective.verifiers import Verifier, traits_of


def example_log_dists(
    n: int = 24, s: int = 11, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """n log-distributions over s outcomes, from uniform over peaked to one-hot and with impossible outcomes: [n, s]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, s, generator=generator, dtype=torch.float64)
    logits *= torch.logspace(-3, 2, n, dtype=torch.float64)[torch.randperm(n, generator=generator)][:, None]
    logits[0] = 0.0  # uniform
    logits[1] = -torch.inf
    logits[1, seed % s] = 0.0  # one-hot
    logits[2, :: 2 + seed % 3] = -torch.inf  # some outcomes impossible
    return torch.log_softmax(logits, -1).to(dtype)


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def check_divergence(
    divergence: Callable[[Tensor, Tensor], Tensor], *, merging: bool = True, bound: float | None = None
) -> None:
    """A divergence is [n, s] x [n, s] -> [n], finite, >= 0, 0 at p = q, token-local, with a true and finite gradient,
    and the closed form it states, if any, equals it in value and gradient.

    ``merging``: also that merging outcomes never raises it (the data-processing inequality, true of f-divergences and
    what makes a top-K value a lower bound). ``bound``: its declared largest value.

    >>> check_divergence(lambda logp, logq: 0.5 * (logp.exp() - logq.exp()).abs().sum(-1), bound=1.0)
    """
    p, q = example_log_dists(seed=1), example_log_dists(seed=2)
    n = p.shape[0]
    value = divergence(p, q)
    _must(value.shape == (n,), f"shape is {tuple(value.shape)}, not ({n},)")
    _must(bool(torch.isfinite(value).all()), f"not finite: {value}")
    _must(bool((value >= 0).all()), f"negative: {value.min()}")
    _must(
        bool((divergence(p, p.clone()).abs() <= 1e-12).all()),
        f"not 0 at p = q: {divergence(p, p.clone()).abs().max()}",
    )
    if bound is not None:
        _must(bool((value <= bound + 1e-9).all()), f"{value.max()} is above its bound {bound}")

    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    _must(torch.equal(divergence(p[order], q[order]), value[order]), "not token-local: permuted rows differ")
    _must(torch.equal(divergence(p[:5], q[:5]), value[:5]), "not token-local: a part of the rows differs")

    leaf = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(divergence(p, torch.log_softmax(leaf, -1)).sum(), leaf)
    _must(bool(torch.isfinite(grad).all()), "the gradient is not finite")
    smooth_p, smooth_q = (0.3 * torch.randn(6, 5, dtype=torch.float64, generator=seeded(k)) for k in (4, 5))
    target = torch.log_softmax(smooth_p, -1)
    _check_descends(divergence, target, smooth_q)

    for dtype in (torch.float32, torch.bfloat16):
        low = divergence(p.to(dtype), q.to(dtype))
        _must(
            bool((low >= 0).all() and torch.isfinite(low).all()), f"negative or not finite in {dtype}: {low}"
        )
        same = divergence(p.to(dtype), p.to(dtype))
        _must(bool((same == 0).all()), f"not exactly 0 at p = q in {dtype}: {same}")

    if closed_form_of(divergence) is not None:
        _check_closed_form(divergence)

    if merging:
        merged = divergence(_merge(p), _merge(q))
        _must(bool((merged <= value + 1e-9).all()), f"merging outcomes raised it by {(merged - value).max()}")


def seeded(seed: int) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def _check_descends(
    divergence: Callable[[Tensor, Tensor], Tensor], logp: Float[Tensor, "n s"], logits: Float[Tensor, "n s"]
) -> None:
    """A small step against the gradient lowers the divergence."""
    leaf = logits.clone().requires_grad_()
    before = divergence(logp, torch.log_softmax(leaf, -1))
    (grad,) = torch.autograd.grad(before.sum(), leaf)
    after = divergence(logp, torch.log_softmax(logits - 1e-3 * grad, -1))
    _must(bool((after < before.detach()).all()), "a step against the gradient does not lower it")


def _check_closed_form(divergence: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Value and gradient of the closed form equal the formula's and autograd's, in fp64."""
    closed_form = closed_form_of(divergence)
    p = torch.log_softmax(3.0 * torch.randn(16, 13, dtype=torch.float64, generator=seeded(8)), -1)
    logits = (3.0 * torch.randn(16, 13, dtype=torch.float64, generator=seeded(9))).requires_grad_()
    value = divergence(p, torch.log_softmax(logits, -1))
    (expected,) = torch.autograd.grad(value.sum(), logits)
    zq = logits.detach().clone()
    norm_p, norm_q = torch.linspace(-2.0, 2.0, 16, dtype=torch.float64), zq.logsumexp(-1)
    block = _block(p + norm_p[:, None], zq.clone(), norm_q[:, None], norm_p[:, None])
    assert closed_form is not None  # the caller looked
    stated = closed_form(block)
    _must(
        bool(torch.allclose(stated[:, 0], value.detach(), rtol=1e-9, atol=1e-11)),
        "the closed form's value differs",
    )
    _must(
        bool(torch.allclose(block.out * block.factor, expected, rtol=1e-8, atol=1e-11)),
        "the closed form's gradient differs",
    )


def _block(zp: Tensor, zq: Tensor, norm_q: Column, norm_p: Column) -> Block:
    return Block(
        zp=zp, zq=zq, norm_q=norm_q, norm_p=norm_p, p=(zp - norm_p).exp(), q=(zq - norm_q).exp(), out=zq,
        spare=torch.empty_like(zq),
    )  # fmt: skip


def _merge(log_dist: Float[Tensor, "n s"]) -> Float[Tensor, "n merged"]:
    """The last three outcomes as one: [n, s - 2]."""
    return torch.cat([log_dist[:, :-3], torch.logsumexp(log_dist[:, -3:], -1, keepdim=True)], -1)


def check_verifier(verifier: Verifier, *, accepts_equal: bool = True) -> None:
    """A verifier gives [n] numbers in [0, 1] (of 0 and more by ``traits.above_one``) without gradient, the same each
    time; token-local without ``keep``.

    ``accepts_equal``: also that a student equal to its teacher is accepted everywhere.

    >>> from selectkd.objective.verifiers import VERIFIERS
    >>> check_verifier(VERIFIERS["greedy_topk"](k=2))
    """
    traits = traits_of(verifier)
    r, needs = traits.uniforms_per_token, traits.teacher_tokens
    _must(isinstance(r, int) and r >= 0, f"uniforms_per_token is {r!r}, not an integer >= 0")
    _must(needs is None or (isinstance(needs, int) and needs >= 0), f"teacher_tokens is {needs!r}")
    p, q = example_log_dists(seed=1), example_log_dists(seed=2)
    n = p.shape[0]
    uniform = torch.rand(n, r, generator=seeded(6))
    label = torch.arange(n) % p.shape[1]
    pair = replace(dense_pair(p, q), label=label, logr=example_log_dists(seed=7))
    with torch.no_grad():
        a = verifier(pair, uniform)
        again = verifier(pair, uniform)
    _must(a.shape == (n,), f"shape is {tuple(a.shape)}, not ({n},)")
    most = float("inf") if traits.above_one else 1.0
    _must(bool(((a >= 0) & (a <= most)).all() and a.isfinite().all()), f"outside [0, {most:g}]: {a}")
    _must(torch.equal(a, again), "the same input gave another verdict: randomness must come from ``uniform``")
    if not traits.ranks:
        part = replace(dense_pair(p[3:9], q[3:9]), label=label[3:9])
        _must(
            torch.equal(verifier(part, uniform[3:9]), a[3:9]), "not token-local: a part of the rows differs"
        )
    if accepts_equal:
        same = replace(dense_pair(p, p.clone()), label=label, logr=pair.logr)
        _must(
            bool((verifier(same, uniform) >= 1.0 - 1e-6).all()),
            "a student equal to its teacher is not accepted",
        )
