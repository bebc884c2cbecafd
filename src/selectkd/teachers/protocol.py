"""What a teacher is to a run, and what is known of one before any weight loads. n supervised rows, v vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from selectkd.loss.teacher_rows import TeacherRows
from selectkd.models.load import Loaded

Payload = Literal["live", "hidden", "top_k", "sampled", "aligned"]
"""What a kind of teacher hands over: a live or a stored hidden state with its head, its K best
tokens, K ids drawn from it, or a distribution over another tokenizer's tokens a span of text."""


class Teacher(Protocol):
    """What puts the teacher's rows beside the student's at the supervised positions [n] of a batch."""

    def __call__(self, batch: Any, position: Tensor) -> TeacherRows: ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A teacher that fetches its rows of a batch, and gains by getting the batch before its rows are needed."""

    def ahead(self, batch: Any) -> None:
        """Begins to fetch; returns at once."""
        ...


@runtime_checkable
class HasWeights(Protocol):
    """A teacher with a model of its own in memory."""

    def place(self, device: torch.device) -> None:
        """Puts the model where its rows are wanted, before the first batch asks for them: its text is written there."""
        ...


class TeacherPlan(Protocol):
    """A teacher of a recipe that has been looked up and not yet opened; making one reads no weight.

    payload and, for top_k, k: what it hands over. source, revision: whose numbers they are. model: what
    ``load_model`` takes to hold it in memory, None where that is not known.
    """

    @property
    def payload(self) -> Payload: ...

    @property
    def k(self) -> int | None: ...

    @property
    def source(self) -> str: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def model(self) -> str | None: ...

    def tokenizer(self) -> Any | None:
        """The teacher's own tokenizer; None where it has none at hand, and the student's is used."""
        ...

    def check_tokenizer(self, tokenizer: Any) -> None:
        """ConfigError where it cannot teach a student of this tokenizer."""
        ...

    def check_text(self, examples: Sequence[Any]) -> None:
        """CacheError, DataError or TeacherError where it cannot answer for these samples."""
        ...

    def loaded(self) -> Loaded:
        """The model itself, loaded once; ConfigError where ``model`` is None."""
        ...

    def open(self, tokenizer: Any, *, student: nn.Module, reference: Teacher | None = None) -> Teacher:
        """The teacher for a student with this tokenizer, with a reference student beside it."""
        ...
