"""The fused loss equals the plain program, on loss and gradient, however it is cut."""

from __future__ import annotations

import pytest
import torch

from selectkd import CachedRows, Head, LiveRows, Objective, distillation_loss, uniforms
from selectkd.errors import ConfigError
from selectkd.objective.divergences import DIVERGENCES
from selectkd.objective.pair import dense_pair
from selectkd.objective.selectors import SELECTORS
from selectkd.objective.verifiers import VERIFIERS

N, V, WIDTH, TEACHER_WIDTH = 37, 53, 8, 12


def rows(seed=0, dtype=torch.float64, v=V, n=N):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, WIDTH, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(v, WIDTH, generator=g, dtype=dtype).requires_grad_()
    teacher_hidden = torch.randn(n, TEACHER_WIDTH, generator=g, dtype=dtype)
    teacher_weight = torch.randn(v, TEACHER_WIDTH, generator=g, dtype=dtype)
    return hidden, weight, teacher_hidden, teacher_weight


def both(
    objective,
    *,
    head=None,
    temperature=1.0,
    chunk=None,
    row_scale=None,
    labels=None,
    sequence=None,
    dtype=torch.float64,
):
    """(loss, d hidden, d weight) of the fused loss and of the plain program."""
    hidden, weight, teacher_hidden, teacher_weight = rows(dtype=dtype)
    head = (lambda w: Head(w)) if head is None else head
    u = uniforms(N, objective.uniforms_per_token, seed=1, step=2)
    scale = torch.full((N,), 1.0 / N, dtype=dtype) if row_scale is None else row_scale
    reference = LiveRows(teacher_hidden * 0.5, teacher_weight)
    loss, sums = distillation_loss(
        hidden, head(weight), LiveRows(teacher_hidden, teacher_weight, reference=reference), objective, u,
        row_scale=scale, temperature=temperature, chunk=chunk, labels=labels, sequence=sequence,
    )  # fmt: skip
    ours = (loss, *torch.autograd.grad(loss, (hidden, weight)), sums)

    from dataclasses import replace

    logits, teacher_logits = head(weight).logits(hidden), teacher_hidden @ teacher_weight.t()
    verified = dense_pair(torch.log_softmax(teacher_logits, -1), torch.log_softmax(logits, -1))
    verified = replace(
        verified, label=labels, sequence=sequence, logr=torch.log_softmax(0.5 * teacher_logits, -1)
    )
    a = objective.verifier(verified, u).detach()
    pair = dense_pair(
        torch.log_softmax(teacher_logits / temperature, -1), torch.log_softmax(logits / temperature, -1)
    )
    per_token = objective.divergence(pair.logp, pair.logq)
    plain = (scale * (objective.beta + (1 - objective.beta) * a) * per_token).sum()
    return ours, (plain, *torch.autograd.grad(plain, (hidden, weight)), a)


def same(ours, plain, **tolerance):
    for mine, theirs in zip(ours[:3], plain[:3], strict=True):
        torch.testing.assert_close(mine, theirs, **(tolerance or {"atol": 1e-11, "rtol": 1e-9}))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("verifier", ["greedy_topk", "spec_k", "always"])
def test_the_fused_loss_equals_the_plain_program(name, verifier):
    ours, plain = both(Objective(name, verifier, beta=0.1), chunk=10)
    same(ours, plain)
    torch.testing.assert_close(ours[3]["accepted"], plain[3].sum())


@pytest.mark.parametrize("name", [*VERIFIERS, *SELECTORS])
def test_every_verifier_and_selector_works_inside_the_fused_loss(name):
    labels, sequence = torch.arange(N) % V, torch.arange(N) // 9
    ours, plain = both(Objective("forward_kl", name, beta=0.2), chunk=7, labels=labels, sequence=sequence)
    same(ours, plain)


@pytest.mark.parametrize("chunk", [1, 2, 16, 37, 1000])
def test_the_chunk_size_changes_nothing(chunk):
    objective = Objective("generalized_jsd", {"name": "spec_k", "k": 2}, beta=0.3)
    (one, *_), (other, *_) = both(objective, chunk=chunk), both(objective, chunk=37)
    same(one, other)


@pytest.mark.parametrize(
    "head",
    [
        lambda w: Head(w, bias=torch.linspace(-1, 1, V, dtype=w.dtype)),
        lambda w: Head(w, scale=0.3),
        lambda w: Head(w, softcap=2.0),
        lambda w: Head(w, bias=torch.linspace(-1, 1, V, dtype=w.dtype), scale=1.7, softcap=5.0),
    ],
)
def test_heads_with_bias_scale_and_softcap(head):
    same(*both(Objective("forward_kl", "greedy_topk"), head=head, chunk=9))


