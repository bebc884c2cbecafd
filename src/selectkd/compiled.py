"""A block of rows of the closed forms' way as one program of torch.compile: the same functions, traced.

b rows, v vocabulary. Elementwise work that PyTorch does in some forty passes becomes three or four. Worth it on a
processor, where bf16 gains most; an accelerator has kernels of its own. A block's first call compiles for seconds.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from selectkd.block import IMPOSSIBLE, LANES, Rows, Settings, argmax
from selectkd.dense import CompiledBlock, Told, floor, statistic
from selectkd.divergences.gradient import Block, closed_form_of
from selectkd.divergences.kl import forward_value
from selectkd.errors import ConfigError
from selectkd.rows import Head, LiveChunk, finish_logits

PROGRAMS = 32
"""Compiled programs that are kept, one for each plan."""


@dataclass(frozen=True)
class Plan:
    """What a program is made for. divergence and params: whose closed form it is; heads: scale and soft-cap of student
    and teacher; reads: the statistics that are told; kl: whether KL(p || q) is; forbids: whether a bias may be -inf."""

    divergence: Callable[..., Tensor]
    params: tuple[tuple[str, Any], ...]
    heads: tuple[tuple[float, float | None], tuple[float, float | None]]
    temperature: float
    reads: tuple[str, ...]
    kl: bool
    forbids: bool

    def __call__(
        self, raw_q: Tensor, raw_p: Tensor, bias_q: Tensor | None, bias_p: Tensor | None, unshared: Tensor | None,
        top: Tensor | None, label: Tensor | None, out: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The columns [b] of a block of raw logits [b, v]; the gradient to the student's logits goes to ``out``."""
        (scale_q, cap_q), (scale_p, cap_p) = self.heads
        logits = finish_logits(raw_q, bias_q, scale_q, cap_q)
        zq = logits / self.temperature
        zp = finish_logits(raw_p, bias_p, scale_p, cap_p) / self.temperature
        if unshared is not None:
            zq, zp = zq.masked_fill(unshared, IMPOSSIBLE), zp.masked_fill(unshared, IMPOSSIBLE)
        e_q, inverse_q, norm_q = exponential(zq)
        e_p, inverse_p, norm_p = exponential(zp)
        finite = torch.isfinite(norm_p)
        q = e_q * inverse_q
        zp, p, norm_p = (
            torch.where(finite, own, students)
            for own, students in ((zp, zq), (e_p * inverse_p, q), (norm_p, norm_q))
        )
        block = Block(zp.clone(), zq.clone(), norm_q, norm_p, p, q, torch.empty_like(q), torch.empty_like(q))
        if self.forbids:
            floor(block)
        if top is None and {"rank", "student_top"} & {*self.reads}:
            top = argmax(zq)
        told = {name: statistic(name, block, top, label).flatten() for name in ("overlap", *self.reads)}
        if self.kl:
            told["kl"] = forward_value(block).flatten()
        told["divergence"] = self.divergence.closed_form(block, **dict(self.params)).flatten()  # type: ignore[attr-defined]
        gradient = block.out * block.factor
        if cap_q is not None:
            gradient = gradient * (1.0 - (logits / cap_q).square())
        out.copy_(gradient)
        return told | {"finite": finite.flatten()}


def exponential(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e^(z - max z) [b, v], one over its sums [b, 1], and the log-sum-exps of z as those inverses are rounded, fp64."""
    top = z.amax(-1, keepdim=True)
    e = (z - top).exp()
    inverse = sums(e).reciprocal()
    return e, inverse, top.double() - inverse.double().log()


def sums(x: Tensor) -> Tensor:
    """The sums of rows [b, v] as [b, 1], by way of those of LANES columns: a compiled sum adds one after the other, and
    over a whole vocabulary its rounding shows in the gradient."""
    b, v = x.shape
    whole = v - v % LANES
    return x[:, :whole].view(b, -1, LANES).sum(-1).sum(-1, keepdim=True) + x[:, whole:].sum(-1, keepdim=True)


@lru_cache(maxsize=PROGRAMS)
def program(plan: Plan) -> Callable[..., dict[str, Tensor]]:
    """The compiled program of a plan. ConfigError, at its first call, where nothing can be compiled."""

    def run(*block: Any) -> dict[str, Tensor]:
        return plan(*block)

    # torch allows a code object so many programs; each plan gets one of its own
    own: Any = types.FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
    compiled = torch.compile(own, fullgraph=True, dynamic=False)

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


def plan_of(
    divergence: Any, student: Head, teacher: Head, temperature: float, reads: tuple[str, ...], *, kl: bool
) -> Plan:
    """The plan of a block: equal for equal divergences, whatever objects they are."""
    function, params = getattr(divergence, "func", divergence), getattr(divergence, "keywords", {})
    heads = ((student.scale, student.softcap), (teacher.scale, teacher.softcap))
    forbids = student.bias is not None or teacher.bias is not None
    return Plan(function, tuple(sorted(params.items())), heads, temperature, reads, kl, forbids)


def compiled_block(settings: Settings) -> CompiledBlock:
    """The compiled way through whole blocks of a call."""

    def block_of(
        raw: Tensor, teacher: LiveChunk, block: slice, reads: tuple[str, ...], rows: Rows, out: Tensor
    ) -> Told:
        kl = settings.also_kl and settings.temperature == 1.0
        student, divergence = settings.head, settings.objective.divergence
        plan = plan_of(divergence, student, teacher.head, settings.temperature, reads, kl=kl)
        columns = program(plan)(
            raw,
            teacher.raw[block],
            student.bias,
            teacher.head.bias,
            teacher.unshared,
            rows.top,
            rows.label,
            out,
        )
        return {"kl": [], **{name: [column] for name, column in columns.items()}}

    return block_of
