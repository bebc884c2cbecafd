"""Statistics of n rows by which a verifier decides without the vocabulary: sums that the loss takes along the way."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int, Real
from torch import Tensor

from selectkd.errors import ConfigError

STATISTICS = (
    "student_top",
    "token_rank",
    "label_rank",
    "overlap",
    "teacher_entropy",
    "student_entropy",
    "bhattacharyya",
)
"""What a verifier may name in ``reads``."""


class RowStatistics:
    """Sums over the vocabulary of each row at the verification temperature; p = teacher, q = student.

    student_top: the student's argmax. token_rank, label_rank: how many tokens the teacher prefers to it, and to the
    label (``width`` where the token is impossible; without labels there is no label_rank). overlap: sum min(p, q).
    Entropies in nats. bhattacharyya: sum sqrt(p q), 1 minus the squared Hellinger distance. width: vocabulary ids.
    Only what was asked for is there; to look at another is a ConfigError.
    """

    student_top: Int[Tensor, " n"]
    token_rank: Real[Tensor, " n"]
    label_rank: Real[Tensor, " n"]
    overlap: Float[Tensor, " n"]
    teacher_entropy: Float[Tensor, " n"]
    student_entropy: Float[Tensor, " n"]
    bhattacharyya: Float[Tensor, " n"]
    width: int

    def __init__(self, width: int, **columns: Tensor) -> None:
        self.width = width
        self.__dict__.update(columns)

    def __getattr__(self, name: str) -> Any:
        if name == "label_rank":
            raise ConfigError(
                "a verifier reads the tokens of the text; pass labels=[n] to distillation_loss."
            )
        if name in STATISTICS:
            raise ConfigError(f"a verifier reads {name}, which its ``reads`` does not name.")
        raise AttributeError(name)
