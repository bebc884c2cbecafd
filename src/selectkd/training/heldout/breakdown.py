"""The probe batch by place in the completion and by how sure the teacher is. n supervised rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selectkd.data.supervised import supervised
from selectkd.models.precision import FP32, Precision
from selectkd.objective.objective import Objective
from selectkd.objective.pair import TokenPair, entropy
from selectkd.objective.verifiers import VerifierTraits
from selectkd.teachers.protocol import Teacher
from selectkd.training.heldout.evaluation import probe

POSITIONS = (0, 4, 16, 64, 256)
"""Where a bin of places in the completion begins; the first token's place is 0. Each bin is four times the last."""
ENTROPIES = (0.0, 0.1, 0.5, 1.0, 2.0)
"""Where a bin of the teacher's entropy begins, in nats: the same for every run, so that runs can be compared."""
MOST_NATS = 32.0
"""Above the entropy of any vocabulary (log of 79 million million tokens)."""


@dataclass(frozen=True)
class _TeacherEntropy:
    """H(p) / MOST_NATS as if it were an acceptance: the loss's own pass over the chunks then measures any teacher."""

    traits = VerifierTraits(proposal_alone=True)  # it asks nothing of the student at all

    def __call__(self, pair: TokenPair, uniform: Tensor) -> Tensor:
        return entropy(pair.logp) / MOST_NATS


@dataclass(frozen=True)
class Breakdown:
    """What is the same at every look at a probe batch: each row's place and its teacher's entropy in nats, [n]."""

    position: Tensor
    teacher_entropy: Tensor

    def acceptance(self, verdicts: Tensor) -> dict[str, list[dict[str, Any]]]:
        """The mean acceptance [n] within each bin, and how many rows it holds; empty bins are left out."""
        return {
            "probe_position": binned(verdicts, self.position, POSITIONS),
            "probe_entropy": binned(verdicts, self.teacher_entropy, ENTROPIES),
        }


def breakdown(
    student: nn.Module,
    teacher: Teacher,
    batch: Any,
    *,
    chunk: int | None = None,
    precision: Precision = FP32,
) -> Breakdown:
    """The breakdown of a batch. The entropy is over the outcomes a teacher gives: of a stored top-K a lower bound."""
    measure = Objective("forward_kl", _TeacherEntropy())
    share = probe(student, teacher, batch, measure, chunk=chunk, precision=precision)
    return Breakdown(supervised(batch).offset, share * MOST_NATS)


def binned(verdicts: Tensor, values: Tensor, edges: Sequence[float]) -> list[dict[str, Any]]:
    """{from, n, acceptance} of each bin [edge, next edge); the last is open, and values below the first count there.

    >>> binned(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 3, 9]), (0, 4, 64))
    [{'from': 0, 'n': 2, 'acceptance': 0.5}, {'from': 4, 'n': 1, 'acceptance': 1.0}]
    """
    of_row = torch.bucketize(
        values, torch.tensor(edges[1:], dtype=values.dtype, device=values.device), right=True
    )
    rows = torch.bincount(of_row, minlength=len(edges))
    accepted = torch.zeros(len(edges), dtype=torch.float64, device=values.device)
    accepted.index_add_(0, of_row, verdicts.double())
    return [
        {"from": edge, "n": n, "acceptance": total / n}
        for edge, n, total in zip(edges, rows.tolist(), accepted.tolist(), strict=True)
        if n
    ]
