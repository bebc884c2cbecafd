"""One optimizer step as a plain program: dense, every row at once, autograd throughout. n rows, v vocabulary.

p teacher, q student, r reference student, all [n, v] of log-probabilities; u [n, c] uniform numbers. Rows stand text by
text, in the order that settles ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Stream(NamedTuple):
    divergence: str
    beta: float
    weight: float
    selector: str | None
    language_model: float


class Rows(NamedTuple):
    """Some rows of the step as verifiers and selectors see them."""

    p: Tensor
    q: Tensor
    r: Tensor
    y: Tensor  # [n] the text's tokens
    u: Tensor
    sequence: Tensor
    finite: Tensor  # [n] whether the teacher's row is
    named: Tensor  # [n] whether its token is accepted whatever the verifier says

    def of(self, rows: Tensor) -> Rows:
        return Rows(*(one[rows] for one in self))


def at(log_a: Tensor, column: Tensor) -> Tensor:
    return log_a.gather(-1, column[:, None])[:, 0]


def kl(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.clamp(min=-87.0), b.clamp(min=-87.0)
    return (a.exp() * (a - b)).sum(-1)


def mix(a: Tensor, b: Tensor, share: float) -> Tensor:
    return (share * a.exp() + (1 - share) * b.exp()).clamp(min=math.exp(-87.0)).log()


def decoupled(p: Tensor, q: Tensor, y: Tensor, target: float) -> Tensor:
    """target * TCKD + NCKD."""
    rest = [a.scatter(-1, y[:, None], -torch.inf) for a in (p, q)]
    binary = [torch.stack([at(a, y), b.logsumexp(-1)], -1) for a, b in zip((p, q), rest, strict=True)]
    return target * kl(*binary) + kl(*(b.log_softmax(-1) for b in rest))


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda p, q, _: kl(p, q),
    "reverse_kl": lambda p, q, _: kl(q, p),
    "skew_kl": lambda p, q, alpha: kl(p, mix(p, q, alpha)),
    "skew_reverse_kl": lambda p, q, alpha: kl(q, mix(q, p, alpha)),
}


def entropy(a: Tensor) -> Tensor:
    return -(a.exp() * a.clamp(min=-1e9)).sum(-1)


def distance(p: Tensor, q: Tensor) -> Tensor:
    return (0.5 * ((p / 2).exp() - (q / 2).exp()).square().sum(-1)).sqrt()


def chance(x: Rows, k: int) -> Tensor:
    return 1 - (0.5 * (x.p.exp() - x.q.exp()).abs().sum(-1)) ** k


def within(x: Rows, token: Tensor, k: int) -> Tensor:
    mine = at(x.p, token)
    return (x.p > mine[:, None]).sum(-1).lt(k) & mine.isfinite()


def greedy(x: Rows, k: int) -> Tensor:
    return within(x, x.q.argmax(-1), k)


def literally(x: Rows, k: int) -> Tensor:
    passed = torch.zeros_like(x.finite)
    for draw, test in zip(x.u[:, :k].T, x.u[:, k : 2 * k].T, strict=True):
        below = x.q.exp().cumsum(-1)
        y = (below <= draw[:, None] * below[:, -1:]).sum(-1)
        passed |= test < (at(x.p, y) - at(x.q, y)).exp()
    return passed


def places(x: Rows) -> Tensor:
    """How many rows of its sequence stand before each."""
    return torch.stack([(x.sequence[:i] == one).sum() for i, one in enumerate(x.sequence)])


def prefix(x: Rows, k: int) -> Tensor:
    good = greedy(x, k) & x.finite
    return torch.stack([good[: i + 1][x.sequence[: i + 1] == one].all() for i, one in enumerate(x.sequence)])


def shuffled(x: Rows, k: int, bins: Tensor) -> Tensor:
    """Greedy's verdicts within each bin, in the order of u; rows that are accepted anyway have a bin of their own."""
    verdict, out = greedy(x, k) & x.finite, torch.zeros_like(x.finite)
    bins = torch.where(x.named & x.finite, -1, bins)
    drawn = torch.where(x.finite, x.u[:, 0], 0.0)  # a row without a teacher stands first
    for one in bins.unique():
        rows = (bins == one).nonzero()[:, 0]
        out[rows] = verdict[rows[drawn[rows].argsort(stable=True)]]
    return out


