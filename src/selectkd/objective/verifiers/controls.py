"""Controls: what a selector must be compared with before its selection is credited with anything. n rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.pair import TokenPair, label_of, one_of, sequence_of
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

    Set ``rate`` to that run's TAR; the default is a fair coin. For a gate of soft weights it draws 0 or 1 at their
    mean, and that draw's noise is part of any difference; ``matched_position`` deals out the weights themselves.
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
    """Another verifier's verdicts dealt out to random rows of the step: random places.

    The verdicts are on the student that is trained with this control, so the rate is that student's at every step, and
    not that of a run under the other verifier.

    of: that verifier, {"name": ..., **params}; by default greedy top-k with ``k``. Of one that gives weights above 1
    the weights are dealt out. spared: ids of tokens whose rows take no part; an Objective sets its ``always_accept``,
    so that the rate of the other rows stays the verifier's. Not token-local: the loss scores every row first.
    """

    k: int = 5
    of: Any = None
    spared: tuple[int, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        at_least_one(type(self).__name__, self.k)

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
            needs_reference=gate.needs_reference,
            above_one=gate.above_one,
        )

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        """The gate's verdict, or its scores where it ranks rows; then a uniform number, and 1 where a row is spared."""
        traits = traits_of(self.gate)
        own = self.gate.score(pair, uniform) if traits.ranks else self.gate(pair, uniform)[:, None]
        columns = [own, uniform[:, traits.uniforms_per_token, None].to(own.dtype)]
        if self.spared:
            named = one_of(label_of(pair, type(self).__name__), self.spared)
            columns.append(named[:, None].to(own.dtype))
        return torch.cat(columns, -1)  # [n, m]

    def keep(self, scores: Float[Tensor, "n m"], sequence: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        beside = 2 if self.spared else 1
        own, drawn = scores[:, :-beside], scores[:, -beside:].nan_to_num(nan=0.0)
        # a row without a teacher has been rejected; a gate that ranks rows sees to it itself
        ranks = traits_of(self.gate).ranks
        verdict = self.gate.keep(own, sequence) if ranks else own[:, 0].nan_to_num(nan=0.0)
        group = self.group(sequence)
        if self.spared:
            group = torch.where(drawn[:, 1] > 0, -1, group)
        chance = torch.argsort(drawn[:, 0], stable=True)
        giver = chance[torch.argsort(group[chance], stable=True)]
        kept = torch.empty_like(verdict)
        kept[torch.argsort(group, stable=True)] = verdict[giver]
        return kept

    def group(self, sequence: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Rows among which verdicts are dealt out have one number of 0 or more, [n]."""
        return torch.zeros_like(sequence)

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return self.keep(self.score(pair, uniform), sequence_of(pair))


@dataclass(frozen=True)
class matched_position(matched_shuffle):
    """Another verifier's verdicts dealt out among the rows of the step that stand at like places of their sequences,
    whichever rows they are.

    The rate at every step and place is that of the verdicts on the student that is trained with this control, and not
    that of a run under the other verifier. Like places are 0, 1 to 2, 3 to 6, 7 to 14, and so on. What a run gains over
    this control is not gained by where in an answer the gate lets tokens pass. Rows of one sequence must stand in order
    (``pair.sequence``). ConfigError for a verifier that ranks rows.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if traits_of(self.gate).ranks:
            raise ConfigError(
                f"matched_position(of={self.of!r}): of must decide row by row, as greedy_topk and spec_k do. "
                "matched_shuffle takes any verifier."
            )

    def group(self, sequence: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        return (place_of(sequence) + 1).double().log2().floor().long()


def place_of(sequence: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """How many rows of its sequence stand before each row, [n]."""
    order = torch.argsort(sequence, stable=True)
    grouped = sequence[order]
    at = torch.arange(sequence.shape[0], device=sequence.device)
    begins = torch.ones_like(grouped, dtype=torch.bool)
    begins[1:] = grouped[1:] != grouped[:-1]
    start = at[begins][begins.long().cumsum(0) - 1]
    return torch.empty_like(at).scatter_(0, order, at - start)
