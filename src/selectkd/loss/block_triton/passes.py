"""The two kernels: a row's sums over the vocabulary in two passes, and the gradient over the student's logits.

c rows of a chunk, v vocabulary; p = teacher, q = student. The products stay with the vendor's library, which wins
there; a chunk's logits of both models are the only [c, v] memory. A thread keeps its own sums to the end of the row, so
that no thread waits for another in a loop.
"""

# a kernel's names are compiled, not checked as Python
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl

from selectkd.loss.block_steps import IMPOSSIBLE
from selectkd.loss.block_triton.formulas import exp

FAR = tl.constexpr(IMPOSSIBLE)
"""The logit of what is impossible: unshared, beyond the vocabulary, or -inf in the product itself."""
BELOW_ALL = tl.constexpr(-1e30)
"""Below every logit: what a thread's maximum begins with."""
FLOATS = (
    "lse_q",
    "lse_p",
    "overlap",
    "value",
    "total",
    "teacher_entropy",
    "student_entropy",
    "bhattacharyya",
    "kl",
)
"""Rows of the table of floats [9, c]; total is the sum of h."""
INTS = ("student_top", "token_rank", "label_rank")
"""Rows of the table of whole numbers [3, c]."""


@triton.jit
def _load(z, bias, unshared, columns, inside, factor, cap):
    """A tile of finished, tempered logits.

    factor: multiplies the product, None for 1. cap: the soft-cap over the temperature, None for none; then factor is
    2 scale / soft-cap, and cap tanh(x / 2) = cap - 2 cap / (1 + e^x).
    """
    logits = tl.load(z + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        logits += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if factor is not None:
        logits *= factor
    if cap is not None:
        logits = cap - 2.0 * cap / (1.0 + exp(logits))
    if unshared is not None:
        inside = inside & (tl.load(unshared + columns, mask=inside, other=1) == 0)
    return tl.where(inside & ~(logits < FAR), logits, FAR)  # nan stays


@triton.jit
def _risen(most, mass, z):
    """A thread's maximum and sum of e^(z - maximum) with one more logit, by one exponential."""
    rise = z - most
    e = exp(-tl.abs(rise))
    return tl.maximum(most, z), tl.where(rise > 0.0, mass * e + 1.0, mass + e)


@triton.jit
def _log_sum_exp(most, mass):
    """The row's log-sum-exp of its threads' maxima and sums."""
    highest = tl.max(most, 0)
    return highest + tl.log(tl.sum(mass * exp(most - highest), 0))


@triton.jit(do_not_specialize=["rows"])
def statistics(
    zs, zt, bias_s, bias_t, unshared, label, ints, floats, stride_s, stride_t, rows, width,
    factor_s, cap_s, factor_t, cap_t, a, b,
    terms: tl.constexpr, RANK: tl.constexpr, LABEL: tl.constexpr, ENTROPY: tl.constexpr, BHATTACHARYYA: tl.constexpr,
    KL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One row's ``FLOATS`` and ``INTS``; those not asked for are not written. terms: None for no divergence."""
    row = tl.program_id(0)
    zs += row.to(tl.int64) * stride_s
    zt += row.to(tl.int64) * stride_t
    lanes = tl.arange(0, TILE)
    zero = tl.zeros([TILE], tl.float32)
    most_s, most_t, mass_s, mass_t = zero + BELOW_ALL, zero + BELOW_ALL, zero, zero
    best = tl.zeros([TILE], tl.int32)
    for start in range(0, width, TILE):
        columns = start + lanes
        inside = columns < width
        s = _load(zs, bias_s, unshared, columns, inside, factor_s, cap_s)
        t = _load(zt, bias_t, unshared, columns, inside, factor_t, cap_t)
        if RANK:
            best = tl.where(s > most_s, start, best)
        most_s, mass_s = _risen(most_s, mass_s, s)
        most_t, mass_t = _risen(most_t, mass_t, t)
    lse_s, lse_t = _log_sum_exp(most_s, mass_s), _log_sum_exp(most_t, mass_t)
    tl.store(floats + row, lse_s)
    tl.store(floats + rows + row, lse_t)

    one = tl.arange(0, 1)
    if RANK:
        # the first of several best: a thread kept its first, the smallest of the threads' is the row's
        first = tl.min(tl.where(most_s == tl.max(most_s, 0), best + lanes, width - 1), 0)
        at = tl.sum(_load(zt, bias_t, unshared, first + one, first + one < width, factor_t, cap_t), 0)
        better = tl.zeros([TILE], tl.int32)
    if LABEL:
        there = tl.load(label + row) + one
        known = (there >= 0) & (there < width)
        of_label = tl.sum(_load(zt, bias_t, unshared, there, known, factor_t, cap_t), 0)
        label_better = tl.zeros([TILE], tl.int32)
    overlap, value, total, entropy_p, entropy_q, bhattacharyya, kl = zero, zero, zero, zero, zero, zero, zero
    for start in range(0, width, TILE):
        columns = start + lanes
        inside = columns < width
        s = _load(zs, bias_s, unshared, columns, inside, factor_s, cap_s)
        t = _load(zt, bias_t, unshared, columns, inside, factor_t, cap_t)
        logq, logp = (
            s - lse_s,
            t - lse_t,
        )  # of what is impossible far below all others: p, q and its terms are 0
        q, p = exp(logq), exp(logp)
        overlap += tl.minimum(p, q)
        if terms is not None:
            v, h = terms(logp, logq, p, q, a, b)
            value += v
            total += h
        if ENTROPY:
            entropy_p -= p * logp
            entropy_q -= q * logq
        if BHATTACHARYYA:
            bhattacharyya += tl.sqrt(p * q)
        if KL:
            kl += p * (logp - logq) + (q - p)
        if RANK:
            better += (t > at).to(tl.int32)
        if LABEL:
            label_better += (t > of_label).to(tl.int32)
    tl.store(floats + 2 * rows + row, tl.sum(overlap, 0))
    if terms is not None:
        tl.store(floats + 3 * rows + row, tl.sum(value, 0))
        tl.store(floats + 4 * rows + row, tl.sum(total, 0))
    if ENTROPY:
        tl.store(floats + 5 * rows + row, tl.sum(entropy_p, 0))
        tl.store(floats + 6 * rows + row, tl.sum(entropy_q, 0))
    if BHATTACHARYYA:
        tl.store(floats + 7 * rows + row, tl.sum(bhattacharyya, 0))
    if KL:
        tl.store(floats + 8 * rows + row, tl.sum(kl, 0))
    if RANK:
        tl.store(ints + row, first)
        tl.store(ints + rows + row, tl.where(at == FAR, width, tl.sum(better, 0)))
    if LABEL:
        tl.store(ints + 2 * rows + row, tl.where(of_label == FAR, width, tl.sum(label_better, 0)))


@triton.jit(do_not_specialize=["rows"])
def gradient(
    zs, zt, bias_s, bias_t, unshared, floats, worth, stride_s, stride_t, rows, width,
    factor_s, cap_s, factor_t, cap_t, a, b, terms: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """worth [c] times (h - q total) over the student's product, taken back through the soft-cap; the programs of a row
    take its tiles in turn. A row whose worth is 0 may hold nan: it is not read."""
    row = tl.program_id(0)
    zs += row.to(tl.int64) * stride_s
    zt += row.to(tl.int64) * stride_t
    lanes = tl.arange(0, TILE)
    counts = tl.load(worth + row)
    if counts == 0.0:
        for start in range(tl.program_id(1) * TILE, width, tl.num_programs(1) * TILE):
            columns = start + lanes
            tl.store(zs + columns, tl.zeros([TILE], zs.dtype.element_ty), mask=columns < width)
    else:
        lse_s, lse_t, total = (
            tl.load(floats + row),
            tl.load(floats + rows + row),
            tl.load(floats + 4 * rows + row),
        )
        for start in range(tl.program_id(1) * TILE, width, tl.num_programs(1) * TILE):
            columns = start + lanes
            inside = columns < width
            s = _load(zs, bias_s, unshared, columns, inside, factor_s, cap_s)
            t = _load(zt, bias_t, unshared, columns, inside, factor_t, cap_t)
            logq, logp = s - lse_s, t - lse_t
            q, p = exp(logq), exp(logp)
            _, h = terms(logp, logq, p, q, a, b)
            g = counts * (h - q * total)
            if cap_s is not None:
                capped = s / cap_s
                g *= tl.where(s == FAR, 0.0, 1.0 - capped * capped)
            tl.store(zs + columns, g.to(zs.dtype.element_ty), mask=inside)
