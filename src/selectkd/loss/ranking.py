"""Who ranks rows against each other, and over which. n rows of a batch, N of all ranked together, m scores a row.

Selectors, verifiers with ``keep``, and extras with one rank the rows of a whole optimizer step: their scores are taken
batch by batch, and the rule is applied to all of them at once (``training.first_pass``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.loss.aligned_rows import AlignedRows
from selectkd.loss.terms import Forward
from selectkd.objective.verifiers import traits_of

Key = tuple[str, int]
"""("selector", stream), ("verifier", stream) or ("extra", place)."""
Kept = Mapping[Key, Tensor]
"""What each contest's ``keep`` gave the rows of a batch: [n], or [n, k] where it hands over several numbers."""


@dataclass(frozen=True)
class Contest:
    """Rows ranked against each other: those of a stream (None: all), by the ``score`` and ``keep`` of ``gate``.

    temperature: of the distributions it scores. apart: the contest whose winners and losers are ranked apart.
    """

    key: Key
    gate: Any
    stream: int | None = None
    temperature: float = 1.0
    apart: Key | None = None

    @property
    def over_step(self) -> bool:
        """Whether rows of other batches of the step are ranked too; else those of a sequence, which is in one batch."""
        return traits_of(self.gate).scope != "sequence"

    @torch.no_grad()
    def scores(self, forward: Forward) -> Float[Tensor, "n m"]:
        """The scores of a batch's rows; nan for those that are not ranked and those without a finite teacher."""
        if self.key[0] == "extra":
            return self.gate.score(forward)
        if isinstance(forward.teacher, AlignedRows):
            raise ConfigError(
                f"{type(self.gate).__name__} ranks rows token by token, and teacher and student have different "
                "tokens. Use greedy_topk, always or matched_random."
            )
        if self.stream is None:
            if not forward.labels.numel():
                return _none(forward)
            return forward.scores(self.gate, temperature=self.temperature)
        rows = forward.rows_of(self.stream)
        if not rows.numel():
            return _none(forward)
        of = forward.take(rows).scores(self.gate, temperature=self.temperature)
        return of.new_full((forward.labels.shape[0], of.shape[1]), torch.nan).index_copy_(0, rows, of)


def _none(forward: Forward) -> Tensor:
    """No score for any row; how many there would be is not known."""
    return torch.empty(forward.labels.shape[0], 0, device=forward.hidden.device)


def decided(
    contests: Sequence[Contest],
    scores: Sequence[Float[Tensor, "N _"]],
    *,
    stream: Int[Tensor, " N"],
    sequence: Int[Tensor, " N"],
    order: Int[Tensor, " N"] | None,
) -> dict[Key, Shaped[Tensor, "N ..."]]:
    """What each contest keeps of the rows, in fp64; 0 where a row is not ranked. order: the rows as ``keep`` sees them,
    which settles ties; None as they are."""
    found: dict[Key, Tensor] = {}
    if order is None:
        order = torch.arange(stream.shape[0], device=stream.device)
    for contest, of in zip(contests, scores, strict=True):
        entrants = (
            torch.ones_like(stream, dtype=torch.bool) if contest.stream is None else stream == contest.stream
        )
        groups = [entrants]
        if contest.apart is not None:
            won = found[contest.apart] > 0
            groups = [entrants & won, entrants & ~won]
        out = None
        for group in groups:
            rows = order[group[order]]
            if rows.numel():
                kept = contest.gate.keep(of[rows].double(), sequence[rows])
                out = kept.new_zeros(stream.shape[0], *kept.shape[1:]) if out is None else out
                out[rows] = kept
        found[contest.key] = of.new_zeros(stream.shape[0]).double() if out is None else out
    return found
