"""The two products that take a chunk's gradient to the hidden states and to the head, dense or over its strong columns.

n rows, c rows of a chunk, v vocabulary, k columns kept, d student width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectkd.loss.head import Head, LogitHead, wide

PIECE = 2048
"""Vocabulary rows of a bf16 product at a time: mixed-precision addition is slow on more than the cache holds."""
COMPENSATED_PIECE = 512
"""The same where each sum passes over five tensors."""
LOOK = 8
"""Rows of a chunk whose absolute values exist at a time while columns are chosen."""
MOST = 0.5
"""Share of the columns above which a product over some of them costs more than the dense one."""


def cuts(start: int, stop: int, size: int) -> Iterator[slice]:
    """start ... stop in pieces of ``size``."""
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


class Strong(NamedTuple):
    """A gradient G [c, v] as its strong columns and what is left: G ~ part at ``ids`` plus rest profile^T elsewhere.

    ids [k]; part [c, k]; rest [c], the sum of a row's other entries; profile [v], how their absolute mass lies over the
    vocabulary, 0 at ids, sum 1.
    """

    ids: Int[Tensor, " k"]
    part: Float[Tensor, "c k"]
    rest: Float[Tensor, " c"]
    profile: Float[Tensor, " v"]


def strong_columns(gradient: Float[Tensor, "c v"], share: float) -> Strong | None:
    """The columns with an entry of at least ``share`` of the largest, in absolute value; None where they are too many.

    Every entry left out is smaller than e = share * max |G|, so their Frobenius norm is below e sqrt(c v), and
    dW = G^T X is off by less than that times the largest singular value of X. For dX = G W it is that of W, but for the
    rank-1 rest, which gives every row of dX back the mass it lost, shaped like the chunk's, and changes this by at most
    |rest| |profile| times the same. Relative to the chunk's largest entry: it follows the divergence's scale.
    Source: the filtering of cut cross-entropy (arXiv 2411.09009), by columns instead of by blocks.
    """
    v = gradient.shape[1]
    fp = wide(gradient.dtype)
    largest, mass = (torch.zeros(v, dtype=fp, device=gradient.device) for _ in range(2))
    total = []
    for rows in cuts(0, gradient.shape[0], LOOK):
        entries = gradient[rows].to(fp)
        total.append(entries.sum(-1))
        entries = entries.abs()
        torch.maximum(largest, entries.amax(0), out=largest)
        mass += entries.sum(0)
    strong = largest >= share * largest.max()  # nan is kept nowhere else but in the dense product
    ids = strong.nonzero()[:, 0]
    if not 0 < ids.shape[0] <= MOST * v:
        return None
    part = gradient[:, ids]
    mass[ids] = 0.0
    profile = mass / mass.sum().clamp(min=torch.finfo(fp).tiny)
    return Strong(ids, part, torch.cat(total) - part.sum(-1, dtype=fp), profile)


def hidden_gradient(
    gradient: Float[Tensor, "c v"], weight: Float[Tensor, "v d"], strong: Strong | None
) -> Float[Tensor, "c d"]:
    """G W; over the strong columns and the rank-1 rest where there are any: [c, d]."""
    if strong is None:
        return gradient @ weight
    tail = strong.profile.to(weight.dtype) @ weight  # [d]
    return torch.addmm(strong.rest.to(weight.dtype)[:, None] * tail, strong.part, weight[strong.ids])


class HeadGradient:
    """The sum of G^T [v, c] X [c, d] over a known number of chunks, ``total`` [v, d] in ``dtype``, default the head's.

    No worse than a sum in fp32 in half its memory, on a processor: below fp32, what each rounding of the total takes
    away is kept in a second tensor of the same dtype and comes back with the next product (Kahan's compensated sum).
    One product or two need no second tensor: they are rounded once. Nor does an fp32 total of bf16 products, as under
    autocast. On an accelerator the sum itself is in fp32, the same memory, and a chunk one product.
    """

    def __init__(self, weight: Tensor, width: int, products: int, dtype: torch.dtype | None = None) -> None:
        self.dtype = weight.dtype if dtype is None else dtype
        self.width, self.narrow = width, weight.dtype.itemsize < 4
        self.at_once = self.narrow and weight.device.type != "cpu"
        summed = torch.float32 if self.at_once and products > 1 else self.dtype
        self._sum = torch.empty_like(weight, dtype=summed, memory_format=torch.contiguous_format)
        self._sum[width if products else 0 :].zero_()
        compensated = summed.itemsize < 4 and products > 2
        self.rest = torch.zeros_like(self._sum[:width]) if compensated else None
        self.piece = PIECE if self.rest is None else COMPENSATED_PIECE
        self.empty = True

    @property
    def total(self) -> Float[Tensor, "v d"]:
        """The sum of the products so far."""
        return self._sum.to(self.dtype)

    def add(
        self, gradient: Float[Tensor, "c v"], inputs: Float[Tensor, "c d"], strong: Strong | None = None
    ) -> None:
        """Adds one chunk's product; below fp32, and over columns, a processor takes a few rows at a time, which stay in
        its cache."""
        total = self._sum[: self.width]
        if strong is not None:
            if self.empty:
                total.zero_()
            for piece in cuts(0, strong.ids.shape[0], strong.ids.shape[0] if self.at_once else self.piece):
                self._add_piece(total, strong.ids[piece], strong.part[:, piece].t() @ inputs)
        elif self.empty and total.dtype == gradient.dtype:
            torch.mm(gradient.t(), inputs, out=total)
        elif not self.narrow:
            torch.addmm(total, gradient.t(), inputs, out=total)
        elif self.at_once:
            add_product(total, gradient.t(), inputs, fresh=self.empty)
        else:
            if self.empty:
                total.zero_()
            for piece in cuts(0, self.width, self.piece):
                self._add_piece(total, piece, gradient[:, piece].t() @ inputs)
        self.empty = False

    def _add_piece(self, total: Tensor, rows: slice | Tensor, product: Tensor) -> None:
        if self.rest is None:
            total[rows] += product
            return
        exact = product.float().add_(total[rows]).add_(self.rest[rows])
        total[rows] = exact.to(total.dtype)
        self.rest[rows] = exact.sub_(total[rows]).to(total.dtype)


class Gradients:
    """What the chunks of a call give hidden states, the head's weight and its bias, each where ``wants`` says so.

    The gradient of the hidden states is rounded to their dtype once backward has scaled it. dtype: of the weight's.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        width: int,
        chunks: int,
        wants: Sequence[bool],
        *,
        dtype: torch.dtype,
    ) -> None:
        weight, bias = head.weight, head.bias
        self.weight, self.width, self.sums = weight, width, wide(weight.dtype)
        self.of_logits = isinstance(head, LogitHead)
        both = torch.promote_types(hidden.dtype, weight.dtype)
        self.hidden = torch.empty_like(hidden, dtype=both) if wants[0] else None
        if self.hidden is not None and self.of_logits:
            self.hidden[:, width:] = 0
        self.head = HeadGradient(weight, width, chunks, dtype) if wants[1] else None
        self.bias = None
        if wants[2] and bias is not None:
            self.bias = torch.zeros(bias.shape, dtype=self.sums, device=weight.device)

    def add(
        self,
        rows: slice,
        gradient: Float[Tensor, "c v"],
        inputs: Float[Tensor, "c d"],
        kept: Int[Tensor, " k"] | None,
        share: float,
    ) -> None:
        """Adds the chunk ``rows``; kept: its rows with a gradient, None for all; share: as of ``strong_columns``."""
        if self.of_logits:
            self._add_logits(rows, gradient, kept)
            return
        if kept is not None:
            gradient, inputs = gradient[kept], inputs[kept]
        inputs = inputs.to(self.weight.dtype)
        strong = strong_columns(gradient, share) if share else None
        if self.hidden is not None:
            part = hidden_gradient(gradient, self.weight[: self.width], strong).to(self.hidden.dtype)
            if kept is None:
                self.hidden[rows] = part
            else:
                self.hidden[rows] = 0
                self.hidden[rows][kept] = part
        if self.head is not None:
            self.head.add(gradient, inputs, strong)
        if self.bias is not None:
            for piece in cuts(0, self.width, PIECE):
                self.bias[piece] += gradient[:, piece].sum(0, dtype=self.sums)

    def _add_logits(
        self, rows: slice, gradient: Float[Tensor, "c v"], kept: Int[Tensor, " k"] | None
    ) -> None:
        """Logits that are given have the chunk's gradient itself; no other row has one."""
        if self.hidden is None:
            return
        here = self.hidden[rows, : self.width]
        if kept is None:
            here.copy_(gradient)
        else:
            here.zero_()
            here[kept] = gradient[kept].to(here.dtype)

    def totals(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden states, weight and bias."""
        return self.hidden, None if self.head is None else self.head.total, self.bias


def add_product(
    total: Float[Tensor, "v d"], a: Float[Tensor, "v c"], b: Float[Tensor, "c d"], *, fresh: bool
) -> None:
    """total += a b, or total = a b where ``fresh``: narrow a and b on an accelerator, total in fp32 and not rounded on
    the way where torch has products into fp32."""
    if not writes_fp32(a.device.type):
        product = a @ b
        total.copy_(product) if fresh else total.add_(product)
    elif fresh:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@cache
def writes_fp32(kind: str) -> bool:
    """Whether a kind of device has products of narrow matrices written in fp32: CUDA's."""
    return kind == "cuda" and torch.version.hip is None
