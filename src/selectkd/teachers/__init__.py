"""Teachers: what puts a teacher's rows beside the student's."""

from __future__ import annotations

from selectkd.teachers.live import LiveTeacher

__all__ = ["LiveTeacher"]
