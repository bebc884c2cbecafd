"""Several teachers in one recipe: each with a weight, or each with the streams it answers for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from selectkd.config.section import Name, Section, refuse
from selectkd.config.teachers import Teacher

OWN = ("weight", "streams", "teacher")


class Member(Section):
    """One of several teachers: {model: ..., weight: .7} or {model: ..., streams: [code]}, of any kind.

    weight: its share of the averaged probabilities, in proportion to the others'. streams: names of data.sources.
    """

    teacher: Teacher
    weight: Annotated[float, Field(gt=0.0)] | None = None
    streams: Annotated[list[Name], Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _teacher_beside_its_part(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "teacher" in value:
            return value
        own = {key: each for key, each in value.items() if key in OWN}
        return {**own, "teacher": {key: each for key, each in value.items() if key not in OWN}}


def _one_way(members: list[Member]) -> list[Member]:
    weighed = [member.weight is not None for member in members]
    routed = [member.streams is not None for member in members]
    if not (all(weighed) and not any(routed)) and not (all(routed) and not any(weighed)):
        raise refuse(
            "several teachers are averaged or routed, all the same way: give each a weight, or each its streams"
        )
    named = [stream for member in members for stream in member.streams or ()]
    twice = sorted({stream for stream in named if named.count(stream) > 1})
    if twice:
        raise refuse(f"the stream {twice[0]} has two teachers; a stream is taught by one")
    return members


Several = Annotated[list[Member], Field(min_length=2), AfterValidator(_one_way)]
