"""What methods make of a batch's terms, against plain fp64 programs written from the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from selectkd.loss.extras.adaptive_alpha import adaptive_alpha
from selectkd.loss.extras.atkd import atkd
from selectkd.loss.extras.policy_gradient import policy_gradient
from selectkd.loss.head import Head
from selectkd.loss.plan import LossPlan, StreamLoss
from selectkd.loss.teacher_rows import LiveRows
from selectkd.loss.terms import Forward, weighted_sum
from selectkd.objective.divergences import LABEL_LOSSES, decoupled_kl
from selectkd.objective.objective import Objective

N, V, D, E = 12, 9, 5, 7
SEQUENCE = torch.tensor([0] * 5 + [1] * 3 + [2] * 4)
STREAM = torch.tensor([0] * 5 + [1] * 3 + [0] * 4)


def numbers(*size: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64) * scale


def made() -> tuple[Forward, Tensor, Tensor, Tensor]:
    """A forward pass in fp64, and log p [n, v] of the teacher."""
    hidden, weight = numbers(N, D, seed=1).requires_grad_(), numbers(V, D, seed=2).requires_grad_()
    teacher_hidden, teacher_weight = numbers(N, E, seed=3), numbers(V, E, seed=4)
    labels = torch.randint(V, (N,), generator=torch.Generator().manual_seed(5))
    teacher = LiveRows(teacher_hidden, teacher_weight)
    forward = Forward(hidden, Head(weight), teacher, labels, SEQUENCE, STREAM, torch.empty(N, 0))
    return forward, hidden, weight, (teacher_hidden @ teacher_weight.T).log_softmax(-1)


def agree(
    plan: LossPlan, plain: Callable[[Tensor, Tensor, Tensor], Tensor], row_scale: Tensor
) -> dict[str, Tensor]:
    """Loss and both gradients of a plan equal those of plain(logp, logq, labels), a program of [n, v] tensors."""
    forward, hidden, weight, logp = made()
    loss, sums = weighted_sum(plan.terms(forward), forward, row_scale)
    ours = torch.autograd.grad(loss, [hidden, weight])
    logq = (hidden @ weight.T).log_softmax(-1)
    wanted = plain(logp, logq, forward.labels)
    theirs = torch.autograd.grad(wanted, [hidden, weight])
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)
        assert other.abs().max() > 1e-4
    return sums


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def at(log_a: Tensor, labels: Tensor) -> Tensor:
    return log_a.gather(1, labels[:, None])[:, 0]


def tckd_nckd(logp: Tensor, logq: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts by loops over the vocabulary, with probabilities."""
    tckd, nckd = [], []
    for p, q, y in zip(logp.exp(), logq.exp(), labels.tolist(), strict=True):
        tckd.append(p[y] * (p[y] / q[y]).log() + (1 - p[y]) * ((1 - p[y]) / (1 - q[y])).log())
        a = torch.stack([p[v] / (1 - p[y]) for v in range(V) if v != y])
        b = torch.stack([q[v] / (1 - q[y]) for v in range(V) if v != y])
        nckd.append((a * (a / b).log()).sum())
    return torch.stack(tckd), torch.stack(nckd)


ONES = torch.full((N,), 1.0 / N, dtype=torch.float64)
ALWAYS = Objective("forward_kl", "always", beta=1.0)


def plain(divergence: Any) -> LossPlan:
    return LossPlan.of(Objective(divergence, "always", beta=1.0))


def test_cross_entropy_is_minus_the_log_probability_of_the_text() -> None:
    agree(plain("cross_entropy"), lambda p, q, y: -at(q, y).mean(), ONES)


def test_seqkd_with_a_selection_gates_the_cross_entropy_by_the_teachers_verdict() -> None:
    plan = LossPlan.of(Objective("cross_entropy", {"name": "greedy_topk", "k": 2}, beta=0.25))

    def gated(logp: Tensor, logq: Tensor, labels: Tensor) -> Tensor:
        accepted = (logq.argmax(-1, keepdim=True) == logp.topk(2, -1).indices).any(-1)
        assert 0 < int(accepted.sum()) < N
        return (torch.where(accepted, 1.0, 0.25) * -at(logq, labels)).mean()

    agree(plan, gated, ONES)


