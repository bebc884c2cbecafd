"""Selectors and schedules against fp64 programs written from the papers' formulas, a loop over rows and tokens each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from selectkd.config import recipe_from
from selectkd.objective.objective import Objective
from selectkd.objective.pair import dense_pair
from selectkd.objective.schedules import TaidSchedule
from selectkd.objective.selectors import SELECTORS
from selectkd.rollouts.streams import losses_of, streams_of

N, V = 37, 23
Rows = NDArray[np.float64]


def probabilities(seed: int) -> Rows:
    z = np.random.default_rng(seed).normal(scale=1.5, size=(N, V))
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


P, Q, R = (probabilities(seed) for seed in (1, 2, 3))
LABEL = np.random.default_rng(4).integers(V, size=N)


def kl(a: Rows, b: Rows) -> Rows:
    return np.array(
        [sum(x * math.log(x / y) for x, y in zip(*rows, strict=True)) for rows in zip(a, b, strict=True)]
    )


def entropy(a: Rows) -> Rows:
    return np.array([-sum(x * math.log(x) for x in row) for row in a])


def scaled(score: Rows) -> Rows:
    return (score - score.min()) / (score.max() - score.min())


def clipped(score: Rows) -> Rows:
    return scaled(np.clip(score, *np.quantile(score, [0.05, 0.95])))


def mass_on_the_students_best() -> Rows:
    return np.array(
        [sum(p[v] for v in sorted(range(V), key=lambda v: -q[v])[:16]) for p, q in zip(P, Q, strict=True)]
    )


SCORES: dict[str, tuple[float, Callable[[], Rows]]] = {
    "se_kd": (0.2, lambda: entropy(Q)),
    "tip": (0.5, lambda: 1 - (1 - scaled(entropy(Q))) * (1 - scaled(kl(P, Q)))),
    "teachability": (0.05, lambda: clipped(kl(P, Q)) * clipped(mass_on_the_students_best())),
    "adaspec": (0.4, lambda: kl(P, Q) - kl(P, R)),
    "atkd": (0.5, lambda: 1 - P[np.arange(N), LABEL]),
    "adakd": (0.5, lambda: np.sqrt(((np.sqrt(P) - np.sqrt(Q)) ** 2).sum(-1) / 2)),
    "rho_1": (0.6, lambda: -np.log(Q[np.arange(N), LABEL]) + np.log(R[np.arange(N), LABEL])),
}
"""Selector -> its paper's share, and the score by which the rows are ranked."""


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_a_selector_keeps_the_rows_its_paper_would(name: str) -> None:
    share, score = SCORES[name]
    wanted = set(np.argsort(-score(), kind="stable")[: math.ceil(share * N)].tolist())
    p, q, r = (torch.from_numpy(a).log() for a in (P, Q, R))
    pair = replace(dense_pair(p, q), label=torch.from_numpy(LABEL), logr=r)
    kept = SELECTORS[name]()(pair, torch.empty(N, 0))
    assert set(kept.nonzero()[:, 0].tolist()) == wanted


def test_taids_t_is_its_algorithms() -> None:
    """t' = min(end, max(linear, t + rate sigmoid(m) (1 - t))), m <- .99 m + .01 (relative fall), from the paper."""
    losses = np.random.default_rng(0).uniform(0.5, 2.0, size=40)
    schedule = TaidSchedule(steps=60, rate=0.05)
    t, m, last = 0.4, 0.0, None
    above = 0
    for step, loss in enumerate(losses, start=1):
        if last is not None:
            m = 0.99 * m + 0.01 * (last - loss) / last
            t = t + 0.05 * (1 - t) / (1 + math.exp(-m))
        linear = 0.4 + 0.6 * step / 60
        above += t > linear
        t, last = min(1.0, max(t, linear)), loss
        assert schedule.update(step, float(loss)) == pytest.approx(t, abs=1e-12)
    assert 0 < above < len(losses)  # both branches of the maximum were taken


@pytest.mark.parametrize("step", [0, 1, 25, 50, 99])
def test_distillm2s_gradual_weights_are_its_formula(step: int) -> None:
    """b = 1 + .5 min(1, 2 step / steps): the student's half has weight b, the teacher's 2 - b."""
    recipe = recipe_from(
        {
            "method": {"name": "distillm2", "gradual": True},
            "teacher": {"model": "t"},
            "student": {"model": "s"},
            "data": {"sources": [{"path": "x", "name": "a"}]},
            "training": {"output_dir": "o", "max_steps": 100, "batch_size": 1},
        }
    )
    streams = streams_of(["a"], recipe.data.policies)
    run = Objective("forward_kl", "always", beta=1.0)
    teacher, student = (spec.at(run, step, 100).weight for spec in losses_of(recipe, streams))
    b = 1 + 0.5 * min(1.0, 2 * step / 100)
    assert (teacher, student) == pytest.approx((2 - b, b), abs=1e-12)


def test_teachability_does_not_let_one_huge_divergence_decide() -> None:
    d, m = torch.linspace(0.0, 1.0, 100).double(), torch.linspace(0.0, 1.0, 100).double()
    d[0], m[0] = 1e3, 0.6  # far above the rest, of no great mass
    kept = SELECTORS["teachability"](share=0.05).keep(torch.stack([d, m], -1), torch.zeros(100).long())
    assert kept.nonzero()[:, 0].tolist() == [95, 96, 97, 98, 99]
