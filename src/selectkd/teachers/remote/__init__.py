"""Teachers that answer over HTTP: the requests, the checks of an answer, and the retries where none comes."""

from __future__ import annotations

from selectkd.teachers.remote.plan import RemotePlan
from selectkd.teachers.remote.teacher import RemoteTeacher

__all__ = ["RemotePlan", "RemoteTeacher"]
