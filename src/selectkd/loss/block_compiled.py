"""A block of rows of the closed forms' way as one program of torch.compile: the same functions, traced.

b rows, v vocabulary. Elementwise work that PyTorch does in some forty passes becomes three or four. Worth it on a
processor, where bf16 gains most; an accelerator has kernels of its own. A block's first call compiles for seconds.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from selectkd.errors import ConfigError
from selectkd.loss.block_eager import RANKS, CompiledBlock, statistic
from selectkd.loss.block_steps import HIGHEST, LANES, LOWEST, BlockConfig, BlockInputs, argmax
from selectkd.loss.head import Head, finish_logits
from selectkd.loss.teacher_rows import LiveChunk
from selectkd.objective.divergences.closed_form import Block, ClosedForm, closed_form_of
from selectkd.objective.divergences.kl import LOG_FLOOR, forward_value
from selectkd.objective.divergences.record import record_of

PROGRAMS = 32
"""Compiled programs that are kept, one for each plan."""
FEW_LANES = 64
"""Below such a width the pieces of a sum are too many."""
PAYS_FROM = 200
"""Optimizer steps from which a run is longer than its compilation."""


@dataclass(frozen=True)
class Plan:
    """What a program is made for. closed_form and params: of the divergence; heads: scale and soft-cap of student
    and teacher; reads: the statistics that are wanted; kl: whether KL(p || q) is; forbids: whether a bias is -inf;
    shifts: whether a row's maximum is subtracted first, without which its log-sum-exp has to be ordinary."""

    closed_form: ClosedForm
    params: tuple[tuple[str, Any], ...]
    heads: tuple[tuple[float, float | None], tuple[float, float | None]]
    temperature: float
    reads: tuple[str, ...]
    kl: bool
    forbids: bool
    shifts: bool = False

    def __call__(
        self, raw_q: Tensor, raw_p: Tensor, bias_q: Tensor | None, bias_p: Tensor | None, unshared: Tensor | None,
        label: Tensor | None, out: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The columns [b] of a block of raw logits [b, v], ``holds`` among them: whether the others do. The gradient to
        the student's logits goes to ``out``."""
        (scale_q, cap_q), (scale_p, cap_p) = self.heads
        logits = finish_logits(raw_q, bias_q, scale_q, cap_q)
        zq = logits / self.temperature
        zp = finish_logits(raw_p, bias_p, scale_p, cap_p) / self.temperature
        if unshared is not None:
            zq, zp = zq.masked_fill(unshared, -math.inf), zp.masked_fill(unshared, -math.inf)
        if self.shifts:
            zq, zp = zq - zq.amax(-1, keepdim=True), zp - zp.amax(-1, keepdim=True)
        q, norm_q = softmax(zq)
        p, norm_p = softmax(zp)
        block = Block(zp.clone(), zq.clone(), norm_q, norm_p, p, q, torch.empty_like(q), torch.empty_like(q))
        top = argmax(zq) if {"token_rank", "student_top"} & {*self.reads} else None
        columns = {name: statistic(name, block, top, label).flatten() for name in self.reads if name in RANKS}
        gone = torch.isneginf(zq)
        if self.forbids or unshared is not None:
            block.zq, block.zp = (
                torch.where(torch.isneginf(z), (norm + LOG_FLOOR).to(z.dtype), z)
                for z, norm in ((zq, norm_q), (zp, norm_p))
            )
        sums = [name for name in dict.fromkeys(("overlap", *self.reads)) if name not in RANKS]
        columns |= {name: statistic(name, block, top, label).flatten() for name in sums}
        if self.kl:
            columns["kl"] = forward_value(block).flatten()
        columns["divergence"] = self.closed_form(block, **dict(self.params)).flatten()
        gradient = block.out * block.factor
        if self.forbids:  # as ``Forbidden.release``
            held = torch.where(gone, gradient, 0.0).sum(-1, keepdim=True)
            gradient = torch.where(gone, 0.0, gradient + q * held)
        if cap_q is not None:
            gradient = gradient * (1.0 - (logits / cap_q).square())
        out.copy_(gradient)
        low, high = (-math.inf, math.inf) if self.shifts else (LOWEST, HIGHEST)
        holds = [(norm > low) & (norm < high) for norm in (norm_q, norm_p)]  # of nan nothing does
        return columns | {"holds": (holds[0] & holds[1]).flatten()}


def softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of rows [b, v], and their log-sum-exps, fp64 [b, 1], true to what it sums to.

    Its sum goes by way of pieces: a compiled sum adds one after the other, and over a whole vocabulary its rounding
    shows in the gradient. Pieces that divide the vocabulary share a pass with the exponentials.
    """
    b, v = z.shape
    lanes = math.gcd(v, LANES)
    if lanes >= FEW_LANES:
        pieces = z.view(b, -1, lanes).exp()
        mass, e = pieces.sum(-1).sum(-1, keepdim=True), pieces.view(b, v)
    else:
        whole = v - v % LANES
        e = z.exp()
        mass = e[:, :whole].view(b, -1, LANES).sum(-1).sum(-1, keepdim=True)
        mass = mass + e[:, whole:].sum(-1, keepdim=True)
    inverse = mass.reciprocal()
    return e * inverse, -inverse.double().log()


@lru_cache(maxsize=PROGRAMS)
def program(plan: Plan) -> Callable[..., dict[str, Tensor]]:
    """The compiled program of a plan. ConfigError, at its first call, where nothing can be compiled."""

    def run(*block: Any) -> dict[str, Tensor]:
        return plan(*block)

    # torch allows a code object so many programs; each plan gets one of its own
    own: Any = types.FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
    # one piece of memory for all temporaries: a heap in pieces keeps several times as much resident
    compiled = torch.compile(own, fullgraph=True, dynamic=False, options={"memory_planning": True})

    def call(*block: Any) -> dict[str, Tensor]:
        try:
            return compiled(*block)
        except BackendCompilerFailed as error:
            raise ConfigError(
                f"training.compile_loss = true, but torch.compile failed: {str(error).splitlines()[0]}. "
                "It needs a C++ compiler (g++ or clang); or set compile_loss to false."
            ) from error

    return call


def check_compiled(divergence: Any, *, whole: bool) -> None:
    """ConfigError where there is nothing to compile: no closed form, or not the student's whole vocabulary."""
    if whole and closed_form_of(divergence) is not None:
        return
    why = "this divergence has none" if whole else "this teacher gives another"
    raise ConfigError(
        "training.compile_loss = true compiles closed forms on the student's whole vocabulary, and "
        f"{why}. Set it to false."
    )


def pays(steps: int, device: torch.device) -> bool:
    """Whether a run of so many optimizer steps saves more time than it compiles: on a processor that can compile.

    The bound of ``PAYS_FROM`` steps is a choice of ours.
    """
    return device.type == "cpu" and steps >= PAYS_FROM and can_compile()


@cache
def can_compile() -> bool:
    """Whether torch.compile makes programs here, found out with a small one in a few seconds."""
    try:
        torch.compile(lambda x: x.exp().sum(-1), dynamic=False)(torch.ones(2, 64))
    except BackendCompilerFailed:
        return False
    return True


def plan_of(
    divergence: Any, student: Head, teacher: Head, temperature: float, reads: tuple[str, ...], *, kl: bool
) -> Plan:
    """The plan of a block: equal for equal divergences, whatever objects they are."""
    record, params = record_of(divergence)
    assert record.closed_form is not None  # nothing else is compiled
    heads = ((student.scale, student.softcap), (teacher.scale, teacher.softcap))
    forbids = any(head.forbidden(head.width).numel() for head in (student, teacher))
    return Plan(record.closed_form, tuple(sorted(params.items())), heads, temperature, reads, kl, forbids)


def compiled_block(config: BlockConfig) -> CompiledBlock:
    """The compiled way through whole blocks of a call."""

    def block_of(
        raw: Tensor, teacher: LiveChunk, block: slice, reads: tuple[str, ...], rows: BlockInputs, out: Tensor
    ) -> dict[str, Tensor] | None:
        kl = config.options.also_kl and config.options.temperature == 1.0
        student, divergence = config.head, config.objective.divergence
        plan = plan_of(divergence, student, teacher.head, config.options.temperature, reads, kl=kl)
        logits = raw, teacher.raw[block], student.bias, teacher.head.bias, teacher.unshared
        for shifts in (False, True):  # not remembered: what a block gives depends on nothing before it
            columns = program(replace(plan, shifts=shifts))(*logits, rows.label, out)
            if columns.pop("holds").all():
                return columns
        return None

    return block_of
