"""What a divergence says of itself when the teacher is known by its K best tokens and one tail outcome.

Merging outcomes never raises an f-divergence (the data-processing inequality), so its value on K + 1 outcomes is a
lower bound. That says nothing of the gradient: one that asks for log p of each token of the tail is far off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from selectkd.objective.divergences.record import record_of

Verdict = Literal["exact", "lower bound", "upper bound", "unbiased", "refused"]


@dataclass(frozen=True)
class Exactness:
    """How a number taken from a teacher's payload stands to the one the live teacher would give, and why."""

    verdict: Verdict
    reason: str


MERGED = Exactness("lower bound", "an f-divergence never rises when outcomes are merged into one tail")
REVERSE = Exactness(
    "refused",
    "reverse KL asks for log p of every token the student likes, and the tail has only their sum: "
    "its gradient is off by .16 of its size at K = 128, forward KL's by .009 (docs/log.md)",
)
NO_DIRECTION = Exactness(
    "refused",
    "it is no f-divergence: no inequality says what merging the tail does to it, so its value bounds nothing",
)
UNDECLARED = Exactness(
    "refused", "it does not declare what merging the tail does to it; decorate it with states(from_top_k=...)"
)


def from_top_k(divergence: Callable[..., Any]) -> Exactness:
    """What a divergence, with the parameters bound to it, states; UNDECLARED where it states nothing."""
    record, params = record_of(divergence)
    if record.from_top_k is None:
        return UNDECLARED
    return record.from_top_k if isinstance(record.from_top_k, Exactness) else record.from_top_k(**params)
