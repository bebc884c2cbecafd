"""Weights of tokens published in 2026 that are no verdicts, behind the interface of verifiers. n rows.

Their acceptance is a weight, which may lie above 1 where ``traits.above_one`` says so: with beta = 0 it is the weight
of the row, and ``weight`` in the metrics is its mean. ``tar`` is then the mean weight and no rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.pair import TokenPair, entropy, label_log_prob, sequence_of
from selectkd.objective.verifiers.row_statistics import RowStatistics
from selectkd.objective.verifiers.traits import VerifierTraits

MOST_NATS = 87.0
"""-log of the smallest fp32 number: what a token that one of the models holds for impossible counts."""


@dataclass(frozen=True)
class sigmoid_entropy_gap:
    """a = sigmoid(H(q) - H(p)), in (0, 1), 1/2 where teacher and student are as unsure: more weight where the teacher
    knows more than the student.

    >>> import torch
    >>> from selectkd.objective.pair import dense_pair
    >>> same = torch.tensor([[0.5, 0.5]]).log()
    >>> sigmoid_entropy_gap()(dense_pair(same, same), torch.empty(1, 0)).item()
    0.5
    """

    traits = VerifierTraits(reads=("teacher_entropy", "student_entropy"))

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return torch.sigmoid(entropy(pair.logq) - entropy(pair.logp))

    def from_statistics(
        self, statistics: RowStatistics, uniform: Float[Tensor, "n r"]
    ) -> Float[Tensor, " n"]:
        return torch.sigmoid(statistics.student_entropy - statistics.teacher_entropy)


@dataclass(frozen=True)
class OfSequence:
    """A weight that is a function of all rows of a sequence: ``score`` row by row, ``weigh`` one sequence in order."""

    traits = VerifierTraits(scope="sequence", above_one=True)

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        raise TypeError(f"{type(self).__name__} states no score")

    def weigh(self, score: Float[Tensor, " t"]) -> Float[Tensor, " t"]:
        """The weights of one sequence from its scores, both in order."""
        raise TypeError(f"{type(self).__name__} states no weight")

    def keep(self, scores: Float[Tensor, "n m"], sequence: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        kept = torch.zeros_like(scores[:, 0])
        for one in sequence.unique():
            rows = (sequence == one).nonzero()[:, 0]
            kept[rows] = self.weigh(scores[rows, 0].nan_to_num(nan=0.0))
        return kept

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return self.keep(self.score(pair, uniform), sequence_of(pair))


@dataclass(frozen=True)
class iw_opd(OfSequence):
    """w_t = 1 + gamma (1 - sum_{i < t} |A_i| / sum_i |A_i|), A = log p(y) - log q(y): from 1 + gamma at a sequence's
    first token down to 1, the faster the more of its disagreement has passed.

    gamma = .5 as published. Where the models agree on every token of a sequence, all its weights are 1 + gamma.
    """

    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ConfigError(f"iw_opd(gamma={self.gamma}): gamma must be 0 or more.")

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        ours, theirs = (
            label_log_prob(pair, each, "iw_opd").clamp(min=-MOST_NATS) for each in (pair.logq, pair.logp)
        )
        return (theirs - ours).abs()[:, None]

    def weigh(self, score: Float[Tensor, " t"]) -> Float[Tensor, " t"]:
        passed = score.cumsum(0) - score
        return 1.0 + self.gamma * (1.0 - passed / score.sum().clamp(min=torch.finfo(score.dtype).tiny))


@dataclass(frozen=True)
class prefix_product(OfSequence):
    """How much the expected accepted length of a draft of ``length`` tokens gains from a token's acceptance, as a share
    of ``length``: in [0, 1], 1 at the first token of a sequence whose tokens are all accepted.

    With a_i = sum_v min(p, q), a draft that begins at s has sum_j prod_{s <= i <= j} a_i tokens accepted in the mean.
    Its derivative to a_t is the chance to reach t times the tokens that t unlocks; the weight is the mean of that over
    the drafts within the sequence that hold t.
    """

    length: int = 5
    # merging outcomes only raises an overlap, and the weight rises with each of them
    traits = VerifierTraits(scope="sequence", from_top_k="upper bound")

    def __post_init__(self) -> None:
        if isinstance(self.length, bool) or self.length < 1:
            raise ConfigError(f"prefix_product(length={self.length}): length must be 1 or more.")

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        return pair.overlap[:, None]

    def weigh(self, score: Float[Tensor, " t"]) -> Float[Tensor, " t"]:
        g, t = self.length, score.shape[0]
        around = torch.nn.functional.pad(score, (g, g))
        reach = torch.ones_like(score)  # the chance that a draft begun `back` tokens ahead reaches each token
        total, drafts = torch.zeros_like(score), torch.zeros_like(score)
        for back in range(g):
            unlocked, product = torch.ones_like(score), torch.ones_like(score)
            for ahead in range(1, g - back):
                product = product * around[g + ahead : g + ahead + t]
                unlocked = unlocked + product
            begins = (torch.arange(t, device=score.device) >= back).to(score.dtype)
            total, drafts = total + begins * reach * unlocked, drafts + begins
            reach = reach * around[g - back - 1 : g - back - 1 + t]
        return total / drafts / g


@dataclass(frozen=True)
class fire:
    """w = (1 + c_T)(1 + c_S) over its mean, c = 1 - H / max H the sureness of teacher and student; 0 in the ``drop``
    of the sequences where the teacher's mean log p of the text is lowest.

    drop = .2 as published, rounded down. The largest entropy and the mean are those of the rows that stay, over the
    optimizer step; so the weights of the step's rows that stay have mean 1.
    """

    drop: float = 0.2
    traits = VerifierTraits(scope="step", above_one=True)

    def __post_init__(self) -> None:
        if not 0.0 <= self.drop < 1.0:
            raise ConfigError(f"fire(drop={self.drop}): drop is a share of the sequences in [0, 1).")

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        likely = label_log_prob(pair, pair.logp, "fire").clamp(min=-MOST_NATS)
        return torch.stack([likely, entropy(pair.logp), entropy(pair.logq)], -1)  # [n, 3]

    def keep(self, scores: Float[Tensor, "n m"], sequence: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        scores = scores.nan_to_num(nan=0.0)
        names, place = sequence.unique(return_inverse=True)
        count = torch.zeros(len(names), dtype=scores.dtype, device=scores.device)
        count = count.index_add(0, place, torch.ones_like(scores[:, 0]))
        mean = torch.zeros_like(count).index_add(0, place, scores[:, 0]) / count
        stays = torch.ones_like(count)
        stays[torch.argsort(mean, stable=True)[: int(self.drop * len(names))]] = 0.0
        kept = stays[place]  # [n]
        sure = [1.0 - h / (h * kept).max().clamp(min=1e-12) for h in (scores[:, 1], scores[:, 2])]
        weight = (1.0 + sure[0]) * (1.0 + sure[1]) * kept
        return weight * kept.sum() / weight.sum()

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return self.keep(self.score(pair, uniform), sequence_of(pair))
