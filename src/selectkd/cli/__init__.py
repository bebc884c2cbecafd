"""The command line: one file per verb. What a verb needs is imported when it runs: ``--help`` is instant."""

from __future__ import annotations

from selectkd.cli.app import main

__all__ = ["main"]
