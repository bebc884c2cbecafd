"""DistiLLM's adaptive scheduler: the held-out loss decides how often the student's own text is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Source = Literal["fresh", "replay", "dataset"]


@dataclass
class AdaptiveScheduler:
    """phi, the probability of the student's text; it rises by ``increase`` at each evaluation whose loss is at least
    ``margin`` above the loss of its last rise (at first: of the first evaluation), and never beyond 1.

    Source: DistiLLM (arXiv 2402.03898). fill_first as in the released code: below phi the
    student writes until the buffer is full.

    >>> scheduler = AdaptiveScheduler()
    >>> for loss in (2.0, 2.05, 2.11, 2.15, 2.3):
    ...     scheduler.evaluated(loss)
    >>> round(scheduler.phi, 1)
    0.2
    """

    phi: float = 0.0
    increase: float = 0.1
    margin: float = 0.1
    fill_first: bool = False
    last: float | None = None

    def evaluated(self, loss: float) -> None:
        """Raises phi where a held-out loss asks for it."""
        if self.last is None:
            self.last = loss
        elif loss >= self.last + self.margin:
            self.phi, self.last = min(1.0, self.phi + self.increase), loss

    def source(self, uniform: float, step: int, steps: int, *, stored: int, full: bool) -> Source:
        """Where the text of a step comes from, ``uniform`` being its number in (0, 1); an empty buffer gives nothing.

        >>> scheduler = AdaptiveScheduler(phi=0.5)
        >>> [scheduler.source(u, 50, 100, stored=9, full=True) for u in (0.2, 0.4, 0.6)]
        ['fresh', 'replay', 'dataset']
        """
        if uniform >= self.phi:
            return "dataset"
        fresh = uniform < self.phi * (1.0 - step / steps)
        return "fresh" if fresh or stored == 0 or (self.fill_first and not full) else "replay"

    def state_dict(self) -> dict[str, Any]:
        """phi and the loss of its last rise."""
        return {"phi": self.phi, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phi, self.last = state["phi"], state["last"]
