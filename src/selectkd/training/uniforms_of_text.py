"""Uniform numbers keyed by the text itself, so that a verdict does not depend on who trains on it beside
whom.

n rows, r uniforms a row. A row's numbers are a function of (seed, step, the tokens of its sample, its place
in the completion): the same padded or packed, in one micro-batch or eight, on one rank or two. A text that
stands twice in one step gets the same verdicts twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selectkd.objective.uniforms import uniforms

_ODD_1, _ODD_2 = (
    -7046029254386353131,
    -4658895280553007687,
)  # 0x9E3779B97F4A7C15 and 0xBF58476D1CE4E5B9 as int64


def draws(batch: Any, rows: Any, r: int, *, seed: int, step: int) -> Tensor:
    """Numbers in (0, 1) for each supervised row, [n, r]."""
    n, device = rows.position.shape[0], rows.position.device
    if r == 0 or n == 0:
        return torch.empty(n, r, device=device)
    return uniforms(
        n, r, seed=seed, step=step, counter=sample_keys(batch)[rows.sequence] + rows.offset, device=device
    )


def sample_keys(batch: Any) -> Tensor:
    """One 64-bit number per sample of a batch, from its tokens and their places alone: [samples]."""
    sequence = batch.sequence.reshape(-1)
    word = (batch.input_ids.reshape(-1) + 1) * _ODD_1
    word = (word ^ (word >> 29)) * (2 * batch.position_ids.reshape(-1) + _ODD_2)
    word = word ^ (word >> 32)
    samples = batch.stream.shape[0]
    owner = torch.where(
        sequence >= 0, sequence, samples
    )  # padding belongs to one more sample, which is cut off
    sums = torch.zeros(samples + 1, dtype=torch.int64, device=word.device)
    return sums.index_add_(0, owner, word)[:samples]