def test_the_sampled_reverse_kl_has_the_advantage_as_its_gradient() -> None:
    forward, hidden, weight, logp = made()
    plan = plain("sampled_reverse_kl")
    loss, _ = weighted_sum(plan.terms(forward), forward, ONES)
    logq = (hidden @ weight.T).log_softmax(-1)
    log_ratio = at(logq, forward.labels) - at(logp, forward.labels)
    assert float(loss.detach()) == pytest.approx(float(log_ratio.detach().mean()), rel=1e-9)
    surrogate = (log_ratio.detach() * at(logq, forward.labels)).mean()
    wanted = torch.autograd.grad(surrogate, hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], wanted, rtol=1e-7, atol=1e-10)


def test_the_mean_of_the_sampled_reverse_kl_over_draws_is_the_reverse_kl_and_so_is_its_gradient() -> None:
    logp = numbers(1, V, seed=8).log_softmax(-1)
    logits = numbers(1, V, seed=9).requires_grad_()
    logq = logits.log_softmax(-1)
    each = LABEL_LOSSES["sampled_reverse_kl"](logp.expand(V, V), logq.expand(V, V), torch.arange(V))
    mean = (logq.exp().detach()[0] * each).sum()
    exact = kl(logq, logp).sum()
    assert float(mean.detach()) == pytest.approx(float(exact.detach()), rel=1e-9)
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (mean, exact))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_decoupled_kl_is_its_two_parts_each_with_its_renormalisation() -> None:
    agree(
        plain({"name": "decoupled_kl"}), lambda p, q, y: torch.stack(tckd_nckd(p, q, y)).sum(0).mean(), ONES
    )
    rest = {"name": "decoupled_kl", "target": 0.0, "rest": 2.0}
    agree(plain(rest), lambda p, q, y: 2 * tckd_nckd(p, q, y)[1].mean(), ONES)


def test_kl_is_tckd_plus_the_teachers_rest_times_nckd() -> None:
    logp, logq = (numbers(N, V, seed=s, scale=3).log_softmax(-1) for s in (6, 7))
    labels = torch.arange(N) % V
    target = decoupled_kl(logp, logq, labels, rest=0.0)
    rest = decoupled_kl(logp, logq, labels, target=0.0)
    torch.testing.assert_close(
        target + (1 - at(logp, labels).exp()) * rest, kl(logp, logq), rtol=1e-9, atol=0
    )


