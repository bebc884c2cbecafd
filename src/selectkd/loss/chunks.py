"""The fused loss: head product, objective and gradient over chunks of rows, so that no [n, v] tensor ever exists.

n rows, c rows of a chunk, b rows of a block, v vocabulary, d student width. A chunk is as large as the matrix
products like it and holds one [c, v] tensor a model; a block is as small as the caches like it, and only blocks see
elementwise work. The gradient is taken in the forward pass, chunk by chunk; backward only scales it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from selectkd.loss.block import evaluate_block
from selectkd.loss.block_steps import BlockConfig, BlockInputs, BlockResult, pair_at
from selectkd.loss.by_device import by_kernels, kernels_for, rows_of_block, scored_rows
from selectkd.loss.head import Head, wide
from selectkd.loss.options import LossOptions
from selectkd.loss.products import Gradients, cuts
from selectkd.loss.teacher_rows import Scratch, TeacherRows
from selectkd.objective.objective import Objective

SCALED_ENTRIES = 1 << 22
"""Entries of a gradient in 16 bits that are multiplied in fp32 at a time."""
F = TypeVar("F", bound=Callable[..., Any])
ROWS = ("acceptance", "divergence", "weight", "overlap", "unverified", "kl")


@dataclass(frozen=True)
class LossCall:
    """Everything of one call but the tensors with gradients."""

    teacher: TeacherRows
    objective: Objective
    uniform: Tensor  # [n, r]
    row_scale: Tensor  # [n]
    labels: Tensor | None = None  # [n]
    sequence: Tensor | None = None  # [n]
    acceptance: Tensor | None = None  # [n], the verdicts where a ranking has given them
    options: LossOptions = field(default_factory=LossOptions)
    later: Tensor | None = None  # [n], of the tokens after each span's first
    products: torch.dtype | None = None  # of the student's products; None: the head's own

    @property
    def chunk(self) -> int:
        """Rows of a chunk."""
        assert self.options.chunk is not None  # chosen where the call begins
        return self.options.chunk

    def rows(self, chunk: slice, block: slice) -> BlockInputs:
        """What the rows of a block of a chunk need beside their logits."""
        here = slice(chunk.start + block.start, chunk.start + block.stop)
        columns = (self.labels, self.sequence, self.acceptance, self.later)
        beside = (None if x is None else x[here] for x in columns)
        return BlockInputs(self.uniform[here], self.row_scale[here], *beside)


@torch.no_grad()
def first_pass(hidden: Tensor, head: Head, call: LossCall, width: int) -> Tensor:
    """The acceptance of every row, [n], from an objective that ranks the batch: scores by chunks, then its rule."""
    scores, sequence = scored(hidden, head, call, width), call.sequence
    if sequence is None:
        sequence = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    return call.objective.verifier.keep(scores, sequence)


@torch.no_grad()
def scored(hidden: Tensor, head: Head, call: LossCall, width: int) -> Tensor:
    """The scores of every row, [n, m], from an objective that ranks; nan where the teacher's row is not finite."""
    with torch.autocast(hidden.device.type, enabled=False):
        return _scores(hidden, head, call, width)


