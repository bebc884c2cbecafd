"""Published gates that are not ours, behind the same interface. n rows, s support columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.pair import TokenPair, entropy, hellinger_distance, label_of, sequence_of
from selectkd.objective.verifiers.row_statistics import RowStatistics
from selectkd.objective.verifiers.selectkd import at_least_one, greedy_topk, within_top
from selectkd.objective.verifiers.traits import VerifierTraits


@dataclass(frozen=True)
class hellinger:
    """a = 1 - H(p, q), H = ||sqrt p - sqrt q|| / sqrt 2; in [0, 1], 1 at p = q. The soft weight the paper rejected.

    Source: SelecTKD (arXiv 2510.24021), ablation of the weighting.
    """

    traits = VerifierTraits(
        reads=("bhattacharyya",), from_top_k="upper bound"
    )  # merging outcomes only lowers H

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return 1.0 - hellinger_distance(pair.logp, pair.logq)

    def from_statistics(
        self, statistics: RowStatistics, uniform: Float[Tensor, "n r"]
    ) -> Float[Tensor, " n"]:
        return 1.0 - (1.0 - statistics.bhattacharyya).clamp(min=0.0).sqrt()


@dataclass(frozen=True)
class teacher_entropy:
    """a = 1 where the teacher's entropy is at most ``max`` nats: learn where the teacher is sure. Default 1 nat."""

    max: float = 1.0
    # merging outcomes only lowers an entropy
    traits = VerifierTraits(reads=("teacher_entropy",), from_top_k="upper bound")

    def __post_init__(self) -> None:
        if not self.max >= 0:
            raise ConfigError(f"teacher_entropy(max={self.max}): max is in nats and must be 0 or more.")

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return (entropy(pair.logp) <= self.max).to(pair.logp.dtype)

    def from_statistics(
        self, statistics: RowStatistics, uniform: Float[Tensor, "n r"]
    ) -> Float[Tensor, " n"]:
        return (statistics.teacher_entropy <= self.max).to(statistics.overlap.dtype)


@dataclass(frozen=True)
class student_entropy:
    """a = 1 where the student's entropy is at least ``min`` nats: learn where the student is unsure. Default 1 nat."""

    min: float = 1.0
    # merging outcomes only lowers an entropy
    traits = VerifierTraits(reads=("student_entropy",), from_top_k="lower bound")

    def __post_init__(self) -> None:
        if not self.min >= 0:
            raise ConfigError(f"student_entropy(min={self.min}): min is in nats and must be 0 or more.")

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return (entropy(pair.logq) >= self.min).to(pair.logq.dtype)

    def from_statistics(
        self, statistics: RowStatistics, uniform: Float[Tensor, "n r"]
    ) -> Float[Tensor, " n"]:
        return (statistics.student_entropy >= self.min).to(statistics.overlap.dtype)


@dataclass(frozen=True)
class label_top_k:
    """a = 1 where the token of the text, y_t, is among the teacher's k best: verifies the label, not the proposal."""

    k: int = 5

    def __post_init__(self) -> None:
        at_least_one("label_top_k", self.k)

    @property
    def traits(self) -> VerifierTraits:
        return VerifierTraits(teacher_tokens=self.k, reads=("label_rank",))

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return within_top(pair, pair.column(label_of(pair, "label_top_k")), self.k, "label_top_k")

    def from_statistics(
        self, statistics: RowStatistics, uniform: Float[Tensor, "n r"]
    ) -> Float[Tensor, " n"]:
        return (statistics.label_rank < self.k).to(statistics.overlap.dtype)


@dataclass(frozen=True)
class prefix_gate:
    """a = 1 up to a sequence's first rejection by greedy top-k, 0 from there on.

    Rows of one sequence must stand in order (``pair.sequence``); not token-local, so the loss scores every row first.
    """

    k: int = 5

    def __post_init__(self) -> None:
        at_least_one("prefix_gate", self.k)

    @property
    def traits(self) -> VerifierTraits:
        return VerifierTraits(teacher_tokens=self.k, scope="sequence")

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        return greedy_topk(self.k)(pair, uniform)[:, None]  # [n, 1]

    def keep(self, scores: Float[Tensor, "n m"], sequence: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        rejected = 1.0 - scores[:, 0].nan_to_num(nan=0.0)  # a row without a teacher is a rejection
        order = torch.argsort(sequence, stable=True)
        count = rejected[order].cumsum(0)
        first = torch.ones_like(order, dtype=torch.bool)
        first[1:] = sequence[order][1:] != sequence[order][:-1]
        # rejections in the sequences ahead: known at each sequence's first row, and never fewer further on
        before = torch.where(first, count - rejected[order], 0.0).cummax(0).values
        within = count - before
        return torch.zeros_like(rejected).scatter(0, order, (within == 0).to(rejected.dtype))

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return self.keep(self.score(pair, uniform), sequence_of(pair))
