"""Whether rows can be the K best tokens of a teacher: a server's, or those of a file whose checksums are right.

n rows, K best tokens, v tokens of the whole vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-3
"""How far a probability or a sum of them may be above 1: far more than fp32 rounds, far less than a fault moves."""

SHORT = 1e-2
"""How far a row may stay below a mass of 1: bf16 rounds a likely token by about half a percent."""


def unsound(
    ids: NDArray[np.int64],
    logp: NDArray[np.floating],
    *,
    vocabulary: int,
    width: int | None = None,
    slack: NDArray[np.floating] | float = 0.0,
) -> tuple[int, str] | None:
    """(the first row that no teacher gives, what is wrong with it); None where all are sound.

    A sound row has K distinct ids below ``vocabulary``, log-probabilities [n, K] that are numbers up to 0, and a mass
    that is 1 together with the tokens it leaves out: each of those is at most as likely as the least of the K, and
    ``width`` - K of them is all there are (width: rows of the teacher's head, by default the vocabulary). So a row
    that a constant was added to is seen where the mass goes above 1, or stays further below it than the others can
    fill. slack [n]: nats by which rounding may have lowered a row.

    >>> half = np.log([[0.5, 0.25]])
    >>> unsound(np.array([[0, 1]]), half, vocabulary=4), unsound(np.array([[0, 0]]), half, vocabulary=4)
    (None, (0, 'has the id 0 twice'))
    """
    n, k = ids.shape
    if n == 0:
        return None
    width = vocabulary if width is None else max(width, vocabulary)
    values = logp.astype(np.float64)
    order = np.sort(ids, 1)
    outside = (order[:, 0] < 0) | (order[:, -1] >= vocabulary)
    twice = (order[:, 1:] == order[:, :-1]).any(1)
    strange = np.isnan(values).any(1) | (values == np.inf).any(1)
    highest = np.where(strange, -np.inf, values.max(1))
    with np.errstate(over="ignore", invalid="ignore"):
        mass = np.exp(values).sum(1)
        others = (width - k) * np.exp(values.min(1))
        least = (mass + others) * np.exp(slack)
    checks = (
        (outside, lambda i: f"has the id {_worst(order[i], vocabulary)}, none of the {vocabulary} of the vocabulary"),
        (twice, lambda i: f"has the id {_repeated(order[i])} twice"),
        (strange, lambda i: "has a log-probability that is not finite"),
        (highest > ROUNDING, lambda i: f"has a log-probability of {highest[i]:.4g}, above 0"),
        (mass > 1 + ROUNDING, lambda i: f"has probabilities that sum to {mass[i]:.4g}"),
        (
            least < 1 - SHORT,
            lambda i: f"has a mass of {mass[i]:.4g}, and the other {width - k} tokens can have {others[i]:.4g} at most",
        ),
    )  # fmt: skip
    for wrong, describe in checks:
        if wrong.any():
            first = int(np.argmax(wrong))
            return first, describe(first)
    return None


def _worst(order: NDArray[np.int64], vocabulary: int) -> int:
    return int(order[-1] if order[-1] >= vocabulary else order[0])


def _repeated(order: NDArray[np.int64]) -> int:
    return int(order[1:][order[1:] == order[:-1]][0])
