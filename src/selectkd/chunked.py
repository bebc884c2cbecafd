"""The fused loss: head product, objective and gradient over chunks of rows, so that no [n, v] tensor ever exists.

n rows, c rows of a chunk, b rows of a block, v vocabulary, d student width. A chunk is as large as the matrix
products like it and holds one [c, v] tensor a model; a block is as small as the caches like it, and only blocks see
elementwise work. The gradient is taken in the forward pass, chunk by chunk; backward only scales it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selectkd.objective import Objective
from selectkd.pair import TokenPair
from selectkd.rows import Head, PairOf, Scratch, TeacherRows

CHUNK_ROWS = 256
CHUNK_ENTRIES = 1 << 22
"""Entries of a chunk, [c, v]: 16 MiB in fp32 for each model. At most CHUNK_ROWS rows, at least 32: fewer cost the
head's gradient a pass over [v, d] each."""
BLOCK_ENTRIES = 1 << 17
"""Entries of a block, [b, v]: the forty temporaries of a divergence and its gradient stay in the third-level cache."""


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


ROWS = ("acceptance", "divergence", "weight", "overlap")


def chunk_rows(n: int, width: int, chunk: int | None) -> int:
    """Rows of a chunk: what the caller said, else what CHUNK_ENTRIES leaves room for."""
    return max(1, min(n, chunk if chunk is not None else max(32, min(CHUNK_ROWS, CHUNK_ENTRIES // width))))


def cuts(start: int, stop: int, size: int) -> Iterator[slice]:
    """start ... stop in pieces of ``size``."""
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


class ChunkPairs:
    """The pairs of one chunk: the loss pair, and the pair the verifier sees where its temperature differs."""

    def __init__(self, work: Work, rows: slice, width: int, scratch: Scratch) -> None:
        self.work, self.rows = work, rows
        self.teacher: PairOf = work.teacher.open(rows, width, scratch)
        reference = work.teacher.reference if work.acceptance is None else None
        self.reference = None if reference is None else reference.open(rows, width, scratch)

    def seen_by_verifier(self, block: slice, logits: Tensor) -> TokenPair:
        """The pair at the verification temperature, with labels, sequences and the reference student attached."""
        temperature = self.work.objective.verify_temperature
        pair = self.attach(self.teacher(block, logits, temperature), block)
        if self.reference is not None:
            pair = replace(pair, logr=self.reference(block, logits, temperature).logp)
        return pair

    def for_loss(self, block: slice, logits: Tensor) -> TokenPair:
        """The pair at the temperature of the loss."""
        return self.attach(self.teacher(block, logits, self.work.temperature), block)

    def attach(self, pair: TokenPair, block: slice) -> TokenPair:
        here = slice(self.rows.start + block.start, self.rows.start + block.stop)
        label = None if self.work.labels is None else self.work.labels[here]
        sequence = None if self.work.sequence is None else self.work.sequence[here]
        return replace(pair, label=label, sequence=sequence)


@torch.no_grad()
def first_pass(hidden: Tensor, head: Head, work: Work, width: int) -> Tensor:
    """The acceptance of every row, [n], from an objective that ranks the batch: scores by chunks, then its rule."""
    selector = work.objective.verifier
    scores, scratch = [], Scratch()
    for rows in cuts(0, hidden.shape[0], work.chunk):
        raw = head.raw(hidden[rows], width, out=scratch.of(work, work.chunk, width, head.weight))
        pairs = ChunkPairs(work, rows, width, scratch)
        for block in cuts(0, raw.shape[0], max(1, BLOCK_ENTRIES // width)):
            pair = pairs.seen_by_verifier(block, head.finish(raw[block]))
            here = slice(rows.start + block.start, rows.start + block.stop)
            score = selector.score(pair, work.uniform[here])  # [b, m]
            if pair.finite is not None:
                score = torch.where(pair.finite[:, None], score, torch.nan)
            scores.append(score)
    sequence = work.sequence
    if sequence is None:
        sequence = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    return selector.keep(torch.cat(scores), sequence)


class ChunkedLoss(torch.autograd.Function):
    """sum_i row_scale_i * weight_i * divergence_i, with its gradients to hidden, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, work: Work
    ) -> tuple[Tensor, ...]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
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
        grad_weight = torch.zeros(weight.shape, dtype=fp, device=weight.device) if wants_weight else None
        grad_bias = (
            torch.zeros(bias.shape, dtype=fp, device=weight.device)
            if wants_bias and bias is not None
            else None
        )

        scratch = Scratch()
        for rows in cuts(0, n, work.chunk):
            chunk = hidden[rows].detach()  # [c, d]
            with torch.no_grad():
                # [c, v], overwritten by its gradient block by block
                raw = head.raw(chunk, width, out=scratch.of(work, work.chunk, width, weight))
            pairs = ChunkPairs(work, rows, width, scratch)
            for block in cuts(0, raw.shape[0], max(1, BLOCK_ENTRIES // width)):
                here = slice(rows.start + block.start, rows.start + block.stop)
                leaf = raw[block].to(fp, copy=True).requires_grad_(wants_any)  # [b, v]
                with torch.set_grad_enabled(wants_any):
                    logits = head.finish(leaf)
                    pair = pairs.for_loss(block, logits)
                    verified = None
                    if work.acceptance is None and work.objective.verify_temperature != work.temperature:
                        with torch.no_grad():
                            verified = pairs.seen_by_verifier(block, logits.detach())
                    given = None if work.acceptance is None else work.acceptance[here]
                    judged = work.objective(pair, work.uniform[here], verified=verified, acceptance=given)
                    share = (work.row_scale[here].to(fp) * judged.weight * judged.divergence).sum()
                loss += share.detach()
                if pair.finite is not None:
                    bad += (~pair.finite).sum()
                for name in ROWS:
                    seen[name][here] = getattr(judged, name).detach()
                if wants_any:
                    leaves = [leaf] if leaf_bias is None or not wants_bias else [leaf, leaf_bias]
                    grads = torch.autograd.grad(share, leaves)
                    raw[block] = grads[0]
                    if grad_bias is not None:
                        grad_bias += grads[1]
            if wants_any:
                kept = _rows_with_gradient(seen["weight"][rows], work.objective.beta)
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
                    if weight.dtype == fp:
                        grad_weight[:width].addmm_(gradient.t(), inputs)
                    else:
                        grad_weight[:width] += gradient.t() @ inputs

        # held here and not by save_for_backward: backward hands them over, so the head's gradient exists once
        ctx.gradients = [grad_hidden, grad_weight, grad_bias]
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
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
        for i, dtype in enumerate(ctx.dtypes):
            if gradients[i] is not None:
                gradients[i] = gradients[i].mul_(grad_loss.to(gradients[i].dtype)).to(dtype)
        return (*gradients, None, None)


def _rows_with_gradient(weight: Tensor, beta: float) -> Tensor | None:
    """The rows of a chunk whose weight is not 0, so that the others cost no product; None means all of them.

    Only beta = 0 makes such rows, and only then is it worth looking.
    """
    if beta != 0.0:
        return None
    kept = weight.nonzero()[:, 0]
    return None if kept.shape[0] == weight.shape[0] else kept