def test_the_bias_gets_its_gradient():
    hidden, weight, teacher_hidden, teacher_weight = rows()
    bias = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    teacher = LiveRows(teacher_hidden, teacher_weight)
    loss, _ = distillation_loss(
        hidden, Head(weight, bias), teacher, Objective("forward_kl", "always"), chunk=5
    )
    plain = dense_pair(
        torch.log_softmax(teacher_hidden @ teacher_weight.t(), -1),
        torch.log_softmax(hidden @ weight.t() + bias, -1),
    )
    expected = torch.autograd.grad(DIVERGENCES["forward_kl"](plain.logp, plain.logq).mean(), bias)[0]
    torch.testing.assert_close(
        torch.autograd.grad(loss, bias)[0], expected, atol=1e-7, rtol=1e-6
    )  # fp32 row_scale


def test_the_loss_temperature_does_not_reach_the_verifier():
    for temperature in (0.5, 2.0):
        same(
            *both(
                Objective("forward_kl", {"name": "expected_spec_k", "k": 2}), temperature=temperature, chunk=8
            )
        )


@pytest.mark.parametrize("verifier", ["greedy_topk", "spec_k", "expected_spec_k", "hellinger"])
def test_beta_one_is_the_base_loss_bit_for_bit(verifier):
    (one, *_), (base, *_) = (
        both(Objective("reverse_kl", v, beta=b), dtype=torch.float32)
        for v, b in ((verifier, 1.0), ("always", 0.01))
    )
    assert all(torch.equal(a, b) for a, b in zip(one[:3], base[:3], strict=True))


def test_greedy_topk_with_k_equal_to_the_vocabulary_is_the_base_loss_bit_for_bit():
    (one, *_), (base, *_) = (
        both(Objective("forward_kl", v, beta=0.01), dtype=torch.float32)
        for v in ({"name": "greedy_topk", "k": V}, "always")
    )
    assert all(torch.equal(a, b) for a, b in zip(one[:3], base[:3], strict=True))


def test_beta_zero_gives_rejected_rows_exactly_zero_gradient():
    ours, _ = both(Objective("forward_kl", {"name": "greedy_topk", "k": 10}, beta=0.0), chunk=10)
    rejected = ours[3]["row_acceptance"] == 0
    assert 0 < rejected.sum() < N
    assert ours[1][rejected].abs().max() == 0.0
    assert ours[1][~rejected].abs().min(-1).values.max() > 0.0


@pytest.mark.parametrize(
    "name", ["forward_kl", "reverse_kl", "generalized_jsd", "total_variation", "skew_kl"]
)
def test_dead_teacher_rows_and_a_logit_shift_change_nothing(name):
    hidden, weight, teacher_hidden, teacher_weight = rows(dtype=torch.float32)
    objective = Objective(name, "greedy_topk")
    base, _ = distillation_loss(hidden, weight, LiveRows(teacher_hidden, teacher_weight), objective)
    dead = torch.cat(
        [teacher_weight, 5 * torch.randn(128, TEACHER_WIDTH, generator=torch.Generator().manual_seed(3))]
    )
    wider, _ = distillation_loss(hidden, weight, LiveRows(teacher_hidden, dead), objective)
    assert abs(wider.item() - base.item()) < 1e-6
    shifted = LiveRows(teacher_hidden, Head(teacher_weight, bias=torch.full((V,), 3.0)))
    moved, _ = distillation_loss(hidden, weight, shifted, objective)
    assert abs(moved.item() - base.item()) < 1e-6
    narrow, _ = distillation_loss(
        hidden, torch.cat([weight, torch.ones(7, WIDTH)]), LiveRows(teacher_hidden, teacher_weight), objective
    )
    assert abs(narrow.item() - base.item()) < 1e-6


