"""What a block of rows takes and gives, and the steps that every way through it shares. b rows, v vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from selectkd.loss.head import Head
from selectkd.loss.options import LossOptions
from selectkd.loss.teacher_rows import Scratch, TeacherChunk
from selectkd.objective.divergences.closed_form import closed_form_of
from selectkd.objective.divergences.kl import forward_kl
from selectkd.objective.objective import Objective
from selectkd.objective.pair import TokenPair
from selectkd.objective.verifiers import traits_of

IMPOSSIBLE = -1e12
"""The logit of an unshared id in a closed form: its probability is exactly 0, its logarithm still finite."""
LOWEST, HIGHEST = -20.0, 60.0
"""Between these log-sum-exps e^z is neither too small nor too large for fp32, and needs no shift by the maximum."""
NO_FP64 = ("mps",)
"""Devices without fp64: there a log-sum-exp is as exact as fp32 is."""
LANES = 1024
"""Width of the pieces an argmax looks at first."""


@dataclass(frozen=True)
class BlockConfig:
    """What is the same for every block of a call."""

    objective: Objective
    head: Head
    options: LossOptions
    wants_gradient: bool

    @property
    def has_closed_form(self) -> bool:
        """Whether a block of a live teacher needs no autograd."""
        return closed_form_of(self.objective.divergence) is not None  # type: ignore[arg-type]


class BlockInputs(NamedTuple):
    """What a block needs beside its logits, each [b] or [b, r]; acceptance is the result of a first pass, later the
    log-probability of the tokens after the first of each span."""

    uniform: Tensor
    scale: Tensor
    label: Tensor | None
    sequence: Tensor | None
    acceptance: Tensor | None
    later: Tensor | None = None


class BlockResult(NamedTuple):
    """What came of a block: four columns [b], how many rows have no finite teacher, and KL(p || q) at temperature 1
    where it was asked for, [b]. Of a teacher aligned by spans also which rows have no verdict, and the
    gradient of ``later``, [b] each."""

    divergence: Tensor
    weight: Tensor
    acceptance: Tensor
    overlap: Tensor
    bad: Tensor | int
    kl: Tensor | None = None
    unverified: Tensor | None = None
    grad_later: Tensor | None = None


def statistics_of(verifier: Any, rows: BlockInputs) -> tuple[str, ...]:
    """The statistics a verifier reads, without those that need labels where there are none."""
    reads = traits_of(verifier).reads or ()
    return tuple(name for name in reads if name != "label_rank" or rows.label is not None)


@torch.no_grad()
def pair_at(
    temperature: float,
    raw: Tensor,
    block: slice,
    teacher: TeacherChunk,
    rows: BlockInputs,
    config: BlockConfig,
) -> TokenPair:
    """The pair at another temperature than the loss's, with labels and sequences: what the verifier sees."""
    logits = config.head.finish(raw[block])
    return replace(teacher.pair(block, logits, temperature), label=rows.label, sequence=rows.sequence)


@torch.no_grad()
def kl_of(pair: TokenPair) -> Tensor:
    """KL(p || q) of each row, [b]."""
    return forward_kl(pair.logp, pair.logq)


def widened(head: Head, raw: Tensor, name: str, scratch: Scratch) -> Tensor:
    """The logits in fp32 or wider, ours to overwrite: ``raw`` itself where it is them, else memory of ``name``."""
    if not head.is_plain:
        return head.finish(raw)
    if raw.dtype in (torch.float32, torch.float64):
        return raw
    rows, width = raw.shape
    return scratch.of(name, rows, width, raw, torch.float32)[:rows].copy_(raw)


def exponentials(
    logits: Sequence[Float[Tensor, "b v"]], out: Sequence[Float[Tensor, "b v"]]
) -> tuple[Float[Tensor, "m b 1"], Float[Tensor, "m b"], bool]:
    """Fills each ``out`` with e^z of its logits; returns one over the sums of their rows, the log-sum-exps in fp64 as
    those inverses are rounded, and whether all of these are ordinary.

    Where one is not, the logits of all rows are shifted by their maximum first, in place; on an accelerator, where a
    look at them would wait, always.
    """
    ordinary = False
    if logits[0].device.type == "cpu":
        inverse, norms = _sums(logits, out)
        ordinary = all(LOWEST < norm < HIGHEST for norm in norms.flatten().tolist())  # nan is not
    if not ordinary:
        for z in logits:
            z.sub_(z.amax(-1, keepdim=True))
        inverse, norms = _sums(logits, out)
    return inverse[:, :, None], norms, ordinary


def _sums(logits: Sequence[Tensor], out: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    sums = [torch.exp(z, out=e).sum(-1) for z, e in zip(logits, out, strict=True)]
    inverse = torch.stack(sums).reciprocal_()
    exact = inverse.float() if inverse.device.type in NO_FP64 else inverse.double()
    return inverse, exact.log().neg_()


def finish_gradient(
    gradient: Tensor, share: Tensor | None, capped: Tensor | None, config: BlockConfig, *, out: Tensor
) -> None:
    """Takes the gradient to the tempered logits back to the head's product and times ``share`` [b], into ``out``, which
    may be its own memory."""
    head = config.head
    if capped is not None and head.softcap is not None:
        gradient.mul_(capped.div_(head.softcap).square_().neg_().add_(1.0))
    factor = head.scale / config.options.temperature
    scale = factor if share is None else (share * factor)[:, None]
    if out.dtype != gradient.dtype:  # one product that also rounds is slower than a product and a copy
        out.copy_(gradient.mul_(scale))
    elif share is not None or factor != 1.0 or gradient.data_ptr() != out.data_ptr():
        torch.mul(gradient, scale, out=out)


def bad_rows(finite: Tensor | None) -> Tensor | int:
    """How many rows are not finite; None means that all are."""
    return 0 if finite is None else (~finite).sum()


def argmax(x: Tensor) -> Tensor:
    """The column of the first largest entry of each row, [b]: the best piece of LANES columns, then inside it."""
    b, v = x.shape
    whole = v - v % LANES
    if whole < 2 * LANES or not x.is_contiguous():
        return x.argmax(-1)
    pieces = x[:, :whole].view(b, -1, LANES)  # [b, v / LANES, LANES]
    piece = pieces.amax(-1).argmax(-1)  # [b]
    inside = pieces.gather(1, piece[:, None, None].expand(b, 1, LANES))[:, 0].argmax(-1)
    best = piece * LANES + inside
    if whole < v:
        rest = x[:, whole:].max(-1)
        best = torch.where(rest.values > x.gather(-1, best[:, None])[:, 0], whole + rest.indices, best)
    return best
