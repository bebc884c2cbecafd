"""What one row counts: the three denominators, right under accumulation and over ranks. n rows, w ranks.

Distributed wrappers average gradients over ranks, so every scale carries a factor w that the average takes
away again; the sum over micro-batches and the average over ranks together give exactly the global mean.
Counts are taken once the batches of a step exist, so they are right for text written during training as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from selectkd.errors import ConfigError

REDUCTIONS = ("sequence_mean", "token_mean", "weight_mean")


def ranks() -> int:
    """How many processes train together: 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def summed(values: Tensor) -> Tensor:
    """The sum of ``values`` over all ranks, on every rank."""
    if ranks() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def total(values: Sequence[int]) -> list[int]:
    """The sum of each number over all ranks, on every rank; for what only processes know, such as a signal."""
    if ranks() == 1:
        return [int(value) for value in values]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    return summed(torch.tensor([int(value) for value in values], device=device)).tolist()


def over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks of ``values`` [n] in main memory, on every rank: alike to the bit on all of them."""
    if ranks() == 1:
        return values
    if dist.get_backend() == "nccl":
        return summed(values.to(torch.device("cuda", torch.cuda.current_device()))).cpu()
    return summed(values)


def gathered_rows(values: Tensor) -> tuple[Tensor, int]:
    """The rows [n, c] of all ranks one after the other, [N, c], and where this rank's begin; n and c may differ, and
    columns that a rank has not are nan there (0 of integers)."""
    if ranks() == 1:
        return values, 0
    size = torch.tensor(values.shape, device=values.device)
    sizes = [torch.empty_like(size) for _ in range(ranks())]
    dist.all_gather(sizes, size)
    most = torch.stack(sizes).amax(0).tolist()
    blank = torch.nan if values.is_floating_point() else 0
    padded = values.new_full(most, blank)  # type: ignore[arg-type]
    padded[: values.shape[0], : values.shape[1]] = values
    parts = [torch.empty_like(padded) for _ in range(ranks())]
    dist.all_gather(parts, padded)
    lengths = [int(one[0]) for one in sizes]
    rows = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    return rows, sum(lengths[: rank()])


@dataclass(frozen=True)
class Counts:
    """Supervised tokens, and sequences with at least one of them, of one optimizer step over all ranks."""

    sequences: int
    tokens: int
    ranks: int = 1


def count(micro: Sequence[Any]) -> Counts:
    """The counts of a step from what is supervised in this rank's micro-batches; a collective call."""
    sequences, tokens = total([sum(m.sequences for m in micro), sum(len(m) for m in micro)])
    return Counts(sequences, tokens, ranks())


def row_scale(rows: Any, counts: Counts, reduction: str) -> Tensor:
    """What each supervised row of a micro-batch counts, [n] fp32.

    sequence_mean: ranks / (|y| * sequences), |y| the supervised tokens of the row's sequence. token_mean:
    ranks / tokens. weight_mean: the same; ``correction`` turns it into a division by the sum of weights.
    """
    checked(reduction)
    sequence = rows.sequence
    if reduction != "sequence_mean":
        return torch.full((sequence.shape[0],), counts.ranks / max(counts.tokens, 1), device=sequence.device)
    return counts.ranks / (rows.length[sequence] * max(counts.sequences, 1))


def correction(counts: Counts, weight: Tensor) -> Tensor:
    """The factor the loss and gradient of weight_mean still need, tokens / weight, ``weight`` being the step's sum of
    weights over all ranks; a tensor like it, so that nothing waits for the device.

    The weights carry no gradient, so dividing the finished gradient is exact, needs no first pass over the models, and
    sees the very weights (dropout included) that made the gradient. It costs one pass over the gradients. A step that
    accepted nothing at beta = 0 has no gradient but of what stands beside the objective, and the factor is 1.
    """
    return torch.where(weight != 0, counts.tokens / weight, torch.ones_like(weight))


def sequence_means(values: Tensor, rows: Any) -> Tensor:
    """The mean of ``values`` [n], one for each row of ``rows``, over each sequence of ``rows.there``: [s]."""
    totals = torch.zeros_like(rows.length).index_add_(0, rows.sequence, values.to(rows.length.dtype))
    return totals[rows.there] / rows.length[rows.there]


def checked(reduction: str) -> str:
    """``reduction`` itself, if it is one."""
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction {reduction!r} is unknown. Known: {', '.join(REDUCTIONS)}.")
    return reduction
