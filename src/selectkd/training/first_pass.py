"""What the loss of an optimizer step must know of all its rows before the first gradient, over micro-batches and ranks.

A component that ranks rows (selectors, some verifiers, ATKD) ranks those of the whole step; a language-modelling loss
beside a ``weight_mean`` needs the step's sum of weights. Both take one more forward pass of the student; the teacher's
rows are kept for the loss. A step of one micro-batch on one rank ranks within its own forward pass. n rows of a
micro-batch.
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
class MicroBatch:
    """One micro-batch with its supervised rows, their row_scale [n] and uniform [n, r], and the plan of its loss.

    last: whether it is the last one of its optimizer step.
    """

    batch: Any
    rows: Any
    row_scale: Tensor
    uniform: Tensor
    last: bool
    plan: LossPlan | None = None


RunFirstPass = Callable[[MicroBatch, FirstPass], list[Tensor]]
"""A forward pass of the model over a micro-batch, without a gradient: the scores or weights of its rows."""


def planned(
    plan: LossPlan,
    micro_batches: Sequence[MicroBatch],
    first_pass: RunFirstPass | None,
    *,
    counts: Counts,
    reduction: str,
) -> list[LossPlan]:
    """The plan of each micro-batch, with what it must know of the whole step.

    A collective call where it runs the model.
    """
    contests = plan.contests
    weighs = reduction == "weight_mean" and plan.models_language
    if not contests and not weighs:
        return [plan for _ in micro_batches]
    alone = len(micro_batches) == 1 and counts.ranks == 1
    plans = [replace(plan, order=_order(*_keys([micro])[:2])) for micro in micro_batches]
    ranks_step = not alone and any(contest.over_step for contest in contests)
    if ranks_step:
        firsts, scores = _run_all(micro_batches, [FirstPass(plan) for _ in micro_batches], first_pass)
        kept = _ranked(contests, scores, micro_batches)
        plans = [
            replace(plan, kept=one, teacher=first.teacher) for one, first in zip(kept, firsts, strict=True)
        ]
    if weighs:
        firsts, weights = _run_all(micro_batches, [FirstPass(one, weighs=True) for one in plans], first_pass)
        total = summed(torch.stack([one[0][0].double() for one in weights]).sum())
        beside = torch.where(total != 0, total / max(counts.tokens, 1), torch.ones_like(total))
        plans = [
            replace(one, beside=beside, teacher=first.teacher)
            for one, first in zip(plans, firsts, strict=True)
        ]
    return plans


def _run_all(
    micro_batches: Sequence[MicroBatch], firsts: list[FirstPass], first_pass: RunFirstPass | None
) -> tuple[list[FirstPass], list[list[Tensor]]]:
    """The first pass over each micro-batch; random numbers are put back, so that dropout is the loss's own.

    ConfigError without ``first_pass``.
    """
    if first_pass is None:
        raise ConfigError(
            "the loss of this step must know of all its rows first: pass Ledger.begin first_pass=..., a forward pass "
            "of the model."
        )
    device = micro_batches[0].row_scale.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return firsts, [first_pass(micro, first) for micro, first in zip(micro_batches, firsts, strict=True)]


def _keys(micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor, Tensor]:
    """(key of its text, number of its sequence, stream) of every row of this rank."""
    sizes = [micro.batch.stream.shape[0] for micro in micro_batches]
    starts = [0, *accumulate(sizes)]
    keys = [sample_keys(micro.batch)[micro.rows.sequence] for micro in micro_batches]
    numbers = [
        micro.rows.sequence + (start + OF_RANK * rank())
        for micro, start in zip(micro_batches, starts, strict=False)
    ]
    return torch.cat(keys), torch.cat(numbers), torch.cat([micro.rows.stream for micro in micro_batches])


def _order(key: Tensor, number: Tensor) -> Tensor:
    """The rows by their text, a sequence's own in order: the same however a step is cut, and ties are settled alike."""
    order = torch.argsort(number, stable=True)
    return order[torch.argsort(key[order], stable=True)]


def _ranked(
    contests: Sequence[Contest], scores: list[list[Tensor]], micro_batches: Sequence[MicroBatch]
) -> list[Kept]:
    """What each contest keeps of the rows of each of this rank's micro-batches."""
    of_rank = torch.stack(_keys(micro_batches), -1)  # [n of this rank, 3]
    rows, start = gathered_rows(of_rank)
    key, number, stream = rows.unbind(-1)
    every = [gathered_rows(_joined([of[i] for of in scores]))[0] for i in range(len(contests))]
    kept = decided(contests, every, stream=stream, sequence=number, order=_order(key, number))
    cuts = [0, *accumulate(len(micro.rows) for micro in micro_batches)]
    return [{name: values[start + a : start + b] for name, values in kept.items()} for a, b in pairwise(cuts)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Scores of several micro-batches in fp64, one without any filled up with nan."""
    most = max(part.shape[1] for part in parts)
    blanks = [part.new_full((part.shape[0], most - part.shape[1]), torch.nan) for part in parts]
    return torch.cat(
        [torch.cat([part, blank], 1).double() for part, blank in zip(parts, blanks, strict=True)]
    )
