"""Triton kernels for a chunk of rows on an accelerator: what ``block`` does, in one launch for statistics and one for
the gradient, without a temporary of the chunk's size.

c rows of a chunk, v vocabulary; p = teacher, q = student. The products stay with the vendor's library, which wins
there; a chunk's logits of both models are the only [c, v] memory. One program a row walks the vocabulary in tiles:
first an online softmax of both models and the student's argmax, then everything a verifier or divergence sums over the
vocabulary, and, once the verdicts are in, the gradient written over the student's logits.
Imported only where the tensors are on an accelerator (chunked.py decides); ``block.judge`` is the reference.
"""

# a kernel is launched by a subscript, which no type checker sees through
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOptionalSubscript=false, reportOperatorIssue=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from selectkd.block import IMPOSSIBLE, Rows, Seen, Settings
from selectkd.rows import LiveChunk
from selectkd.verifiers import RowStatistics

TILE = 4096
"""Columns a program holds at a time: 32 KiB of fp32 for the two models."""
SMALLEST = tl.constexpr(1.1754944e-38)
"""The smallest normal fp32 number: a mixture that underflows counts as this."""


# Every divergence's terms: (value, h) of one vocabulary entry, h = d value / d log q with log q taken as free.


@triton.jit
def _forward_kl(logp, logq, p, q, a, b):
    return p * (logp - logq), -p


@triton.jit
def _reverse_kl(logp, logq, p, q, a, b):
    value = q * (logq - logp)
    return value, value


@triton.jit
def _jeffreys(logp, logq, p, q, a, b):
    gap = logq - logp
    return a * q * gap - (1.0 - a) * p * gap, a * q * gap - (1.0 - a) * p


@triton.jit
def _skew_kl(logp, logq, p, q, a, b):
    gap = logp - tl.log(tl.maximum(a * p + (1.0 - a) * q, SMALLEST))
    return p * gap, (a - 1.0) * q * tl.exp(gap)


@triton.jit
def _skew_reverse_kl(logp, logq, p, q, a, b):
    gap = logq - tl.log(tl.maximum((1.0 - a) * p + a * q, SMALLEST))
    return q * gap, q * (gap - b * tl.exp(gap))  # b is alpha, or 0 where the mixture is detached


@triton.jit
def _generalized_jsd(logp, logq, p, q, a, b):
    mixture = tl.log(tl.maximum(a * p + (1.0 - a) * q, SMALLEST))
    reverse = (1.0 - a) * q * (logq - mixture)
    return a * p * (logp - mixture) + reverse, reverse


@triton.jit
def _total_variation(logp, logq, p, q, a, b):
    gap = q - p
    return 0.5 * tl.abs(gap), 0.5 * q * tl.where(gap > 0, 1.0, tl.where(gap < 0, -1.0, 0.0))


@triton.jit
def _alpha_beta(logp, logq, p, q, a, b):
    both = tl.exp((a + b) * logq)
    cross = tl.exp(a * logp + b * logq)
    value = (both / (a + b) - cross / b) / a + tl.exp((a + b) * logp) / (b * (a + b))
    return value, (both - cross) / a


@triton.jit
def _todi(logp, logq, p, q, a, b):
    gap = logq - logp
    rest = 1.0 / (1.0 + tl.exp(-gap))  # q / (p + q)
    return (q - p) * gap, rest * q * (gap + 1.0) - (1.0 - rest) * p


@triton.jit
def _neg_log_acceptance(logp, logq, p, q, a, b):
    # the value is -log of the overlap; h lacks the factor -1 / overlap, which the gradient kernel is handed
    return p * 0.0, q * tl.where(q < p, 1.0, tl.where(q == p, 0.5, 0.0))


def _one(name: str, default: float) -> Callable[[dict[str, Any]], tuple[float, float]]:
    return lambda params: (float(params.get(name, default)), 0.0)


def _of_skew_reverse(params: dict[str, Any]) -> tuple[float, float]:
    alpha = float(params.get("alpha", 0.1))
    return alpha, 0.0 if params.get("detach_mixture", False) else alpha


def _of_alpha_beta(params: dict[str, Any]) -> tuple[float, float]:
    return float(params.get("alpha", 0.2)), float(params.get("beta", 0.7))


