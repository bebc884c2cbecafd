"""Several teachers in one recipe: each with a weight, or each with the streams or the records it answers for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from selectkd.config.section import Name, Section, Text, refuse
from selectkd.config.teachers import Teacher

Value = str | int | float | bool

MEMBER_KEYS = ("weight", "streams", "when", "teacher")


class Member(Section):
    """One of several teachers, of any kind: {model: ..., weight: 0.7}, for instance."""

    teacher: Teacher
    """The teacher; its keys may also stand beside weight, streams or when."""
    weight: Annotated[float, Field(gt=0.0)] | None = None
    """Share of this teacher in the averaged probabilities, in proportion to the other weights."""
    streams: Annotated[list[Name], Field(min_length=1)] | None = None
    """Names of the data.sources that this teacher answers for."""
    when: (
        Annotated[dict[Text, Value | Annotated[list[Value], Field(min_length=1)]], Field(min_length=1)] | None
    ) = None
    """Fields of a record, each with the value or the list of values for which this teacher answers."""

    @model_validator(mode="before")
    @classmethod
    def _teacher_beside_its_part(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "teacher" in value:
            return value
        given = {key: each for key, each in value.items() if key in MEMBER_KEYS}
        return {**given, "teacher": {key: each for key, each in value.items() if key not in MEMBER_KEYS}}


def _one_way(members: list[Member]) -> list[Member]:
    ways = [
        {way for way in ("weight", "streams", "when") if getattr(member, way) is not None}
        for member in members
    ]
    if len(ways[0]) != 1 or any(way != ways[0] for way in ways):
        raise refuse(
            "several teachers are combined in one way; give all of them a weight, streams, or a condition (when: "
            "{field: value})"
        )
    split = [m.teacher.model for m in members if getattr(m.teacher, "placement", "device") == "sharded"]  # type: ignore[union-attr]
    if split and "weight" not in ways[0]:
        raise refuse(
            f"{split[0]} is sharded, so it must answer for every batch; give the teachers weights, or set its "
            "placement "
            "to device or offloaded"
        )
    named = [stream for member in members for stream in member.streams or ()]
    twice = sorted({stream for stream in named if named.count(stream) > 1})
    if twice:
        raise refuse(f"the stream {twice[0]} has two teachers; give each stream one teacher")
    return members


Several = Annotated[list[Member], Field(min_length=2), AfterValidator(_one_way)]
