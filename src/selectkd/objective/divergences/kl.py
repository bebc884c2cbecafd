"""The Kullback-Leibler family. n rows, s support columns; p = teacher, q = student; natural log.

All of them are built from one function, ``relative_entropy``, in a form whose every term is non-negative, so that
no rounding (bf16 inputs included) makes a divergence negative.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.divergences.closed_form import Block, Column, centre, dot, total
from selectkd.objective.divergences.from_top_k import MERGED, REVERSE
from selectkd.objective.divergences.record import states

LOG_FLOOR = -87.0
"""What the logarithm of an impossible outcome (-inf) counts as: the smallest normal fp32 number is e^-87.3.

It keeps loss and gradient finite where one model forbids a token that the other allows: such a token costs its own
probability times 87 nats. Every finite log-probability is used as it is.
"""


def floored(log_a: Float[Tensor, "n s"]) -> Float[Tensor, "n s"]:
    """log_a with -inf replaced by LOG_FLOOR (gradient 0 there)."""
    return log_a.masked_fill(torch.isneginf(log_a), LOG_FLOOR)


def relative_entropy(log_a: Float[Tensor, "n s"], log_b: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """KL(a || b) = sum a log(a / b), as sum a (e^d - 1 - d) with d = log b - log a: [n].

    Never negative; 0 exactly where a = b. The added sum(b) - sum(a) is 0 for distributions; it makes each term
    non-negative and the rounding error relative to the divergence instead of to 1.
    """
    log_a, log_b = floored(log_a), floored(log_b)
    gap = log_b - log_a  # [n, s]
    short = gap.clamp(max=1.0)
    near = log_a.exp() * (torch.expm1(short) - short)
    far = log_b.exp() - log_a.exp() * (1.0 + gap)
    return torch.where(gap <= 1.0, near, far).clamp(min=0.0).sum(-1)


def log_mixture(
    log_a: Float[Tensor, "n s"], log_b: Float[Tensor, "n s"], skew: float
) -> Float[Tensor, "n s"]:
    """log(skew * a + (1 - skew) * b), [n, s]; exactly log a or log b at skew 1 or 0, and where a = b."""
    if skew == 1.0:
        return log_a
    if skew == 0.0:
        return log_b
    log_a, log_b = floored(log_a), floored(log_b)
    hi = torch.maximum(log_a, log_b).detach()
    mixed = hi + torch.log(skew * torch.exp(log_a - hi) + (1.0 - skew) * torch.exp(log_b - hi))
    # equal entries: no rounding may separate them; each side still gets its share of the gradient
    equal = log_a.detach() + skew * (log_a - log_a.detach()) + (1.0 - skew) * (log_b - log_b.detach())
    return torch.where(log_a == log_b, equal, mixed)


def share_of(name: str, value: float) -> float:
    """``value`` checked to lie in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} = {value} must lie in [0, 1].")
    return float(value)


def mixture(block: Block, skew: float) -> Float[Tensor, "*n s"]:
    """skew p + (1 - skew) q in ``block.spare``; what underflows counts as the smallest normal number."""
    mixed = torch.lerp(block.q, block.p, skew, out=block.spare)
    return mixed.clamp_(min=torch.finfo(mixed.dtype).tiny)


def forward_value(block: Block) -> Column:
    """KL(p || q), with q - p left in ``block.spare``."""
    forward = dot(block.p, block.log_ratio(), block.spare)
    return block.excess(block.spare) - forward


def _forward_kl(block: Block) -> Column:
    """g = q - p."""
    forward = dot(block.p, block.log_ratio(), block.spare)
    return block.excess(block.out) - forward