TERMS: dict[str, tuple[Any, Callable[[dict[str, Any]], tuple[float, float]]]] = {
    "forward_kl": (_forward_kl, lambda params: (0.0, 0.0)),
    "reverse_kl": (_reverse_kl, lambda params: (0.0, 0.0)),
    "jeffreys": (_jeffreys, _one("weight", 0.5)),
    "skew_kl": (_skew_kl, _one("alpha", 0.1)),
    "skew_reverse_kl": (_skew_reverse_kl, _of_skew_reverse),
    "generalized_jsd": (_generalized_jsd, _one("beta", 0.5)),
    "total_variation": (_total_variation, lambda params: (0.0, 0.0)),
    "alpha_beta": (_alpha_beta, _of_alpha_beta),
    "todi": (_todi, lambda params: (0.0, 0.0)),
    "neg_log_acceptance": (_neg_log_acceptance, lambda params: (0.0, 0.0)),
}
"""Divergences the kernels claim, by name, with what turns their parameters into the two numbers a term takes."""


@triton.jit
def _load(z, bias, unshared, columns, inside, scale, cap, inverse_temperature, IMPOSSIBLE: tl.constexpr):
    """A tile of finished logits; an id that is unshared or beyond the vocabulary is impossible on both sides."""
    logits = tl.load(z + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        logits += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    logits *= scale
    if cap > 0.0:
        logits = cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * logits / cap)))  # cap * tanh(logits / cap)
    logits *= inverse_temperature
    if unshared is not None:
        inside = inside & (tl.load(unshared + columns, mask=inside, other=1) == 0)
    return tl.where(inside, logits, IMPOSSIBLE)


