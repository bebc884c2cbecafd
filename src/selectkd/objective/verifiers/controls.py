"""Controls: what a selector must be compared with before its selection is credited with anything. n rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.pair import TokenPair, sequence_of
from selectkd.objective.registry import build
from selectkd.objective.verifiers.row_statistics import RowStatistics
from selectkd.objective.verifiers.selectkd import at_least_one, greedy_topk
from selectkd.objective.verifiers.traits import VerifierTraits, traits_of


@dataclass(frozen=True)
class always:
    """a = 1 everywhere: plain distillation.

    >>> import torch
    >>> from selectkd.objective.pair import dense_pair
    >>> always()(dense_pair(torch.zeros(1, 1), torch.zeros(1, 1)), torch.empty(1, 0)).item()
    1.0
    """

    traits = VerifierTraits(teacher_tokens=0, reads=())

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return torch.ones(pair.logp.shape[0], dtype=pair.logp.dtype, device=pair.logp.device)

    def from_statistics(
        self, statistics: RowStatistics, uniform: Float[Tensor, "n r"]
    ) -> Float[Tensor, " n"]:
        return torch.ones_like(statistics.overlap)


@dataclass(frozen=True)
class matched_random:
    """a = 1 with probability ``rate`` whatever the models say: random places at the rate of the run it controls for.

    Set ``rate`` to that run's TAR; the default is a fair coin.
    """

    rate: float = 0.5
    traits = VerifierTraits(uniforms_per_token=1, teacher_tokens=0, reads=())

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate <= 1.0:
            raise ConfigError(f"matched_random(rate={self.rate}): rate must lie in [0, 1].")

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return (uniform[:, 0] < self.rate).to(pair.logp.dtype)

    def from_statistics(
        self, statistics: RowStatistics, uniform: Float[Tensor, "n r"]
    ) -> Float[Tensor, " n"]:
        return (uniform[:, 0] < self.rate).to(statistics.overlap.dtype)


@dataclass(frozen=True)
class matched_shuffle:
    """Another verifier's verdicts dealt out to random rows of the step: the same rate at every step, random places.

    of: that verifier, {"name": ..., **params}, one that decides row by row; by default greedy top-k with ``k``. Not
    token-local: the loss scores every row first. ConfigError for a verifier that ranks rows.
    """

    k: int = 5
    of: Any = None

    def __post_init__(self) -> None:
        at_least_one(type(self).__name__, self.k)
        if traits_of(self.gate).ranks:
            raise ConfigError(
                f"{type(self).__name__}(of={self.of!r}): of must decide row by row, as greedy_topk and spec_k do."
            )

    @cached_property
    def gate(self) -> Any:
        """The verifier whose verdicts are dealt out."""
        from selectkd.objective.verifiers import VERIFIERS

        return greedy_topk(self.k) if self.of is None else build(VERIFIERS, self.of, kind="verifier")

    @property
    def traits(self) -> VerifierTraits:
        gate = traits_of(self.gate)
        return VerifierTraits(
            uniforms_per_token=gate.uniforms_per_token + 1,
            teacher_tokens=gate.teacher_tokens,
            scope="step",
            above_one=gate.above_one,
        )

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        own = traits_of(self.gate).uniforms_per_token
        verdict = self.gate(pair, uniform)
        return torch.stack([verdict, uniform[:, own].to(verdict.dtype)], -1)  # [n, 2]

    def keep(self, scores: Float[Tensor, "n m"], sequence: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        scores = scores.nan_to_num(nan=0.0)  # a row without a teacher has been rejected
        return scores[torch.argsort(scores[:, 1], stable=True), 0]

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return self.keep(self.score(pair, uniform), sequence_of(pair))


@dataclass(frozen=True)
class matched_position(matched_shuffle):
    """Another verifier's verdicts dealt out among the rows of the step that stand at like places of their sequences:
    the same rate at every step and at every place, whichever rows they are.

    Like places are 0, 1 to 2, 3 to 6, 7 to 14, and so on. What a run gains over this control is not gained by where in
    an answer the gate lets tokens pass. Rows of one sequence must stand in order (``pair.sequence``).
    """

    def keep(self, scores: Float[Tensor, "n m"], sequence: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        scores = scores.nan_to_num(nan=0.0)
        place = place_of(sequence)
        bins = (place + 1).double().log2().floor().long()
        chance = torch.argsort(scores[:, 1], stable=True)
        drawn = chance[torch.argsort(bins[chance], stable=True)]
        kept = torch.empty_like(scores[:, 0])
        kept[torch.argsort(bins, stable=True)] = scores[drawn, 0]
        return kept


def place_of(sequence: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """How many rows of its sequence stand before each row, [n]."""
    order = torch.argsort(sequence, stable=True)
    grouped = sequence[order]
    at = torch.arange(sequence.shape[0], device=sequence.device)
    begins = torch.ones_like(grouped, dtype=torch.bool)
    begins[1:] = grouped[1:] != grouped[:-1]
    start = at[begins][begins.long().cumsum(0) - 1]
    return torch.empty_like(at).scatter_(0, order, at - start)
