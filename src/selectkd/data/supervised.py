"""The shift, here and nowhere else: the hidden state at i predicts token i + 1. b rows, t tokens, n trained
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from selectkd.data.collate import Batch, moved


@dataclass(frozen=True)
class Supervised:
    """The n trained tokens of a batch in row order: where each is predicted, what it is, whose it is."""

    position: Tensor  # [n] flat index into b*t of the hidden state that predicts the token
    labels: Tensor  # [n] the token itself
    sequence: Tensor  # [n] index of its sample in the batch
    stream: Tensor  # [n] stream of that sample
    offset: Tensor  # [n] index among the trained tokens of its sample, from 0
    length: Tensor  # [samples] trained tokens of each sample, fp32
    there: Tensor  # [s] the samples with at least one trained token
    of_stream: Mapping[int, Tensor]  # the rows of each stream that has some

    def __len__(self) -> int:
        return self.position.shape[0]

    @property
    def sequences(self) -> int:
        """How many samples have at least one trained token."""
        return self.there.shape[0]

    def to(self, device: torch.device | str) -> Supervised:
        """The same on another device."""
        rows = moved(self.of_stream, device)
        return replace(
            self, **moved({f.name: getattr(self, f.name) for f in fields(self)}, device) | {"of_stream": rows}
        )


def supervised(batch: Batch) -> Supervised:
    """Every trained token that has a token of its own sample before it; n may be 0.

    Looked for once, in main memory where the batch came from there: on an accelerator the search waits for the device.
    """
    found = batch.found
    if found is None:
        here = batch.in_memory
        found = _search(batch) if here is batch else supervised(here).to(batch.input_ids.device)
        batch.note("found", found)
    return found


def in_memory(batch: Batch, position: Tensor) -> tuple[Batch, Tensor]:
    """A batch and its positions [n] in main memory; the host waits for neither where they are ``supervised``'s own."""
    here = batch.in_memory
    if here is not batch and batch.found is not None and position is batch.found.position:
        return here, supervised(here).position
    return here, position.to(here.input_ids.device)


def _search(batch: Batch) -> Supervised:
    same_sample = batch.sequence[:, 1:] == batch.sequence[:, :-1]  # [b, t-1]
    chosen = batch.completion[:, 1:] & same_sample & (batch.sequence[:, 1:] >= 0)
    row, before = chosen.nonzero(as_tuple=True)
    width = batch.input_ids.shape[1]
    sequence = batch.sequence[row, before + 1]
    count = torch.bincount(sequence, minlength=batch.stream.shape[0])  # [samples]
    # Samples lie one after the other in row order, so a sample's trained tokens are contiguous here.
    first = count.cumsum(0) - count
    offset = torch.arange(row.shape[0], device=row.device) - first[sequence]
    stream = batch.stream[sequence]
    return Supervised(
        position=row * width + before,
        labels=batch.input_ids[row, before + 1],
        sequence=sequence,
        stream=stream,
        offset=offset,
        length=count.to(torch.float32),
        there=count.nonzero()[:, 0],
        of_stream={one: (stream == one).nonzero()[:, 0] for one in stream.unique().tolist()},
    )
