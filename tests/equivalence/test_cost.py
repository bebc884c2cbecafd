"""What the fused loss costs, counted and not timed: products, and memory that does not grow with the rows."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from selectkd import CachedRows, LiveRows, Objective, distillation_loss
from selectkd.loss.head import Head
from selectkd.loss.plan import LossPlan, StreamLoss
from selectkd.loss.terms import Forward, weighted_sum
from selectkd.objective.selectors import SELECTORS

N, V, D = 96, 512, 16
UNIT = 2 * N * V * D


def units(
    objective: Objective, *, cached: bool = False, frozen: bool = False, dtype=torch.float32
) -> tuple[float, float]:
    """Matrix products in units of one [n, d] x [d, v] product, and the share of rows accepted."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_(not frozen)
    other = torch.randn(N, D, generator=generator).to(dtype) + hidden.detach()
    best = torch.log_softmax((other @ weight.detach().t()).float(), -1).topk(20, -1)
    teacher = CachedRows(best.indices, best.values) if cached else LiveRows(other, weight.detach())
    uniform = torch.rand(N, objective.uniforms_per_token, generator=generator)
    with FlopCounterMode(display=False) as counted:
        loss, sums = distillation_loss(hidden, weight, teacher, objective, uniform, chunk=32)
        loss.backward()
    return counted.get_total_flops() / UNIT, float(sums["accepted"] / sums["n"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["forward_kl", "generalized_jsd", "taid"])
def test_a_live_teacher_costs_four_products(name, dtype):
    assert units(Objective(name, "greedy_topk"), dtype=dtype)[0] == pytest.approx(4.0)


def test_a_cached_teacher_costs_three_products():
    assert units(Objective("forward_kl", "greedy_topk"), cached=True)[0] == pytest.approx(3.0)


def test_a_frozen_head_costs_one_product_less():
    assert units(Objective("forward_kl", "greedy_topk"), frozen=True)[0] == pytest.approx(3.0)


def test_rejected_rows_cost_no_gradient_product_at_beta_zero():
    cost, tar = units(Objective("forward_kl", "greedy_topk", beta=0.0))
    assert 0.2 < tar < 0.95
    assert cost == pytest.approx(2.0 + 2.0 * tar)


def test_thinned_rows_cost_no_gradient_product():
    cost, tar = units(Objective("forward_kl", "greedy_topk", beta=0.1, thin_rejected=True))
    assert 2.0 + 2.0 * tar <= cost < 2.0 + 2.0 * (tar + 0.3 * (1 - tar))


PROGRAM = textwrap.dedent(
    """
    import sys, torch
    from selectkd import LiveRows, Objective, distillation_loss

    def status(key):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    torch.set_num_threads(1)
    n, v, d = int(sys.argv[1]), 16384, 64
    weight = torch.randn(v, d).mul_(0.1).requires_grad_()
    hidden, teacher_hidden, teacher_weight = torch.randn(n, d), torch.randn(n, d), torch.randn(v, d).mul_(0.1)
    for rows, width in ((64, 1000), (n, v)):
        h = hidden[:rows].clone().requires_grad_()
        teacher = LiveRows(teacher_hidden[:rows], teacher_weight[:width])
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        before = status("VmRSS")
        loss, _ = distillation_loss(h, weight[:width], teacher, Objective("generalized_jsd", "greedy_topk"))
        torch.autograd.grad(loss, (h, weight))
    print(status("VmHWM") - before)
    """
)


def test_rows_that_a_streams_selector_drops_cost_their_logits_alone():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator).requires_grad_() for n in (N, V))
    plan = LossPlan((StreamLoss(Objective("forward_kl", "always"), selector=SELECTORS["se_kd"](share=0.25)),))
    rows = torch.zeros(N, dtype=torch.long)
    here = Forward(
        hidden,
        Head(weight),
        LiveRows(hidden.detach() + 1.0, weight.detach()),
        rows,
        rows,
        rows,
        torch.empty(N, 0),
    )
    with FlopCounterMode(display=False) as counted:
        weighted_sum(plan.terms(here), here, torch.full((N,), 1.0 / N))[0].backward()
    assert counted.get_total_flops() / UNIT == pytest.approx(4.0 + 2.0 * 0.25)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_peak_does_not_grow_with_the_rows():
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, n], capture_output=True, text=True, check=True
            ).stdout
        )
        for n in ("512", "2048")
    ]
    assert peaks[1] - peaks[0] < 10 * 2**20  # of which the gradient of the hidden states is .4 MiB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_without_gradients_costs_the_logits_alone(dtype):
    hidden, weight = (torch.randn(rows, D).to(dtype).requires_grad_() for rows in (N, V))
    teacher = LiveRows(torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype))
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        loss, _ = distillation_loss(hidden, weight, teacher, Objective("forward_kl", "greedy_topk"), chunk=32)
    assert counted.get_total_flops() / UNIT == pytest.approx(2.0) and not loss.requires_grad


def test_rows_that_a_selector_drops_cost_no_gradient_product():
    spent, accepted = units(Objective("forward_kl", "se_kd", beta=0.0))
    # two models' logits in the first pass and in the second, and both gradients of the rows that are kept
    assert spent == pytest.approx(4.0 + 2.0 * accepted) and accepted < 0.25
