"""Every divergence's terms as Triton functions: (value, h) of one vocabulary entry, h = d value / d log q with log q
taken as free.

p = teacher, q = student. A value may hold a part that sums to 0 over the vocabulary, as q - p does: where both models
almost agree, it takes the rounding of their two log-sum-exps out of the sum.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

SMALLEST = tl.constexpr(1.1754944e-38)
"""The smallest normal fp32 number: a mixture that underflows counts as this."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x by a product and one instruction. tl.exp takes four more, to keep results below the normal numbers."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _forward_kl(logp, logq, p, q, a, b):
    return p * (logp - logq) + (q - p), -p


@triton.jit
def _reverse_kl(logp, logq, p, q, a, b):
    h = q * (logq - logp)
    return h + (p - q), h


@triton.jit
def _jeffreys(logp, logq, p, q, a, b):
    gap = logq - logp
    reverse = a * q * gap
    value = reverse - (1.0 - a) * p * gap + (1.0 - 2.0 * a) * (q - p)
    return value, reverse - (1.0 - a) * p


@triton.jit
def _skew_kl(logp, logq, p, q, a, b):
    gap = logp - tl.log(tl.maximum(a * p + (1.0 - a) * q, SMALLEST))
    return p * gap + (1.0 - a) * (q - p), (a - 1.0) * q * exp(gap)


@triton.jit
def _skew_reverse_kl(logp, logq, p, q, a, b):
    gap = logq - tl.log(tl.maximum((1.0 - a) * p + a * q, SMALLEST))
    # b is alpha, or 0 where the mixture is detached
    return q * gap + (1.0 - a) * (p - q), q * (gap - b * exp(gap))


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
    both = exp((a + b) * logq)
    cross = exp(a * logp + b * logq)
    value = (both / (a + b) - cross / b) / a + exp((a + b) * logp) / (b * (a + b))
    return value, (both - cross) / a


@triton.jit
def _todi(logp, logq, p, q, a, b):
    gap = logq - logp
    rest = 1.0 / (1.0 + exp(-gap))  # q / (p + q)
    return (q - p) * gap, rest * q * (gap + 1.0) - (1.0 - rest) * p


@triton.jit
def _neg_log_acceptance(logp, logq, p, q, a, b):
    # the value is -log of the overlap; h lacks the factor -1 / overlap, which the gradient kernel is handed
    return p * 0.0, q * tl.where(q < p, 1.0, tl.where(q == p, 0.5, 0.0))


def _no_number(params: dict[str, Any]) -> tuple[float, float]:
    return 0.0, 0.0


def _one(name: str, default: float) -> Callable[[dict[str, Any]], tuple[float, float]]:
    return lambda params: (float(params.get(name, default)), 0.0)


def _of_skew_reverse(params: dict[str, Any]) -> tuple[float, float]:
    alpha = float(params.get("alpha", 0.1))
    return alpha, 0.0 if params.get("detach_mixture", False) else alpha


def of_alpha_beta(params: dict[str, Any]) -> tuple[float, float]:
    """alpha and beta of the family."""
    return float(params.get("alpha", 0.2)), float(params.get("beta", 0.7))


TERMS: dict[str, tuple[Any, Callable[[dict[str, Any]], tuple[float, float]]]] = {
    "forward_kl": (_forward_kl, _no_number),
    "reverse_kl": (_reverse_kl, _no_number),
    "jeffreys": (_jeffreys, _one("weight", 0.5)),
    "skew_kl": (_skew_kl, _one("alpha", 0.1)),
    "skew_reverse_kl": (_skew_reverse_kl, _of_skew_reverse),
    "generalized_jsd": (_generalized_jsd, _one("beta", 0.5)),
    "total_variation": (_total_variation, _no_number),
    "alpha_beta": (_alpha_beta, of_alpha_beta),
    "todi": (_todi, _no_number),
    "neg_log_acceptance": (_neg_log_acceptance, _no_number),
}
"""Divergences the kernels claim, by name, with what turns their parameters into the two numbers a term takes."""
