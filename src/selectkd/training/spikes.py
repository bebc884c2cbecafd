"""Steps whose gradient is far larger than those before them: counted and named, never acted upon."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

MEMORY = 0.98
"""Weight of the past in the running mean and variance: fifty steps, so that a schedule's drift is no spike."""

FAR = 4.0
"""Standard deviations of the log of the norm above its mean; of a normal variable one step in 30,000 is so far."""

WARM = 20
"""Steps before the first can count: the mean and the spread must be known."""


@dataclass
class Spikes:
    """A running mean and variance of log(gradient norm); ``steps`` are those more than FAR deviations above it.

    >>> spikes = Spikes()
    >>> for step in range(1, 41):
    ...     _ = spikes.see(step, 1.0 + 0.1 * (step % 3))
    >>> spikes.see(41, 50.0), spikes.steps
    (True, [41])
    """

    seen: int = 0
    mean: float = 0.0
    variance: float = 0.0
    steps: list[int] = field(default_factory=list)

    def see(self, step: int, norm: float) -> bool:
        """Whether the step's gradient norm, finite and not negative, is a spike; it moves the mean, not the spread."""
        value = math.log(max(norm, 1e-30))
        far = self.seen >= WARM and value - self.mean > FAR * math.sqrt(self.variance + 1e-12)
        self.seen += 1
        share = max(1.0 - MEMORY, 1.0 / self.seen)  # an ordinary mean until the memory is full
        off = value - self.mean
        self.mean += share * off
        if far:
            self.steps.append(step)
        else:
            self.variance += share * ((1.0 - share) * off * off - self.variance)
        return far

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "mean": self.mean, "variance": self.variance, "steps": list(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.mean, self.variance = state["seen"], state["mean"], state["variance"]
        self.steps = list(state["steps"])
