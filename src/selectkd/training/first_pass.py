"""What the loss of an optimizer step must know of all its rows before the first gradient, over micro-batches and ranks.

Who ranks rows (selectors, some verifiers, ATKD) ranks those of the whole step; a language-modelling loss beside a
``weight_mean`` needs the step's sum of weights. Both take a forward pass of the student more; the teacher's rows are
kept for the loss. A step of one micro-batch on one rank ranks within its own forward pass. n rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.loss.plan import FirstPass, LossPlan
from selectkd.loss.ranking import Contest, Kept, decided
from selectkd.training.counts import Counts, gathered_rows, rank, summed
from selectkd.training.uniforms_of_text import sample_keys

OF_RANK = 1 << 40
"""Sequences of a step are numbered from this times the rank."""


@dataclass(frozen=True)
class Portion:
    """One micro-batch and what it counts: row_scale [n], uniform [n, r], and the plan of its loss."""

    batch: Any
    seen: Any
    row_scale: Tensor
    uniform: Tensor
    last: bool
    plan: LossPlan | None = None


Ask = Callable[[Portion, FirstPass], list[Tensor]]
"""A forward pass over a micro-batch, without a gradient, for what a first pass wants to know."""


def planned(
    plan: LossPlan, portions: Sequence[Portion], ask: Ask | None, *, counts: Counts, reduction: str
) -> list[LossPlan]:
    """The plan of each micro-batch, with what it must know of the step; a collective call where it asks the model."""
    contests = plan.contests
    weighs = reduction == "weight_mean" and plan.models_language
    if not contests and not weighs:
        return [plan for _ in portions]
    alone = len(portions) == 1 and counts.ranks == 1
    plans = [replace(plan, order=_order(*_keys([portion])[:2])) for portion in portions]
    ranks_step = not alone and any(contest.over_step for contest in contests)
    if (ranks_step or weighs) and ask is None:
        raise ConfigError(
            "the loss of this step must know of all its rows first: pass Ledger.begin a way to ask the model (ask=...)."
        )
    if ranks_step:
        firsts, scores = _asked(portions, [FirstPass(plan) for _ in portions], ask)  # type: ignore[arg-type]
        kept = _ranked(contests, scores, portions)
        plans = [
            replace(plan, kept=one, teacher=first.teacher) for one, first in zip(kept, firsts, strict=True)
        ]
    if weighs:
        firsts, weights = _asked(portions, [FirstPass(one, weighs=True) for one in plans], ask)  # type: ignore[arg-type]
        total = summed(torch.stack([one[0][0].double() for one in weights]).sum())
        beside = torch.where(total != 0, total / max(counts.tokens, 1), torch.ones_like(total))
        plans = [
            replace(one, beside=beside, teacher=first.teacher)
            for one, first in zip(plans, firsts, strict=True)
        ]
    return plans


def _asked(
    portions: Sequence[Portion], firsts: list[FirstPass], ask: Ask
) -> tuple[list[FirstPass], list[list[Tensor]]]:
    """What the model says to each; random numbers are put back, so that dropout is the loss's own."""
    device = portions[0].row_scale.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return firsts, [ask(portion, first) for portion, first in zip(portions, firsts, strict=True)]


def _keys(portions: Sequence[Portion]) -> tuple[Tensor, Tensor, Tensor]:
    """(key of its text, number of its sequence, stream) of every row of this rank."""
    sizes = [portion.batch.stream.shape[0] for portion in portions]
    starts = [0, *accumulate(sizes)]
    keys = [sample_keys(portion.batch)[portion.seen.sequence] for portion in portions]
    numbers = [
        portion.seen.sequence + (start + OF_RANK * rank())
        for portion, start in zip(portions, starts, strict=False)
    ]
    return torch.cat(keys), torch.cat(numbers), torch.cat([portion.seen.stream for portion in portions])


def _order(key: Tensor, number: Tensor) -> Tensor:
    """The rows by their text, a sequence's own in order: the same however a step is cut, and ties are settled alike."""
    order = torch.argsort(number, stable=True)
    return order[torch.argsort(key[order], stable=True)]


def _ranked(
    contests: Sequence[Contest], scores: list[list[Tensor]], portions: Sequence[Portion]
) -> list[Kept]:
    """What each contest keeps of the rows of each of this rank's micro-batches."""
    of_rank = torch.stack(_keys(portions), -1)  # [n of this rank, 3]
    rows, start = gathered_rows(of_rank)
    key, number, stream = rows.unbind(-1)
    every = [gathered_rows(_joined([of[i] for of in scores]))[0] for i in range(len(contests))]
    kept = decided(contests, every, stream=stream, sequence=number, order=_order(key, number))
    cuts = [0, *accumulate(len(portion.seen) for portion in portions)]
    return [{name: values[start + a : start + b] for name, values in kept.items()} for a, b in pairwise(cuts)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Scores of several micro-batches in fp64, one without any filled up with nan."""
    most = max(part.shape[1] for part in parts)
    blanks = [part.new_full((part.shape[0], most - part.shape[1]), torch.nan) for part in parts]
    return torch.cat(
        [torch.cat([part, blank], 1).double() for part, blank in zip(parts, blanks, strict=True)]
    )
