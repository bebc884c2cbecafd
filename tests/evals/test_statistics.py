"""Intervals and tests against closed forms, and the share of intervals that hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import comb

from selectkd.errors import ConfigError
from selectkd.evals.statistics import bootstrap_mean, bootstrap_ratio, mcnemar, paired_bootstrap, wilson


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (164, 164), (1, 1), (60, 164)])
def test_wilson_solves_its_own_equation(k: int, n: int) -> None:
    seen, z = wilson(k, n), 1.959963984540054
    for bound in (seen.low, seen.high):  # |p_hat - p| = z sqrt(p (1 - p) / n) at both ends
        assert abs(k / n - bound) == pytest.approx(z * math.sqrt(max(bound * (1 - bound), 0) / n), abs=1e-12)
    assert 0 <= seen.low <= seen.value <= seen.high <= 1


def test_wilson_of_nothing_knows_nothing() -> None:
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)
    with pytest.raises(ConfigError, match="5 successes of 3"):
        wilson(5, 3)


def test_wilson_holds_the_truth_at_its_level() -> None:
    n, p = 30, 0.2
    chance = [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    held = sum(c for k, c in enumerate(chance) if wilson(k, n).low <= p <= wilson(k, n).high)
    assert 0.93 <= held <= 0.98  # exact sum over all outcomes; the score interval swings about .95


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 0), (0, 5), (3, 9), (7, 7), (1, 20)])
def test_mcnemar_is_the_binomial_tail_doubled(b: int, c: int) -> None:
    first = [True] * b + [False] * c + [True] * 4 + [False] * 2
    second = [False] * b + [True] * c + [True] * 4 + [False] * 2
    n = b + c
    expected = min(1.0, 2 * sum(comb(n, i, exact=True) for i in range(min(b, c) + 1)) / 2**n) if n else 1.0
    seen = mcnemar(first, second)
    assert (seen.only_first, seen.only_second) == (b, c)
    assert seen.p == pytest.approx(expected, abs=1e-12)


def test_a_bootstrap_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    seen = bootstrap_mean(values)
    half = 1.96 * values.std() / math.sqrt(400)  # what the resamples' spread tends to
    assert seen.value == pytest.approx(values.mean(), abs=1e-12)
    assert seen.high - seen.low == pytest.approx(2 * half, rel=0.05)  # 10,000 resamples: 3% of its own error


def test_a_bootstrap_holds_the_truth_at_its_level() -> None:
    rng = np.random.default_rng(1)
    trials = 400
    held = sum(
        one.low <= 1.0 <= one.high
        for one in (bootstrap_mean(rng.exponential(1.0, 50), resamples=600, seed=i) for i in range(trials))
    )
    # a percentile interval of 50 skewed values covers about 93%; 4 sigma of 400 trials is 5%
    assert 0.88 <= held / trials <= 0.98


def test_paired_bootstrap_holds_the_difference_and_gains_from_pairing() -> None:
    rng = np.random.default_rng(2)
    trials, held, narrower = 300, 0, 0
    for i in range(trials):
        hard = rng.normal(0, 3, 60)
        first, second = hard + rng.normal(0, 0.5, 60), hard + 0.3 + rng.normal(0, 0.5, 60)
        seen = paired_bootstrap(first, second, resamples=600, seed=i)
        alone = bootstrap_mean(second, resamples=600, seed=i)
        held += seen.low <= 0.3 <= seen.high
        narrower += seen.high - seen.low < alone.high - alone.low
    assert 0.89 <= held / trials <= 0.99  # 4 sigma of 300 trials is 5%
    assert narrower == trials


def test_p_of_no_difference_is_uniform_where_there_is_none() -> None:
    rng = np.random.default_rng(3)
    ps = [
        paired_bootstrap(*rng.normal(0, 1, (2, 80)), resamples=400, seed=i).p for i in range(300)
    ]  # fmt: skip
    assert np.mean(np.array(ps) <= 0.05) <= 0.11  # 5% + 4 sigma of 300 trials + the bootstrap's own excess
    assert np.mean(ps) == pytest.approx(0.5, abs=0.09)


def test_a_ratio_weighs_units_by_their_length() -> None:
    seen = bootstrap_ratio([1.0, 9.0, 2.0], [1.0, 9.0, 10.0])
    assert seen.value == pytest.approx(12 / 20) and seen.low < seen.value < seen.high
    same = bootstrap_ratio([2.0, 4.0], [1.0, 2.0])
    assert (same.low, same.high) == (2.0, 2.0)
    assert math.isnan(bootstrap_ratio([0.0], [0.0]).value)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(4).random(30)
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=5) != bootstrap_mean(values, seed=6)


def test_unequal_lengths_are_refused() -> None:
    for call in (paired_bootstrap, bootstrap_ratio, mcnemar):
        with pytest.raises(ConfigError):
            call([True, False], [True])


def test_one_unit_and_none_have_no_width() -> None:
    assert bootstrap_mean([0.25]).high == 0.25
    assert math.isnan(bootstrap_mean([]).value)
    assert paired_bootstrap([], []).n == 0 and paired_bootstrap([1.0], [0.0]).value == -1.0
