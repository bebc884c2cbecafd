"""From a recipe to its Writer: which models write, where a text ends, and what may be written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import distributed as dist
from torch import nn

from selectkd.data.render import pad_id_of
from selectkd.errors import ConfigError
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
    if _ranks() > 1 and any(
        policy.name == "adaptive" or getattr(policy, "replay", None) is not None for policy in policies
    ):
        raise ConfigError(
            "a replay buffer is one process's own, and this run has several. Train on one device, or use a policy "
            "without a buffer (method imitkd has the option fresh)."
        )
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
        max_new_tokens=recipe.data.max_new_tokens,
        seed=recipe.training.seed,
    )


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
