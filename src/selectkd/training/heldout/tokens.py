"""The probe token by token: the student's proposal, its standing with the teacher, its share of the loss.

n supervised rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selectkd.data.supervised import Supervised, supervised
from selectkd.loss.aligned_rows import AlignedRows
from selectkd.loss.by_device import chunk_rows
from selectkd.loss.chunks import LossCall, scored
from selectkd.loss.distillation import distillation_loss
from selectkd.loss.head import Head
from selectkd.loss.options import LossOptions
from selectkd.loss.products import cuts
from selectkd.loss.teacher_rows import TeacherRows
from selectkd.models.forward import evaluating, hidden_rows
from selectkd.models.head import head_of
from selectkd.models.precision import FP32, Precision
from selectkd.models.sharded import inside
from selectkd.objective.objective import Objective
from selectkd.objective.pair import TokenPair, entropy
from selectkd.objective.verifiers import VerifierTraits
from selectkd.teachers.protocol import Teacher
from selectkd.training.counts import Counts, row_scale
from selectkd.training.uniforms_of_text import draws

OF_PAIR = (
    "proposal", "rank", "p_proposal", "q_proposal", "teacher_top", "p_teacher_top", "q_teacher_top",
    "p_label", "q_label", "teacher_entropy", "student_entropy",
)  # fmt: skip
OF_LOSS = ("acceptance", "divergence", "weight", "overlap", "unverified")
WHOLE = ("sample", "token", "label", "proposal", "rank", "teacher_top")
"""Columns of whole numbers; -1 is unknown. The others are fp32, and nan is unknown."""


@dataclass(frozen=True)
class _Details:
    """OF_PAIR of each row as scores [n, 11]: the loss's own pass over the chunks then reads any teacher."""

    traits = VerifierTraits(scope="step")

    def __call__(self, pair: TokenPair, uniform: Tensor) -> Tensor:
        return torch.ones_like(pair.logp[:, 0])

    def keep(self, scores: Tensor, sequence: Tensor) -> Tensor:
        return torch.ones_like(scores[:, 0])

    def score(self, pair: TokenPair, uniform: Tensor) -> Tensor:
        assert pair.label is not None  # ``_of_pairs`` hands them in
        best = pair.ranked.argmax(-1)
        columns = (pair.student_top, best, pair.column(pair.label))
        (p_top, q_top), (p_best, q_best), (p_label, q_label) = (_at(pair, column) for column in columns)
        chosen = pair.ranked.gather(-1, pair.student_top.clamp(min=0)[:, None])
        rank = torch.where(pair.student_top >= 0, (pair.ranked > chosen).sum(-1) + 1, -1)
        return torch.stack(
            [
                _id_at(pair, pair.student_top), rank, p_top, q_top, _id_at(pair, best), p_best, q_best,
                p_label, q_label, entropy(pair.logp), entropy(pair.logq),
            ],
            -1,
        ).double()  # fmt: skip


def _at(pair: TokenPair, column: Tensor) -> tuple[Tensor, Tensor]:
    """p and q [n] at a column; nan where it is -1."""
    found = (x.gather(-1, column.clamp(min=0)[:, None])[:, 0].exp() for x in (pair.logp, pair.logq))
    p, q = (torch.where(column >= 0, value, torch.nan) for value in found)
    return p, q


def _id_at(pair: TokenPair, column: Tensor) -> Tensor:
    """The token id of a column; -1 where it is -1."""
    ids = column if pair.ids is None else pair.ids.gather(-1, column.clamp(min=0)[:, None])[:, 0]
    return torch.where(column >= 0, ids, -1)


