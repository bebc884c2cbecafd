"""A model against a reference: every pair judged in both orders, every verdict kept on disk the moment it is there."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from selectkd.evals.judging.judges import Judge
from selectkd.evals.judging.question import Choice, Comparison
from selectkd.evals.memory import Memory, key_of
from selectkd.evals.statistics import Interval, bootstrap_mean

LENGTH_RESAMPLES = 500
"""Each is a fit of its own: 500 give a 95% interval whose ends are good to about a tenth of its width."""
NEWTON_STEPS = 40
"""A dozen settle a fit; wins alone, which the ridge ends near sigma(11), take the most."""


@dataclass(frozen=True)
class Pair:
    """A request, the judged model's answer, and the reference's."""

    request: str
    answer: str
    reference: str

    @property
    def orders(self) -> tuple[Comparison, Comparison]:
        """The answer first, and the answer second."""
        return (
            Comparison(self.request, self.answer, self.reference),
            Comparison(self.request, self.reference, self.answer),
        )


@dataclass(frozen=True)
class Contest:
    """What a judge made of the pairs. score of a pair: 1 won in both orders, 0 lost in both, .5 where the orders
    disagree or either is a tie; 0 where either verdict is invalid, so that no answer wins by confusing a judge.

    win_rate: the mean score. length_controlled: what it would be at equal length (see ``at_equal_length``).
    """

    scores: list[float]
    win_rate: Interval
    length_controlled: Interval
    wins: int
    ties: int
    losses: int
    invalid: int
    asked: int


def contest(pairs: Sequence[Pair], judge: Judge, *, memory: Memory, seed: int = 0) -> Contest:
    """Judges every pair in both orders. What is in ``memory`` is not asked again, whatever ended the run that asked."""
    name, lock = judge.name, threading.Lock()
    todo = unasked(pairs, name, memory)
    wanted = list(todo)

    def heard(index: int, reply: str) -> None:
        key = wanted[index]
        with lock:
            memory.keep({key: todo[key].read(reply)}, judge=name, reply=reply)

    if wanted:
        judge.ask([todo[key].text for key in wanted], heard)
    verdicts: list[Choice] = [memory.known[key_of(name, one.text)] for pair in pairs for one in pair.orders]
    scored = [score(one, two) for one, two in zip(verdicts[::2], verdicts[1::2], strict=True)]
    scores = [0.0 if one is None else one for one in scored]
    apart = [len(pair.answer) - len(pair.reference) for pair in pairs]
    return Contest(
        scores=scores,
        win_rate=bootstrap_mean(scores, seed=seed),
        length_controlled=at_equal_length(scores, apart, seed=seed),
        wins=scored.count(1.0),
        ties=scored.count(0.5),
        losses=scored.count(0.0),
        invalid=scored.count(None),
        asked=len(wanted),
    )


def unasked(pairs: Sequence[Pair], judge: str, memory: Memory) -> dict[str, Comparison]:
    """The comparisons that ``memory`` holds no verdict of the judge on, by their keys; one that stands twice, once."""
    every = {key_of(judge, one.text): one for pair in pairs for one in pair.orders}
    return {key: one for key, one in every.items() if key not in memory.known}


def score(answer_first: Choice, answer_second: Choice) -> float | None:
    """The score of a pair from its verdicts in the two orders; None where either is invalid.

    >>> score("first", "second"), score("first", "first"), score("tie", "second"), score("first", "invalid")
    (1.0, 0.5, 0.5, None)
    """
    if "invalid" in (answer_first, answer_second):
        return None
    if (answer_first, answer_second) == ("first", "second"):
        return 1.0
    return 0.0 if (answer_first, answer_second) == ("second", "first") else 0.5


def at_equal_length(scores: Sequence[float], apart: Sequence[int], *, seed: int = 0) -> Interval:
    """The win rate of answers as long as the reference's: sigma(a) of the fit score = sigma(a + b tanh(d / sd(d))).

    d: the answer's characters minus the reference's. A weak ridge on b alone keeps it finite where lengths part wins
    from losses. The interval is a bootstrap over pairs. Source: Dubois et al., Length-controlled AlpacaEval (arXiv
    2404.04475), for one model.
    """
    won, lengths = np.asarray(scores, dtype=np.float64), np.asarray(apart, dtype=np.float64)
    if not len(won):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    spread = lengths.std()
    longer = np.tanh(lengths / spread) if spread else np.zeros_like(lengths)
    n = len(won)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=LENGTH_RESAMPLES)
    value, *drawn = _at_zero(won, longer, np.vstack([np.ones(n), counts])).tolist()
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(min(low, value)), float(max(high, value)), n)


def _at_zero(won: Any, longer: Any, counts: Any) -> Any:
    """sigma(a) of the fits won ~ sigma(a + b longer), each pair counted counts[r, i] times: [r], by Newton's method.

    Minimised: -sum log likelihood / n + b^2 / (2 n) + 1e-6 a^2.
    """
    n = counts.shape[1]
    a, b = np.zeros(len(counts)), np.zeros(len(counts))
    for _ in range(NEWTON_STEPS):
        p = expit(a[:, None] + b[:, None] * longer)  # [r, n]
        left, bend = counts * (p - won) / n, counts * p * (1 - p) / n
        slope_a, slope_b = left.sum(1) + 2e-6 * a, (left * longer).sum(1) + b / n
        aa, ab, bb = bend.sum(1) + 2e-6, (bend * longer).sum(1), (bend * longer**2).sum(1) + 1 / n
        whole = aa * bb - ab**2
        a = a - np.clip((bb * slope_a - ab * slope_b) / whole, -2, 2)
        b = b - np.clip((aa * slope_b - ab * slope_a) / whole, -2, 2)
    return expit(a)