def by_position(x: Rows) -> Tensor:
    """1.5 minus half the share of its sequence's disagreement that has passed."""
    gap = (at(x.p, x.y).clamp(min=-87.0) - at(x.q, x.y).clamp(min=-87.0)).abs() * x.finite
    before = torch.stack([gap[:i][x.sequence[:i] == one].sum() for i, one in enumerate(x.sequence)])
    whole = torch.stack([gap[x.sequence == one].sum() for one in x.sequence])
    return 1.5 - 0.5 * torch.where(whole > 0, before / whole, 0.0)


def unlocked(x: Rows) -> Tensor:
    """The mean gain of the drafts of 5 tokens that hold a row, as a share of 5."""
    a, place = torch.minimum(x.p, x.q).exp().sum(-1).clamp(max=1.0) * x.finite, places(x)
    out = torch.zeros_like(a)
    for i in range(len(a)):
        rows = (x.sequence == x.sequence[i]).nonzero()[:, 0]
        t, gains = int(place[i]), []
        for start in range(max(0, t - 4), t + 1):
            later = a[rows[t + 1 : start + 5]]
            gains.append(a[rows[start:t]].prod() * (1 + later.cumprod(0).sum()))
        out[i] = torch.stack(gains).mean() / 5
    return out


def sure(x: Rows) -> Tensor:
    """(1 + c_T)(1 + c_S) over its mean in all but the least likely fifth of the sequences."""
    likely, names = at(x.p, x.y).clamp(min=-87.0) * x.finite, x.sequence.unique()
    mean = torch.stack([likely[x.sequence == one].mean() for one in names])
    dropped = names[mean.argsort(stable=True)[: int(0.2 * len(names))]]
    kept = ~torch.isin(x.sequence, dropped)
    weight = torch.ones_like(likely)
    for h in (entropy(x.p) * x.finite, entropy(x.q) * x.finite):
        weight = weight * (2 - h / h[kept].max().clamp(min=1e-12))
    return weight * kept / weight[kept].mean()


VERIFIERS: dict[str, Callable[[Rows, int], Tensor]] = {
    "sigmoid_entropy_gap": lambda x, k: torch.sigmoid(entropy(x.q) - entropy(x.p)),
    "iw_opd": lambda x, k: by_position(x),
    "prefix_product": lambda x, k: unlocked(x),
    "fire": lambda x, k: sure(x),
    "greedy_topk": greedy,
    "spec_k": lambda x, k: x.u[:, 0] < chance(x, k),
    "spec_k_literal": literally,
    "expected_spec_k": chance,
    "hellinger": lambda x, k: 1 - distance(x.p, x.q),
    "teacher_entropy": lambda x, k: entropy(x.p) <= 1.0,
    "student_entropy": lambda x, k: entropy(x.q) >= 1.0,
    "label_top_k": lambda x, k: within(x, x.y, k),
    "prefix_gate": prefix,
    "always": lambda x, k: torch.ones_like(x.finite),
    "matched_random": lambda x, k: x.u[:, 0] < 0.5,
    "matched_shuffle": lambda x, k: shuffled(x, k, torch.zeros_like(x.y)),
    "matched_position": lambda x, k: shuffled(x, k, (places(x) + 1).log2().floor()),
}


def unit(x: Tensor, finite: Tensor, clip: float = 0.0) -> Tensor:
    """Scaled to [0, 1] over the finite rows, after a clip to their quantiles."""
    low, high = x[finite].quantile(clip), x[finite].quantile(1 - clip)
    return (x.clamp(low, high) - low) / (high - low)


def teachable(x: Rows) -> Tensor:
    mass = x.p.gather(-1, x.q.topk(16, -1).indices).exp().sum(-1)
    return unit(kl(x.p, x.q), x.finite, 0.05) * unit(mass, x.finite, 0.05)


SELECTORS: dict[str, tuple[float, Callable[[Rows], Tensor]]] = {
    "se_kd": (0.2, lambda x: entropy(x.q)),
    "tip": (0.5, lambda x: 1 - (1 - unit(entropy(x.q), x.finite)) * (1 - unit(kl(x.p, x.q), x.finite))),
    "teachability": (0.05, teachable),
    "adaspec": (0.4, lambda x: kl(x.p, x.q) - kl(x.p, x.r)),
    "atkd": (0.5, lambda x: 1 - at(x.p, x.y).exp()),
    "adakd": (0.5, lambda x: distance(x.p, x.q)),
    "rho_1": (0.6, lambda x: at(x.r, x.y) - at(x.q, x.y)),
}


def best_share(name: str, x: Rows) -> Tensor:
    """Which rows a selector keeps: its share of them, the highest scores first, those without a teacher last."""
    share, score = SELECTORS[name]
    best = torch.where(x.finite, score(x), -torch.inf).argsort(descending=True, stable=True)
    kept = torch.zeros_like(x.finite)
    kept[best[: math.ceil(share * len(kept) - 1e-9)]] = True
    return kept


