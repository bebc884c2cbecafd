"""The base model of a LoRA student as its teacher: the student's weights, its adapters off.

n supervised rows, v vocabulary, d student width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selectkd.errors import ConfigError
from selectkd.loss.teacher_rows import LiveRows
from selectkd.models.forward import hidden_rows
from selectkd.models.head import head_of
from selectkd.models.load import Loaded
from selectkd.models.lora import adapters_off, check_base
from selectkd.teachers.protocol import Payload, Teacher


class AdaptersOffTeacher:
    """The rows of a student's base at the supervised positions of a batch; no second copy of any weight, no gradient.

    student: a model with LoRA adapters that alone are trained, so that the rest is what it was at the beginning.
    reference: a reference student whose rows go along. ConfigError for a student whose base would not stay what it is.
    """

    def __init__(self, student: nn.Module, *, reference: Teacher | None = None) -> None:
        check_base(student)
        self.student, self.reference = student, reference

    @torch.no_grad()
    def __call__(self, batch: Any, position: Tensor) -> LiveRows:
        """The rows at ``position`` [n], flat indices into the batch's b * t hidden states, and the student's head.

        Asked ``inside`` the student where that is sharded, as its loss and measures are.
        """
        with adapters_off(self.student), torch.autocast(position.device.type, enabled=False):
            rows = hidden_rows(self.student, batch, position)
        reference = None if self.reference is None else self.reference(batch, position)
        return LiveRows(rows, head_of(self.student), reference=reference)


@dataclass
class AdaptersOffPlan:
    """The plan of ``teacher: {adapters_off: true}``; exact for every divergence and verifier, as a live teacher is."""

    payload: Payload = "live"
    k: int | None = None
    source: str = "the student with its adapters off"
    revision: str | None = None
    model: str | None = None

    def tokenizer(self) -> None:
        """The student's is used."""

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Nothing to check: it is the student's own."""

    def check_text(self, examples: Sequence[Any]) -> None:
        """Nothing to check: a model answers for any text."""

    def loaded(self) -> Loaded:
        raise ConfigError(
            "teacher.adapters_off has no model of its own to load. Name one: teacher: {model: ...}, which may be the "
            "student's."
        )

    def open(
        self, tokenizer: Any, *, student: nn.Module, reference: Teacher | None = None
    ) -> AdaptersOffTeacher:
        return AdaptersOffTeacher(student, reference=reference)
