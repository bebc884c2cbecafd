"""A divergence at a temperature of each row's own: AdaKD's. n rows, s support columns; p teacher, q student."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.divergences.from_top_k import NO_DIRECTION
from selectkd.objective.divergences.kl import forward_kl, reverse_kl
from selectkd.objective.divergences.record import states
from selectkd.objective.pair import hellinger_distance

TEMPERED = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}


@states(from_top_k=NO_DIRECTION)
def token_temperature(
    logp: Float[Tensor, "n s"],
    logq: Float[Tensor, "n s"],
    *,
    of: str = "forward_kl",
    scale: float = 0.5,
    middle: float = 0.3,
) -> Float[Tensor, " n"]:
    """T^2 D(p_T || q_T), D forward or reverse KL, T = exp(-scale tanh(log(H(p, q) / middle))) without gradient.

    H is the Hellinger distance: rows that differ more than ``middle`` are sharpened, down to T = exp(-scale), others
    softened, up to exp(scale). In [0, inf), 0 at p = q. scale = 0 is D itself. scale is the released code's; it takes
    for ``middle`` the median of the rows it keeps, which no row knows alone, and here it is a number.
    ConfigError for another D.
    Source: AdaKD (arXiv 2510.11615), inverse difficulty temperature scaling, and its authors' code.

    >>> import torch
    >>> p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> token_temperature(p, q, scale=0.0).item() == forward_kl(p, q).item()
    True
    """
    if of not in TEMPERED or not scale >= 0 or not middle > 0:
        raise ConfigError(
            f"token_temperature(of={of!r}, scale={scale}, middle={middle}): of is forward_kl or reverse_kl, scale is 0 "
            "or more, and middle is above 0."
        )
    if scale == 0:
        return TEMPERED[of](logp, logq)
    with torch.no_grad():
        square = (hellinger_distance(logp, logq) / middle).square()
        # tanh(log r) = (r^2 - 1) / (r^2 + 1), which has a value at r = 0
        temperature = torch.exp(-scale * (square - 1.0) / (square + 1.0))[:, None]
    p, q = (torch.log_softmax(one / temperature, -1) for one in (logp, logq))
    return temperature[:, 0].square() * TEMPERED[of](p, q)
