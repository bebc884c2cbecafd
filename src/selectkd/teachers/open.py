"""From a recipe's ``teacher:`` to its plan: the one place that knows which class stands for which kind."""

from __future__ import annotations

from selectkd.config import ModelTeacher
from selectkd.config import Teacher as Section
from selectkd.errors import ConfigError
from selectkd.teachers.model import ModelPlan
from selectkd.teachers.protocol import TeacherPlan


def plan_teacher(spec: Section, *, dtype: str = "float32") -> TeacherPlan:
    """The plan of a recipe's teacher; ``dtype`` is used where the section names none."""
    if isinstance(spec, ModelTeacher):
        return ModelPlan(
            spec.model,
            dtype=spec.dtype or dtype,
            quantization=spec.quantization,
            wanted_revision=spec.revision,
        )
    raise ConfigError(f"no teacher can be made of {type(spec).__name__}. Name one: teacher: {{model: ...}}.")
