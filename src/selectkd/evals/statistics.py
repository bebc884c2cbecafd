"""The statistics of every evaluation: bootstraps, Student's t, McNemar's exact test, Wilson's interval.

n units: problems, sequences, prompts; two models answer the same ones. scipy does the mathematics; what stands here
are the choices: percentile bootstraps, 95%, a seed. Everything is a pure function of its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from selectkd.errors import ConfigError

LEVEL = 0.95
RESAMPLES = 10_000
"""A percentile at 2.5% of 10,000 resamples rests on 250 of them: its own error is about 3% of the interval."""


@dataclass(frozen=True)
class Interval:
    """A value and the interval around it, in the value's units; low <= high, and both equal value where n says
    nothing.
    """

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Second minus first on the same units, its interval, and the two-sided p of no difference, in (0, 1]."""

    value: float
    low: float
    high: float
    p: float
    n: int


@dataclass(frozen=True)
class McNemar:
    """How often only the first and only the second was right, and the exact two-sided p that both are as good."""

    only_first: int
    only_second: int
    p: float


def wilson(successes: int, n: int, *, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a proportion successes / n, within [0, 1]; [0, 1] at n = 0.

    Unlike the normal interval it has a width at 0 of n and n of n, and holds its level for small n.
    Source: Wilson, JASA 22 (1927), by way of scipy.stats.binomtest.

    >>> seen = wilson(8, 10)
    >>> round(seen.low, 4), seen.value, round(seen.high, 4)
    (0.4902, 0.8, 0.9433)
    """
    if n == 0:
        return Interval(float("nan"), 0.0, 1.0, 0)
    if not 0 <= successes <= n:
        raise ConfigError(f"{successes} successes of {n}: give at most as many as there are trials.")
    found = stats.binomtest(successes, n).proportion_ci(confidence_level=level, method="wilson")
    return Interval(successes / n, float(found.low), float(found.high), n)


def score_interval(scores: ArrayLike, *, level: float = LEVEL, seed: int = 0) -> Interval:
    """The mean of [n] scores in [0, 1] and its interval: the bootstrap over the units, and where all scores are the
    same, which a bootstrap takes for certain, Wilson's score interval.

    Wilson's interval is a bound for such scores: their variance is at most mean (1 - mean), that of right and wrong.

    >>> seen = score_interval([1.0] * 10)
    >>> round(seen.low, 4), seen.value, seen.high
    (0.7225, 1.0, 1.0)
    """
    values = _vector(scores)
    if len(values) and (values.min() < 0.0 or values.max() > 1.0):
        raise ConfigError(f"scores from {values.min()} to {values.max()}: each must lie in [0, 1].")
    if len(values) == 0 or values.min() < values.max():
        return bootstrap_mean(values, level=level, seed=seed)
    n, mean = len(values), float(values[0])
    z2 = float(stats.norm.ppf((1 + level) / 2)) ** 2
    centre, reach = mean + z2 / (2 * n), float(np.sqrt(z2 * (mean * (1 - mean) / n + z2 / (4 * n * n))))
    low, high = (centre - reach) / (1 + z2 / n), (centre + reach) / (1 + z2 / n)
    return Interval(mean, min(mean, max(0.0, low)), max(mean, min(1.0, high)), n)


def bootstrap_mean(
    values: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of [n] values and its percentile bootstrap over the units.

    >>> bootstrap_mean([2.0, 2.0, 2.0])
    Interval(value=2.0, low=2.0, high=2.0, n=3)
    """
    values = _vector(values)
    return bootstrap_ratio(values, np.ones_like(values), level=level, resamples=resamples, seed=seed)


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """sum(numerator) / sum(denominator) and its percentile bootstrap, units drawn with both their numbers.

    For a rate per token over sequences of unequal length: the sequence is the unit, since tokens of one sequence
    are not independent. nan where the denominators sum to 0.

    >>> bootstrap_ratio([1.0, 3.0], [2.0, 6.0]).value
    0.5
    """
    top, below = _vector(numerator), _vector(denominator)
    if top.shape != below.shape:
        raise ConfigError(f"{len(top)} numerators and {len(below)} denominators: every unit needs both.")
    n = len(top)
    if n == 0 or not below.sum():
        return Interval(float("nan"), float("nan"), float("nan"), n)
    value = float(top.sum() / below.sum())
    drawn = _resampled((top, below), _ratio, resamples=resamples, seed=seed)
    low, high = _percentiles(drawn, level)
    return Interval(value, min(low, value), max(high, value), n)


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """mean(second - first) on the same n units, with the percentile bootstrap of the pairs; with weights [n], such as
    the tokens of each sequence, sum(weights (second - first)) / sum(weights).

    p is twice the smaller share of resamples on either side of 0, one added to count and total so that it is never 0.
    Source: Koehn, Statistical significance tests for machine translation evaluation, EMNLP 2004.

    >>> paired_bootstrap([0.0, 1.0], [0.0, 1.0])
    Difference(value=0.0, low=0.0, high=0.0, p=1.0, n=2)
    """
    one, two = _vector(first), _vector(second)
    if one.shape != two.shape:
        raise ConfigError(f"{len(one)} and {len(two)} answers: a paired comparison needs the same questions.")
    apart = two - one
    n = len(apart)
    if n == 0:
        return Difference(float("nan"), float("nan"), float("nan"), 1.0, 0)
    worth = np.ones_like(apart) if weights is None else _vector(weights)
    drawn = _resampled((worth * apart, worth), _ratio, resamples=resamples, seed=seed)
    low, high = _percentiles(drawn, level)
    value = float((worth * apart).sum() / worth.sum())
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (len(drawn) + 1))
    return Difference(value, min(low, value), max(high, value), p, n)


