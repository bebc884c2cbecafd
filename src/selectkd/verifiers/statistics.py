"""What a verifier can be told of n rows without seeing the vocabulary: sums that the loss takes along the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class RowStatistics(Protocol):
    """Sums over the vocabulary of each row at the verification temperature; p = teacher, q = student.

    student_top: the student's argmax. rank, label_rank: how many tokens the teacher prefers to it, and to the label
    (``width`` where the token is impossible; label_rank means nothing without labels). overlap: sum min(p, q).
    Entropies in nats. affinity: sum sqrt(p q), 1 minus the squared Hellinger distance. width: ids of the vocabulary.
    """

    @property
    def student_top(self) -> Int[Tensor, " n"]: ...

    @property
    def rank(self) -> Tensor: ...  # [n], whole numbers

    @property
    def label_rank(self) -> Tensor: ...  # [n], whole numbers

    @property
    def overlap(self) -> Float[Tensor, " n"]: ...

    @property
    def teacher_entropy(self) -> Float[Tensor, " n"]: ...

    @property
    def student_entropy(self) -> Float[Tensor, " n"]: ...

    @property
    def affinity(self) -> Float[Tensor, " n"]: ...

    @property
    def width(self) -> int: ...


@dataclass(frozen=True)
class StatisticsTable:
    """All the ``RowStatistics`` of some rows, computed already."""

    student_top: Int[Tensor, " n"]
    rank: Int[Tensor, " n"]
    label_rank: Int[Tensor, " n"]
    overlap: Float[Tensor, " n"]
    teacher_entropy: Float[Tensor, " n"]
    student_entropy: Float[Tensor, " n"]
    affinity: Float[Tensor, " n"]
    width: int
