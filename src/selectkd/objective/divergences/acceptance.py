"""Losses on the acceptance of speculative decoding, sum min(p, q). n rows, s support columns."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.divergences.closed_form import Block, Column, total
from selectkd.objective.divergences.from_top_k import MERGED, NO_DIRECTION
from selectkd.objective.divergences.kl import LOG_FLOOR, forward_kl
from selectkd.objective.divergences.record import states


def _towards_overlap(block: Block) -> tuple[Column, Column]:
    """Leaves below = q where q < p, half of it where q = p, in ``spare``, and above = q - below in ``zp``; returns both
    sums.

    The derivative of -sum min(p, q) to log q is -below, so its gradient is -below + q sum(below), which is above
    sum(below) - below sum(above): no difference of near numbers, however little p and q overlap.
    """
    below = torch.sub(block.p, block.q, out=block.spare).sign_().add_(1.0).mul_(0.5).mul_(block.q)
    above = torch.sub(block.q, below, out=block.zp)
    return total(below), total(above)


def _total_variation(block: Block) -> Column:
    """TV = 1 - sum min(p, q)."""
    gap = torch.sub(block.q, block.p, out=block.spare)
    value = 0.5 * total(torch.abs(gap, out=block.zp))
    below, above = _towards_overlap(block)
    torch.mul(block.zp, below, out=block.out).sub_(block.spare.mul_(above))
    return value


@states(closed_form=_total_variation, from_top_k=MERGED)
def total_variation(logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """Total variation, 1/2 sum_v |p - q|.

    In [0, 1], 0 at p = q; 1 - TV is the acceptance rate of speculative decoding. No unit.
    Source: Wen et al. 2023 (f-distill); SelecTKD, section 3.

    >>> import torch
    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> total_variation(p.log(), q.log()).item()
    0.25
    """
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


def _neg_log_acceptance(block: Block) -> Column:
    """The gradient of -sum min(p, q), over that sum."""
    shared = total(torch.minimum(block.p, block.q, out=block.spare))
    floor = math.exp(LOG_FLOOR)
    scale = torch.where((shared > floor) & (shared < 1.0), 1.0 / shared.clamp(min=floor), 0.0)
    below, above = _towards_overlap(block)
    torch.mul(block.zp, below * scale, out=block.out).sub_(block.spare.mul_(above * scale))
    return -shared.clamp(min=floor, max=1.0).log()


@states(closed_form=_neg_log_acceptance, from_top_k=MERGED)
def neg_log_acceptance(logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """Negative log acceptance, -log sum_v min(p, q).

    In [0, 87] nats (a sum below e^-87 counts as e^-87), 0 at p = q.
    Source: vLLM Speculators (arXiv 2602.23881).

    >>> import torch
    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> round(neg_log_acceptance(p.log(), q.log()).item(), 4)
    0.2877
    """
    # in log space, so that nearly disjoint distributions keep a gradient
    lower = torch.minimum(logp, logq)
    disjoint = torch.isneginf(lower).all(-1)
    log_overlap = torch.logsumexp(lower.masked_fill(disjoint[:, None], LOG_FLOOR), -1)
    loss = (-log_overlap).clamp(min=0.0, max=-LOG_FLOOR)
    loss = torch.where(disjoint, loss * 0.0 - LOG_FLOOR, loss)
    return torch.where((logp == logq).all(-1), loss * 0.0, loss)


@states(from_top_k=NO_DIRECTION)
def kl_tv_hybrid(
    logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"], *, eta: float = 3.0
) -> Float[Tensor, " n"]:
    """lambda KL(p || q) + (1 - lambda) TV(p, q) with lambda = e^(-eta * acceptance), acceptance without gradient.

    In [0, inf), 0 at p = q: forward KL where the two hardly meet, total variation where they nearly agree. Default 3
    as in the paper.
    Source: vLLM Speculators (arXiv 2602.23881).

    >>> import torch
    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> round(kl_tv_hybrid(p.log(), q.log()).item(), 4)
    0.2388
    """
    if eta < 0:
        raise ConfigError(f"eta = {eta} must be 0 or more.")
    acceptance = torch.minimum(logp, logq).exp().sum(-1).clamp(max=1.0)
    share = torch.exp(-eta * acceptance.detach())
    return share * forward_kl(logp, logq) + (1.0 - share) * total_variation(logp, logq)
