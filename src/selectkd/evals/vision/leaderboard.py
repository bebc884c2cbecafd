"""The average of the Open VLM Leaderboard over its eight benchmarks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from selectkd.evals.run_suite import Scores
from selectkd.evals.statistics import Interval
from selectkd.evals.vision.benchmarks import BENCHMARKS


def task_values(rows: Sequence[Scores]) -> dict[str, Interval]:
    """The one value of each benchmark, in [0, 1]: its metric, or the mean of its metrics (HallusionBench's three).

    The interval of such a mean takes the metrics for fully dependent, so it is at least as wide as it must be.
    """
    found = {}
    for task in BENCHMARKS:
        seen = [one.interval for one in rows if one.task == task]
        if seen:
            value, low, high = (
                sum(values) / len(seen)
                for values in zip(*((one.value, one.low, one.high) for one in seen), strict=True)
            )
            found[task] = Interval(value, low, high, max(one.n for one in seen))
    return found


def leaderboard_average(values: Mapping[str, Interval]) -> Interval | None:
    """The plain mean of the eight benchmarks, each from 0 to 1; None unless all eight are there, as the leaderboard.

    The leaderboard divides OCRBench's 1,000 points by 10, so that every benchmark ends at 100. HallusionBench counts as
    the mean of aAcc, fAcc and qAcc. The interval adds the distances to the benchmarks' limits as independent errors.
    Source: the leaderboard's ``generate_table`` and its ``DEFAULT_BENCH``; Zou and Donner, Statistics in Medicine 27
    (2008), for the interval.

    >>> one = Interval(0.5, 0.4, 0.6, 100)
    >>> leaderboard_average({"mmstar": one}) is None
    True
    >>> seen = leaderboard_average({name: one for name in BENCHMARKS})
    >>> seen.value, round(seen.low, 4), round(seen.high, 4)
    (0.5, 0.4646, 0.5354)
    """
    if set(values) != set(BENCHMARKS):
        return None
    every, count = list(values.values()), len(values)
    value = sum(one.value for one in every) / count
    below = math.sqrt(sum((one.value - one.low) ** 2 for one in every)) / count
    above = math.sqrt(sum((one.high - one.value) ** 2 for one in every)) / count
    return Interval(value, value - below, value + above, sum(one.n for one in every))


def average_row(name: str, rows: Sequence[Scores], settings: dict[str, Any]) -> dict[str, Any] | None:
    """The row of the average; None unless all eight benchmarks are there."""
    seen = leaderboard_average(task_values(rows))
    if seen is None:
        return None
    return {
        "model": name, "task": "average", "metric": "leaderboard", "value": seen.value, "low": seen.low,
        "high": seen.high, "n": seen.n, "settings": {**settings, "tasks": list(BENCHMARKS)},
    }  # fmt: skip
