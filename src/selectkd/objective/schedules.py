"""Numbers that change over a run: beta for cold students, and TAID's interpolation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from selectkd.errors import ConfigError


@dataclass
class BetaSchedule:
    """beta from ``start`` to ``end``: linearly over ``steps``, or as the student comes to agree, up to ``until_tar``.

    With ``until_tar`` beta = end + (start - end) * (1 - TAR / until_tar), never rising again: it follows the best TAR
    seen so far. A constant is BetaSchedule(b, b). Our addition for students that agree nowhere; constant in the paper.

    >>> [round(BetaSchedule(1.0, 0.0, steps=4).value(step, tar=0.0), 2) for step in (0, 2, 4, 9)]
    [1.0, 0.5, 0.0, 0.0]
    >>> by_tar = BetaSchedule(1.0, 0.0, until_tar=0.5)
    >>> [by_tar.value(step, tar) for step, tar in enumerate((0.0, 0.25, 0.1, 0.6))]
    [1.0, 0.5, 0.5, 0.0]
    """

    start: float
    end: float
    steps: int | None = None
    until_tar: float | None = None
    best_tar: float = 0.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.end <= 1.0 and 0.0 <= self.start <= 1.0):
            raise ConfigError(f"beta must lie in [0, 1], got start {self.start} and end {self.end}.")
        if self.start != self.end and (self.steps is None) == (self.until_tar is None):
            raise ConfigError("a beta that changes needs exactly one of steps and until_tar.")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"beta.steps = {self.steps} must be 1 or more.")
        if self.until_tar is not None and not 0.0 < self.until_tar <= 1.0:
            raise ConfigError(f"beta.until_tar = {self.until_tar} must lie in (0, 1].")

    def value(self, step: int, tar: float = 0.0) -> float:
        """beta for optimizer step ``step`` (from 0), ``tar`` being the TAR seen last."""
        if self.start == self.end:
            return self.end
        if self.steps is not None:
            done = min(step / self.steps, 1.0)
        else:
            assert self.until_tar is not None  # __post_init__ saw to it
            self.best_tar = max(self.best_tar, tar if math.isfinite(tar) else 0.0)
            done = min(self.best_tar / self.until_tar, 1.0)
        return self.start + (self.end - self.start) * done


@dataclass
class TaidSchedule:
    """TAID's t: at least linear from ``start`` to ``end`` over ``steps``, faster while the loss falls.

    t <- min(end, max(linear, t + rate * sigmoid(m) * (1 - t))), m the running mean (momentum) of the relative fall of
    the loss. Defaults as in the paper. Source: TAID (arXiv 2501.16937), Algorithm 1.

    >>> schedule = TaidSchedule(steps=10)
    >>> schedule.update(step=5, loss=2.0) >= 0.7
    True
    """

    steps: int
    start: float = 0.4
    end: float = 1.0
    rate: float = 5e-4
    momentum: float = 0.99
    t: float | None = None
    mean_fall: float = 0.0
    last_loss: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0.0 <= self.start <= self.end <= 1.0:
            raise ConfigError(f"TaidSchedule needs steps >= 1 and 0 <= start <= end <= 1, got {self}.")
        if self.t is None:
            self.t = self.start

    def update(self, step: int, loss: float) -> float:
        """t for the step after ``step``, given the loss just measured."""
        assert self.t is not None  # __post_init__ saw to it
        if self.last_loss is not None and self.last_loss > 0:
            fall = (self.last_loss - loss) / self.last_loss
            self.mean_fall = self.momentum * self.mean_fall + (1.0 - self.momentum) * fall
            self.t += self.rate * (1.0 - self.t) / (1.0 + math.exp(-self.mean_fall))
        self.last_loss = loss
        linear = self.start + (self.end - self.start) * min(step / self.steps, 1.0)
        self.t = min(self.end, max(linear, self.t))
        return self.t


@dataclass
class ShareSchedule:
    """AdaKD's share of rows: times 1 - change where the loss's moving average fell by the part ``change`` since the
    share last changed, times 1 + change where it rose by it, within [floor, 1].

    The average is exponential, its first value the first loss. The authors compare from the end of their warm-up on,
    here from the first step on. momentum: theirs is an option without a stated value; .9 is ours, ten steps.
    Source: AdaKD (arXiv 2510.11615), loss-driven adaptive token focusing, and its authors' code.

    >>> schedule = ShareSchedule(1.0, momentum=0.0)
    >>> [round(schedule.update(loss), 3) for loss in (2.0, 1.9, 1.7, 1.6, 2.0)]
    [1.0, 1.0, 0.9, 0.9, 0.99]
    """

    share: float
    change: float = 0.1
    floor: float = 0.1
    momentum: float = 0.9
    mean: float | None = None
    last: float | None = None

    def update(self, loss: float) -> float:
        """The share for the next step, given the loss just measured."""
        self.mean = loss if self.mean is None else self.momentum * self.mean + (1.0 - self.momentum) * loss
        if self.last is None:
            self.last = self.mean
        elif abs(self.mean - self.last) > self.change * abs(self.last):
            factor = 1.0 + self.change if self.mean > self.last else 1.0 - self.change
            self.share = min(1.0, max(self.floor, self.share * factor))
            self.last = self.mean
        return self.share
