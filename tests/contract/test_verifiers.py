"""Every row of VERIFIERS and SELECTORS keeps the contract; the rates are what theory gives."""

from __future__ import annotations

import math

import pytest
import torch

from selectkd.errors import ConfigError
from selectkd.objective.contract import check_verifier, example_log_dists
from selectkd.objective.pair import dense_pair, topk_pair
from selectkd.objective.selectors import SELECTORS
from selectkd.objective.verifiers import VERIFIERS, traits_of

ACCEPT_EQUALS = {"greedy_topk", "spec_k", "expected_spec_k", "spec_k_literal", "hellinger", "always"}


@pytest.mark.parametrize("name", VERIFIERS)
def test_a_verifier_keeps_the_contract(name):
    check_verifier(VERIFIERS[name](), accepts_equal=name in ACCEPT_EQUALS)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_keeps_the_contract(name):
    check_verifier(SELECTORS[name](), accepts_equal=False)


@pytest.mark.parametrize("name", ["spec_k", "spec_k_literal"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_spec_k_accepts_at_the_rate_theory_gives(name, k):
    trials, dists = 40_000, example_log_dists(5, 7, seed=3)
    p, q = dists[3:4], dists[4:5]
    tv = 0.5 * (p.exp() - q.exp()).abs().sum().item()
    assert 0.05 < tv < 0.95
    verifier = VERIFIERS[name](k=k)
    generator = torch.Generator().manual_seed(11)
    uniform = torch.rand(trials, traits_of(verifier).uniforms_per_token, generator=generator)
    rate = verifier(dense_pair(p.expand(trials, -1), q.expand(trials, -1)), uniform).mean().item()
    expected = 1 - tv**k
    assert abs(rate - expected) < 4 * math.sqrt(
        expected * (1 - expected) / trials
    )  # 4 sigma of 40,000 trials
    assert VERIFIERS["expected_spec_k"](k=k)(dense_pair(p, q), torch.empty(1, 0)).item() == pytest.approx(
        expected
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("stored", [5, 10, 32])
def test_greedy_topk_from_a_cache_equals_the_live_verdict_bit_for_bit(k, stored):
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.log_softmax(2 * torch.randn(400, 64, generator=generator), -1) for _ in range(2))
    q = torch.log_softmax(0.5 * p + 0.5 * q, -1)
    best = p.topk(stored, -1)
    verifier, none = VERIFIERS["greedy_topk"](k=k), torch.empty(400, 0)
    live = verifier(dense_pair(p, q), none)
    assert 0.02 < live.mean() < 0.98
    assert torch.equal(live, verifier(topk_pair(best.indices, best.values, q), none))


def test_ties_at_rank_k_are_accepted():
    p = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    q = torch.tensor([[0.1, 0.1, 0.1, 0.7]]).log()
    verdicts = [VERIFIERS["greedy_topk"](k=k)(dense_pair(p, q), torch.empty(1, 0)).item() for k in (1, 2, 4)]
    assert verdicts == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "5"])
@pytest.mark.parametrize(
    "name", ["greedy_topk", "spec_k", "spec_k_literal", "expected_spec_k", "label_top_k"]
)
def test_a_k_that_is_no_positive_integer_is_refused(name, k, unchecked):
    with pytest.raises(ConfigError, match=name):
        VERIFIERS[name](k=k)


def test_a_k_beyond_the_vocabulary_is_refused():
    p = torch.log_softmax(torch.zeros(1, 4), -1)
    with pytest.raises(ConfigError, match="4 or less"):
        VERIFIERS["greedy_topk"](k=5)(dense_pair(p, p), torch.empty(1, 0))


def test_prefix_gate_closes_at_the_first_rejection_of_each_sequence():
    scores = torch.tensor([1.0, 0, 1, 1, 1, 0, 0, 1])[:, None]
    sequence = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    kept = VERIFIERS["prefix_gate"]().keep(scores, sequence)
    assert kept.tolist() == [1, 0, 0, 1, 1, 0, 0, 0]


def test_matched_shuffle_keeps_the_rate_and_moves_the_places():
    p, q = example_log_dists(200, 9, seed=1), example_log_dists(200, 9, seed=2)
    uniform = torch.rand(200, 1, generator=torch.Generator().manual_seed(0))
    greedy = VERIFIERS["greedy_topk"](k=2)(dense_pair(p, q), uniform)
    dealt = VERIFIERS["matched_shuffle"](k=2)(dense_pair(p, q), uniform)
    assert dealt.sum() == greedy.sum() and not torch.equal(dealt, greedy)


@pytest.mark.parametrize(
    ("name", "share"), [("se_kd", 0.2), ("tip", 0.5), ("teachability", 0.05), ("adakd", 0.5)]
)
def test_a_selector_keeps_its_share(name, share):
    p, q = example_log_dists(101, 20, seed=1), example_log_dists(101, 20, seed=2)
    kept = SELECTORS[name]()(dense_pair(p, q), torch.empty(101, 0))
    assert kept.sum().item() == math.ceil(101 * share)


def test_a_selector_that_compares_with_a_reference_says_so():
    p = example_log_dists()
    with pytest.raises(ConfigError, match="reference"):
        SELECTORS["adaspec"]()(dense_pair(p, p), torch.empty(len(p), 0))
