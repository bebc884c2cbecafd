"""The run that evaluations look at."""

from __future__ import annotations

from evals.tiny_run import tiny_run

__all__ = ["tiny_run"]
