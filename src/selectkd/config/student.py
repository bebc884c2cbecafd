"""The sections of a recipe that name the student: the one that learns, and the one it is compared with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from selectkd.config.quantization import Quantization
from selectkd.config.section import Attention, Count, Dtype, Section, Text, Whole, refuse


class Reference(Section):
    """A reference student, for the selectors that compare with one."""

    model: Text
    """The reference student: a hub id, a folder, or a .gguf file."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model. Left out: the hub's main branch."""
    dtype: Dtype | None = None
    """Number format of its weights in memory. Left out: as for a teacher in memory."""


class FromTeacher(Section):
    """A student cut from the teacher's layers."""

    layers: Count
    """Number of the teacher's layers that stay."""
    choose: Literal["measured", "even"] | list[Annotated[int, Field(ge=0), Whole]] = "measured"
    """Which layers stay. `measured` keeps those whose loss costs least on held-out text, and remembers them in
    `~/.cache/selectkd/layers` for the next command; `even` spaces them; a list names them from 0."""

    @model_validator(mode="after")
    def _as_many_as_named(self) -> Self:
        if isinstance(self.choose, list):
            if len(set(self.choose)) != len(self.choose):
                raise refuse(f"choose = {self.choose} names a layer twice")
            if len(self.choose) != self.layers:
                raise refuse(
                    f"layers = {self.layers} but choose names {len(self.choose)} layers; make the two agree"
                )
        return self


class Student(Section):
    """The model that learns: an existing one, or one cut from the teacher."""

    model: Text | None = None
    """The student: a hub id, a folder, or a .gguf file."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model. Left out: the hub's main branch."""
    from_teacher: FromTeacher | None = None
    """Cuts the student from the teacher, in place of model."""
    quantization: Quantization | None = None
    """Stores the student's base in 4 bits, for adapters to train on: `bitsandbytes-4bit`, or a mapping of the keys of
    quantization. Needs training.lora. Left out: no quantization."""
    attn_implementation: Attention | None = None
    """How the student computes attention. Left out: the choice of transformers for the model."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.model is None) == (self.from_teacher is None):
            raise refuse("needs exactly one of model and from_teacher")
        if self.revision is not None and self.model is None:
            raise refuse("revision belongs to model; a student cut from the teacher has the teacher's")
        if self.attn_implementation is not None and self.model is None:
            raise refuse(
                "attn_implementation belongs to model; a student cut from the teacher has the teacher's"
            )
        return self
