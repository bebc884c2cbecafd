"""From logits to a token: temperature, top-k, top-p, and a draw from a uniform number. b texts, v vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selectkd.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a distribution is shaped before a draw: temperature, then the top_k best, then the nucleus of mass top_p.

    temperature 0 is the best token (the first, where several are best). A nucleus is the fewest best tokens whose mass
    reaches top_p, so it holds at least one. Source: Holtzman et al. (arXiv 1904.09751) for top_p.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if (
            not self.temperature >= 0
            or not 0 < self.top_p <= 1
            or (self.top_k is not None and self.top_k < 1)
        ):
            raise ConfigError(
                f"{self} does not describe a distribution to sample from. Use temperature >= 0, 0 < top_p <= 1 and "
                "top_k >= 1."
            )

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution a token is drawn from, [b, v] fp32, from logits [b, v].

        >>> import torch
        >>> Sampling(top_p=0.6).probabilities(torch.tensor([[0.5, 0.3, 0.2]]).log()).tolist()[0][2]
        0.0
        """
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = logits if self.temperature == 1.0 else logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            edge = logits.topk(self.top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < edge, -torch.inf)
        p = torch.softmax(logits, -1)
        if self.top_p < 1.0:
            best, order = p.sort(dim=-1, descending=True, stable=True)
            outside = (best.double().cumsum(-1) - best) >= self.top_p
            p = p.scatter(-1, order, best.masked_fill(outside, 0.0))
            p = p / p.sum(-1, keepdim=True)
        return p


def drawn(p: Tensor, uniform: Tensor) -> Tensor:
    """The token of each row of p [b, v] at a uniform number in (0, 1), [b]: the inverse of the cumulative mass.

    Never a token of probability 0.

    >>> import torch
    >>> drawn(torch.tensor([[0.5, 0.0, 0.5]] * 2), torch.tensor([0.4, 0.6])).tolist()
    [0, 2]
    """
    mass = p.double().cumsum(
        -1
    )  # in fp32 the sum of 50,000 terms would be off by more than a small probability
    token = torch.searchsorted(mass, uniform.double()[:, None] * mass[:, -1:], right=True)
    return token.clamp(max=p.shape[-1] - 1)[:, 0]
