"""What a target gets: the student, and how the user wants it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selectkd.models.load import Loaded


@dataclass(frozen=True)
class Student:
    """A student in fp32; with its adapter still on it for the target ``adapter`` alone.

    model, tokenizer, source: as of ``Loaded``. base: the model that an adapter belongs to, None for a student cut from
    its teacher. ends_of: (tokenizer, model) -> ids that end a text. name: for files and tables.
    """

    model: Any
    tokenizer: Any
    source: str
    ends_of: Callable[..., frozenset[int]]
    name: str = "student"
    base: str | None = None
    base_revision: str | None = None

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end a text of the student."""
        return self.ends_of(self.tokenizer, self.model)


@dataclass(frozen=True)
class Options:
    """kind: the number format of the weights. folder: where the export will be. target: the model that the student
    drafts for, and its name for the server. draft_length: tokens that are drafted at once. calibration: ids of texts
    that weights of fewer bits are rounded for; none rounds each weight alone.
    """

    kind: str
    folder: Path
    target: Loaded | None = None
    target_name: str | None = None
    draft_length: int | None = None
    calibration: Sequence[Sequence[int]] = ()

    def with_length(self, length: int) -> Options:
        """The same with another draft length."""
        return replace(self, draft_length=length)
