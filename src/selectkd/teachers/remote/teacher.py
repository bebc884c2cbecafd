"""A teacher that is asked over HTTP at the supervised positions of a batch. n supervised rows, K best tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.rows import CachedRows
from selectkd.teachers.remote.server import Sample, TopKServer


class RemoteTeacher:
    """The K best tokens of a server's model; exact where ``show teachers`` says so of top_k.

    All samples of a batch are asked for at once. TeacherError, before a row is used, where one of them has no sound
    answer.
    """

    def __init__(self, server: TopKServer) -> None:
        self.server = server

    def __call__(self, batch: Any, position: Tensor) -> CachedRows:
        """The rows at ``position`` [n], flat indices into the batch's b * t hidden states."""
        n, k = position.shape[0], self.server.k
        samples, at = samples_of(batch, position)
        ids, logp = np.zeros((n, k), np.int64), np.zeros((n, k), np.float32)
        for mine, rows in zip(at, self.server.top_k(samples), strict=True):
            ids[mine], logp[mine] = rows.ids, rows.logp
        device = batch.input_ids.device
        return CachedRows(torch.from_numpy(ids).to(device), torch.from_numpy(logp).to(device))


def samples_of(batch: Any, position: Tensor) -> tuple[list[Sample], list[np.ndarray[Any, Any]]]:
    """(each sample that has a wanted row, with the places of its rows; which of the n rows those are)."""
    if batch.extra:
        raise ConfigError(
            f"the batch carries {', '.join(batch.extra)} beside its tokens, and a server is sent token ids alone. "
            "Use a teacher in memory: teacher: {model: ...}."
        )
    owner = batch.sequence.flatten()[position].cpu().numpy()
    place = batch.position_ids.flatten()[position].cpu().numpy()
    samples: list[Sample] = []
    at = []
    for number, ids in enumerate(batch.samples()):
        mine = np.nonzero(owner == number)[0]
        if len(mine):
            samples.append((ids.tolist(), place[mine].tolist()))
            at.append(mine)
    return samples, at
