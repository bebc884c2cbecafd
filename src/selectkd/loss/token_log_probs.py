"""The log-probability of given tokens through a head, by chunks of rows. n rows, c rows of a chunk, v vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selectkd.loss.by_device import chunk_rows
from selectkd.loss.chunks import differentiable_once, untraced
from selectkd.loss.head import Head, product_dtype, wide
from selectkd.loss.products import HeadGradient, cuts
from selectkd.loss.teacher_rows import Scratch


@untraced
def token_log_probs(
    hidden: Float[Tensor, "n d"],
    head: Float[Tensor, "v d"] | Head,
    token: Int[Tensor, " n"],
    *,
    dead: Bool[Tensor, " v"] | None = None,
    chunk: int | None = None,
    products: torch.dtype | None = None,
) -> Float[Tensor, " n"]:
    """log softmax(head(hidden))[token] of each row, [n], with gradients to hidden and to the head's weight and bias.

    Equals ``log_softmax(head.logits(hidden), -1).gather(-1, token)``, but only [c, v] exists at a time: the logits are
    computed again for the gradient. dead: rows of the head that stand for no token, left out of the sum. products: the
    dtype of the head's products, default ``product_dtype``.

    >>> import torch
    >>> token_log_probs(torch.eye(2), torch.zeros(4, 2), torch.tensor([0, 3])).exp().tolist()
    [0.25, 0.25]
    """
    head = Head.of(head)
    products = product_dtype(head.weight) if products is None else products
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogProbs.apply(hidden, head.weight, head.bias, head, token, dead, chunk, products)  # type: ignore[no-any-return]


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, token: Tensor,
        dead: Tensor | None, chunk: int | None, products: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, token, dead)
        ctx.head, ctx.products = head, products
        ctx.rows = chunk_rows(hidden.shape[0], head.width, chunk, products, hidden.device)
        head = replace(head, weight=weight.detach().to(products))
        fp = wide(weight.dtype)
        out = torch.empty(hidden.shape[0], dtype=fp, device=hidden.device)
        scratch = Scratch()
        for rows in cuts(0, hidden.shape[0], ctx.rows):
            logits = _logits(head, hidden[rows], dead, scratch, ctx.rows)
            out[rows] = logits.gather(-1, token[rows, None])[:, 0] - logits.logsumexp(-1)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        differentiable_once()
        hidden, weight, bias, token, dead = ctx.saved_tensors
        of_weight, weight = weight.dtype, weight.detach().to(ctx.products)
        head: Head = replace(ctx.head, weight=weight, bias=bias)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        products = -(-hidden.shape[0] // ctx.rows)
        head_gradient = HeadGradient(weight, head.width, products, of_weight) if wants_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=grad.dtype, device=bias.device) if wants_bias else None
        scratch = Scratch()
        for rows in cuts(0, hidden.shape[0], ctx.rows):
            logits = _logits(head, hidden[rows], dead, scratch, ctx.rows)
            slope = 1.0 if head.softcap is None else 1.0 - (logits / head.softcap).square()
            # d log q(y) / d z = onehot(y) - q
            gradient = torch.softmax(logits, -1).neg_()
            gradient.scatter_add_(-1, token[rows, None], torch.ones_like(gradient[:, :1]))
            gradient.mul_(grad[rows, None]).mul_(slope * head.scale)
            if dead is not None:
                gradient.masked_fill_(dead, 0.0)
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            gradient = gradient.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (gradient @ weight).to(hidden.dtype)
            if head_gradient is not None:
                head_gradient.add(gradient, hidden[rows].to(weight.dtype))
        of_head = None if head_gradient is None else head_gradient.total
        of_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, of_head, of_bias, None, None, None, None, None


@torch.no_grad()
def _logits(head: Head, hidden: Tensor, dead: Tensor | None, scratch: Scratch, rows: int) -> Tensor:
    """The finished logits of a chunk, -inf where dead."""
    raw = head.raw(hidden, out=scratch.of(head.weight, rows, head.width, head.weight))
    logits = head.finish(raw)
    return logits if dead is None else logits.masked_fill(dead, -torch.inf)