@states(closed_form=_forward_kl, from_top_k=MERGED)
def forward_kl(logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """Forward KL, sum_v p log(p / q).

    In [0, inf) nats, 0 at p = q; mean-seeking: the student pays wherever the teacher has mass.
    Source: Hinton et al. 2015; SelecTKD, equation 1.

    >>> import torch
    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> round(forward_kl(p.log(), q.log()).item(), 4)
    0.1438
    """
    return relative_entropy(logp, logq)


def _reverse_kl(block: Block) -> Column:
    """f = log q - log p."""
    mean = centre(block, block.log_ratio())
    return mean - block.excess(block.spare)


@states(closed_form=_reverse_kl, from_top_k=REVERSE)
def reverse_kl(logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """Reverse KL, sum_v q log(q / p).

    In [0, inf) nats, 0 at p = q; mode-seeking: the student pays where it has mass and the teacher has none.
    Source: MiniLLM (arXiv 2306.08543).

    >>> import torch
    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> round(reverse_kl(p.log(), q.log()).item(), 4)
    0.1308
    """
    return relative_entropy(logq, logp)


def _jeffreys(block: Block, *, weight: float = 0.5) -> Column:
    """g = (1 - weight) (q - p) + weight q (f - E_q f), f = log q - log p."""
    w = share_of("weight", weight)
    gap = block.log_ratio()
    forward, reverse = -dot(block.p, gap, block.zp), dot(block.q, gap, block.zp)
    gap.sub_(reverse).mul_(w).add_(1.0 - w)
    torch.mul(gap, block.q, out=block.out).add_(block.p, alpha=w - 1.0)
    return (1.0 - w) * forward + w * reverse + (1.0 - 2.0 * w) * block.excess(block.spare)


@states(closed_form=_jeffreys, from_top_k=lambda weight=0.5: MERGED if weight == 0.0 else REVERSE)
def jeffreys(
    logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"], *, weight: float = 0.5
) -> Float[Tensor, " n"]:
    """Weighted Jeffreys divergence, (1 - weight) KL(p || q) + weight KL(q || p).

    In [0, inf) nats, 0 at p = q; ``weight`` in [0, 1] is the share of reverse KL. weight 0 is forward_kl, 1 reverse_kl.
    Source: Jeffreys 1946.

    >>> import torch
    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> round(jeffreys(p.log(), q.log()).item(), 4)
    0.1373
    """
    w = share_of("weight", weight)
    return (1.0 - w) * relative_entropy(logp, logq) + w * relative_entropy(logq, logp)


def _skew_kl(block: Block, *, alpha: float = 0.1) -> Column:
    """f = (1 - alpha)^2 (q - p) / m, m = alpha p + (1 - alpha) q.

    The derivative -(1 - alpha) p / m plus the constant 1 - alpha, which f - E_q f does without: the difference is taken
    between p and q themselves, so that a student near its teacher keeps its digits.
    """
    mixed = mixture(block, share_of("alpha", alpha))
    log_mixed = torch.log(mixed, out=block.zq)
    logp, lost = block.take_logp()
    value = dot(block.p, logp.sub_(log_mixed), block.zp) - lost  # sum p log(p / m)
    value += (1.0 - alpha) * block.excess(block.zp)  # sum (m - p)
    centre(block, block.zp.div_(mixed), (1.0 - alpha) ** 2)
    return value


@states(closed_form=_skew_kl, from_top_k=MERGED)
def skew_kl(
    logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"], *, alpha: float = 0.1
) -> Float[Tensor, " n"]:
    """Skew KL, KL(p || alpha p + (1 - alpha) q), at most -log alpha.

    0 at p = q; alpha in [0, 1], 0 is forward KL, 1 is 0. Default .1 as in the paper.
    Source: DistiLLM (arXiv 2402.03898), section 3.1.

    >>> import torch
    >>> p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> round(skew_kl(p.log(), q.log()).item(), 4)
    2.3026
    """
    return relative_entropy(logp, log_mixture(logp, logq, share_of("alpha", alpha)))


def _skew_reverse_kl(block: Block, *, alpha: float = 0.1, detach_mixture: bool = False) -> Column:
    """f = log(q / m) - alpha q / m, m = (1 - alpha) p + alpha q; without the last term if m is detached."""
    mixed = mixture(block, 1.0 - share_of("alpha", alpha))
    logq, lost = block.take_logq()
    gap = logq.sub_(torch.log(mixed, out=block.zp))  # log(q / m)
    value = dot(block.q, gap, block.zp) - lost
    value += total(torch.sub(mixed, block.q, out=block.zp))  # of m as it was rounded
    centre(block, gap if detach_mixture else gap.addcdiv_(block.q, mixed, value=-alpha))
    return value


@states(
    closed_form=_skew_reverse_kl,
    from_top_k=lambda alpha=0.1, detach_mixture=False: REVERSE if alpha == 0.0 else MERGED,
)
def skew_reverse_kl(
    logp: Float[Tensor, "n s"],
    logq: Float[Tensor, "n s"],
    *,
    alpha: float = 0.1,
    detach_mixture: bool = False,
) -> Float[Tensor, " n"]:
    """Skew reverse KL, KL(q || (1 - alpha) p + alpha q), at most -log alpha.

    0 at p = q; alpha in [0, 1], 0 is reverse KL. ``detach_mixture`` stops the gradient through the student inside
    the mixture (DistiLLM-2 does, DistiLLM does not); the value is the same.
    Source: DistiLLM (arXiv 2402.03898), section 3.1; DistiLLM-2 (arXiv 2503.07067).

    >>> import torch
    >>> p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> round(skew_reverse_kl(p.log(), q.log()).item(), 4)
    2.3026
    """
    inner = logq.detach() if detach_mixture else logq
    return relative_entropy(logq, log_mixture(inner, logp, share_of("alpha", alpha)))


def _generalized_jsd(block: Block, *, beta: float = 0.5) -> Column:
    """f = (1 - beta) log(q / m), m = beta p + (1 - beta) q."""
    b = share_of("beta", beta)
    log_mixed = mixture(block, b).log_()
    (logp, lost_p), (logq, lost_q) = block.take_logp(), block.take_logq()
    forward = dot(block.p, logp.sub_(log_mixed), block.zp) - lost_p  # sum p log(p / m)
    reverse = centre(block, logq.sub_(log_mixed), 1.0 - b) - lost_q  # sum q log(q / m)
    return b * forward + (1.0 - b) * reverse


@states(closed_form=_generalized_jsd, from_top_k=MERGED)
def generalized_jsd(
    logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"], *, beta: float = 0.5
) -> Float[Tensor, " n"]:
    """Generalised Jensen-Shannon divergence, beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    In [0, log 2] at beta = .5, in general at most the entropy of (beta, 1 - beta); 0 at p = q, continuous in beta,
    and so 0 at beta = 0 and 1 (the KL limits of JSD / beta have their own names: forward_kl, reverse_kl).
    Source: GKD (arXiv 2306.13649), equation 3.

    >>> import torch
    >>> p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> round(generalized_jsd(p.log(), q.log()).item(), 4)
    0.6931
    """
    b = share_of("beta", beta)
    mixture = log_mixture(logp, logq, b)
    return b * relative_entropy(logp, mixture) + (1.0 - b) * relative_entropy(logq, mixture)


__all__ = [
    "LOG_FLOOR",
    "forward_kl",
    "generalized_jsd",
    "jeffreys",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
]
