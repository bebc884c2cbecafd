"""From a recipe's ``teacher:`` to its plan: the one place that knows which class stands for which kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selectkd.config import AdaptersOffTeacher, CacheTeacher, ModelTeacher, RemoteTeacher
from selectkd.config import Teacher as Section
from selectkd.config.several import Member
from selectkd.errors import ConfigError
from selectkd.teachers.adapters_off import AdaptersOffPlan
from selectkd.teachers.aligned import AlignedPlan
from selectkd.teachers.cache.plan import CachePlan
from selectkd.teachers.model import ModelPlan
from selectkd.teachers.protocol import TeacherPlan
from selectkd.teachers.remote.own_plan import OwnPlan
from selectkd.teachers.remote.plan import RemotePlan, connection_of
from selectkd.teachers.several import SeveralPlan


def plan_teacher(
    spec: Section | list[Member], *, dtype: str = "float32", sharding: Any = None
) -> TeacherPlan:
    """The plan of a recipe's teacher. dtype: where the section names none; sharding: of a teacher over the ranks."""
    if isinstance(spec, list):
        plans = [plan_teacher(member.teacher, dtype=dtype, sharding=sharding) for member in spec]
        weights = [member.weight for member in spec if member.weight is not None]
        streams = [member.streams for member in spec if member.streams is not None]
        when = [member.when for member in spec if member.when is not None]
        return SeveralPlan(plans, weights or None, streams or None, when or None)
    if isinstance(spec, ModelTeacher):
        own = ModelPlan(
            spec.model,
            dtype=spec.dtype or dtype,
            quantization=spec.quantization,
            wanted_revision=spec.revision,
            placement=spec.placement,
            attn_implementation=spec.attn_implementation,
            sharding=sharding,
        )
        own.check()
        if spec.cross_tokenizer is None:
            return own
        across = spec.cross_tokenizer
        return AlignedPlan(own, across.pairing, across.matched_weight, across.unverified_weight)
    if isinstance(spec, AdaptersOffTeacher):
        return AdaptersOffPlan()
    if isinstance(spec, CacheTeacher):
        return CachePlan(Path(spec.cache).expanduser(), wanted_of(spec))
    if isinstance(spec, RemoteTeacher):
        kind = OwnPlan if spec.kind == "selectkd" else RemotePlan
        return kind(spec, connection_of(spec))
    raise ConfigError(f"no teacher can be made of {type(spec).__name__}. Name one: teacher: {{model: ...}}.")


def wanted_of(spec: CacheTeacher) -> dict[str, Any]:
    """What a recipe says of its cache, as the index has it; keys it leaves out are left out."""
    teacher = spec.model_dump(include={"model", "revision", "dtype", "quantization"}, exclude_none=True)
    stored = spec.model_dump(include={"payload", "k", "precision", "shard_rows"}, exclude_none=True)
    return {**({"teacher": teacher} if teacher else {}), **stored}