@torch.no_grad()
def look(
    student: nn.Module,
    teacher: Teacher,
    batch: Any,
    objective: Objective,
    *,
    reduction: str = "sequence_mean",
    seed: int = 0,
    chunk: int | None = None,
    precision: Precision = FP32,
) -> dict[str, Tensor]:
    """Columns [n] of a probe batch, from the same uniform numbers every time; a collective call of a sharded student.

    sample, token: whose row it is and which token of it. label, proposal (the student's most probable token),
    teacher_top: ids; p_ and q_ of them: the teacher's and the student's probability at temperature 1. rank: of the
    proposal with the teacher, from 1. Entropies in nats, of a stored top-K over its outcomes. OF_LOSS as
    ``distillation_loss`` has them, share: of the batch's loss. A proposal outside a stored top-K has rank -1 and no p;
    beside a teacher of another tokenizer the columns of OF_PAIR are unknown.
    """
    rows = supervised(batch)
    uniform = draws(batch, rows, objective.uniforms_per_token, seed=seed, step=0)

    def measure() -> dict[str, Tensor]:
        head = head_of(student)
        with precision.autocast(batch.input_ids.device):
            hidden = hidden_rows(student, batch, rows.position)  # [n, d]
        given = teacher(batch, rows.position)
        with precision.autocast(hidden.device):
            _, sums = distillation_loss(
                hidden,
                head,
                given,
                objective,
                uniform,
                chunk=chunk,
                labels=rows.labels,
                sequence=rows.sequence,
            )
        return {name: sums[f"row_{name}"] for name in OF_LOSS} | _of_pairs(
            hidden, head, given, rows.labels, chunk=chunk
        )

    with evaluating(student):
        columns = inside(student, measure)
    return _placed(batch, rows) | columns | {"share": _share(rows, columns, reduction)}


def _of_pairs(
    hidden: Tensor, head: Head, teacher: TeacherRows, labels: Tensor, *, chunk: int | None
) -> dict[str, Tensor]:
    n, device = hidden.shape[0], hidden.device
    if isinstance(teacher, AlignedRows) or not n:
        return {name: torch.full((n,), -1 if name in WHOLE else torch.nan, device=device) for name in OF_PAIR}
    width = teacher.shared_width(head.width)
    options = LossOptions(chunk=chunk_rows(n, width, chunk, head.weight.dtype, device))
    call = LossCall(
        teacher, Objective("forward_kl", _Details()), torch.empty(n, 0, device=device),
        torch.ones(n, device=device), labels, options=options,
    )  # fmt: skip
    scores = scored(hidden.detach(), head.detach(), call, width)
    columns: dict[str, Tensor] = dict(zip(OF_PAIR, scores.unbind(-1), strict=True))
    outside = columns["proposal"] < 0
    if bool(outside.any()):  # in the tail of a stored top-K, which has no names
        best, q = _most_probable(hidden[outside], head, width, rows=call.chunk)
        columns["proposal"][outside], columns["q_proposal"][outside] = (
            best.to(scores.dtype),
            q.to(scores.dtype),
        )
    return columns


def _most_probable(hidden: Tensor, head: Head, width: int, *, rows: int) -> tuple[Tensor, Tensor]:
    """The student's most probable token of each row and its probability, [n] each."""
    found = [
        torch.softmax(head.finish(head.raw(hidden[piece], width)).float(), -1).max(-1)
        for piece in cuts(0, hidden.shape[0], rows)
    ]
    return torch.cat([one.indices for one in found]), torch.cat([one.values for one in found])


def _placed(batch: Any, rows: Supervised) -> dict[str, Tensor]:
    """Whose row each is, which token of its sample (a prompt's first is 0), and the token."""
    place = batch.position_ids.reshape(-1)[rows.position] + 1
    return {"sample": rows.sequence, "token": place, "label": rows.labels}


def _share(rows: Supervised, columns: Mapping[str, Tensor], reduction: str) -> Tensor:
    """What part of the batch's loss each row is, [n]; 0 where there is no loss. They sum to 1."""
    scale = row_scale(rows, Counts(rows.sequences, len(rows)), reduction)
    loss = scale * columns["weight"] * columns["divergence"]
    total = loss.sum()
    return torch.where(total != 0, loss / total, 0.0)
