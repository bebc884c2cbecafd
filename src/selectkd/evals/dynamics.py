"""How a student came to agree: TAR on the fixed probe batch over a run, and what Theorem 1 says of it.

The theorem claims TAR[t+1] - TAR[t] >= eta kappa (1 - TAR[t]), eta the learning rate: log(1 - TAR) then falls at
least as fast as -kappa times the summed learning rate. It is local, and a student of too little capacity never reaches
TAR = 1; so kappa is fitted, given with its interval, and put beside what speaks against it: steps back, and flips.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from selectkd.errors import ConfigError, DataError
from selectkd.evals.statistics import LEVEL

FEWEST_LOOKS = 3
"""A line through two points has no error."""
MOST_CORRELATION = 0.9
"""Residuals correlated more than this are taken as this: beyond it, an interval would be a guess."""


@dataclass(frozen=True)
class Look:
    """One look at the probe batch: the summed learning rate until then, TAR, flips since the last look, held-out KL
    (nats a token, None without held-out text), and acceptance by place and by the teacher's entropy.
    """

    step: int
    learned: float
    tar: float
    lost: int
    won: int
    kl: float | None
    by_position: list[dict[str, Any]]
    by_entropy: list[dict[str, Any]]


@dataclass(frozen=True)
class Line:
    """log(1 - TAR) = intercept - kappa x, x the summed learning rate; the interval of kappa; rate: the fall a step.

    used: looks in the fit; correlation: of successive residuals, for which the interval is widened.
    """

    kappa: float
    low: float
    high: float
    intercept: float
    rate: float
    used: int
    correlation: float
    r_squared: float


@dataclass(frozen=True)
class Dynamics:
    """What ``selectkd dynamics`` reports. line: None with fewer than three looks below TAR 1.

    nondecreasing_share: of successive looks, how many had TAR at least as high as before. rank_correlation:
    Spearman's, of TAR and held-out KL over the looks (the paper's Figure 3a expects it near -1).
    """

    run: str
    looks: list[Look]
    line: Line | None
    nondecreasing_share: float
    lost: int
    won: int
    rank_correlation: float | None

    def as_dict(self) -> dict[str, Any]:
        """The contract's keys {kappa, kappa_low, kappa_high, nondecreasing_share, flips}, and all they rest on."""
        line = self.line
        return {
            "run": self.run,
            "kappa": None if line is None else line.kappa,
            "kappa_low": None if line is None else line.low,
            "kappa_high": None if line is None else line.high,
            "rate_per_step": None if line is None else line.rate,
            "nondecreasing_share": self.nondecreasing_share,
            "flips": self.lost + self.won,
            "flips_accepted_to_rejected": self.lost,
            "flips_rejected_to_accepted": self.won,
            "tar_against_heldout_kl_rank_correlation": self.rank_correlation,
            "fit": None if line is None else asdict(line),
            "looks": [asdict(look) for look in self.looks],
        }


def dynamics(run: str | os.PathLike[str]) -> Dynamics:
    """The dynamics of a run folder, from its metrics.jsonl. ConfigError where the run looked fewer than twice."""
    looks = read_looks(run)
    if len(looks) < 2:
        raise ConfigError(
            f"{run} looked at its probe batch {len(looks)} times. Train with training.evaluate_every (and "
            "data.evaluation) and training.probe_samples above 0; ten looks or more make a curve."
        )
    steps = list(itertools.pairwise(looks))
    with_kl = [look for look in looks if look.kl is not None]
    kl, tar = [look.kl for look in with_kl], [look.tar for look in with_kl]
    varied = len(with_kl) >= FEWEST_LOOKS and len(set(kl)) > 1 and len(set(tar)) > 1
    return Dynamics(
        run=str(run),
        looks=looks,
        line=fit(looks),
        nondecreasing_share=sum(after.tar >= before.tar for before, after in steps) / len(steps),
        lost=sum(look.lost for look in looks),
        won=sum(look.won for look in looks),
        rank_correlation=_spearman(tar, kl) if varied else None,
    )


def fit(looks: Sequence[Look], *, level: float = LEVEL) -> Line | None:
    """Least squares of log(1 - TAR) on the summed learning rate over the looks with TAR < 1; None with fewer than 3.

    The interval is Student's, its error widened by sqrt((1 + r) / (1 - r)) for residuals of lag-one correlation r > 0:
    successive looks at one student are not independent.
    """
    open_looks = [look for look in looks if look.tar < 1.0]
    x = np.array([look.learned for look in open_looks])
    if len(open_looks) < FEWEST_LOOKS or len(np.unique(x)) < 2:
        return None
    y = np.log1p(-np.array([look.tar for look in open_looks]))
    found: Any = stats.linregress(x, y)
    left = y - (found.intercept + found.slope * x)
    r = _lag_one(left)
    error = found.stderr * math.sqrt((1 + r) / (1 - r))
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 2)) * error
    steps = open_looks[-1].step - open_looks[0].step
    return Line(
        kappa=-float(found.slope),
        low=-float(found.slope) - half,
        high=-float(found.slope) + half,
        intercept=float(found.intercept),
        rate=-float(found.slope) * float(x[-1] - x[0]) / steps,
        used=len(x),
        correlation=r,
        r_squared=float(found.rvalue) ** 2,
    )


def read_looks(run: str | os.PathLike[str]) -> list[Look]:
    """Every look at the probe batch in a run's metrics.jsonl, in order of steps."""
    lines = _lines(Path(run))
    paced = [(line["step"], line["lr"]) for line in lines if line.get("lr") is not None]
    return [
        Look(
            step=line["step"],
            learned=_learned(paced, line["step"]),
            tar=line["probe_tar"],
            lost=line.get("probe_lost", 0),
            won=line.get("probe_won", 0),
            kl=(line.get("evaluation") or {}).get("kl"),
            by_position=line.get("probe_position", []),
            by_entropy=line.get("probe_entropy", []),
        )
        for line in lines
        if line.get("probe_tar") is not None
    ]


def _spearman(one: Sequence[Any], other: Sequence[Any]) -> float:
    found: Any = stats.spearmanr(one, other)
    return float(found.statistic)


def _learned(paced: Sequence[tuple[int, float]], step: int) -> float:
    """The learning rate summed over steps 1 .. step; steps not logged lie on a line between those that were."""
    if not paced or step == 0:
        return 0.0
    at, rate = zip(*paced, strict=True)
    return float(np.interp(np.arange(1, step + 1), at, rate).sum())


def _lag_one(left: NDArray[np.float64]) -> float:
    """The correlation of successive residuals, within [0, MOST_CORRELATION]; 0 where they are all rounding."""
    total = float((left**2).sum())
    if total < 1e-20 * len(left):
        return 0.0
    return min(max(float((left[1:] * left[:-1]).sum()) / total, 0.0), MOST_CORRELATION)


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder} has no metrics.jsonl, so it is no run folder. Name a run's output_dir.")
    lines = []
    content = path.read_text(encoding="utf-8")
    texts = content.splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(texts) and not content.endswith("\n"):
                break  # a run that is under way is writing it
            raise DataError(
                f"{path}:{number} is not JSON: {error}. A run writes one object a line."
            ) from error
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise DataError(f"{path}:{number} has no step. A run writes one object with a step a line.")
        lines.append(line)
    return lines
