"""A teacher that a recipe names as a model: looked up first, loaded when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from selectkd.data.alignment import align
from selectkd.models.head import head_of
from selectkd.models.load import Loaded, check_model, load_model, load_tokenizer
from selectkd.models.quantized import check_quantization
from selectkd.models.sharded import Spread
from selectkd.teachers.live import LiveTeacher
from selectkd.teachers.placement import PLACEMENT, Placement
from selectkd.teachers.protocol import Payload, Teacher


@dataclass
class ModelPlan:
    """The plan of ``teacher: {model: ...}``; exact for every divergence and verifier.

    placement: as of ``place_on``. sharding: the recipe's section, None for one copy over all ranks.
    """

    model: str
    dtype: str = "float32"
    quantization: str | None = None
    wanted_revision: str | None = None
    placement: Placement = "device"
    attn_implementation: str | None = None
    sharding: Any = None
    payload: Payload = "live"
    k: int | None = None
    _loaded: Loaded | None = field(default=None, repr=False)

    @classmethod
    def holding(cls, model: nn.Module, tokenizer: Any) -> ModelPlan:
        """The plan of a model in memory, whose tokenizer is ``tokenizer``."""
        source = "in memory"
        return cls(source, _loaded=Loaded(model, tokenizer, source, None))

    @property
    def source(self) -> str:
        return self.model

    @property
    def revision(self) -> str | None:
        """The commit or checksum that was loaded; before that, the one asked for."""
        return self.wanted_revision if self._loaded is None else self._loaded.revision

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._loaded is not None

    def tokenizer(self) -> Any:
        return load_tokenizer(self.model, revision=self.wanted_revision)

    def check_tokenizer(self, tokenizer: Any) -> None:
        align(self.tokenizer(), tokenizer)

    def check_text(self, examples: Sequence[Any]) -> None:
        """Nothing to check: a model answers for any text."""

    def loaded(self) -> Loaded:
        if self._loaded is None:
            self._loaded = load_model(
                self.model,
                dtype=self.dtype,
                quantization=self.quantization,
                revision=self.wanted_revision,
                attn_implementation=self.attn_implementation,
                spread=Spread.of(self.sharding, PLACEMENT) if self.placement == "sharded" else None,
            )
        return self._loaded

    def check(self) -> None:
        """ConfigError for what cannot be loaded as the recipe says, before anything is."""
        check_quantization(self.quantization)
        check_model(
            self.model, self.attn_implementation, revision=self.wanted_revision,
            where="teacher.attn_implementation",
        )  # fmt: skip

    def open(self, tokenizer: Any, *, student: nn.Module, reference: Teacher | None = None) -> LiveTeacher:
        loaded = self.loaded()
        shared = shared_rows(
            loaded.tokenizer,
            tokenizer,
            teacher_width=head_of(loaded.model).width,
            student_width=head_of(student).width,
        )
        return LiveTeacher(loaded.model, shared=shared, reference=reference, placement=self.placement)


def shared_rows(teacher: Any, student: Any, *, teacher_width: int, student_width: int) -> Tensor | None:
    """Which rows of the teacher's head [v] stand for a token of both vocabularies; None where all do."""
    alignment = align(teacher, student, teacher_width=teacher_width, student_width=student_width)
    mask = alignment.mask(teacher_width)
    return None if mask[: min(teacher_width, student_width)].all() else mask
