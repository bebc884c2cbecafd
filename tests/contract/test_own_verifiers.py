"""A verifier or selector from outside needs no more than its protocol says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from selectkd import CachedRows, LiveRows, Objective, TokenPair, distillation_loss, uniforms
from selectkd.loss.plan import LossPlan, StreamLoss
from selectkd.objective.selectors import SELECTORS, top_fraction
from selectkd.objective.verifiers import STATISTICS, VERIFIERS, VerifierTraits, greedy_topk, traits_of

N, V, D = 12, 9, 4


def sure(pair: TokenPair, uniform: Tensor) -> Tensor:
    """Accepts where the teacher is sure."""
    return (pair.logp.amax(-1) > -1.0).to(pair.logp.dtype)


class Sure:
    """The same, as an object that says nothing of itself."""

    def __call__(self, pair: TokenPair, uniform: Tensor) -> Tensor:
        return sure(pair, uniform)


class Stated:
    """Judges by statistics, reads one uniform number, and states so."""

    traits = VerifierTraits(uniforms_per_token=1, teacher_tokens=3, reads=("token_rank",))

    def __call__(self, pair: TokenPair, uniform: Tensor) -> Tensor:
        return torch.ones(len(uniform))

    def from_statistics(self, statistics, uniform: Tensor) -> Tensor:
        return torch.ones(len(uniform))


class Attributes:
    """The same, each trait by an attribute of its name."""

    uniforms_per_token = 1
    teacher_tokens = 3
    reads = ("token_rank",)

    __call__ = Stated.__call__
    from_statistics = Stated.from_statistics


class Ranks(Sure):
    """Has a first pass, and says nothing of itself."""

    def score(self, pair: TokenPair, uniform: Tensor) -> Tensor:
        return sure(pair, uniform)[:, None]

    def keep(self, scores: Tensor, sequence: Tensor) -> Tensor:
        return scores[:, 0]


class Compares(Ranks):
    scope = "sequence"
    needs_reference = True


class OfOurs(greedy_topk):
    """One of ours with another need: an attribute comes before the traits of the parent."""

    uniforms_per_token = 2


class ReadsNothing(Sure):
    """Names statistics that it has no way to judge by."""

    reads = ("token_rank",)
    scope = "sequence"


@pytest.mark.parametrize(
    ("own", "traits"),
    [
        (sure, VerifierTraits()),
        (Sure(), VerifierTraits()),
        (Stated(), Stated.traits),
        (Attributes(), Stated.traits),
        (Ranks(), VerifierTraits(scope="step")),
        (Compares(), VerifierTraits(scope="sequence", needs_reference=True)),
        (OfOurs(k=3), replace(greedy_topk(3).traits, uniforms_per_token=2)),
        (ReadsNothing(), VerifierTraits()),
        (SELECTORS["adaspec"](scope="sequence"), VerifierTraits(scope="sequence", needs_reference=True)),
    ],
)
def test_traits_are_stated_whole_or_by_attributes_of_their_names(own, traits) -> None:
    assert traits_of(own) == traits == Objective("forward_kl", own).traits


@pytest.mark.parametrize("name", [*VERIFIERS, *SELECTORS])
def test_the_traits_of_ours_are_those_of_their_methods(name) -> None:
    own = {**VERIFIERS, **SELECTORS}[name]()
    assert traits_of(own).ranks == hasattr(own, "keep")
    assert (traits_of(own).reads is not None) == hasattr(own, "from_statistics")
    assert set(traits_of(own).reads or ()) <= set(STATISTICS)


@pytest.mark.parametrize("own", [sure, Sure()])
@pytest.mark.parametrize("stored", [False, True])
def test_an_own_verifier_that_says_nothing_of_itself_works(own, stored) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(N, D, requires_grad=True), torch.randn(V, D)
    logp = (2 * torch.randn(N, V)).log_softmax(-1)
    teacher = LiveRows(logp, torch.eye(V))
    if stored:
        best = logp.topk(4, -1)
        teacher = CachedRows(best.indices, best.values)
    objective = Objective("forward_kl", own, beta=0.0)
    assert objective.uniforms_per_token == 0 and objective.teacher_tokens is None
    _, sums = distillation_loss(hidden, head, teacher, objective)
    wanted = (logp.amax(-1) > -1.0).float()
    assert 0 < wanted.sum() < N and torch.equal(sums["row_acceptance"], wanted)
    assert LossPlan((StreamLoss(objective, selector=own),)).uniforms_per_token == 0


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_rank_last(fault) -> None:
    score = torch.tensor([3.0, fault, 2.0, 1.0])
    assert top_fraction(score, 0.75).tolist() == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("name", SELECTORS)
def test_one_bad_row_moves_no_other_rows_place(name) -> None:
    generator = torch.Generator().manual_seed(0)
    selector = SELECTORS[name](share=0.25)
    scores = torch.rand(40, 2, generator=generator)
    sequence = torch.zeros(40, dtype=torch.long)
    kept = selector.keep(scores, sequence)
    assert 0 < kept.sum() < 40
    with_bad = torch.cat([torch.full((1, 2), torch.nan), scores])
    beside = selector.keep(with_bad, torch.zeros(41, dtype=torch.long))
    assert beside[0] == 0.0
    # the bad row counts for the share, and so one row more may be kept
    assert bool((beside[1:] >= kept).all()) and beside.sum() - kept.sum() <= 1


def test_no_uniform_number_is_one(monkeypatch) -> None:
    monkeypatch.setattr(
        "selectkd.objective.uniforms._shift", lambda x, bits: torch.full_like(x, (1 << 24) - 1)
    )
    assert uniforms(3, 2, seed=0, step=0).max() < 1.0
