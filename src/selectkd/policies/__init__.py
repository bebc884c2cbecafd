"""Policies: who writes the text of a step, which streams it falls into, and what each stream costs."""

from __future__ import annotations

from selectkd.policies.adaptive import AdaptiveScheduler
from selectkd.policies.open import writer_for
from selectkd.policies.replay import ReplayBuffer
from selectkd.policies.streams import Stream, check_labels, extras_of, losses_of, streams_of
from selectkd.policies.writer import Writer

__all__ = [
    "AdaptiveScheduler",
    "ReplayBuffer",
    "Stream",
    "Writer",
    "check_labels",
    "extras_of",
    "losses_of",
    "streams_of",
    "writer_for",
]
