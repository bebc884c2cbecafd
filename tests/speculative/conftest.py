"""The run whose student drafts."""

from __future__ import annotations

from evals.tiny_run import tiny_run

__all__ = ["tiny_run"]
