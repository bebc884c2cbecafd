"""The alpha-beta family. n rows, s support columns; p = teacher, q = student; natural log."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.divergences.closed_form import Block, Column, project
from selectkd.objective.divergences.from_top_k import MERGED, NO_DIRECTION, REVERSE, Exactness
from selectkd.objective.divergences.kl import floored, reverse_kl
from selectkd.objective.divergences.record import states


def power_gap(log_a: Float[Tensor, "n s"], log_b: Float[Tensor, "n s"], power: float) -> Float[Tensor, "n s"]:
    """(b^power - a^power) / power, [n, s]; log b - log a at power 0, its limit. No overflow for power >= 0."""
    gap = log_b - log_a
    if power == 0.0:
        return gap
    larger = torch.maximum(log_a, log_b)
    return -torch.sign(gap) * torch.exp(power * larger) * torch.expm1(-power * gap.abs()) / power


def _of_alpha_beta(alpha: float = 0.2, beta: float = 0.7) -> Exactness:
    """An f-divergence where alpha + beta = 1, reverse KL at (0, 1), without a direction elsewhere."""
    if (alpha, beta) == (0.0, 1.0):
        return REVERSE
    return MERGED if abs(alpha + beta - 1.0) < 1e-9 else NO_DIRECTION


def _alpha_beta(block: Block, *, alpha: float = 0.2, beta: float = 0.7) -> Column:
    """h = (q^(alpha + beta) - p^alpha q^beta) / alpha; q^beta (log q - log p) at alpha = 0, its limit."""
    logp, logq = (
        (z.double() - norm).to(z.dtype) for z, norm in ((block.zp, block.norm_p), (block.zq, block.norm_q))
    )
    value = alpha_beta(logp, logq, alpha=alpha, beta=beta)[:, None]
    student = torch.mul(logq, beta, out=block.spare).exp_()  # q^beta
    logs = logp, logq
    a, b = logs if alpha == 0.0 else (x.mul_(alpha).exp_().div_(alpha) for x in logs)
    project(block, b.sub_(a).mul_(student))
    return value


@states(closed_form=_alpha_beta, from_top_k=_of_alpha_beta)
def alpha_beta(
    logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"], *, alpha: float = 0.2, beta: float = 0.7
) -> Float[Tensor, " n"]:
    """Alpha-beta divergence, -1/(ab) sum[p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], a = alpha, b = beta.

    In [0, inf), 0 at p = q; alpha, beta >= 0, not both 0; continuous towards (1, 0) = forward KL and (0, 1) = reverse
    KL. Defaults .2 and .7, the paper's for instruction following.
    Source: ABKD (arXiv 2505.04560), definition of D_AB.

    >>> import torch
    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> round(alpha_beta(p.log(), q.log(), alpha=1.0, beta=0.0).item(), 4)
    0.1438
    """
    if alpha < 0 or beta < 0 or alpha + beta <= 0:
        raise ConfigError(f"alpha = {alpha} and beta = {beta} must be 0 or more, and not both 0.")
    if (alpha, beta) == (0.0, 1.0):
        return reverse_kl(logp, logq)
    # D_{a,b}(p, q) = D_{b,a}(q, p): divide by the larger of the two, so that the smaller may go to 0
    a, b = max(alpha, beta), min(alpha, beta)
    log_a, log_b = floored(logp), floored(logq)
    if beta > alpha:
        log_a, log_b = log_b, log_a
    terms = power_gap(log_a, log_b, a + b) - torch.exp(a * log_a) * power_gap(log_a, log_b, b)
    return (terms / a).clamp(min=0.0).sum(-1)
