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
from scipy.optimize import brentq

from selectkd.errors import ConfigError, DataError
from selectkd.evals.statistics import LEVEL

FEWEST_LOOKS = 3
"""A line through two points has no error."""
CORRELATIONS = np.linspace(0.0, 0.98, 50)
"""Correlations of successive residuals that the interval is averaged over; at 1 there is no line."""


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

    used: looks in the fit; correlation: of successive residuals, the mean of what the looks leave possible.
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
class Claim:
    """Theorem 1 between two successive looks: gain = TAR after - TAR before, bound = kappa (1 - TAR before) times the
    learning rate summed between them, kappa as fitted to the whole run.

    holds: gain >= bound. largest: the kappa at which it would just hold, None at TAR 1 or without learning rate.
    """

    start: int
    end: int
    gain: float
    bound: float
    holds: bool
    largest: float | None


@dataclass(frozen=True)
class Dynamics:
    """What ``selectkd study dynamics`` reports. line: None with fewer than three looks below TAR 1; then there are no
    claims.

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
    claims: list[Claim]

    @property
    def claim_share(self) -> float | None:
        """Of the steps between looks, how many satisfy Theorem 1's inequality at the fitted kappa."""
        return sum(claim.holds for claim in self.claims) / len(self.claims) if self.claims else None

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
            "theorem_1_share": self.claim_share,
            "theorem_1": [asdict(claim) for claim in self.claims],
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
    line = fit(looks)
    return Dynamics(
        run=str(run),
        looks=looks,
        line=line,
        claims=[] if line is None else [claim(before, after, line.kappa) for before, after in steps],
        nondecreasing_share=sum(after.tar >= before.tar for before, after in steps) / len(steps),
        lost=sum(look.lost for look in looks),
        won=sum(look.won for look in looks),
        rank_correlation=_spearman(tar, kl) if varied else None,
    )


def fit(looks: Sequence[Look], *, level: float = LEVEL) -> Line | None:
    """A line through log(1 - TAR) over the summed learning rate, of the looks with TAR < 1; None with fewer than 3.

    Successive looks at one student are not independent: residuals are taken to be autoregressive, each r times the one
    before plus noise. For every r in CORRELATIONS the line is that of generalised least squares, Student's t about it;
    they are averaged by the restricted likelihood of r, and kappa and its interval are the mean's and its quantiles.
    """
    open_looks = [look for look in looks if look.tar < 1.0]
    x = np.array([look.learned for look in open_looks])
    if len(open_looks) < FEWEST_LOOKS or len(np.unique(x)) < 2:
        return None
    y = np.log1p(-np.array([look.tar for look in open_looks]))
    fits = autoregressive(x, y)
    weight, slope = fits[:, 0], float(fits[:, 0] @ fits[:, 2])
    low, high = (_quantile(fits, len(x) - 2, share) for share in ((1 - level) / 2, (1 + level) / 2))
    steps = open_looks[-1].step - open_looks[0].step
    return Line(
        kappa=-slope,
        low=-high,
        high=-low,
        intercept=float(weight @ fits[:, 1]),
        rate=-slope * float(x[-1] - x[0]) / steps,
        used=len(x),
        correlation=float(weight @ CORRELATIONS),
        r_squared=float(np.corrcoef(x, y)[0, 1]) ** 2 if np.ptp(y) > 0 else 1.0,
    )


def autoregressive(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """(weight, intercept, slope, its standard error) of the line for each r in CORRELATIONS; weights sum to 1.

    The weight is the restricted likelihood times the reference prior 1 / sqrt(1 - r^2).
    """
    n, rows = len(x), []
    scale = max(float(np.abs(x).max()), 1e-300)
    design = np.stack([np.ones(n), x / scale], 1)
    for r in CORRELATIONS:
        # each row minus r times the one before: independent noise, of the same size in the first
        first = math.sqrt(1 - r * r)
        a = np.concatenate([first * design[:1], design[1:] - r * design[:-1]])
        b = np.concatenate([first * y[:1], y[1:] - r * y[:-1]])
        information = a.T @ a
        line = np.linalg.solve(information, a.T @ b)
        left = max(float(((b - a @ line) ** 2).sum()), 1e-24)
        error = math.sqrt(left / (n - 2) * np.linalg.inv(information)[1, 1])
        log_weight = -0.5 * np.linalg.slogdet(information)[1] - (n - 2) / 2 * math.log(left)
        rows.append((log_weight, line[0], line[1] / scale, error / scale))
    found = np.array(rows)
    found[:, 0] = np.exp(found[:, 0] - found[:, 0].max())
    found[:, 0] /= found[:, 0].sum()
    return found


def _quantile(fits: NDArray[np.float64], freedom: int, share: float) -> float:
    """Where the mixture of Student's t about the slopes has so much below it."""
    weight, _, slope, error = fits.T
    ends = slope + stats.t.ppf(share, freedom) * error
    low, high = float(ends.min()), float(ends.max())
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        return low
    below: Any = lambda at: float(weight @ stats.t.cdf((at - slope) / error, freedom)) - share  # noqa: E731
    found: Any = brentq(below, low, high)
    return float(found)


def claim(before: Look, after: Look, kappa: float) -> Claim:
    """What the theorem says of two successive looks."""
    gain, learned = after.tar - before.tar, after.learned - before.learned
    room = learned * (1.0 - before.tar)
    return Claim(
        before.step, after.step, gain, kappa * room, gain >= kappa * room, gain / room if room > 0 else None
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
