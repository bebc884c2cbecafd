"""Weights of 2026 by hand: positions, sequences left out, drafts, entropies; and the router, row by row."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from selectkd.errors import ConfigError
from selectkd.objective.contract import example_log_dists
from selectkd.objective.divergences import DIVERGENCES
from selectkd.objective.objective import Objective
from selectkd.objective.pair import dense_pair, entropy
from selectkd.objective.verifiers import VERIFIERS


def none(rows: int) -> torch.Tensor:
    """No uniform numbers for so many rows."""
    return torch.empty(rows, 0)


def test_iw_opd_falls_from_the_first_token_to_the_last_by_the_disagreement_that_has_passed() -> None:
    p = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.75], [0.125, 0.875], [0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    pair = replace(
        dense_pair(p.log(), q.log()),
        label=torch.zeros(4, dtype=torch.long),
        sequence=torch.tensor([0, 0, 0, 1]),
    )
    # |A| = log 2, log 4, 0 in the first sequence: 0, 1/3 and all of it have passed
    weights = VERIFIERS["iw_opd"](gamma=0.3)(pair, none(4))
    assert weights.tolist() == pytest.approx([1.3, 1.2, 1.0, 1.3])


def test_fire_leaves_the_least_likely_sequences_out_and_keeps_the_mean_of_the_rest() -> None:
    p, q = example_log_dists(40, 9, seed=1), example_log_dists(40, 9, seed=2)
    sequence = torch.arange(10).repeat_interleave(4)
    pair = replace(dense_pair(p, q), label=torch.arange(40) % 9, sequence=sequence)
    weights = VERIFIERS["fire"]()(pair, none(40))
    likely = p.gather(1, pair.label[:, None])[:, 0].clamp(min=-87.0).view(10, 4).mean(1)
    out = set(likely.argsort()[:2].tolist())
    assert {one for one in range(10) if not weights[sequence == one].any()} == out
    kept = torch.tensor([one.item() not in out for one in sequence])
    assert weights[kept].mean().item() == pytest.approx(1.0) and weights.max() > 1
    sure = [1 - h / h[kept].max() for h in (entropy(p), entropy(q))]
    by_hand = (1 + sure[0]) * (1 + sure[1])
    assert torch.allclose(weights[kept], (by_hand / by_hand[kept].mean())[kept])


@pytest.mark.parametrize("length", [1, 3, 7])
def test_prefix_product_is_the_derivative_of_the_expected_accepted_length(length: int) -> None:
    a = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    drafts = [range(start, start + length) for start in range(5)]
    expected = torch.zeros(5, dtype=torch.float64)
    for t in range(5):
        gains = []
        for draft in drafts:
            if t in draft:
                inside = [i for i in draft if i < 5]
                accepted = sum(a[inside[: j + 1]].prod() for j in range(len(inside)))
                gains.append(torch.autograd.grad(accepted, a)[0][t])
        expected[t] = torch.stack(gains).mean() / length
    weights = VERIFIERS["prefix_product"](length=length).weigh(a.detach())
    # a draft is cut at the sequence's end, as the padding of zeros cuts it
    assert torch.allclose(weights, expected)
    assert bool((VERIFIERS["prefix_product"](length=length).weigh(torch.ones(9)) <= 1).all())


def test_more_weight_goes_where_the_teacher_knows_more() -> None:
    sure, unsure = torch.tensor([[0.98, 0.01, 0.01]]).log(), torch.full((1, 3), 1 / 3).log()
    gap = VERIFIERS["sigmoid_entropy_gap"]()
    high, low = gap(dense_pair(sure, unsure), none(1)), gap(dense_pair(unsure, sure), none(1))
    assert high.item() > 0.7 and high.item() + low.item() == pytest.approx(1.0)


def test_a_weight_above_one_counts_more_than_once_and_cannot_thin() -> None:
    p, q = example_log_dists(6, 9, seed=1), example_log_dists(6, 9, seed=2)
    pair = replace(dense_pair(p, q), label=torch.zeros(6, dtype=torch.long))
    objective = Objective("forward_kl", {"name": "iw_opd", "gamma": 0.5}, beta=0.0)
    assert objective(pair, none(6)).weight[0].item() == pytest.approx(1.5)
    with pytest.raises(ConfigError, match="weighs rows above 1"):
        Objective("forward_kl", "iw_opd", thin_rejected=True)


def test_a_router_gives_each_row_the_divergence_of_the_first_gate_that_takes_it() -> None:
    p, q = example_log_dists(30, 9, seed=1), example_log_dists(30, 9, seed=2)
    routes = [
        {"gate": {"name": "greedy_topk", "k": 2}, "divergence": "reverse_kl", "weight": 2.0},
        {"gate": {"name": "teacher_entropy", "max": 1.0}, "divergence": {"name": "skew_kl", "alpha": 0.3}},
        {"divergence": "total_variation"},
    ]
    routed = DIVERGENCES["router"](p, q, routes=routes)
    accepted = VERIFIERS["greedy_topk"](k=2)(dense_pair(p, q), none(30)).bool()
    sure = entropy(p) <= 1.0
    rest = DIVERGENCES["total_variation"](p, q)
    expected = torch.where(sure, DIVERGENCES["skew_kl"](p, q, alpha=0.3), rest)
    expected = torch.where(accepted, 2.0 * DIVERGENCES["reverse_kl"](p, q), expected)
    assert torch.equal(routed, expected)
    taken = {(bool(a), bool(b)) for a, b in zip(accepted, sure, strict=True)}
    assert len(taken) >= 3  # every route has rows
    assert math.isclose(
        Objective({"name": "router", "routes": routes}, "always")(dense_pair(p, q), none(30)).divergence[0],
        routed[0],
    )


@pytest.mark.parametrize(
    ("routes", "match"),
    [
        ([], "is empty"),
        ("forward_kl", "is a list"),
        ([{"gate": "greedy_topk"}], "needs a divergence"),
        ([{"divergence": "forward_kl", "wieght": 1}], "Did you mean 'weight'"),
        ([{"divergence": "forward_kl", "weight": -1}], "0 or more"),
        ([{"gate": "spec_k", "divergence": "forward_kl"}], "ranks rows or draws"),
        ([{"gate": "greedy_topkk", "divergence": "forward_kl"}], "Did you mean 'greedy_topk'"),
    ],
)
def test_a_route_that_cannot_work_is_refused_as_the_objective_is_made(routes, match, unchecked) -> None:
    with pytest.raises(ConfigError, match=match):
        Objective({"name": "router", "routes": routes})


def test_a_control_deals_out_the_verdicts_of_any_gate_that_decides_row_by_row() -> None:
    p, q = example_log_dists(64, 9, seed=1), example_log_dists(64, 9, seed=2)
    pair = replace(dense_pair(p, q), sequence=torch.arange(8).repeat_interleave(8))
    uniform = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    gate = {"name": "spec_k", "k": 1}
    own = VERIFIERS["spec_k"](k=1)(pair, uniform)
    for name in ("matched_shuffle", "matched_position"):
        dealt = VERIFIERS[name](of=gate)(pair, uniform)
        assert dealt.sum() == own.sum() and not torch.equal(dealt, own)
        if name == "matched_shuffle":  # by a column of numbers that the gate has not read
            assert torch.equal(dealt, own[uniform[:, 1].argsort(stable=True)])
    with pytest.raises(ConfigError, match="must decide row by row"):
        VERIFIERS["matched_position"](of={"name": "prefix_gate"})
