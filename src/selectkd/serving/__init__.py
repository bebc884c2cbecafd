"""``selectkd serve-teacher``: a model in memory that answers for others, over HTTP."""

from __future__ import annotations

from selectkd.serving.app import application
from selectkd.serving.engine import Engine
from selectkd.serving.limits import Limits

__all__ = ["Engine", "Limits", "application"]
