"""From a recipe to its Writer: which models write, where a text ends, and what may be written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from selectkd.data.render import pad_id_of
from selectkd.generation import ends_of
from selectkd.policies.streams import Stream
from selectkd.policies.writer import Writer
from selectkd.teachers.protocol import TeacherPlan
from selectkd.teachers.several import SeveralPlan


def writer_for(
    recipe: Any, streams: Sequence[Stream], student: nn.Module, teacher: TeacherPlan, tokenizer: Any
) -> Writer | None:
    """What writes the text of a step, None where all of it is the data set's. The teacher writes where it is one
    model in memory; ConfigError where a policy wants it to and it is not.
    """
    policies = recipe.data.policies
    if all(policy.name == "dataset" for policy in policies):
        return None
    in_memory = teacher.payload == "live" and not isinstance(teacher, SeveralPlan)
    model = teacher.loaded().model if in_memory else None
    return Writer(
        policies,
        streams,
        student,
        model,
        ends=ends_of(tokenizer, student, *(() if model is None else (model,))),
        width=len(tokenizer),
        pad_id=pad_id_of(tokenizer),
        max_length=recipe.training.max_length,
        seed=recipe.training.seed,
    )
