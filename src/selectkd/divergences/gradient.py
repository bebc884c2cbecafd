"""How a divergence states its gradient beside its formula. n rows, s support columns; p = teacher, q = student.

The gradient of a row's divergence D to the student's logits is g = h - q sum(h), where h_v = dD / d log q_v with log q
taken as free; with h = q f it is g = q (f - E_q f). A closed form computes D and g together from what the loss has at
hand, without autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Block:
    """A block of rows as the closed forms see it, every entry finite: log p = zp - norm_p, log q = zq - norm_q.

    zp, zq [n, s]: logits; p, q [n, s]: their softmaxes, read only; norms [2, n]: the log-sum-exps of zq and zp in fp64,
    true to the sums that q and p have (1 but for rounding). zp, zq and spare may be overwritten. out receives the
    gradient; it may be the memory of zq, so it is written last.
    """

    zp: Float[Tensor, "n s"]
    zq: Float[Tensor, "n s"]
    norms: Float[Tensor, "2 n"]
    p: Float[Tensor, "n s"]
    q: Float[Tensor, "n s"]
    out: Float[Tensor, "n s"]
    spare: Float[Tensor, "n s"]

    @property
    def norm_q(self) -> Float[Tensor, " n"]:
        return self.norms[0]

    @property
    def norm_p(self) -> Float[Tensor, " n"]:
        return self.norms[1]

    def log_ratio(self) -> Float[Tensor, "n s"]:
        """log q - log p, in ``spare``."""
        shift = (self.norms[0] - self.norms[1]).to(self.zq.dtype)
        return torch.sub(self.zq, self.zp, out=self.spare).sub_(shift[:, None])

    def excess(self, out: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
        """sum (q - p), with q - p left in ``out``.

        0 but for rounding; with it a relative entropy sum p log(p / q) becomes sum p log(p / q) - p + q, whose error is
        of second order in p - q as the value is.
        """
        return torch.sub(self.q, self.p, out=out).sum(-1)

    def take_logp(self) -> tuple[Float[Tensor, "n s"], Float[Tensor, " n"]]:
        """log p in the memory of zp, once, and what rounding norm_p added to all entries of a row alike."""
        norms, lost = self._rounded
        return self.zp.sub_(norms[1]), lost[1]

    def take_logq(self) -> tuple[Float[Tensor, "n s"], Float[Tensor, " n"]]:
        """log q in the memory of zq, once, and what rounding norm_q added to all entries of a row alike."""
        norms, lost = self._rounded
        return self.zq.sub_(norms[0]), lost[0]

    @cached_property
    def _rounded(self) -> tuple[Float[Tensor, "2 n 1"], Float[Tensor, "2 n"]]:
        """The norms in the dtype of the logits, and what that took from them."""
        rounded = self.norms.to(self.zq.dtype)
        return rounded[:, :, None], (self.norms - rounded).to(self.zq.dtype)


class ClosedForm(Protocol):
    """(block, **params) -> D [n]; the gradient to the student's logits is left in block.out."""

    def __call__(self, block: Block, **params: float) -> Float[Tensor, " n"]: ...


def with_gradient(closed_form: Callable[..., Tensor]) -> Callable[[F], F]:
    """Declares ``closed_form`` as value and gradient of the divergence it decorates; both take the same parameters.

    The contract suite holds the two equal in fp64.
    """

    def declare(divergence: F) -> F:
        divergence.closed_form = closed_form  # type: ignore[attr-defined]
        return divergence

    return declare


def closed_form_of(divergence: Callable[..., Tensor]) -> Callable[[Block], Tensor] | None:
    """The closed form a divergence declares, with the parameters bound to the divergence; None where it has none."""
    function = getattr(divergence, "func", divergence)
    closed_form = getattr(function, "closed_form", None)
    if closed_form is None:
        return None
    params = getattr(divergence, "keywords", {})

    def bound(block: Block) -> Tensor:
        return closed_form(block, **params)

    return bound


def dot(a: Float[Tensor, "n s"], b: Float[Tensor, "n s"], out: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """sum_v a b, [n]; the products are left in ``out``, which may be a or b."""
    return torch.mul(a, b, out=out).sum(-1)


def centre(block: Block, f: Float[Tensor, "n s"], factor: float = 1.0) -> Float[Tensor, " n"]:
    """Leaves g = factor * q (f - E_q f) in ``block.out``, overwriting f, and zp or zq beside it; returns E_q f [n].

    Subtracted before it is multiplied: where f is nearly constant, q f - q E_q f would lose its digits.
    """
    mean = dot(block.q, f, block.out if f is block.zp else block.zp)
    torch.add(mean[:, None] * -factor, f, alpha=factor, out=f)
    torch.mul(f, block.q, out=block.out)
    return mean


def project(block: Block, h: Float[Tensor, "n s"]) -> None:
    """Leaves g = h - q sum(h) in ``block.out``."""
    torch.addcmul(h, block.q, h.sum(-1, keepdim=True), value=-1.0, out=block.out)
