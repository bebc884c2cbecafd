"""Teachers that answer over HTTP: what is asked, what is believed of an answer, and what happens when none comes."""

from __future__ import annotations

from selectkd.teachers.remote.plan import RemotePlan
from selectkd.teachers.remote.teacher import RemoteTeacher

__all__ = ["RemotePlan", "RemoteTeacher"]
