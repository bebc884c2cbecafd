"""Weights of 2026 by hand: positions, sequences left out, drafts, entropies; and the router, row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from selectkd.errors import ConfigError
from selectkd.objective.contract import example_log_dists
from selectkd.objective.divergences import DIVERGENCES
from selectkd.objective.objective import Objective
from selectkd.objective.pair import dense_pair, entropy
from selectkd.objective.plugins import allow_plugin, component
from selectkd.objective.verifiers import VERIFIERS, VerifierTraits, traits_of


@component("verifier")
def of_the_text():
    return lambda pair, uniform: (pair.label[:, None] == torch.arange(2)).any(-1).float()


@component("verifier")
def of_the_reference():
    return Stated(VerifierTraits(needs_reference=True))


@component("verifier")
def twice():
    return Stated(VerifierTraits(above_one=True))


@component("verifier")
def of_all():
    return lambda pair, uniform: pair.logp.new_ones(1)


@component("verifier")
def sure():
    return lambda pair, uniform: (pair.logp.amax(-1) > -0.5).to(pair.logp.dtype)


@dataclass(frozen=True)
class Stated:
    """A gate of a plug-in with these traits."""

    traits: VerifierTraits

    def __call__(self, pair, uniform):
        return 2.0 * torch.ones_like(pair.logp[:, 0])


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
        ([{"gate": "label_top_k", "divergence": "forward_kl"}], "label_top_k reads the tokens of the text"),
        ([{"gate": "iw_opd", "divergence": "forward_kl"}], "ranks rows"),
        ([{"gate": f"{__name__}:of_the_text", "divergence": "forward_kl"}], "fails on rows without a text"),
        ([{"gate": f"{__name__}:of_the_reference", "divergence": "forward_kl"}], "a reference student"),
        ([{"gate": f"{__name__}:twice", "divergence": "forward_kl"}], "weighs rows above 1"),
        ([{"gate": f"{__name__}:of_all", "divergence": "forward_kl"}], r"gives \(1,\) for 2 rows"),
        (
            [
                {
                    "divergence": {
                        "name": "router",
                        "routes": [{"gate": "label_top_k", "divergence": "forward_kl"}],
                    }
                }
            ],
            "label_top_k reads the tokens of the text",
        ),
    ],
)
def test_a_route_that_cannot_work_is_refused_as_the_objective_is_made(routes, match, unchecked) -> None:
    allow_plugin(__name__)
    with pytest.raises(ConfigError, match=match):
        Objective({"name": "router", "routes": routes})


def test_a_gate_of_a_plugin_that_needs_both_distributions_alone_is_a_route(unchecked) -> None:
    allow_plugin(__name__)
    routes = [{"gate": f"{__name__}:sure", "divergence": "reverse_kl"}]
    p, q = example_log_dists(30, 9, seed=1), example_log_dists(30, 9, seed=2)
    routed = Objective({"name": "router", "routes": routes}, "always")(dense_pair(p, q), none(30)).divergence
    expected = torch.where(p.amax(-1) > -0.5, DIVERGENCES["reverse_kl"](p, q), 0.0)
    assert torch.equal(routed, expected) and 0 < routed.count_nonzero() < 30


def test_a_routers_gates_decide_by_the_pair_that_verification_sees() -> None:
    """At the temperature of the loss, .2, the teacher is sure of every row; at 1 of none. In a router within a route
    too."""
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.5, 0.5]], dtype=torch.float64)
    at = {t: dense_pair((logits / t).log_softmax(-1), (-logits / t).log_softmax(-1)) for t in (0.2, 1.0)}
    gate = {"name": "teacher_entropy", "max": 0.5}
    routes = [{"gate": gate, "divergence": "reverse_kl"}, {"divergence": "forward_kl"}]
    for divergence in (routes, [{"divergence": {"name": "router", "routes": routes}}]):
        objective = Objective({"name": "router", "routes": divergence}, "always")
        loss = at[0.2].logp, at[0.2].logq
        sure = objective(at[0.2], none(2)).divergence
        unsure = objective(at[0.2], none(2), verified=at[1.0]).divergence
        assert torch.equal(sure, DIVERGENCES["reverse_kl"](*loss))
        assert torch.equal(unsure, DIVERGENCES["forward_kl"](*loss))


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


@pytest.mark.parametrize("name", ["iw_opd", "fire", "prefix_gate", "prefix_product"])
def test_a_shuffle_deals_out_the_weights_of_a_gate_that_ranks_rows(name: str) -> None:
    p, q = example_log_dists(64, 9, seed=1), example_log_dists(64, 9, seed=2)
    sequence = torch.arange(8).repeat_interleave(8)
    pair = replace(dense_pair(p, q), sequence=sequence, label=torch.arange(64) % 9)
    uniform = torch.rand(64, 1, generator=torch.Generator().manual_seed(0))
    own = VERIFIERS[name]()(pair, none(64))
    dealt = VERIFIERS["matched_shuffle"](of={"name": name})
    assert traits_of(dealt).above_one == traits_of(VERIFIERS[name]()).above_one
    found = dealt(pair, uniform)
    assert torch.equal(found, own[uniform[:, 0].argsort(stable=True)]) and not torch.equal(found, own)


@pytest.mark.parametrize("name", ["matched_shuffle", "matched_position"])
def test_rows_that_are_always_accepted_take_no_part_in_a_shuffle(name: str) -> None:
    """Else their verdicts go to other rows, which are then accepted beside them, and the whole rate is another."""
    p, q = example_log_dists(64, 9, seed=1), example_log_dists(64, 9, seed=2)
    sequence, label = torch.arange(8).repeat_interleave(8), torch.arange(64) % 9
    own = VERIFIERS["greedy_topk"](k=2)(dense_pair(p, q), none(64)).bool()
    label = torch.where(
        own & (torch.arange(64) % 2 == 0), 0, label.clamp(min=1)
    )  # 0: accepted by the gate as well
    pair = replace(dense_pair(p, q), sequence=sequence, label=label)
    uniform = torch.rand(64, 1, generator=torch.Generator().manual_seed(0))
    gated = Objective("forward_kl", {"name": "greedy_topk", "k": 2}, beta=0.0, always_accept=(0,))
    control = replace(gated, verifier={"name": name, "of": {"name": "greedy_topk", "k": 2}})
    accepted, dealt = (one(pair, uniform).acceptance for one in (gated, control))
    assert dealt.sum() == accepted.sum() and not torch.equal(dealt, accepted)
    assert bool((dealt[label == 0] == 1).all())