def test_decoupled_kl_stays_finite_where_the_teacher_leaves_nothing_else() -> None:
    logp = torch.full((1, V), -math.inf, dtype=torch.float64)
    logp[0, 3] = 0.0
    logits = numbers(1, V, seed=1).requires_grad_()
    loss = decoupled_kl(logp, logits.log_softmax(-1), torch.tensor([3]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert float(loss.detach()) == pytest.approx(-float(logits.detach().log_softmax(-1)[0, 3]), rel=1e-9)
    assert torch.isfinite(gradient).all()


def test_atkd_weighs_the_two_halves_of_the_batch_by_its_formula() -> None:
    plan = LossPlan((StreamLoss(ALWAYS),), [atkd(easy=0.2)])

    def by_paper(logp: Tensor, logq: Tensor, labels: Tensor) -> Tensor:
        surprise = 1 - at(logp, labels).exp()
        hard = surprise >= surprise.sort().values[N // 2 - 1 : N // 2 + 1].mean()
        assert int(hard.sum()) == N // 2
        target, rest = tckd_nckd(logp, logq, labels)
        return 0.2 * rest[~hard].mean() + 0.8 * (target + rest)[hard].mean()

    agree(plan, by_paper, ONES)


def skewed(logp: Tensor, logq: Tensor, alpha: float | Tensor) -> Tensor:
    return kl(logp, (alpha * logp.exp() + (1 - alpha) * logq.exp()).log())


def reverse_skewed(logp: Tensor, logq: Tensor, alpha: float | Tensor) -> Tensor:
    return kl(logq, ((1 - alpha) * logp.exp() + alpha * logq.detach().exp()).log())


DISTILLM2 = (
    StreamLoss(Objective({"name": "skew_kl", "alpha": 0.1}, "always", beta=1.0), weight=0.75),
    StreamLoss(
        Objective({"name": "skew_reverse_kl", "alpha": 0.1, "detach_mixture": True}, "always", beta=1.0),
        weight=1.25,
    ),
)


def per_sequence() -> Tensor:
    length = torch.bincount(SEQUENCE)[SEQUENCE]
    return 1.0 / (length * 3.0).double()


def test_distillm2_adds_its_two_divergences_with_their_weights_as_means_of_sequences() -> None:
    def by_paper(logp: Tensor, logq: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for sequence in range(3):
            rows = sequence == SEQUENCE
            if sequence == 1:
                total = total + 1.25 * reverse_skewed(logp[rows], logq[rows], 0.1).mean()
            else:
                total = total + 0.75 * skewed(logp[rows], logq[rows], 0.1).mean()
        return total / 3

    agree(LossPlan(DISTILLM2), by_paper, per_sequence())


def test_distillm2_alpha_really_adapts_and_by_its_formula() -> None:
    forward, _, _, logp = made()
    logq = (forward.hidden @ forward.head.weight.T).log_softmax(-1)
    log_p, log_q = at(logp, forward.labels), at(logq, forward.labels).detach()
    mean_p, mean_q = (torch.stack([x[s == SEQUENCE].mean() for s in range(3)]).exp() for x in (log_p, log_q))
    gap = mean_p - mean_q
    extra = adaptive_alpha(start=0.1, floor=0.01, window=1)
    LossPlan(DISTILLM2, [extra], step=0).terms(forward)
    assert extra.sums["skew_kl"] == pytest.approx([float(gap[0] + gap[2]), 2.0])
    assert extra.sums["skew_reverse_kl"] == pytest.approx([float(-gap[1]), 1.0])
    # an anchor below the gaps, so that the clip leaves something to see
    extra.anchor = {"skew_kl": 1.03 * float(gap.abs()[0]), "skew_reverse_kl": 1.05 * float(gap.abs()[1])}

    def alpha(name: str, difference: float) -> float:
        if difference <= 0:
            return 0.1
        return min(max(1 - 0.9 * extra.anchor[name] / (difference + 1e-5), 0.01), 0.1)

    alphas = [
        alpha("skew_kl", float(gap[0])),
        alpha("skew_reverse_kl", float(-gap[1])),
        alpha("skew_kl", float(gap[2])),
    ]
    assert len({round(one, 6) for one in alphas}) > 1

    def by_paper(logp: Tensor, logq: Tensor, labels: Tensor) -> Tensor:
        parts = []
        for sequence, one in enumerate(alphas):
            rows = sequence == SEQUENCE
            weight, loss = (1.25, reverse_skewed) if sequence == 1 else (0.75, skewed)
            parts.append(weight * loss(logp[rows], logq[rows], one).mean())
        return torch.stack(parts).sum() / 3

    agree(LossPlan(DISTILLM2, [extra], step=1), by_paper, per_sequence())


def test_adaptive_alpha_takes_up_where_it_was_saved() -> None:
    first, second = adaptive_alpha(window=1), adaptive_alpha(window=1)
    forward = made()[0]
    LossPlan(DISTILLM2, [first], step=0).terms(forward)
    second.load_state_dict(first.state_dict())
    for extra in (first, second):
        LossPlan(DISTILLM2, [extra], step=1).terms(forward)
    assert first.anchor == second.anchor and len(first.anchor) == 2


@pytest.mark.parametrize("clip", [10.0, 0.5])
def test_minillm_is_the_exact_step_and_the_mean_of_later_rewards(clip: float) -> None:
    objective = Objective("reverse_kl", "always", beta=1.0)
    plan = LossPlan((StreamLoss(objective),), [policy_gradient(share=0.2, clip=clip)])

    def by_paper(logp: Tensor, logq: Tensor, labels: Tensor) -> Tensor:
        log_p, log_q = at(logp, labels), at(logq, labels)
        p, q = log_p.exp(), log_q.exp().detach()
        w = q / (0.2 * p + 0.8 * q)
        total = torch.zeros((), dtype=torch.float64)
        for t in range(N):
            later = [s for s in range(t + 1, N) if SEQUENCE[s] == SEQUENCE[t]]
            rewards = [float((log_p - log_q.detach())[s].clamp(-clip, clip)) for s in later]
            long = sum(rewards) / len(rewards) if rewards else 0.0
            total = total + w[t] * (kl(logq[t : t + 1], logp[t : t + 1])[0] - long * log_q[t]) / N
        return total

    agree(plan, by_paper, ONES)


def test_a_selector_beside_a_verifier_leaves_the_rows_it_drops_out() -> None:
    from selectkd.objective.selectors import se_kd

    stream = StreamLoss(
        Objective("forward_kl", {"name": "greedy_topk", "k": 2}, beta=0.25), selector=se_kd(0.5)
    )

    def by_hand(logp: Tensor, logq: Tensor, labels: Tensor) -> Tensor:
        entropy = -(logq.exp() * logq).sum(-1)
        kept = torch.zeros(N, dtype=torch.bool)
        kept[entropy.argsort(descending=True)[: N // 2]] = True
        accepted = (logq.argmax(-1, keepdim=True) == logp.topk(2, -1).indices).any(-1)
        return (kept * torch.where(accepted, 1.0, 0.25) * kl(logp, logq)).mean()

    sums = agree(LossPlan((stream,)), by_hand, ONES)
    assert int((sums["row_weight"] == 0).sum()) == N // 2
    assert float(sums["n"]) == N and float(sums["row_divergence"].min()) > 0
    assert float(sums["weighted_divergence"]) < float(sums["divergence"])


def test_a_selector_beside_a_verifier_ranks_at_the_temperature_of_verification() -> None:
    """As it does where it stands alone, for the objective's verifier."""
    from selectkd.objective.selectors import tip

    ranked = {}
    for temperature in (1.0, 8.0):
        alone = Objective("forward_kl", tip(0.5), beta=0.0, verify_temperature=temperature)
        beside = Objective("forward_kl", "always", beta=0.0, verify_temperature=temperature)
        forward, *_ = made()
        rows = [
            weighted_sum(LossPlan((stream,)).terms(forward), forward, ONES)[1]["row_weight"]
            for stream in (StreamLoss(alone), StreamLoss(beside, selector=tip(0.5)))
        ]
        assert torch.equal(*rows) and 0 < int(rows[0].sum()) < N
        ranked[temperature] = rows[0]
    assert not torch.equal(ranked[1.0], ranked[8.0])


def test_the_language_modelling_loss_is_added_and_gated_by_nothing() -> None:
    objective = Objective("forward_kl", {"name": "greedy_topk", "k": 1}, beta=0.0)
    streams = (StreamLoss(objective, language_model=0.3), StreamLoss(objective))

    def by_hand(logp: Tensor, logq: Tensor, labels: Tensor) -> Tensor:
        accepted = (logq.argmax(-1) == logp.argmax(-1)).double()
        text = torch.where(STREAM == 0, -at(logq, labels), 0.0)
        return (accepted * kl(logp, logq) + 0.3 * text).mean()

    sums = agree(LossPlan(streams), by_hand, ONES)
    assert float(sums["n"]) == N  # a row counts once, whatever is added to it


def test_a_stream_of_weight_zero_is_measured_and_teaches_nothing() -> None:
    streams = (StreamLoss(ALWAYS), StreamLoss(ALWAYS, weight=0.0))
    sums = agree(LossPlan(streams), lambda p, q, y: torch.where(STREAM == 0, kl(p, q), 0.0).mean(), ONES)
    assert bool((sums["row_divergence"] > 0).all())
    assert sums["row_weight"].tolist() == [float(one == 0) for one in STREAM.tolist()]


def test_one_term_of_every_row_is_the_plain_loss_bit_for_bit() -> None:
    from selectkd.loss.distillation import distillation_loss

    forward = made()[0]
    loss, sums = weighted_sum(LossPlan.of(ALWAYS).terms(forward), forward, ONES)
    again, others = distillation_loss(
        forward.hidden, forward.head, forward.teacher, ALWAYS, row_scale=ONES, labels=forward.labels
    )
    assert float(loss.detach()) == float(again.detach()) and torch.equal(
        sums["row_divergence"], others["row_divergence"]
    )
