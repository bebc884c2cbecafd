"""A teacher whose rows come over HTTP, at the supervised positions of a batch. n supervised rows, K best tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from selectkd.data.collate import sent
from selectkd.data.supervised import in_memory
from selectkd.errors import ConfigError
from selectkd.loss.teacher_rows import CachedRows, LiveRows
from selectkd.teachers.protocol import Teacher
from selectkd.teachers.remote.answers import TopK
from selectkd.teachers.remote.own import OwnServer
from selectkd.teachers.remote.sample import Sample


class TopKSource(Protocol):
    """What has the K best tokens of samples: our own server, or one of another kind."""

    def top_k(self, samples: Sequence[Sample]) -> list[TopK]: ...


class RemoteTeacher:
    """The K best tokens of a server's model; exact where ``show teachers`` says so of top_k.

    shared: as of CachedRows. All samples of a batch are asked for at once. TeacherError, before a row is used, where
    one of them has no sound answer.
    """

    def __init__(self, server: TopKSource, k: int, *, shared: Tensor | None = None) -> None:
        self.server, self.k, self.shared = server, k, shared

    def __call__(self, batch: Any, position: Tensor) -> CachedRows:
        """The rows at ``position`` [n], flat indices into the batch's b * t hidden states."""
        n, k = position.shape[0], self.k
        samples, at = samples_of(batch, position)
        ids, logp = np.zeros((n, k), np.int64), np.zeros((n, k), np.float32)
        for chosen, rows in zip(at, self.server.top_k(samples), strict=True):
            ids[chosen], logp[chosen] = rows.ids, rows.logp
        device = batch.input_ids.device
        shared = None if self.shared is None else self.shared.to(device)
        return CachedRows(
            sent(torch.from_numpy(ids), device), sent(torch.from_numpy(logp), device), shared=shared
        )


class RemoteHiddenTeacher:
    """The hidden states of our own server's model, with its head, which is fetched once: exact for everything.

    shared, reference: as for LiveTeacher.
    """

    def __init__(
        self, server: OwnServer, *, shared: Tensor | None = None, reference: Teacher | None = None
    ) -> None:
        self.server, self.shared, self.reference = server, shared, reference
        self.head = server.head()

    def __call__(self, batch: Any, position: Tensor) -> LiveRows:
        """The rows at ``position`` [n], flat indices into the batch's b * t hidden states."""
        device = batch.input_ids.device
        samples, at = samples_of(batch, position)
        self.head = self.head.to(device)
        hidden = torch.zeros(position.shape[0], self.head.weight.shape[1], dtype=self.head.weight.dtype)
        for chosen, rows in zip(at, self.server.hidden(samples), strict=True):
            hidden[torch.from_numpy(chosen)] = rows.to(hidden.dtype)
        shared = None if self.shared is None else self.shared.to(device)
        reference = None if self.reference is None else self.reference(batch, position)
        return LiveRows(sent(hidden, device), self.head, shared=shared, reference=reference)


def samples_of(batch: Any, position: Tensor) -> tuple[list[Sample], list[np.ndarray[Any, Any]]]:
    """(each sample that has a wanted row, with its images and the rows' places; which of the n rows those are)."""
    if batch.extra and not batch.images:
        raise ConfigError(
            f"the batch has {', '.join(batch.extra)} besides its tokens, but a server gets token ids and images only. "
            "Use a teacher in memory: teacher: {model: ...}."
        )
    here, position = in_memory(batch, position)
    owner = here.sequence.flatten()[position].cpu().numpy()
    place = here.position_ids.flatten()[position].cpu().numpy()
    samples: list[Sample] = []
    at = []
    for number, ids in enumerate(batch.samples()):
        chosen = np.nonzero(owner == number)[0]
        if len(chosen):
            images = batch.images[number] if batch.images else None
            samples.append(Sample(ids.tolist(), place[chosen].tolist(), images))
            at.append(chosen)
    return samples, at
