"""How a divergence states its gradient beside its formula. n rows, s support columns; p = teacher, q = student.

The gradient of a row's divergence D to the student's logits is g = h - q sum(h), where h_v = dD / d log q_v with log q
taken as free; with h = q f it is g = q (f - E_q f). A closed form computes D and g together from what the loss has at
hand, without autograd.

A number of each row is a column [n, 1], which can be added to and multiplied with the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from selectkd.objective.divergences.record import record_of

Column = Float[Tensor, "n 1"]
"""A number of each row."""


@dataclass
class Block:
    """Rows as the closed forms see them, every entry finite: log p = zp - norm_p, log q = zq - norm_q.

    zp, zq: logits; p, q: their softmaxes, read only; norm_q, norm_p: the log-sum-exps of zq and zp in
    fp64, true to the sums that q and p have (1 but for rounding). zp, zq and spare may be overwritten. out receives the
    gradient, which is still to be multiplied by ``factor``; it may be the memory of zq, so it is written last.
    """

    zp: Float[Tensor, "n s"]
    zq: Float[Tensor, "n s"]
    norm_q: Column
    norm_p: Column
    p: Float[Tensor, "n s"]
    q: Float[Tensor, "n s"]
    out: Float[Tensor, "n s"]
    spare: Float[Tensor, "n s"]
    factor: float = 1.0

    def log_ratio(self) -> Float[Tensor, "n s"]:
        """log q - log p, in ``spare``."""
        return torch.sub(self.zq, self.zp, out=self.spare).sub_((self.norm_q - self.norm_p).to(self.zq.dtype))

    def excess(self, out: Float[Tensor, "n s"]) -> Column:
        """sum (q - p), with q - p left in ``out``.

        0 but for rounding; with it a relative entropy sum p log(p / q) becomes sum p log(p / q) - p + q, whose error is
        of second order in p - q as the value is.
        """
        return total(torch.sub(self.q, self.p, out=out))

    def take_logp(self) -> tuple[Float[Tensor, "n s"], Column]:
        """log p in the memory of zp, once, and what rounding norm_p added to all entries of a row alike."""
        return _minus(self.zp, self.norm_p)

    def take_logq(self) -> tuple[Float[Tensor, "n s"], Column]:
        """log q in the memory of zq, once, and what rounding norm_q added to all entries of a row alike."""
        return _minus(self.zq, self.norm_q)


def total(x: Float[Tensor, "n s"]) -> Column:
    """The sum of each row."""
    return x.sum(-1, keepdim=True)


def _minus(logits: Tensor, norm: Column) -> tuple[Tensor, Column]:
    rounded = norm.to(logits.dtype)
    return logits.sub_(rounded), (norm - rounded).to(logits.dtype)


ClosedForm = Callable[..., Column]
"""(block, **params) -> D; the gradient to the student's logits over block.factor is left in block.out."""


def closed_form_of(divergence: Callable[..., Tensor]) -> Callable[[Block], Column] | None:
    """The closed form a divergence states, with the parameters bound to the divergence; None where it has none."""
    record, params = record_of(divergence)
    return None if record.closed_form is None else functools.partial(record.closed_form, **params)


def dot(a: Float[Tensor, "n s"], b: Float[Tensor, "n s"], out: Float[Tensor, "n s"]) -> Column:
    """sum_v a b; the products are left in ``out``, which may be a or b."""
    return total(torch.mul(a, b, out=out))


def centre(block: Block, f: Float[Tensor, "n s"], factor: float = 1.0) -> Column:
    """Leaves g = factor * q (f - E_q f) in ``block.out``, overwriting f, and zp or zq beside it; returns E_q f.

    Subtracted before it is multiplied: where f is nearly constant, q f - q E_q f would lose its digits.
    """
    mean = dot(block.q, f, block.out if f is block.zp else block.zp)
    torch.mul(f.sub_(mean), block.q, out=block.out)
    block.factor = factor
    return mean


def project(block: Block, h: Float[Tensor, "n s"]) -> None:
    """Leaves g = h - q sum(h) in ``block.out``."""
    torch.addcmul(h, block.q, total(h), value=-1.0, out=block.out)