def _scores(hidden: Tensor, head: Head, call: LossCall, width: int) -> Tensor:
    selector = call.objective.verifier
    beside = call.teacher.reference
    if beside is not None:  # a reference of fewer ids: all three are compared on what they share
        width = min(width, beside.shared_width(width))
    head = replace(head, weight=head.weight.to(call.products or head.weight.dtype))
    scores, scratch, temperature = [], Scratch(), call.objective.verify_temperature
    config = BlockConfig(call.objective, head, call.options, wants_gradient=False)
    for rows in cuts(0, hidden.shape[0], call.chunk):
        raw = head.raw(hidden[rows], width, out=scratch.of(call, call.chunk, width, head.weight))
        teacher = call.teacher.open(rows, width, scratch)
        reference = None if beside is None else beside.open(rows, width, scratch)
        for block in cuts(0, raw.shape[0], scored_rows(width, raw.device)):
            at = call.rows(rows, block)
            pair = pair_at(temperature, raw, block, teacher, at, config)
            if reference is not None:
                pair = replace(pair, logr=pair_at(temperature, raw, block, reference, at, config).logp)
            score = selector.score(pair, at.uniform)  # [b, m]
            if pair.finite is not None:
                score = torch.where(pair.finite[:, None], score, torch.nan)
            scores.append(score)
    return torch.cat(scores)


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
        call: LossCall,
    ) -> tuple[Tensor, ...]:
        wants = ctx.needs_input_grad[:3]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, later)]
        given, weight = weight.dtype, weight.detach().to(call.products or weight.dtype)
        head = replace(head, weight=weight, bias=bias)  # itself, which is looked at once
        width, n = call.teacher.shared_width(head.width), hidden.shape[0]
        fp = wide(weight.dtype)

        loss = torch.zeros((), dtype=fp, device=hidden.device)
        columns = {name: torch.empty(n, dtype=fp, device=hidden.device) for name in ROWS}
        bad = torch.zeros((), dtype=fp, device=hidden.device)
        gradients = Gradients(hidden, head, width, -(-n // call.chunk), wants, dtype=given)
        grad_later = None
        if later is not None:
            grad_later = torch.zeros_like(later) if ctx.needs_input_grad[3] else None
            call = replace(call, later=later.detach())

        config = BlockConfig(call.objective, head, call.options, any(wants))
        scratch = Scratch()
        for rows in cuts(0, n, call.chunk):
            chunk = hidden[rows].detach()  # [c, d]
            with torch.no_grad():
                # [c, v], overwritten by its gradient block by block
                raw = head.raw(chunk, width, out=scratch.of(call, call.chunk, width, weight))
            result = evaluate_chunk(raw, rows, width, call, config, scratch)
            for name in ROWS:
                values = result._asdict()[name]
                columns[name][rows] = 0.0 if values is None else values
            if grad_later is not None and result.grad_later is not None:
                grad_later[rows] = result.grad_later
            loss += (call.row_scale[rows].to(fp) * result.weight * result.divergence).sum()
            bad += result.bad
            if any(wants):
                # on an accelerator a look at the weights would wait; there the kernels do not read such rows
                looks = call.objective.drops_rows and raw.device.type == "cpu"
                kept = rows_with_gradient(result.weight) if looks else None
                gradients.add(rows, raw, chunk, kept, call.options.gradient_filter)

        # held here and not by save_for_backward: backward hands them over, so the head's gradient exists once
        ctx.gradients = [*gradients.totals(), grad_later]
        rows_out = [columns[name] for name in ROWS]
        ctx.mark_non_differentiable(bad, *rows_out)
        return (loss, bad, *rows_out)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        differentiable_once()
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
                gradients[i] = gradients[i].to(dtype) if plain else scaled(gradients[i], grad_loss, dtype)
        return (*gradients, None, None)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor * gradient in ``dtype``, in place where that is its own: multiplied in fp32 or wider, then rounded once.

    A factor such as 1/3 is off by up to .2% once it is rounded to bf16, for all entries alike, and a loss scale of
    65,536 is beyond fp16.
    """
    if gradient.dtype.itemsize >= 4:
        return gradient.mul_(factor.to(gradient.dtype)).to(dtype)
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    rows = max(1, SCALED_ENTRIES // max(1, gradient[:1].numel()))
    for piece in cuts(0, gradient.shape[0], rows):
        out[piece] = gradient[piece].float().mul_(factor)
    return out


def differentiable_once() -> None:
    """RuntimeError in the backward pass of a second derivative: the gradient was taken without a graph of its own."""
    if torch.is_grad_enabled():  # as autograd has it under create_graph alone
        raise RuntimeError(
            "distillation_loss has no second derivative: its gradient is computed without a graph. Leave create_graph "
            "out, or take the Hessian of the plain program (docs/architecture.md)."
        )


def untraced(function: F) -> F:
    """The function as torch.compile sees it from outside: the graph breaks there, and it runs as it stands."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


def evaluate_chunk(
    raw: Tensor, rows: slice, width: int, call: LossCall, config: BlockConfig, scratch: Scratch
) -> BlockResult:
    """A chunk, block by block or at once where the kernels do this work; the gradient is left in ``raw``."""
    teacher = call.teacher.open(rows, width, scratch)
    kernels = kernels_for(raw, teacher, config, ranked=call.acceptance is not None)
    if kernels is not None:
        whole = by_kernels(kernels, raw, teacher, call.rows(rows, slice(0, raw.shape[0])), config)
        if whole is not None:
            return whole
    columns: dict[str, Tensor] = {}
    bad: Tensor | int = 0
    for block in cuts(0, raw.shape[0], rows_of_block(raw, teacher, config)):
        result = evaluate_block(raw, block, teacher, call.rows(rows, block), config, scratch)
        bad = bad + result.bad
        # copied, not kept: small tensors that stay would lie where the next block's large ones have been
        for name, values in result._asdict().items():
            if name != "bad" and values is not None:
                if name not in columns:
                    columns[name] = torch.empty(raw.shape[0], dtype=values.dtype, device=values.device)
                columns[name][block] = values
    return BlockResult(bad=bad, **columns)


def rows_with_gradient(weight: Tensor) -> Tensor | None:
    """The rows of a chunk whose weight is not 0, so that the others cost no product; None means all of them."""
    kept = weight.nonzero()[:, 0]
    return None if kept.shape[0] == weight.shape[0] else kept