@triton.jit
def _statistics(
    zs, zt, bias_s, bias_t, unshared, label, top, rank, label_rank, floats,
    stride_s, stride_t, rows, width, scale_s, cap_s, scale_t, cap_t, inverse_temperature, a, b,
    terms: tl.constexpr, IMPOSSIBLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One row's sums over the vocabulary: floats [9, c] = log-sum-exp of q and p, overlap, value, sum of h, entropy of
    p and q, sum sqrt(p q), KL(p || q); the student's argmax, its rank and the label's with the teacher."""
    row = tl.program_id(0)
    zs += row.to(tl.int64) * stride_s
    zt += row.to(tl.int64) * stride_t
    max_s, max_t, sum_s, sum_t = -float("inf"), -float("inf"), 0.0, 0.0
    best = 0
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < width
        s = _load(zs, bias_s, unshared, columns, inside, scale_s, cap_s, inverse_temperature, IMPOSSIBLE)
        t = _load(zt, bias_t, unshared, columns, inside, scale_t, cap_t, inverse_temperature, IMPOSSIBLE)
        tile_max, tile_best = tl.max(s, 0, return_indices=True)
        best = tl.where(tile_max > max_s, start + tile_best, best)
        new_s, new_t = tl.maximum(max_s, tile_max), tl.maximum(max_t, tl.max(t, 0))
        sum_s = sum_s * tl.exp(max_s - new_s) + tl.sum(tl.where(inside, tl.exp(s - new_s), 0.0), 0)
        sum_t = sum_t * tl.exp(max_t - new_t) + tl.sum(tl.where(inside, tl.exp(t - new_t), 0.0), 0)
        max_s, max_t = new_s, new_t
    lse_s, lse_t = max_s + tl.log(sum_s), max_t + tl.log(sum_t)

    first = tl.arange(0, 1)
    here, there = best + first, tl.load(label + row) + first  # as tiles of one column
    t = _load(zt, bias_t, unshared, here, here < width, scale_t, cap_t, inverse_temperature, IMPOSSIBLE)
    at = tl.sum(t, 0)
    t = _load(zt, bias_t, unshared, there, there < width, scale_t, cap_t, inverse_temperature, IMPOSSIBLE)
    of_label = tl.sum(t, 0)
    overlap, value, total, entropy_p, entropy_q, affinity, kl = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    better, label_better = 0, 0
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < width
        s = _load(zs, bias_s, unshared, columns, inside, scale_s, cap_s, inverse_temperature, IMPOSSIBLE)
        t = _load(zt, bias_t, unshared, columns, inside, scale_t, cap_t, inverse_temperature, IMPOSSIBLE)
        logq, logp = s - lse_s, t - lse_t
        q, p = tl.exp(logq), tl.exp(logp)
        v, h = terms(logp, logq, p, q, a, b)
        value += tl.sum(tl.where(inside, v, 0.0), 0)
        total += tl.sum(tl.where(inside, h, 0.0), 0)
        overlap += tl.sum(tl.minimum(p, q), 0)
        entropy_p -= tl.sum(p * logp, 0)
        entropy_q -= tl.sum(q * logq, 0)
        affinity += tl.sum(tl.exp(0.5 * (logp + logq)), 0)
        kl += tl.sum(p * (logp - logq), 0)
        better += tl.sum((inside & (t > at)).to(tl.int32), 0)
        label_better += tl.sum((inside & (t > of_label)).to(tl.int32), 0)
    tl.store(top + row, best)
    tl.store(rank + row, tl.where(at == IMPOSSIBLE, width, better))
    tl.store(label_rank + row, tl.where(of_label == IMPOSSIBLE, width, label_better))
    tl.store(floats + 0 * rows + row, lse_s)
    tl.store(floats + 1 * rows + row, lse_t)
    tl.store(floats + 2 * rows + row, overlap)
    tl.store(floats + 3 * rows + row, value)
    tl.store(floats + 4 * rows + row, total)
    tl.store(floats + 5 * rows + row, entropy_p)
    tl.store(floats + 6 * rows + row, entropy_q)
    tl.store(floats + 7 * rows + row, affinity)
    tl.store(floats + 8 * rows + row, kl)


@triton.jit
def _gradient(
    zs, zt, bias_s, bias_t, unshared, lse_s, lse_t, total, factor, share,
    stride_s, stride_t, width, scale_s, cap_s, scale_t, cap_t, inverse_temperature, a, b,
    terms: tl.constexpr, IMPOSSIBLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """share * factor * (h - q total) over the student's product, taken back through temperature, soft-cap and scale."""
    row = tl.program_id(0)
    zs += row.to(tl.int64) * stride_s
    zt += row.to(tl.int64) * stride_t
    of_s, of_t, sum_h = tl.load(lse_s + row), tl.load(lse_t + row), tl.load(total + row)
    worth = tl.load(share + row) * tl.load(factor + row) * inverse_temperature * scale_s
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < width
        s = _load(zs, bias_s, unshared, columns, inside, scale_s, cap_s, inverse_temperature, IMPOSSIBLE)
        t = _load(zt, bias_t, unshared, columns, inside, scale_t, cap_t, inverse_temperature, IMPOSSIBLE)
        logq, logp = s - of_s, t - of_t
        q, p = tl.exp(logq), tl.exp(logp)
        _, h = terms(logp, logq, p, q, a, b)
        g = worth * (h - q * sum_h)
        if cap_s > 0.0:
            capped = s / (inverse_temperature * cap_s)
            g *= 1.0 - capped * capped
        if unshared is not None:
            g = tl.where(tl.load(unshared + columns, mask=inside, other=1) == 0, g, 0.0)
        g = tl.where(worth == 0.0, 0.0, g)  # a row that counts nothing may hold nan
        tl.store(zs + columns, g.to(zs.dtype.element_ty), mask=inside)


def claims(settings: Settings, teacher: Any) -> bool:
    """Whether the kernels do this work: a live teacher, a divergence with terms, a verifier that reads statistics."""
    name, params = _named(settings.objective.divergence)
    if not isinstance(teacher, LiveChunk) or name not in TERMS or teacher.raw.dtype == torch.float64:
        return False
    if name == "alpha_beta" and min(_of_alpha_beta(params)) <= 0.0:
        return False  # a limit of the family: the closed form in dense.py has it
    if any(
        head.bias is not None and bool(head.bias.isneginf().any()) for head in (settings.head, teacher.head)
    ):
        return False  # what a bias forbids counts as e^-87, which dense.py knows
    return hasattr(settings.objective.verifier, "from_statistics")


def _named(divergence: Any) -> tuple[str, dict[str, Any]]:
    """The registry name of a divergence and the parameters bound to it."""
    function = getattr(divergence, "func", divergence)
    return getattr(function, "__name__", ""), dict(getattr(divergence, "keywords", {}))


@torch.no_grad()
def judge(raw: Tensor, teacher: LiveChunk, rows: Rows, settings: Settings) -> Seen:
    """Judges a whole chunk and writes the gradient of the loss over ``raw`` [c, v]; equals ``block.judge``."""
    objective = settings.objective
    launch = _Launch(raw, teacher, rows, settings)
    seen, floats = launch.statistics(settings.temperature)
    verified, overlap = seen, floats[2].clamp(max=1.0)
    if rows.acceptance is None and objective.verify_temperature != settings.temperature:
        verified, other = launch.statistics(objective.verify_temperature)
        overlap = other[2].clamp(max=1.0)
    finite = torch.isfinite(floats[1])
    acceptance = rows.acceptance
    if acceptance is None:
        acceptance = objective.verifier.from_statistics(verified, rows.uniform).to(torch.float32)
    weight, acceptance = objective.weight_of(acceptance, rows.uniform, label=rows.label, finite=finite)
    divergence = torch.where(finite, floats[3].clamp(min=0.0), 0.0)
    factor = torch.ones_like(divergence)
    if launch.name == "neg_log_acceptance":
        floor = 1.6458115e-38  # e^-87, the floor of the formula
        divergence = torch.where(finite, -seen.overlap.clamp(min=floor).log(), 0.0)
        factor = torch.where(
            (seen.overlap > floor) & (seen.overlap < 1.0), -1.0 / seen.overlap.clamp(min=floor), 0.0
        )
    share = rows.scale.to(torch.float32) * weight
    kl: Tensor | int = 0
    if settings.also_kl:
        at_one = floats if settings.temperature == 1.0 else launch.statistics(1.0)[1]
        kl = torch.where(finite, at_one[8].clamp(min=0.0), 0.0).sum()
    if settings.wants_gradient:
        launch.gradient(floats, factor.contiguous(), share.contiguous())
    return Seen(divergence, weight, acceptance, overlap, (~finite).sum(), kl)


class _Launch:
    """The arguments of one chunk's launches."""

    def __init__(self, raw: Tensor, teacher: LiveChunk, rows: Rows, settings: Settings) -> None:
        self.raw, self.teacher, self.rows, self.settings = raw, teacher, rows, settings
        self.name, params = _named(settings.objective.divergence)
        self.terms, numbers = TERMS[self.name]
        self.a, self.b = numbers(params)
        c, self.width = raw.shape
        self.label = (
            rows.label if rows.label is not None else torch.zeros(c, dtype=torch.long, device=raw.device)
        )
        self.unshared = None if teacher.unshared is None else teacher.unshared.to(torch.int8)

    def _heads(self) -> tuple[Any, ...]:
        ours, theirs = self.settings.head, self.teacher.head
        return (ours.scale, ours.softcap or 0.0, theirs.scale, theirs.softcap or 0.0)

    def _biases(self) -> tuple[Any, ...]:
        ours, theirs = self.settings.head.bias, self.teacher.head.bias
        return (None if ours is None else ours.detach(), theirs)

    def statistics(self, temperature: float) -> tuple[RowStatistics, Tensor]:
        """The statistics of every row at a temperature, and the table of floats [9, c] they come from."""
        c = self.raw.shape[0]
        ints = torch.empty(3, c, dtype=torch.int32, device=self.raw.device)
        floats = torch.empty(9, c, dtype=torch.float32, device=self.raw.device)
        _statistics[(c,)](
            self.raw, self.teacher.raw, *self._biases(), self.unshared, self.label, ints[0], ints[1], ints[2], floats,
            self.raw.stride(0), self.teacher.raw.stride(0), c, self.width, *self._heads(), 1.0 / temperature,
            self.a, self.b, terms=self.terms, IMPOSSIBLE=IMPOSSIBLE, TILE=TILE,
        )  # fmt: skip
        labelled = {} if self.rows.label is None else {"label_rank": ints[2]}
        table = RowStatistics(
            student_top=ints[0].long(), rank=ints[1], **labelled, overlap=floats[2].clamp(max=1.0),
            teacher_entropy=floats[5], student_entropy=floats[6], affinity=floats[7], width=self.width,
        )  # fmt: skip
        return table, floats

    def gradient(self, floats: Tensor, factor: Tensor, share: Tensor) -> None:
        """Writes the gradient over the student's product."""
        _gradient[(self.raw.shape[0],)](
            self.raw, self.teacher.raw, *self._biases(), self.unshared, floats[0], floats[1], floats[4], factor, share,
            self.raw.stride(0), self.teacher.raw.stride(0), self.width, *self._heads(),
            1.0 / self.settings.temperature, self.a, self.b,
            terms=self.terms, IMPOSSIBLE=IMPOSSIBLE, TILE=TILE,
        )  # fmt: skip
