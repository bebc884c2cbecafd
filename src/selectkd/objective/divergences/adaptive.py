"""Divergences that adapt per token or over time: AKL, ToDi, TAID. n rows, s support columns; p teacher, q student."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selectkd.objective.divergences.closed_form import Block, Column, dot, project
from selectkd.objective.divergences.from_top_k import MERGED, NO_DIRECTION, REVERSE
from selectkd.objective.divergences.kl import floored, forward_kl, relative_entropy, reverse_kl, share_of
from selectkd.objective.divergences.record import states


@torch.no_grad()
def head_share(p: Float[Tensor, "n s"], q: Float[Tensor, "n s"], mu: float) -> Float[Tensor, " n"]:
    """The head's part of sum |p - q|, [n]; the head is the best tokens of p whose mass together is at most ``mu``, and
    the first one always."""
    best_first, order = p.sort(dim=-1, descending=True, stable=True)
    sorted_head = best_first.cumsum(-1) <= mu
    sorted_head[:, 0] = True
    head = torch.zeros_like(sorted_head).scatter(-1, order, sorted_head)  # back to vocabulary order
    gap = (p - q).abs()
    in_head, in_all = (gap * head).sum(-1), gap.sum(-1)
    return torch.where(in_all > 0, in_head / in_all.clamp(min=torch.finfo(gap.dtype).tiny), 0.5)


def _adaptive_kl(block: Block, *, mu: float = 0.5) -> Column:
    """g = share (q - p) + (1 - share) q (f - E_q f), f = log q - log p."""
    share = head_share(block.p, block.q, share_of("mu", mu))[:, None]
    gap = block.log_ratio()
    forward, reverse = -dot(block.p, gap, block.zp), dot(block.q, gap, block.zp)
    gap.sub_(reverse).mul_(1.0 - share).add_(share)
    torch.mul(gap, block.q, out=block.out).sub_(block.p * share)
    return share * forward + (1.0 - share) * reverse + (2.0 * share - 1.0) * block.excess(block.spare)


@states(closed_form=_adaptive_kl, from_top_k=NO_DIRECTION)
def adaptive_kl(
    logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"], *, mu: float = 0.5
) -> Float[Tensor, " n"]:
    """AKL, g_head/(g_head + g_tail) KL(p || q) + g_tail/(g_head + g_tail) KL(q || p), g = sum |p - q| on head and tail.

    The head is the teacher's tokens in descending p while their mass together is at most ``mu`` (its best token
    always); the gaps carry no gradient. In [0, inf), 0 at p = q. Default .5 as in the paper.
    Source: arXiv 2404.02657, section 4, and its authors' code, which leaves out the token that crosses mu. The paper's
    text has the smallest head that reaches mu, with that token.

    >>> import torch
    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> round(adaptive_kl(p.log(), q.log()).item(), 4)
    0.1373
    """
    share = head_share(logp.exp(), logq.exp(), share_of("mu", mu))
    return share * forward_kl(logp, logq) + (1.0 - share) * reverse_kl(logp, logq)


def _todi(block: Block) -> Column:
    """h = (1 - w) q (log q - log p + 1) - w p, w = p / (p + q) without gradient."""
    gap = block.log_ratio()
    value = dot(block.q, gap, block.zp) - dot(block.p, gap, block.zp)
    rest = torch.sigmoid(gap, out=block.zp)  # 1 - w
    project(block, gap.add_(1.0).mul_(block.q).add_(block.p).mul_(rest).sub_(block.p))
    return value


@states(closed_form=_todi, from_top_k=REVERSE)
def todi(logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """ToDi, sum_v w p log(p / q) + (1 - w) q log(q / p) with w = p / (p + q) without gradient.

    In [0, inf), 0 at p = q; its value is sum_v (p^2 - q^2) / (p + q) log(p / q) = KL(p || q) + KL(q || p);
    its gradient raises q where the teacher is surer and lowers it where the student is.
    Source: ToDi (arXiv 2505.16297), equations 7-8.

    >>> import torch
    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> round(todi(p.log(), q.log()).item(), 4)
    0.2747
    """
    log_p, log_q = floored(logp), floored(logq)
    gap = log_p - log_q
    w = torch.sigmoid(gap.detach())  # p / (p + q)
    terms = w * log_p.exp() * gap - (1.0 - w) * log_q.exp() * gap
    return terms.clamp(min=0.0).sum(-1)


@states(from_top_k=lambda t=0.4: MERGED if t == 1.0 else NO_DIRECTION)
def taid(logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"], *, t: float = 0.4) -> Float[Tensor, " n"]:
    """TAID, KL(m || q) with m = softmax((1 - t) log q + t log p), the student in m without gradient.

    In [0, inf), 0 at p = q; t in [0, 1], 1 is forward KL. t rises over training: see schedules.TaidSchedule;
    .4 is the paper's start.
    Source: TAID (arXiv 2501.16937), equations 3-4.

    >>> import torch
    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> taid(p.log(), q.log(), t=1.0).item() == forward_kl(p.log(), q.log()).item()
    True
    """
    share_of("t", t)
    if t == 1.0:
        return forward_kl(logp, logq)
    inner = logq.detach()
    blend = torch.lerp(floored(inner), floored(logp), t)
    blend = blend.masked_fill(torch.isneginf(inner) & torch.isneginf(logp), -torch.inf)
    target = torch.log_softmax(blend, -1)
    # a student that equals the teacher must be at 0 exactly, which the log-softmax's rounding would break
    same = (inner == logp).all(-1, keepdim=True)
    return relative_entropy(torch.where(same, inner, target), logq)
