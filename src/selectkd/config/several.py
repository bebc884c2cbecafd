"""Several teachers in one recipe: each with a weight, or each with the streams or the records it answers for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from selectkd.config.section import Name, Section, Text, refuse
from selectkd.config.teachers import Teacher

Value = str | int | float | bool

OWN = ("weight", "streams", "when", "teacher")


class Member(Section):
    """One of several teachers: {model: ..., weight: .7}, {model: ..., streams: [code]} or {model: ..., when: {topic:
    code}}, of any kind.

    weight: its share of the averaged probabilities, in proportion to the others'. streams: names of data.sources. when:
    fields of a record and the value each must have, or a list of such values.
    """

    teacher: Teacher
    weight: Annotated[float, Field(gt=0.0)] | None = None
    streams: Annotated[list[Name], Field(min_length=1)] | None = None
    when: (
        Annotated[dict[Text, Value | Annotated[list[Value], Field(min_length=1)]], Field(min_length=1)] | None
    ) = None

    @model_validator(mode="before")
    @classmethod
    def _teacher_beside_its_part(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "teacher" in value:
            return value
        own = {key: each for key, each in value.items() if key in OWN}
        return {**own, "teacher": {key: each for key, each in value.items() if key not in OWN}}


def _one_way(members: list[Member]) -> list[Member]:
    ways = [
        {way for way in ("weight", "streams", "when") if getattr(member, way) is not None}
        for member in members
    ]
    if len(ways[0]) != 1 or any(way != ways[0] for way in ways):
        raise refuse(
            "several teachers are averaged or routed, all the same way: give each a weight, or each its streams, or "
            "each the records it answers for (when: {field: value})"
        )
    split = [m.teacher.model for m in members if getattr(m.teacher, "placement", "device") == "sharded"]  # type: ignore[union-attr]
    if split and "weight" not in ways[0]:
        raise refuse(
            f"{split[0]} is sharded over the ranks, which must all ask it at once, and a routed teacher is not; "
            "average it by weight, or set its placement to device or offloaded"
        )
    named = [stream for member in members for stream in member.streams or ()]
    twice = sorted({stream for stream in named if named.count(stream) > 1})
    if twice:
        raise refuse(f"the stream {twice[0]} has two teachers; a stream is taught by one")
    return members


Several = Annotated[list[Member], Field(min_length=2), AfterValidator(_one_way)]
