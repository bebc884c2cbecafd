"""One forward pass of student and teacher to the loss. n supervised rows, d student width, r uniforms."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from selectkd.data.supervised import supervised
from selectkd.distill import distillation_loss
from selectkd.models.head import backbone, head_of
from selectkd.objective import Objective
from selectkd.rows import Head, TeacherRows


class Teacher(Protocol):
    """What puts the teacher's rows beside the student's at the supervised positions of a batch."""

    def __call__(self, batch: Any, position: Tensor) -> TeacherRows: ...


class DistillationModel(nn.Module):
    """The student whose forward is the distillation loss, so that what wraps it (DDP, FSDP) sees the whole
    step.

    The teacher is held beside the module: it is in neither ``parameters()`` nor ``state_dict()``. also_kl:
    measure KL(p || q) at temperature 1 as well, as ``sums["kl"]``, where the objective's divergence is
    another one; it costs one more head product of both models. Otherwise ``sums["kl"]`` is the divergence.
    """

    accepts_loss_kwargs = False

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        *,
        temperature: float = 1.0,
        chunk: int | None = None,
        also_kl: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.temperature, self.chunk, self.also_kl = temperature, chunk, also_kl
        self._beside = (teacher,)  # a tuple, so that nn.Module does not adopt it

    @property
    def teacher(self) -> Teacher:
        return self._beside[0]

    @property
    def config(self) -> Any:
        """The student's configuration, for those who wrap models."""
        return self.student.config

    def forward(
        self, batch: Any, row_scale: Tensor, uniform: Tensor, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, sums) of a batch: sum over its supervised rows of row_scale [n] * weight * divergence."""
        seen = supervised(batch)
        head = head_of(self.student)
        hidden = backbone(self.student)(**batch.model_inputs(dtype=head.weight.dtype))  # [b, t, d]
        rows = hidden.reshape(-1, hidden.shape[-1])[seen.position]  # [n, d]
        teacher = self.teacher(batch, seen.position)
        loss, sums = distillation_loss(
            rows,
            head,
            teacher,
            objective,
            uniform,
            row_scale=row_scale,
            temperature=self.temperature,
            chunk=self.chunk,
            labels=seen.labels,
            sequence=seen.sequence,
        )
        sums["kl"] = self._kl(rows, head, teacher) if self.also_kl else sums["divergence"]
        return loss, sums

    @torch.no_grad()
    def _kl(self, rows: Tensor, head: Head, teacher: TeacherRows) -> Tensor:
        sums = distillation_loss(rows.detach(), head, teacher, _PLAIN, chunk=self.chunk)[1]
        return sums["divergence"]


_PLAIN = Objective("forward_kl", "always", beta=1.0)
