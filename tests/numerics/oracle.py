"""Every divergence in 60 digits, value and gradient: what each way through the loss must give in fp64.

The value is the formula of its paper, written out token by token; the gradient to the student's logits is a central
difference of that value, so it shares no derivation with the package. p teacher, q student, v outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mpmath import mp, mpf

mp.dps = 60
STEP = mpf(10) ** -25
"""Of the central difference: its error is of the order of STEP^2, far below fp64."""
FLOOR = mpf(-87)
"""The logarithm of an outcome that a bias of -inf forbids."""

Numbers = list[Any]


def log_softmax(z: Sequence[Any]) -> Numbers:
    """Logits of None are impossible: probability 0, and so no part of the sum."""
    top = max(one for one in z if one is not None)
    log_sum = mp.log(mp.fsum(mp.exp(one - top) for one in z if one is not None)) + top
    return [None if one is None else one - log_sum for one in z]


def prob(log: Any) -> Any:
    return mpf(0) if log is None else mp.exp(log)


def floored(logs: Numbers) -> Numbers:
    return [FLOOR if one is None else one for one in logs]


def kl(p: Numbers, q: Numbers) -> Any:
    """sum p log(p / q) of log-probabilities, impossible ones at FLOOR and of probability e^FLOOR."""
    return mp.fsum(mp.exp(a) * (a - b) for a, b in zip(floored(p), floored(q), strict=True))


def mixed(p: Numbers, q: Numbers, share: Any) -> Numbers:
    return [
        mp.log(share * mp.exp(a) + (1 - share) * mp.exp(b))
        for a, b in zip(floored(p), floored(q), strict=True)
    ]


def overlap(p: Numbers, q: Numbers) -> Any:
    return mp.fsum(min(prob(a), prob(b)) for a, b in zip(p, q, strict=True))


def total_variation(p: Numbers, q: Numbers, frozen: Numbers) -> Any:
    return mp.fsum(abs(prob(a) - prob(b)) for a, b in zip(p, q, strict=True)) / 2


def alpha_beta(p: Numbers, q: Numbers, frozen: Numbers) -> Any:
    a, b = mpf(0.2), mpf(0.7)
    return -mp.fsum(
        mp.exp(a * x + b * y) - (a * mp.exp((a + b) * x) + b * mp.exp((a + b) * y)) / (a + b)
        for x, y in zip(floored(p), floored(q), strict=True)
    ) / (a * b)


def adaptive_kl(p: Numbers, q: Numbers, frozen: Numbers) -> Any:
    """The head is the teacher's best tokens while their mass stays at or below .5, its best one always."""
    order = sorted(range(len(p)), key=lambda i: -prob(p[i]))
    gaps, mass = [abs(prob(a) - prob(b)) for a, b in zip(p, frozen, strict=True)], mpf(0)
    head = []
    for place, i in enumerate(order):
        mass += prob(p[i])
        if place == 0 or mass <= mpf(1) / 2:
            head.append(i)
    share = mp.fsum(gaps[i] for i in head) / mp.fsum(gaps)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def todi(p: Numbers, q: Numbers, frozen: Numbers) -> Any:
    total = []
    for a, b, at in zip(floored(p), floored(q), floored(frozen), strict=True):
        w = 1 / (1 + mp.exp(at - a))
        total.append(w * mp.exp(a) * (a - b) + (1 - w) * mp.exp(b) * (b - a))
    return mp.fsum(total)


def taid(p: Numbers, q: Numbers, frozen: Numbers) -> Any:
    t = mpf(0.4)
    blend = [
        None if a is None and b is None else (1 - t) * y + t * x
        for a, b, x, y in zip(p, frozen, floored(p), floored(frozen), strict=True)
    ]
    return kl(log_softmax(blend), q)


