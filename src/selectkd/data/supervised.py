"""The shift, here and nowhere else: the hidden state at i predicts token i + 1. b rows, t tokens, n trained
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selectkd.data.collate import Batch


@dataclass(frozen=True)
class Supervised:
    """The n trained tokens of a batch in row order: where each is predicted, what it is, whose it is."""

    position: Tensor  # [n] flat index into b*t of the hidden state that predicts the token
    labels: Tensor  # [n] the token itself
    sequence: Tensor  # [n] index of its sample in the batch
    stream: Tensor  # [n] stream of that sample
    offset: Tensor  # [n] index among the trained tokens of its sample, from 0
    sequences: int  # samples with at least one trained token

    def __len__(self) -> int:
        return self.position.shape[0]

    def to(self, device: torch.device | str) -> Supervised:
        """The same on another device."""
        names = ("position", "labels", "sequence", "stream", "offset")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def supervised(batch: Batch) -> Supervised:
    """Every trained token that has a token of its own sample before it; n may be 0."""
    own = batch.sequence[:, 1:] == batch.sequence[:, :-1]  # [b, t-1]
    chosen = batch.completion[:, 1:] & own & (batch.sequence[:, 1:] >= 0)
    row, before = chosen.nonzero(as_tuple=True)
    width = batch.input_ids.shape[1]
    sequence = batch.sequence[row, before + 1]
    count = torch.bincount(sequence, minlength=batch.stream.shape[0])  # [samples]
    # Samples lie one after the other in row order, so a sample's trained tokens are contiguous here.
    first = count.cumsum(0) - count
    offset = torch.arange(row.shape[0], device=row.device) - first[sequence]
    return Supervised(
        position=row * width + before,
        labels=batch.input_ids[row, before + 1],
        sequence=sequence,
        stream=batch.stream[sequence],
        offset=offset,
        sequences=int((count > 0).sum()),
    )
