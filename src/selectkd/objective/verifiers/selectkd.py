"""SelecTKD's verifiers: Variant A (greedy top-k) and Variant B (spec-k) in three forms.

n rows, s support columns, k proposals or rank window; p = teacher, q = student. Class names are the registry's names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.pair import TokenPair
from selectkd.objective.verifiers.row_statistics import RowStatistics
from selectkd.objective.verifiers.traits import VerifierTraits


def at_least_one(name: str, k: int) -> None:
    """A ConfigError unless k is an integer of 1 or more."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ConfigError(f"{name}(k={k!r}): k must be an integer of 1 or more; the paper's default is 5.")


def within_top(pair: TokenPair, column: Int[Tensor, " n"], k: int, name: str) -> Float[Tensor, " n"]:
    """Whether fewer than k tokens have p(v) > p(column): [n] of 0 and 1, without a sort.

    Ties at rank k are accepted. A column of -1 (in the tail) is rejected: the tail is many tokens and has no rank.
    """
    ranked = pair.ranked  # [n, s - tail]
    if ranked.shape[-1] < k:
        have = ranked.shape[-1]
        raise ConfigError(
            f"{name}(k={k}) needs the teacher's {k} best tokens; it holds {have} a position. "
            f"Set objective.verifier.k to {have} or less"
            + (", or store more tokens (K >= 2k sees ties across the edge)." if pair.tail else ".")
        )
    chosen = ranked.gather(-1, column.clamp(min=0)[:, None])  # [n, 1]
    # counted in floats: five times as fast as in booleans
    better = torch.gt(ranked, chosen, out=torch.empty_like(ranked)).sum(-1)
    # a token of probability 0 (unshared) is never accepted, not even with k = V
    return ((better < k) & (column >= 0) & ~torch.isneginf(chosen[:, 0])).to(pair.logp.dtype)


@dataclass(frozen=True)
class greedy_topk:
    """Variant A: a = 1 where the student's argmax is among the teacher's k best tokens, else 0.

    k = 5 as in the paper; k = V accepts everything. Exact from a stored teacher top-K whenever K >= k.
    Source: SelecTKD (arXiv 2510.24021), Algorithm 1, Variant A.

    >>> import torch
    >>> from selectkd.objective.pair import dense_pair
    >>> p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.3, 0.6]])
    >>> [greedy_topk(k=k)(dense_pair(p.log(), q.log()), torch.empty(1, 0)).item() for k in (1, 2, 3)]
    [0.0, 0.0, 1.0]
    """

    k: int = 5

    def __post_init__(self) -> None:
        at_least_one("greedy_topk", self.k)

    @property
    def traits(self) -> VerifierTraits:
        return VerifierTraits(teacher_tokens=self.k, reads=("token_rank",), proposal_alone=True)

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return within_top(pair, pair.student_top, self.k, "greedy_topk")

    def from_statistics(
        self, statistics: RowStatistics, uniform: Float[Tensor, "n r"]
    ) -> Float[Tensor, " n"]:
        return (statistics.token_rank < self.k).to(statistics.overlap.dtype)


@dataclass(frozen=True)
class spec_k:
    """Variant B, fast: a = 1 with probability exactly 1 - TV(p, q)^k, else 0, from one uniform number a token.

    It has the law of ``spec_k_literal`` (k independent draws of the student, any of which may pass) without sampling
    over the vocabulary. k = 5 as in the paper. From a top-K teacher the acceptance is an upper bound.
    Source: SelecTKD (arXiv 2510.24021), Algorithm 1, Variant B; the law: Leviathan et al. 2023, theorem 3.5.

    >>> import torch
    >>> from selectkd.objective.pair import dense_pair
    >>> pair = dense_pair(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, 1.0]]).log())
    >>> [spec_k(k=2)(pair, torch.tensor([[u]])).item() for u in (0.74, 0.76)]  # 1 - TV^2 = 0.75
    [1.0, 0.0]
    """

    k: int = 5
    # merging outcomes only lowers TV
    traits = VerifierTraits(uniforms_per_token=1, reads=("overlap",), from_top_k="upper bound")

    def __post_init__(self) -> None:
        at_least_one("spec_k", self.k)

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        chance = any_passes(pair.overlap, self.k)
        return (uniform[:, 0].to(chance.dtype) < chance).to(chance.dtype)

    def from_statistics(
        self, statistics: RowStatistics, uniform: Float[Tensor, "n r"]
    ) -> Float[Tensor, " n"]:
        chance = any_passes(statistics.overlap, self.k)
        return (uniform[:, 0].to(chance.dtype) < chance).to(chance.dtype)


@dataclass(frozen=True)
class expected_spec_k:
    """Variant B without noise: a = 1 - TV(p, q)^k, the probability that spec-k accepts; in [0, 1], 1 at p = q.

    Source: SelecTKD (arXiv 2510.24021), Algorithm 1, Variant B, in expectation.

    >>> import torch
    >>> from selectkd.objective.pair import dense_pair
    >>> pair = dense_pair(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    >>> expected_spec_k(k=2)(pair, torch.empty(1, 0)).item()
    0.9375
    """

    k: int = 5
    traits = VerifierTraits(reads=("overlap",), from_top_k="upper bound")  # merging outcomes only lowers TV

    def __post_init__(self) -> None:
        at_least_one("expected_spec_k", self.k)

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return any_passes(pair.overlap, self.k)

    def from_statistics(
        self, statistics: RowStatistics, uniform: Float[Tensor, "n r"]
    ) -> Float[Tensor, " n"]:
        return any_passes(statistics.overlap, self.k)


@dataclass(frozen=True)
class spec_k_literal:
    """Variant B word for word: k draws y ~ q, each passes if r < min(1, p(y) / q(y)); a = 1 if any passes.

    The oracle of the tests and of the one-file example; ``spec_k`` has the same law at a fraction of the cost. Reads
    2k uniform numbers a token: k for the draws (inverse transform), k for the tests.
    Source: SelecTKD (arXiv 2510.24021), Algorithm 1, Variant B.

    >>> import torch
    >>> from selectkd.objective.pair import dense_pair
    >>> pair = dense_pair(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    >>> spec_k_literal(k=1)(pair, torch.tensor([[0.9, 0.7]])).item()  # draws token 1, 0.7 > 0.5 / 0.75
    0.0
    """

    k: int = 5

    def __post_init__(self) -> None:
        at_least_one("spec_k_literal", self.k)

    @property
    def traits(self) -> VerifierTraits:  # merging outcomes only lowers TV
        return VerifierTraits(uniforms_per_token=2 * self.k, from_top_k="upper bound")

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        q = pair.logq.double().exp()
        cumulative = q.cumsum(-1)
        draws, tests = uniform[:, : 2 * self.k].double().split(self.k, dim=-1)  # [n, k] each
        drawn = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
        drawn = drawn.clamp(max=q.shape[-1] - 1)  # [n, k]
        ratio = (pair.logp.double().gather(-1, drawn) - pair.logq.double().gather(-1, drawn)).exp()
        return (tests < ratio).any(-1).to(pair.logp.dtype)


def any_passes(overlap: Float[Tensor, " n"], k: int) -> Float[Tensor, " n"]:
    """1 - (1 - overlap)^k = 1 - TV(p, q)^k, [n]: the probability that at least one of k draws of the student passes."""
    return 1.0 - (1.0 - overlap) ** k
