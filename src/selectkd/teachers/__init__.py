"""Teachers: what puts a teacher's rows beside the student's."""

from __future__ import annotations

from selectkd.teachers.live import LiveTeacher
from selectkd.teachers.open import plan_teacher
from selectkd.teachers.protocol import Payload, ReadsAhead, Teacher, TeacherPlan

__all__ = ["LiveTeacher", "Payload", "ReadsAhead", "Teacher", "TeacherPlan", "plan_teacher"]
