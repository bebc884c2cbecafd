"""Losses that look at the token of the text: (logp [n, s], logq [n, s], column [n]) -> [n]. LABEL_LOSSES names them.

n rows, s support columns; p teacher, q student; column: where the text's token y stands, -1 where the support has no
place for it (such a row costs 0). They are no divergences: ``cross_entropy`` is not 0 at p = q, and
``sampled_reverse_kl`` can be negative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.divergences.from_top_k import Exactness
from selectkd.objective.divergences.kl import LOG_FLOOR, relative_entropy
from selectkd.objective.divergences.record import states
from selectkd.objective.registry import name_in

IN_TAIL = Exactness(
    "refused", "it asks for the probability of the text's own token, which K tokens and a tail need not have"
)


@states(from_top_k=IN_TAIL)
def cross_entropy(
    logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"], column: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Cross-entropy of the text's token, -log q(y); p is not read, so that a verifier alone brings the teacher in.

    In [0, inf) nats. Source: SeqKD (Kim and Rush 2016), on text that the teacher wrote.

    >>> import torch
    >>> q = torch.tensor([[0.25, 0.75]])
    >>> round(cross_entropy(q.log(), q.log(), torch.tensor([1])).item(), 4)
    0.2877
    """
    return torch.where(column >= 0, -_at(logq, column), 0.0)


@states(from_top_k=IN_TAIL)
def sampled_reverse_kl(
    logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"], column: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """log q(y) - log p(y), with the gradient A * grad log q(y), A = log q(y) - log p(y) held constant.

    For y ~ q its mean is the reverse KL and its gradient the reverse KL's, estimated from the drawn token alone; in
    (-inf, inf) nats. Source: on-policy distillation with the sampled token's log-ratio as an advantage, coefficient
    1, discount 0.

    >>> import torch
    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> round(sampled_reverse_kl(p.log(), q.log(), torch.tensor([1])).item(), 4)
    0.4055
    """
    log_q = _at(logq, column)
    advantage = (log_q - _at(logp, column)).detach().nan_to_num(posinf=-LOG_FLOOR, neginf=LOG_FLOOR)
    return torch.where(column >= 0, advantage * (1.0 + log_q - log_q.detach()), 0.0)


@states(from_top_k=IN_TAIL)
def decoupled_kl(
    logp: Float[Tensor, "n s"],
    logq: Float[Tensor, "n s"],
    column: Int[Tensor, " n"],
    *,
    target: float = 1.0,
    rest: float = 1.0,
) -> Float[Tensor, " n"]:
    """target * TCKD + rest * NCKD: the binary KL of y against all else, and the KL of all else renormalised.

    TCKD = p_y log(p_y / q_y) + (1 - p_y) log((1 - p_y) / (1 - q_y)); NCKD = sum_{v != y} a_v log(a_v / b_v) with
    a = p / (1 - p_y), b = q / (1 - q_y), 0 where the teacher leaves nothing. KL(p || q) = TCKD + (1 - p_y) NCKD. In
    [0, inf) nats, 0 at p = q. Source: ATKD (arXiv 2402.11890), section 2; DKD (arXiv 2203.08679), equation 7.

    >>> import torch
    >>> p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.5, 0.4, 0.1]])
    >>> round(decoupled_kl(p.log(), q.log(), torch.tensor([0])).item(), 4)  # TCKD is 0 here
    0.2231
    """
    if target < 0 or rest < 0:
        raise ConfigError(f"decoupled_kl: target = {target} and rest = {rest} must be 0 or more.")
    place = column.clamp(min=0)[:, None]  # [n, 1]
    others_p, rest_p = _others(logp, place)
    others_q, rest_q = _others(logq, place)
    loss = torch.zeros_like(logp[:, 0])
    if rest:
        nothing = torch.isneginf(rest_p)[:, 0]
        loss = loss + rest * torch.where(nothing, 0.0, relative_entropy(others_p, others_q))
    if target:
        binary_p = torch.cat([logp.gather(1, place), rest_p], 1)  # [n, 2]
        binary_q = torch.cat([logq.gather(1, place), rest_q], 1)
        loss = loss + target * relative_entropy(binary_p, binary_q)
    return torch.where(column >= 0, loss, 0.0)


def _others(
    log_a: Float[Tensor, "n s"], place: Int[Tensor, "n 1"]
) -> tuple[Float[Tensor, "n s"], Float[Tensor, "n 1"]]:
    """All but one column, renormalised (-inf in its place), and the logarithm of their mass; -inf where there is
    none.
    """
    others = log_a.scatter(1, place, -torch.inf)
    empty = torch.isneginf(others).all(-1, keepdim=True)  # [n, 1]
    mass = torch.logsumexp(others.masked_fill(empty, 0.0), -1, keepdim=True)
    return (others - mass).masked_fill(empty, -torch.inf), mass.masked_fill(empty, -torch.inf)


def _at(log_a: Float[Tensor, "n s"], column: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    return log_a.gather(-1, column.clamp(min=0)[:, None])[:, 0]


LABEL_LOSSES: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "cross_entropy": cross_entropy,
        "sampled_reverse_kl": sampled_reverse_kl,
        "decoupled_kl": decoupled_kl,
    }
)


def reads_label(divergence: Any) -> bool:
    """Whether a divergence is one of LABEL_LOSSES, its parameters bound or not: it takes the label's column too."""
    return name_in(LABEL_LOSSES, divergence) is not None
