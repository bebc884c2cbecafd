"""``selectkd serve-teacher``: a model in memory that answers for others, over HTTP."""

from __future__ import annotations

from selectkd.teachers.server.app import application
from selectkd.teachers.server.engine import Engine
from selectkd.teachers.server.limits import Limits

__all__ = ["Engine", "Limits", "application"]
