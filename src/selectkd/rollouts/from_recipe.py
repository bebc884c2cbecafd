"""The RolloutWriter of a recipe: which models write, where a text ends, and how long it may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from selectkd.data.render import pad_id_of
from selectkd.data.vision import Vision
from selectkd.models.precision import FP32, Precision
from selectkd.rollouts.completion_server import CompletionServer
from selectkd.rollouts.generate import ends_of
from selectkd.rollouts.served_student import ServedStudent
from selectkd.rollouts.streams import Stream
from selectkd.rollouts.writer import RolloutWriter
from selectkd.teachers.model import ModelPlan
from selectkd.teachers.protocol import TeacherPlan
from selectkd.teachers.remote.secrets import key_of
from selectkd.teachers.remote.settings import POLICY


def writer_for(
    recipe: Any,
    streams: Sequence[Stream],
    student: nn.Module,
    teacher: TeacherPlan,
    tokenizer: Any,
    *,
    precision: Precision = FP32,
    vision: Vision | None = None,
) -> RolloutWriter | None:
    """The writer of every step's text; None where all text is the data set's. A teacher can write only as one whole
    model in memory; ConfigError where a policy needs another teacher to write. vision: the processor of a student that
    sees images.
    """
    policies = recipe.data.policies
    if all(policy.name == "dataset" for policy in policies):
        return None
    whole = isinstance(teacher, ModelPlan) and teacher.placement != "sharded"
    model = teacher.loaded().model if whole else None
    return RolloutWriter(
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
        precision=precision,
        vision=vision,
        served={
            number: _served(policy.served, student, tokenizer, precision, vision)
            for number, policy in enumerate(policies)
            if getattr(policy, "served", None) is not None
        },
    )


def _served(
    settings: Any, student: nn.Module, tokenizer: Any, precision: Precision, vision: Vision | None
) -> ServedStudent:
    key = key_of(settings.api_key_env, POLICY.key)
    server = CompletionServer(
        settings.url, settings.model, key, settings.wait, ca=settings.ca, settings=POLICY
    )
    return ServedStudent(
        server,
        settings.kind,
        settings.folder,
        student,
        tokenizer,
        settings.refresh_every,
        dtype=precision.saved,
        vision=vision,
    )
