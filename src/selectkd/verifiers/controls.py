"""Controls: what a selector must be compared with before its selection is credited with anything. n rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.pair import TokenPair
from selectkd.verifiers.gates import sequence_of
from selectkd.verifiers.selectkd import at_least_one, greedy_topk
from selectkd.verifiers.statistics import RowStatistics


@dataclass(frozen=True)
class always:
    """a = 1 everywhere: plain distillation.

    >>> import torch
    >>> from selectkd.pair import dense_pair
    >>> always()(dense_pair(torch.zeros(1, 1), torch.zeros(1, 1)), torch.empty(1, 0)).item()
    1.0
    """

    uniforms_per_token = 0
    reads = ()
    teacher_tokens = 0

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
    uniforms_per_token = 1
    reads = ()
    teacher_tokens = 0

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
    """The verdicts of greedy top-k dealt out to random rows of the batch: the same rate at every step, random places.

    Not token-local: the loss scores every row first.
    """

    k: int = 5
    uniforms_per_token = 1

    def __post_init__(self) -> None:
        at_least_one("matched_shuffle", self.k)

    @property
    def teacher_tokens(self) -> int:
        return self.k

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        verdict = greedy_topk(self.k)(pair, uniform)
        return torch.stack([verdict, uniform[:, 0].to(verdict.dtype)], -1)  # [n, 2]

    def keep(self, scores: Float[Tensor, "n m"], sequence: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        scores = scores.nan_to_num(nan=0.0)  # a row without a teacher has been rejected
        return scores[torch.argsort(scores[:, 1], stable=True), 0]

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return self.keep(self.score(pair, uniform), sequence_of(pair))