def test_unshared_ids_in_the_middle_take_no_part():
    hidden, weight, teacher_hidden, teacher_weight = rows()
    shared = torch.ones(V, dtype=torch.bool)
    shared[[3, 17]] = False
    masked, _ = distillation_loss(
        hidden,
        weight,
        LiveRows(teacher_hidden, teacher_weight, shared=shared),
        Objective("forward_kl", "greedy_topk"),
    )
    cut, _ = distillation_loss(
        hidden,
        weight[shared],
        LiveRows(teacher_hidden, teacher_weight[shared]),
        Objective("forward_kl", "greedy_topk"),
    )
    torch.testing.assert_close(masked, cut, atol=1e-11, rtol=1e-9)
    assert torch.autograd.grad(masked, weight)[0][~shared].abs().max() == 0


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd", "total_variation"])
def test_a_cache_of_the_whole_vocabulary_equals_the_live_teacher(name):
    hidden, weight, teacher_hidden, teacher_weight = rows()
    logp = torch.log_softmax(teacher_hidden @ teacher_weight.t(), -1)
    best = logp.topk(V, -1)
    objective = Objective(name, "greedy_topk", beta=0.1)
    results = []
    for teacher in (LiveRows(teacher_hidden, teacher_weight), CachedRows(best.indices, best.values)):
        loss, _ = distillation_loss(hidden, weight, teacher, objective, chunk=11)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for a, b in zip(*results, strict=True):
        # the stored tail's mass is 1 - sum p, known to fp64 rounding of 1: about 1e-15, felt as its logarithm
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("head", [Head, lambda w: Head(w, scale=0.7, softcap=3.0)], ids=["plain", "soft cap"])
@pytest.mark.parametrize("verifier", ["greedy_topk", "expected_spec_k", "student_entropy"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd", "total_variation"])
def test_dead_rows_of_the_heads_change_nothing_of_a_cache(name, verifier, head):
    """Of the student's, in the middle and beyond the teacher's, and ids of the teacher's that a cache has stored."""
    hidden, weight, teacher_hidden, teacher_weight = rows()
    extra = 3 * torch.randn(
        6, weight.shape[1], generator=torch.Generator().manual_seed(5), dtype=weight.dtype
    )
    wide = torch.cat([weight.detach(), extra]).requires_grad_()
    shared = torch.arange(V + 6) < V
    shared[[3, 17]] = False
    logp = torch.log_softmax(teacher_hidden @ teacher_weight.t(), -1)
    best = logp.topk(V, -1)
    objective = Objective(name, verifier, beta=0.1)
    u = uniforms(N, objective.uniforms_per_token, seed=1, step=2)
    results = []
    for teacher in (
        LiveRows(teacher_hidden, teacher_weight, shared=shared[:V]),
        CachedRows(best.indices, best.values, shared=shared),
    ):
        loss, sums = distillation_loss(hidden, head(wide), teacher, objective, u, chunk=11, also_kl=True)
        gradient = torch.autograd.grad(loss, (hidden, wide))
        assert gradient[1][~shared].abs().max() == 0
        results.append((loss, *gradient, sums["row_acceptance"], sums["kl"]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)  # as above


@pytest.mark.parametrize("stored", [8, 16, 32])
def test_a_top_k_divergence_is_a_lower_bound_and_its_acceptance_an_upper_bound(stored):
    hidden, weight, teacher_hidden, teacher_weight = rows()
    logp = torch.log_softmax(teacher_hidden @ teacher_weight.t(), -1)
    best = logp.topk(stored, -1)
    objective = Objective("forward_kl", "expected_spec_k")
    _, live = distillation_loss(hidden, weight, LiveRows(teacher_hidden, teacher_weight), objective)
    _, cached = distillation_loss(hidden, weight, CachedRows(best.indices, best.values), objective)
    assert bool((cached["row_divergence"] <= live["row_divergence"] + 1e-12).all())
    assert bool((cached["row_acceptance"] >= live["row_acceptance"] - 1e-12).all())


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_a_teacher_row_that_is_not_finite_teaches_nothing_and_is_counted(fault):
    hidden, weight, teacher_hidden, teacher_weight = rows()
    teacher_hidden[4, 2] = fault
    loss, sums = distillation_loss(hidden, weight, LiveRows(teacher_hidden, teacher_weight), Objective())
    grad = torch.autograd.grad(loss, hidden)[0]
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(grad).all())
    assert grad[4].abs().max() == 0 and sums["teacher_nonfinite"] == 1 and sums["row_weight"][4] == 0


@pytest.mark.parametrize(
    "name", sorted(set(DIVERGENCES) - {"uld"})
)  # of sorted vectors: ties at 0 have no order
@pytest.mark.parametrize("side", ["teacher", "student", "both"])
def test_tokens_that_a_bias_forbids_count_as_in_the_formula(name, side):
    """A bias of -inf on one side alone: finite, and equal to the divergence's own formula."""
    hidden, weight, teacher_hidden, teacher_weight = rows()
    bias = torch.zeros(weight.shape[0], dtype=weight.dtype)
    bias[2:6] = -torch.inf
    ours = Head(weight, bias if side != "teacher" else None)
    theirs = Head(teacher_weight, bias if side != "student" else None)
    objective = Objective(name, "always")
    scale = torch.full((N,), 1 / N, dtype=torch.float64)
    loss, _ = distillation_loss(hidden, ours, LiveRows(teacher_hidden, theirs), objective, row_scale=scale)
    logp = torch.log_softmax(theirs.logits(teacher_hidden, theirs.width), -1)
    logq = torch.log_softmax(ours.logits(hidden, ours.width), -1)
    plain = objective.divergence(logp, logq).mean()
    mine, theirs_too = (torch.autograd.grad(one, (hidden, weight)) for one in (loss, plain))
    torch.testing.assert_close(loss, plain, rtol=1e-9, atol=1e-9)
    for one, other in zip(mine, theirs_too, strict=True):
        assert bool(one.isfinite().all())
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_always_accept_takes_named_tokens_whatever_the_verifier_says():
    labels = torch.arange(N) % 4
    hidden, weight, teacher_hidden, teacher_weight = rows()
    objective = Objective("forward_kl", {"name": "greedy_topk", "k": 1}, beta=0.0, always_accept=(2,))
    _, sums = distillation_loss(
        hidden, weight, LiveRows(teacher_hidden, teacher_weight), objective, labels=labels
    )
    assert bool((sums["row_weight"][labels == 2] == 1).all()) and sums["accepted"] < N


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["generalized_jsd", "taid"])  # a closed form, and autograd
def test_the_kl_beside_another_divergence_is_forward_kl_at_temperature_one(name, temperature):
    hidden, weight, teacher_hidden, teacher_weight = rows()
    teacher = LiveRows(teacher_hidden, teacher_weight)
    _, plain = distillation_loss(hidden, weight, teacher, Objective("forward_kl", "always"))
    without, _ = distillation_loss(
        hidden, weight, teacher, Objective(name, "always"), temperature=temperature
    )
    loss, sums = distillation_loss(
        hidden, weight, teacher, Objective(name, "always"), temperature=temperature, chunk=10, also_kl=True
    )
    torch.testing.assert_close(sums["kl"], plain["divergence"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, without, rtol=1e-12, atol=0.0)


def test_no_rows_at_all_give_a_loss_of_zero():
    _, weight, _, teacher_weight = rows()
    hidden = torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True)
    loss, sums = distillation_loss(
        hidden, weight, LiveRows(torch.zeros(0, TEACHER_WIDTH), teacher_weight), Objective()
    )
    loss.backward()
    assert loss.item() == 0.0 and sums["n"] == 0


def test_wrong_shapes_are_refused_with_what_would_work(unchecked):
    hidden, weight, teacher_hidden, teacher_weight = rows()
    teacher = LiveRows(teacher_hidden, teacher_weight)
    with pytest.raises(ConfigError, match="must be the same"):
        distillation_loss(hidden[:5], weight, teacher, Objective())
    with pytest.raises(ConfigError, match=r"selectkd\.uniforms"):
        distillation_loss(hidden, weight, teacher, Objective("forward_kl", "spec_k"))
    with pytest.raises(ConfigError, match="row_scale"):
        distillation_loss(hidden, weight, teacher, Objective(), row_scale=torch.ones(3))
    with pytest.raises(ConfigError, match=f"{V} or less"):
        distillation_loss(
            hidden, weight, teacher, Objective("forward_kl", {"name": "greedy_topk", "k": V + 1})
        )
    best = torch.log_softmax(teacher_hidden @ teacher_weight.t(), -1).topk(4, -1)
    with pytest.raises(ConfigError, match="4 or less"):
        distillation_loss(hidden, weight, CachedRows(best.indices, best.values), Objective())
    with pytest.raises(ConfigError, match="top-K teacher"):
        distillation_loss(
            hidden,
            weight,
            CachedRows(best.indices, best.values),
            Objective("forward_kl", "always"),
            temperature=2.0,
        )


def test_a_frozen_head_gets_no_gradient_and_costs_no_weight_gradient():
    hidden, weight, teacher_hidden, teacher_weight = rows()
    loss, _ = distillation_loss(
        hidden, weight.detach(), LiveRows(teacher_hidden, teacher_weight), Objective()
    )
    loss.backward()
    assert hidden.grad is not None and weight.grad is None


def test_the_sums_count_the_rows_that_are_always_accepted():
    hidden, weight, teacher_hidden, teacher_weight = rows()
    labels = torch.arange(N) % 4
    for tokens, count in (((), 0), ((2,), (labels == 2).sum()), ((2, 3), (labels >= 2).sum())):
        objective = Objective("forward_kl", {"name": "matched_random", "rate": 0.0}, always_accept=tokens)
        u = uniforms(N, 1, seed=1, step=2)
        teacher = LiveRows(teacher_hidden, teacher_weight)
        _, sums = distillation_loss(hidden, weight, teacher, objective, u, labels=labels)
        assert sums["always_accepted"] == sums["accepted"] == count
