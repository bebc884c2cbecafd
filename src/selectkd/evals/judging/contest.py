"""A model against a reference: every pair judged in both orders, every verdict kept on disk the moment it is there."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import expit

from selectkd.errors import TeacherError
from selectkd.evals.judging.judges import Judge
from selectkd.evals.judging.question import Choice, Comparison
from selectkd.evals.memory import Memory, key_of
from selectkd.evals.statistics import Interval, score_interval

MOST_INVALID = 0.1
"""The share of verdicts that may be unreadable: beyond it a win rate of the rest is none of the model's."""
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
    """What a judge made of the pairs. score of a pair: the mean of its two orders, 1 a win, .5 a tie, 0 a loss in each;
    None where either verdict is invalid. wins, ties and losses: scores above, at and below .5.

    win_rate: the mean of the scores there are. length_controlled: what it would be at equal length (see
    ``at_equal_length``). invalid: pairs without a score. asked: questions the judge was asked this time.
    """

    scores: list[float | None]
    win_rate: Interval
    length_controlled: Interval
    wins: int
    ties: int
    losses: int
    invalid: int
    asked: int


def contest(pairs: Sequence[Pair], judge: Judge, *, memory: Memory, seed: int = 0) -> Contest:
    """Judges every pair in both orders. What is in ``memory`` is not asked again, whatever ended the run that asked; an
    invalid verdict is never in it.

    Raises TeacherError where more than MOST_INVALID of the verdicts are invalid: a rate of the rest says too little.
    """
    name, lock = judge.name, threading.Lock()
    todo = unasked(pairs, name, memory)
    wanted = list(todo)
    unread: dict[str, str] = {}  # the replies without a verdict

    def on_reply(index: int, reply: str) -> None:
        key = wanted[index]
        verdict = todo[key].read(reply)
        with lock:
            if verdict == "invalid":
                unread[key] = reply
            else:
                memory.keep({key: verdict}, judge=name, reply=reply)

    if wanted:
        judge.ask([todo[key].text for key in wanted], on_reply)
    keys = [key_of(name, one.text) for pair in pairs for one in pair.orders]
    _check_invalid(name, [unread[key] for key in keys if key in unread], len(keys))
    verdicts: list[Choice] = ["invalid" if key in unread else memory.known[key] for key in keys]
    scores = [score(one, two) for one, two in zip(verdicts[::2], verdicts[1::2], strict=True)]
    scored = [(one, pair) for one, pair in zip(scores, pairs, strict=True) if one is not None]
    known = [one for one, _ in scored]
    return Contest(
        scores=scores,
        win_rate=score_interval(known, seed=seed),
        length_controlled=at_equal_length(
            known, [len(pair.answer) - len(pair.reference) for _, pair in scored], seed=seed
        ),
        wins=sum(one > 0.5 for one in known),
        ties=known.count(0.5),
        losses=sum(one < 0.5 for one in known),
        invalid=scores.count(None),
        asked=len(wanted),
    )


def _check_invalid(judge: str, unread: Sequence[str], asked: int) -> None:
    """TeacherError where too many replies hold no verdict."""
    if len(unread) > MOST_INVALID * asked:
        raise TeacherError(
            f"the judge {judge} gave no readable verdict on {len(unread)} of {asked} questions, one of them ending in "
            f"{unread[0][-60:]!r}. Its readable verdicts are kept; give it room with --judge-tokens, or name another."
        )


def unasked(pairs: Sequence[Pair], judge: str, memory: Memory) -> dict[str, Comparison]:
    """The comparisons that ``memory`` holds no verdict of the judge on, by their keys; one that stands twice, once."""
    every = {key_of(judge, one.text): one for pair in pairs for one in pair.orders}
    return {key: one for key, one in every.items() if key not in memory.known}


def score(answer_first: Choice, answer_second: Choice) -> float | None:
    """The score of a pair, the mean of its verdicts in the two orders; None where either is invalid.

    >>> score("first", "second"), score("first", "first"), score("tie", "second"), score("first", "invalid")
    (1.0, 0.5, 0.75, None)
    """
    if "invalid" in (answer_first, answer_second):
        return None
    worth = {"first": 1.0, "tie": 0.5, "second": 0.0}
    return (worth[answer_first] + 1.0 - worth[answer_second]) / 2


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
    if won.min() == won.max():
        return replace(score_interval(scores), value=value)
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