def plain_step(
    case: Any,
    z: Tensor,
    zp: Tensor,
    zr: Tensor,
    y: Tensor,
    u: Tensor,
    sequence: Tensor,
    stream: Tensor,
    alive: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of a step: z, zp, zr the logits of student, teacher and reference, alive [v] the shared ids."""
    logs = lambda x, t=1.0: (x / t).masked_fill(~alive, -torch.inf).log_softmax(-1)  # noqa: E731
    finite = zp[:, alive].isfinite().all(-1)
    zp = torch.where(finite[:, None], zp, z.detach())
    named = torch.isin(y, torch.tensor(case.always_accept))
    seen = lambda t: Rows(logs(zp, t), logs(z.detach(), t), logs(zr, t), y, u, sequence, finite, named)  # noqa: E731
    p, q, n = logs(zp, case.temperature), logs(z, case.temperature), len(y)
    log_p, log_q = at(logs(zp), y), at(logs(z), y)
    sources, stream = stream, stream if len(case.streams) > 1 else torch.zeros_like(stream)

    kept = torch.ones_like(finite)  # by the streams' selectors
    accepted, beta, factor, language = (torch.zeros_like(log_p) for _ in range(4))
    for number, of in enumerate(case.streams):
        mine = (stream == number).nonzero()[:, 0]
        if of.selector:
            kept[mine] = best_share(of.selector, seen(case.verify_temperature).of(mine))
        for group in (mine[kept[mine]], mine[~kept[mine]]):
            if not len(group):
                continue
            x = seen(case.verify_temperature).of(group)
            verdict = (
                best_share(case.judge, x) if case.judge in SELECTORS else VERIFIERS[case.judge](x, case.k)
            )
            accepted[group] = verdict.to(accepted.dtype)
        beta[mine], factor[mine], language[mine] = of.beta, of.weight, of.language_model

    accept = torch.where(named, 1.0, accepted)
    weight = beta + (1 - beta) * accept
    if case.thins:
        weight = (u[:, -1] < weight).to(weight.dtype)
    weight = weight * finite * kept

    divergence, beside = torch.zeros_like(log_p), torch.zeros_like(log_p)
    alpha = torch.full_like(log_p, 0.1)[:, None]
    for one in sequence.unique() if case.extra == "adaptive_alpha" else ():
        rows = (sequence == one).nonzero()[:, 0]
        known, sign = rows[finite[rows]], -1 if "reverse" in case.streams[stream[rows[0]]].divergence else 1
        gap = sign * (log_p[known].mean().exp() - log_q[known].mean().exp()).detach()
        if gap > 0:
            alpha[rows] = (1 - (1 - case.start) * case.anchor / (gap + 1e-5)).clamp(0.01, case.start)
        else:
            alpha[rows] = case.start
    for number, of in enumerate(case.streams):
        mine = (stream == number).nonzero()[:, 0]
        divergence[mine] = DIVERGENCES[of.divergence](p[mine], q[mine], alpha[mine])
    if case.extra == "atkd":
        surprise = 1 - log_p.exp()
        hard = (surprise >= surprise[finite].quantile(0.5)) & finite
        factor = factor * torch.where(hard, 0.8 * n / hard.sum(), 0.2 * n / (finite & ~hard).sum())
        divergence = torch.where(hard, decoupled(p, q, y, 1.0), decoupled(p, q, y, 0.0))
    if case.extra == "policy_gradient":
        reward = (log_p - log_q).detach()
        factor = factor / (0.2 * reward.exp() + 0.8)
        for i in range(n):
            later = reward[i + 1 :][sequence[i + 1 :] == sequence[i]].clamp(-1, 1)
            beside[i] = -later.mean() * at(q, y)[i] if len(later) else 0.0

    length, texts = sequence.bincount()[sequence], len(sequence.unique())
    scale = 1 / (length * texts) if case.reduction == "sequence_mean" else torch.full_like(log_p, 1 / n)
    total = weight.sum() if case.reduction == "weight_mean" and weight.any() else torch.tensor(float(n))
    loss = (scale * n / total * weight * factor * (divergence + beside)).sum() - (
        scale * language * log_q
    ).sum()
    each = torch.zeros(texts, dtype=z.dtype).index_add(0, sequence, accept / length)
    gap = kl(logs(zp), logs(z))
    of_source = {f"kl of {name}": gap[sources == number].mean() for number, name in enumerate("ab")}
    return loss, {"tar": each.mean(), "weight": weight.mean(), "kl": gap.mean(), **of_source}