def kl_tv_hybrid(p: Numbers, q: Numbers, frozen: Numbers) -> Any:
    share = mp.exp(-3 * overlap(p, frozen))
    return share * kl(p, q) + (1 - share) * total_variation(p, q, frozen)


def uld(p: Numbers, q: Numbers, frozen: Numbers) -> Any:
    sides = [sorted((prob(one) for one in side), reverse=True) for side in (p, q)]
    return mp.fsum(abs(a - b) for a, b in zip(*sides, strict=True))


def entropy(p: Numbers) -> Any:
    return -mp.fsum(mp.exp(one) * one for one in p if one is not None)


def router(p: Numbers, q: Numbers, frozen: Numbers) -> Any:
    """Reverse KL where the teacher is sure, forward KL elsewhere."""
    return kl(q, p) if entropy(p) <= mpf(0.8) else kl(p, q)


def token_temperature(p: Numbers, q: Numbers, frozen: Numbers) -> Any:
    gaps = mp.fsum((mp.sqrt(prob(a)) - mp.sqrt(prob(b))) ** 2 for a, b in zip(p, frozen, strict=True))
    ratio = gaps / 2 / mpf(0.3) ** 2
    t = mp.exp(-mpf(0.5) * (ratio - 1) / (ratio + 1))
    hot = [log_softmax([None if one is None else one / t for one in side]) for side in (p, q)]
    return t**2 * kl(*hot)


A = mpf(0.1)  # the fp64 number that the package computes with
VALUES: dict[str, Callable[[Numbers, Numbers, Numbers], Any]] = {
    "forward_kl": lambda p, q, _: kl(p, q),
    "reverse_kl": lambda p, q, _: kl(q, p),
    "jeffreys": lambda p, q, _: (kl(p, q) + kl(q, p)) / 2,
    "skew_kl": lambda p, q, _: kl(p, mixed(p, q, A)),
    "skew_reverse_kl": lambda p, q, _: kl(q, mixed(q, p, A)),
    "generalized_jsd": lambda p, q, _: (kl(p, mixed(p, q, mpf(1) / 2)) + kl(q, mixed(p, q, mpf(1) / 2))) / 2,
    "total_variation": total_variation,
    "alpha_beta": alpha_beta,
    "adaptive_kl": adaptive_kl,
    "todi": todi,
    "taid": taid,
    "neg_log_acceptance": lambda p, q, _: -mp.log(overlap(p, q)),
    "kl_tv_hybrid": kl_tv_hybrid,
    "uld": uld,
    "router": router,
    "token_temperature": token_temperature,
}
"""name -> (log p, log q, log q without a gradient) -> D, at the registry's default parameters."""


def value_and_gradient(
    name: str, zp: Sequence[float], zq: Sequence[float], *, dead: Sequence[int] = (), merge: int | None = None
) -> tuple[Any, Numbers]:
    """D and dD / dzq. dead: ids of neither model, of which nothing may show; -inf is what one model alone forbids.

    merge: on the teacher's first ``merge`` ids and, as one, all others.
    """
    alive = [i for i in range(len(zp)) if i not in set(dead)]
    ours, theirs = ([None if z[i] == -float("inf") else mpf(z[i]) for i in alive] for z in (zq, zp))

    def seen(z: Numbers) -> Numbers:
        logs = log_softmax(z)
        if merge is None:
            return logs
        rest = mp.fsum(prob(one) for one in logs[merge:])
        return [*logs[:merge], mp.log(rest) if rest else None]

    p, frozen, divergence = seen(theirs), seen(ours), VALUES[name]
    gradient = [mpf(0)] * len(zp)
    for place, i in enumerate(alive):
        if ours[place] is None:
            continue
        sides = []
        for step in (STEP, -STEP):
            moved = [*ours]
            moved[place] += step
            sides.append(divergence(p, seen(moved), frozen))
        gradient[i] = (sides[0] - sides[1]) / (2 * STEP)
    return divergence(p, frozen, frozen), gradient
