"""Controls: what a selector must be compared with before its selection is credited with anything. n rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.pair import TokenPair, sequence_of
from selectkd.objective.verifiers.row_statistics import RowStatistics
from selectkd.objective.verifiers.selectkd import at_least_one, greedy_topk
from selectkd.objective.verifiers.traits import VerifierTraits


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
    """The verdicts of greedy top-k dealt out to random rows of the step: the same rate at every step, random places.

    Not token-local: the loss scores every row first.
    """

    k: int = 5

    def __post_init__(self) -> None:
        at_least_one(type(self).__name__, self.k)

    @property
    def traits(self) -> VerifierTraits:
        return VerifierTraits(uniforms_per_token=1, teacher_tokens=self.k, scope="step")

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        verdict = greedy_topk(self.k)(pair, uniform)
        return torch.stack([verdict, uniform[:, 0].to(verdict.dtype)], -1)  # [n, 2]

    def keep(self, scores: Float[Tensor, "n m"], sequence: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        scores = scores.nan_to_num(nan=0.0)  # a row without a teacher has been rejected
        return scores[torch.argsort(scores[:, 1], stable=True), 0]

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return self.keep(self.score(pair, uniform), sequence_of(pair))


@dataclass(frozen=True)
class matched_position(matched_shuffle):
    """The verdicts of greedy top-k dealt out among the rows of the step that stand at like places of their sequences:
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