def t_interval(values: ArrayLike, *, level: float = LEVEL) -> Interval:
    """The mean of [n] values and Student's t interval of it; of one value, without end on both sides.

    For a few runs, where a bootstrap cannot draw enough different samples: 3 values make an interval 2.48 standard
    deviations to each side. It takes the values for normal.
    Source: Student, Biometrika 6 (1908), by way of scipy.stats.t.

    >>> found = t_interval([1.0, 2.0, 3.0])
    >>> round(found.low, 3), found.value, round(found.high, 3)
    (-0.484, 2.0, 4.484)
    """
    seen = _vector(values)
    n = len(seen)
    if n < 2:
        return Interval(float(seen.mean()) if n else float("nan"), -float("inf"), float("inf"), n)
    reach = float(stats.t.ppf((1 + level) / 2, n - 1) * seen.std(ddof=1) / np.sqrt(n))
    value = float(seen.mean())
    return Interval(value, value - reach, value + reach, n)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's exact test on right or wrong of two models: of the units they differ on, half should be the second's.

    p is the two-sided binomial probability, 1 where they never differ.
    Source: McNemar, Psychometrika 12 (1947); exact form, by way of scipy.stats.binomtest.

    >>> mcnemar([True] * 5, [False] * 5)
    McNemar(only_first=5, only_second=0, p=0.0625)
    """
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one.shape != two.shape:
        raise ConfigError(f"{len(one)} and {len(two)} answers: a paired comparison needs the same questions.")
    only_first, only_second = int((one & ~two).sum()), int((two & ~one).sum())
    apart = only_first + only_second
    p = float(stats.binomtest(only_second, apart).pvalue) if apart else 1.0
    return McNemar(only_first, only_second, p)


def _resampled(
    units: tuple[NDArray[np.float64], ...], statistic: Any, *, resamples: int, seed: int
) -> NDArray[np.float64]:
    """The statistic of ``resamples`` resamples of the units; of one unit, the same value each time."""
    n = len(units[0])
    if n == 1:
        return np.full(resamples, statistic(*units, axis=-1))
    found = stats.bootstrap(
        units,
        statistic,
        paired=len(units) > 1,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // n),  # at most 16 MB of drawn numbers at a time
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return np.asarray(found.bootstrap_distribution)


def _percentiles(drawn: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _mean(values: NDArray[np.float64], axis: int) -> Any:
    return values.mean(axis=axis)


def _ratio(top: NDArray[np.float64], below: NDArray[np.float64], axis: int) -> Any:
    # a resample without any denominator says nothing: it repeats the whole sample's ratio of 0 / tiny = 0
    return top.sum(axis=axis) / np.maximum(below.sum(axis=axis), np.finfo(np.float64).tiny)


def _vector(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ConfigError(f"a statistic of {array.ndim} axes: give one number for each unit.")
    return array
