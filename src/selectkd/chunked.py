"""The fused loss: head product, objective and gradient over chunks of rows, so that no [n, v] tensor ever exists.

n rows, c rows of a chunk, b rows of a block, v vocabulary, d student width. A chunk is as large as the matrix
products like it and holds one [c, v] tensor a model; a block is as small as the caches like it, and only blocks see
elementwise work. The gradient is taken in the forward pass, chunk by chunk; backward only scales it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selectkd.block import Rows, Settings, for_verifier, has_closed_form, judge
from selectkd.objective import Objective
from selectkd.rows import Head, Scratch, TeacherRows
from selectkd.spans import AlignedChunk

CHUNK_ROWS = 256
"""Rows of a chunk: each chunk costs the head's gradient one pass over [v, d], and 256 rows make that small (measured:
128 rows cost 7% more time)."""
CHUNK_ENTRIES = 1 << 26
"""Entries of a chunk, [c, v], at most: 256 MiB in fp32 for each model."""
BLOCK_ENTRIES = 3 << 17
"""Entries of a block, [b, v]: the six buffers of a closed form, 1.5 MiB each, stay in the third-level cache."""
AUTOGRAD_ENTRIES = 1 << 17
"""The same where autograd keeps some forty temporaries of a block."""
PIECE = 2048
"""Vocabulary rows of a bf16 product at a time: mixed-precision addition is slow on more than the cache holds."""
ROWS = ("acceptance", "divergence", "weight", "overlap", "unverified")


@dataclass(frozen=True)
class Work:
    """Everything of one call but the tensors with gradients."""

    teacher: TeacherRows
    objective: Objective
    uniform: Tensor  # [n, r]
    row_scale: Tensor  # [n]
    temperature: float
    chunk: int
    labels: Tensor | None  # [n]
    sequence: Tensor | None  # [n]
    acceptance: Tensor | None = None  # [n], from the first pass

    def rows(self, chunk: slice, block: slice) -> Rows:
        """What the rows of a block of a chunk need beside their logits."""
        here = slice(chunk.start + block.start, chunk.start + block.stop)
        label, sequence, acceptance = (
            None if x is None else x[here] for x in (self.labels, self.sequence, self.acceptance)
        )
        return Rows(self.uniform[here], self.row_scale[here], label, sequence, acceptance)


def chunk_rows(n: int, width: int, chunk: int | None) -> int:
    """Rows of a chunk: what the caller said, else what CHUNK_ENTRIES leaves room for."""
    return max(1, min(n, chunk if chunk is not None else max(32, min(CHUNK_ROWS, CHUNK_ENTRIES // width))))


def cuts(start: int, stop: int, size: int) -> Iterator[slice]:
    """start ... stop in pieces of ``size``."""
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


@torch.no_grad()
def first_pass(hidden: Tensor, head: Head, work: Work, width: int) -> Tensor:
    """The acceptance of every row, [n], from an objective that ranks the batch: scores by chunks, then its rule."""
    selector = work.objective.verifier
    scores, scratch = [], Scratch()
    settings = Settings(work.objective, head, work.temperature, wants_gradient=False, wants_bias=False)
    for rows in cuts(0, hidden.shape[0], work.chunk):
        raw = head.raw(hidden[rows], width, out=scratch.of(work, work.chunk, width, head.weight))
        teacher = work.teacher.open(rows, width, scratch)
        beside = work.teacher.reference
        reference = None if beside is None else beside.open(rows, width, scratch)
        for block in cuts(0, raw.shape[0], max(1, AUTOGRAD_ENTRIES // width)):
            at = work.rows(rows, block)
            pair = for_verifier(raw, block, teacher, at, settings)
            if reference is not None:
                pair = replace(pair, logr=for_verifier(raw, block, reference, at, settings).logp)
            score = selector.score(pair, at.uniform)  # [b, m]
            if pair.finite is not None:
                score = torch.where(pair.finite[:, None], score, torch.nan)
            scores.append(score)
    sequence = work.sequence
    if sequence is None:
        sequence = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    return selector.keep(torch.cat(scores), sequence)


class ChunkedLoss(torch.autograd.Function):
    """sum_i row_scale_i * weight_i * divergence_i, with its gradients to hidden, weight, bias and ``later`` [n]: what
    the tokens after each row's first one have, where the teacher is aligned by spans.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        later: Tensor | None,
        head: Head,
        work: Work,
    ) -> tuple[Tensor, ...]:
        wants_hidden, wants_weight, wants_bias, wants_later = ctx.needs_input_grad[:4]
        wants_any = wants_hidden or wants_weight or wants_bias
        weight = weight.detach()
        leaf_bias = None if bias is None else bias.detach().requires_grad_(wants_bias)
        head = replace(head, weight=weight, bias=leaf_bias)
        width = work.teacher.shared_width(head.width)
        fp = torch.float64 if weight.dtype == torch.float64 else torch.float32
        n = hidden.shape[0]

        loss = torch.zeros((), dtype=fp, device=hidden.device)
        seen = {name: torch.empty(n, dtype=fp, device=hidden.device) for name in ROWS}
        bad = torch.zeros((), dtype=fp, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # fp32 throughout: a sum of bf16 products kept in bf16 is worse than the plain program
        grad_weight = torch.empty(weight.shape, dtype=fp, device=weight.device) if wants_weight else None
        if grad_weight is not None:
            grad_weight[width if n else 0 :].zero_()
        grad_bias = (
            torch.zeros(bias.shape, dtype=fp, device=weight.device)
            if wants_bias and bias is not None
            else None
        )
        grad_later = torch.zeros_like(later) if wants_later and later is not None else None

        settings = Settings(work.objective, head, work.temperature, wants_any, wants_bias)
        scratch = Scratch()
        for rows in cuts(0, n, work.chunk):
            chunk = hidden[rows].detach()  # [c, d]
            with torch.no_grad():
                # [c, v], overwritten by its gradient block by block
                raw = head.raw(chunk, width, out=scratch.of(work, work.chunk, width, weight))
            teacher = work.teacher.open(rows, width, scratch)
            entries = BLOCK_ENTRIES if has_closed_form(settings, teacher) else AUTOGRAD_ENTRIES
            widest = max(width, teacher.width) if isinstance(teacher, AlignedChunk) else width
            kernels = kernels_for(raw, teacher, settings)
            size = raw.shape[0] if kernels is not None else max(1, entries // widest)
            for block in cuts(0, raw.shape[0], size):
                at = work.rows(rows, block)
                here = slice(rows.start + block.start, rows.start + block.stop)
                if later is not None:
                    at = at._replace(later=later.detach()[here].requires_grad_(wants_later))
                if kernels is not None:
                    judged = kernels.judge(raw, teacher, at, settings)
                else:
                    judged = judge(raw, block, teacher, at, settings, scratch)
                loss += judged.loss
                bad += judged.bad
                for name in ROWS:
                    seen[name][here] = getattr(judged, name)
                if grad_bias is not None and judged.grad_bias is not None:
                    grad_bias[: judged.grad_bias.shape[0]] += judged.grad_bias
                if grad_later is not None and judged.grad_later is not None:
                    grad_later[here] = judged.grad_later
            if wants_any:
                kept = rows_with_gradient(seen["weight"][rows]) if work.objective.drops_rows else None
                gradient = raw if kept is None else raw[kept]
                inputs = (chunk if kept is None else chunk[kept]).to(weight.dtype)
                if grad_hidden is not None:
                    part = gradient @ weight[:width]
                    if kept is None:
                        grad_hidden[rows] = part.to(hidden.dtype)
                    else:
                        grad_hidden[rows] = 0
                        grad_hidden[rows][kept] = part.to(hidden.dtype)
                if grad_weight is not None:
                    add_product(grad_weight[:width], gradient, inputs, first=rows.start == 0)

        # held here and not by save_for_backward: backward hands them over, so the head's gradient exists once
        ctx.gradients = [grad_hidden, grad_weight, grad_bias, grad_later]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, later)]
        rows_out = [seen[name] for name in ROWS]
        ctx.mark_non_differentiable(bad, *rows_out)
        return (loss, bad, *rows_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the distillation loss was already backpropagated; call distillation_loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        plain = (
            grad_loss.device.type == "cpu" and grad_loss.item() == 1.0
        )  # elsewhere a look would cost a sync
        for i, dtype in enumerate(ctx.dtypes):
            if gradients[i] is not None:
                scaled = gradients[i] if plain else gradients[i].mul_(grad_loss.to(gradients[i].dtype))
                gradients[i] = scaled.to(dtype)
        return (*gradients, None, None)


def kernels_for(raw: Tensor, teacher: Any, settings: Settings) -> Any:
    """The module of kernels where they do this work: on an accelerator, with Triton there; None for ``block.judge``."""
    if raw.device.type == "cpu" or importlib.util.find_spec("triton") is None:
        return None
    from selectkd import kernels

    return kernels if kernels.claims(settings, teacher) else None


def rows_with_gradient(weight: Tensor) -> Tensor | None:
    """The rows of a chunk whose weight is not 0, so that the others cost no product; None means all of them."""
    kept = weight.nonzero()[:, 0]
    return None if kept.shape[0] == weight.shape[0] else kept


def add_product(total: Tensor, gradient: Tensor, inputs: Tensor, *, first: bool) -> None:
    """total [v, d] += gradient^T [v, c] inputs [c, d]; the first chunk writes instead of adding to zeros.

    Of a bf16 product only PIECE rows exist at a time, added in fp32 while they are in the cache.
    """
    if gradient.dtype == total.dtype:
        if first:
            torch.mm(gradient.t(), inputs, out=total)
        else:
            torch.addmm(total, gradient.t(), inputs, out=total)
        return
    for piece in cuts(0, total.shape[0], PIECE):
        part = gradient[:, piece].t() @ inputs
        if first:
            total[piece].copy_(part)
        else:
            total[piece].add_(part)
