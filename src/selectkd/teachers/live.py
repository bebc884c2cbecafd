"""A teacher held in memory. n supervised rows, v vocabulary, e teacher width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from selectkd.loss.teacher_rows import LiveRows
from selectkd.models.forward import hidden_rows
from selectkd.models.head import head_of
from selectkd.models.sharded import inside, whole_head
from selectkd.teachers.placement import Placement, place_on
from selectkd.teachers.protocol import Teacher


class HeldModel:
    """A teacher's model in memory, frozen and in eval mode.

    It is no ``nn.Module`` on purpose: held by a trained module, it is neither trained, wrapped, saved nor moved
    along. It moves itself to the device of a batch, or its layers elsewhere (``placement``, see ``place_on``).
    """

    def __init__(self, model: nn.Module, *, placement: Placement = "device") -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = head_of(model)
        self.placement: Placement = placement
        self.on = self.head.weight.device if placement == "device" else None

    def place(self, device: torch.device) -> None:
        """Puts the model where its rows are wanted; nothing to do where it is there."""
        if self.on != device:
            place_on(self.model, device, self.placement)
            self.head, self.on = whole_head(head_of(self.model)), device


class LiveTeacher(HeldModel):
    """The teacher's rows at the supervised positions of a batch: its last hidden states and its head, no gradient.

    shared: which rows of its head [v] stand for a token of both vocabularies; None where all do. reference: a
    reference student, held the same way, whose rows go along with the teacher's. placement: as of ``place_on``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        shared: Tensor | None = None,
        reference: Teacher | None = None,
        placement: Placement = "device",
    ) -> None:
        super().__init__(model, placement=placement)
        self.shared, self.reference = shared, reference

    @torch.no_grad()
    def __call__(self, batch: Any, position: Tensor) -> LiveRows:
        """The rows at ``position`` [n], flat indices into the batch's b * t hidden states."""
        device = batch.input_ids.device
        self.place(device)
        with torch.autocast(device.type, enabled=False):  # autocast is the student's
            rows = inside(self.model, lambda: hidden_rows(self.model, batch, position))
        shared = None if self.shared is None else self.shared.to(device)
        reference = None if self.reference is None else self.reference(batch, position)
        return LiveRows(rows, self.head, shared=shared, reference=reference)
