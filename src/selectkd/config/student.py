"""The sections of a recipe that name the student: the one that learns, and the one it is compared with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from selectkd.config.section import Attention, Count, Dtype, Section, Text, Whole, refuse


class Reference(Section):
    """A reference student, for the selectors that compare with one: a hub id, a folder, or a .gguf file."""

    model: Text
    revision: Text | None = None
    dtype: Dtype | None = None


class FromTeacher(Section):
    """A student cut from the teacher: how many of its layers stay, and which."""

    layers: Count
    choose: Literal["measured", "even"] | list[Annotated[Whole, Field(ge=0)]] = "measured"

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
    """The model that learns: an existing one, or one cut from the teacher.

    attn_implementation: how it computes attention; transformers' choice for the model where it is left out.
    """

    model: Text | None = None
    revision: Text | None = None
    from_teacher: FromTeacher | None = None
    attn_implementation: Attention | None = None

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
