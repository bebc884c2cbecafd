"""The fused loss of a router: each route's gate, divergence and weight, as in the plain program."""

from __future__ import annotations

import pytest
import torch

from equivalence.test_distillation_loss import N, V, rows
from selectkd import LiveRows, Objective, distillation_loss
from selectkd.errors import ConfigError
from selectkd.objective.divergences import DIVERGENCES
from selectkd.objective.pair import dense_pair, entropy


@pytest.mark.parametrize("verifier", ["expected_spec_k", "se_kd"])  # one row by row, one after a first pass
@pytest.mark.parametrize("verify_temperature", [1.0, 0.5])
def test_a_routers_gates_see_the_temperature_of_verification_and_not_the_losss(verifier, verify_temperature):
    gate = {"name": "teacher_entropy", "max": 1.5}
    routes = [{"gate": gate, "divergence": "reverse_kl"}, {"divergence": "forward_kl", "weight": 3.0}]
    objective = Objective(
        {"name": "router", "routes": routes}, verifier, beta=0.1, verify_temperature=verify_temperature
    )
    hidden, weight, teacher_hidden, teacher_weight = rows()
    teacher = LiveRows(teacher_hidden, teacher_weight)
    scale = torch.full((N,), 1.0 / N, dtype=torch.float64)
    loss, _ = distillation_loss(
        hidden, weight, teacher, objective, row_scale=scale, temperature=4.0, chunk=10
    )
    ours = torch.autograd.grad(loss, (hidden, weight))

    def pair(t):
        logits = teacher_hidden @ teacher_weight.t(), hidden @ weight.t()
        return dense_pair(*(torch.log_softmax(one / t, -1) for one in logits))

    seen, lost = pair(verify_temperature), pair(4.0)
    sure = entropy(seen.logp) <= 1.5
    assert 0 < sure.sum() < N and not bool((entropy(lost.logp) <= 1.5).any())
    reverse, forward = (DIVERGENCES[name](lost.logp, lost.logq) for name in ("reverse_kl", "forward_kl"))
    a = objective.verifier(seen, torch.empty(N, 0)).detach()
    plain = ((0.1 + 0.9 * a) * torch.where(sure, reverse, 3.0 * forward)).mean()
    for mine, theirs in zip(
        (loss, *ours), (plain, *torch.autograd.grad(plain, (hidden, weight))), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-9)


def test_a_route_whose_gate_needs_more_tokens_than_there_are_is_refused_before_the_first_row():
    hidden, weight, teacher_hidden, teacher_weight = rows()
    gate = {"name": "greedy_topk", "k": V + 1}
    objective = Objective(
        {"name": "router", "routes": [{"gate": gate, "divergence": "forward_kl"}]}, "always"
    )
    with pytest.raises(
        ConfigError, match=f"needs the teacher's {V + 1} best tokens.*that route's gate to {V}"
    ):
        distillation_loss(hidden, weight, LiveRows(teacher_hidden, teacher_weight), objective)
