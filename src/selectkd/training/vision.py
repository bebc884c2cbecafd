"""Images in a recipe: whose processor makes them, and what a run with images cannot have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selectkd.config import ModelTeacher
from selectkd.data.vision import Vision
from selectkd.errors import ConfigError
from selectkd.models.load import load_vision
from selectkd.teachers.adapters_off import AdaptersOffPlan
from selectkd.teachers.aligned import AlignedPlan
from selectkd.teachers.cache.plan import CachePlan
from selectkd.teachers.model import ModelPlan
from selectkd.teachers.protocol import TeacherPlan
from selectkd.teachers.remote.plan import ServerPlan
from selectkd.teachers.remote.server import TOKENS_ALONE
from selectkd.teachers.several import SeveralPlan


def vision_of(recipe: Any, teacher: TeacherPlan) -> Vision | None:
    """The processor of a recipe's student, of a cut one its teacher's; None where it sees no images."""
    if recipe.student.model is not None:
        return load_vision(recipe.student.model, revision=recipe.student.revision)
    return None if teacher.model is None else load_vision(teacher.model, revision=teacher.revision)


def check_images(recipe: Any, teacher: TeacherPlan) -> Vision | None:
    """``vision_of``, and ConfigError where a teacher would see other images, or for keys that images do not go with."""
    vision = vision_of(recipe, teacher)
    if vision is None:
        if recipe.training.freeze:
            raise ConfigError(
                f"training.freeze = {recipe.training.freeze} names parts of a model that sees images, and the student "
                "sees none. Leave training.freeze out."
            )
        return None
    plans = teacher.plans if isinstance(teacher, SeveralPlan) else [teacher]
    for plan in plans:
        if isinstance(plan, AlignedPlan):
            raise ConfigError(
                f"{plan.source} has another tokenizer, whose image tokens are others. Use a teacher of the student's "
                "tokenizer and processor."
            )
        if isinstance(plan, ModelPlan):
            check_processor(plan, vision)
        elif isinstance(plan, ServerPlan):
            check_server(plan, vision)
        elif not isinstance(plan, CachePlan | AdaptersOffPlan):
            raise ConfigError(
                f"{plan.source} gets token ids, and the student's prompts have images. Use a teacher in memory, or a "
                "cache of one."
            )
    sharded = [t for t in recipe.teachers if isinstance(t, ModelTeacher) and t.placement != "device"]
    if recipe.training.sharding is not None or sharded:
        key = "training.sharding" if recipe.training.sharding is not None else "teacher.placement"
        raise ConfigError(f"{key} takes no model that sees images. Leave it out, or use a text model.")
    if recipe.data.streaming and isinstance(recipe.data.evaluation, float | int):
        raise ConfigError(
            "data.evaluation: a share of streamed text is held out by its words, which say nothing of images. Name a "
            "file: evaluation: {path: FILE}."
        )
    served = [one.served for one in recipe.data.policies if getattr(one, "served", None) is not None]
    if any(one.kind != "vllm" for one in served):
        raise ConfigError(
            "data.policy.served (kind: sglang) gets token ids alone, and the student sees images. Serve it with vLLM "
            "(kind: vllm), or leave served out."
        )
    if recipe.data.packing:
        raise ConfigError(
            "data.packing takes no model that sees images. Set it to false; data.bucket: true saves padding too."
        )
    return vision


def check_processor(plan: ModelPlan, vision: Vision) -> None:
    """ConfigError unless a teacher's own processor makes the tensors and token counts of the student's."""
    if plan.is_loaded and not Path(plan.model).exists():
        return  # a model in memory has no processor of its own
    theirs = load_vision(plan.model, revision=plan.wanted_revision)
    if theirs is None:
        raise ConfigError(
            f"{plan.model} sees no images, and the student does. Use a teacher that sees them, or a text student."
        )
    _same_processor(theirs, vision, plan.model)


def check_server(plan: ServerPlan, vision: Vision) -> None:
    """ConfigError unless a server takes prompts with images, and the processor beside its tokenizer is the student's.

    The server's own processor cannot be read; the token counts of its answers are compared with the student's.
    """
    if not plan.takes_images:
        raise ConfigError(f"{plan.source} (kind: {plan.spec.kind}) {TOKENS_ALONE}")
    folder = str(plan.spec.tokenizer)
    theirs = load_vision(folder)
    if theirs is None:
        raise ConfigError(
            f"teacher.tokenizer = {folder} has no processor of a model that sees images. Name the folder or hub id of "
            "the model that is served: its processor is compared with the student's."
        )
    _same_processor(theirs, vision, folder)


def _same_processor(theirs: Vision, vision: Vision, model: str) -> None:
    if theirs.fingerprint != vision.fingerprint:
        differ = _differences(theirs.settings, vision.settings)
        raise ConfigError(
            f"the processor of {model} makes other images than the student's: {'; '.join(differ[:4])}. Use a pair "
            "with one processor, or copy the teacher's processor files into the student's folder."
        )


def _differences(one: Any, other: Any, under: str = "") -> list[str]:
    """``key: teacher's, not student's`` for each setting that differs."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [f"{under.lstrip('.')}: {one} of the teacher, {other} of the student"]
    found = []
    for key in sorted({*one, *other}):
        found += _differences(one.get(key), other.get(key), f"{under}.{key}")
    return found
