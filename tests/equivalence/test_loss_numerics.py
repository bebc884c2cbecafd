"""The fused loss in low precision, at peaked rows and with rejected rows thinned is finite, unbiased and no worse."""

from __future__ import annotations

import pytest
import torch

from equivalence.test_distillation_loss import N, rows
from selectkd import LiveRows, Objective, distillation_loss, uniforms
from selectkd.loss.block_steps import argmax
from selectkd.objective.divergences import DIVERGENCES


def test_bf16_is_no_worse_than_the_plain_program():
    hidden, weight, teacher_hidden, teacher_weight = (t.detach() for t in rows(n=300))
    exact_loss, _ = distillation_loss(
        hidden.requires_grad_(), weight.requires_grad_(), LiveRows(teacher_hidden, teacher_weight),
        Objective("forward_kl", "always"),
    )  # fmt: skip
    exact = torch.autograd.grad(exact_loss, (hidden, weight))
    low = [t.detach().bfloat16() for t in (hidden, weight, teacher_hidden, teacher_weight)]
    h, w = low[0].requires_grad_(), low[1].requires_grad_()
    loss, _ = distillation_loss(h, w, LiveRows(low[2], low[3]), Objective("forward_kl", "always"), chunk=64)
    ours = torch.autograd.grad(loss, (h, w))
    logp, logq = (
        torch.log_softmax((low[2] @ low[3].t()).float(), -1),
        torch.log_softmax((h @ w.t()).float(), -1),
    )
    plain = torch.autograd.grad(
        torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="batchmean"), (h, w)
    )
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert (mine.double() - truth).norm() <= 1.05 * (theirs.double() - truth).norm()


@pytest.mark.parametrize("verifier", ["greedy_topk", "expected_spec_k"])
def test_thinning_rejected_rows_estimates_loss_and_gradient_without_bias(verifier):
    hidden, weight, teacher_hidden, teacher_weight = rows()
    teacher = LiveRows(teacher_hidden, teacher_weight)
    exact, _ = distillation_loss(hidden, weight, teacher, Objective("forward_kl", verifier, beta=0.3))
    exact_grad = torch.autograd.grad(exact, hidden)[0]
    thin = Objective("forward_kl", verifier, beta=0.3, thin_rejected=True)
    trials, losses, grads = 600, [], []
    for step in range(trials):
        loss, sums = distillation_loss(hidden, weight, teacher, thin, uniforms(N, 1, seed=5, step=step))
        assert set(sums["row_weight"].unique().tolist()) <= {0.0, 1.0}
        losses.append(loss.detach())
        grads.append(torch.autograd.grad(loss, hidden)[0])
    losses, grads = torch.stack(losses), torch.stack(grads)
    error = (losses.mean() - exact).abs() / (losses.std() / trials**0.5)
    assert error < 4  # 4 sigma of 600 trials
    z = (grads.mean(0) - exact_grad).abs() / (grads.std(0) / trials**0.5).clamp(min=1e-12)
    assert (z < 4).double().mean() > 0.999


@pytest.mark.parametrize("columns", [128, 200, 1000])
def test_the_argmax_in_two_levels_is_the_argmax(columns):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, columns, generator=generator).round(decimals=1)  # many ties: the first one wins
    x[3] = 0.0
    x[4, -1] = 99.0
    assert torch.equal(argmax(x), x.argmax(-1))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_peaked_and_equal_rows_keep_loss_and_gradient_finite_in_fp32(name, scale):
    hidden, weight, teacher_hidden, teacher_weight = rows(dtype=torch.float32)
    teacher = LiveRows(teacher_hidden * scale, teacher_weight)
    scaled = (hidden.detach() * scale).requires_grad_()
    loss, sums = distillation_loss(scaled, weight, teacher, Objective(name, "greedy_topk", beta=0.5))
    assert bool(torch.isfinite(loss)) and bool((sums["row_divergence"] >= 0).all())
    for grad in torch.autograd.grad(loss, (scaled, weight)):
        assert bool(torch.isfinite(grad).all())
    same, sums = distillation_loss(hidden, weight, LiveRows(hidden, weight), Objective(name, "always"))
    assert sums["row_divergence"].max() <= 1e-6  # of identical models: the rounding of 53 terms
    assert all(grad.abs().max() < 1e-6 for grad in torch.autograd.grad(same, (hidden, weight)))
