"""What a block of rows is judged by, what comes of it, and what all ways through it share. b rows, v vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

<<<<<<< HEAD
from selectkd.divergences.kl import forward_kl
=======
from selectkd.divergences.gradient import Block, closed_form_of
from selectkd.divergences.kl import LOG_FLOOR, forward_kl, forward_value
from selectkd.divergences.sorted import is_unpaired, sorted_distance
>>>>>>> i67
from selectkd.objective import Objective
from selectkd.pair import TokenPair
from selectkd.rows import Head, Scratch, TeacherChunk

IMPOSSIBLE = -1e4
"""The logit of an unshared id in a closed form: its probability is exactly 0, its logarithm still finite."""
LOWEST, HIGHEST = -20.0, 60.0
"""Between these log-sum-exps e^z is neither too small nor too large for fp32, and needs no shift by the maximum."""
LANES = 1024
"""Width of the pieces an argmax looks at first."""


@dataclass(frozen=True)
class Settings:
    """What is the same for every block of a call."""

    objective: Objective
    head: Head
    temperature: float
    wants_gradient: bool
    also_kl: bool = False


class Rows(NamedTuple):
    """What a block needs beside its logits, each [b] or [b, r]; acceptance is the result of a first pass, later the
    log-probability of the tokens after the first of each span, top the student's argmax where it is known already.
    """

    uniform: Tensor
    scale: Tensor
    label: Tensor | None
    sequence: Tensor | None
    acceptance: Tensor | None
    later: Tensor | None = None
    top: Tensor | None = None


class Seen(NamedTuple):
    """What came of a block: four columns [b], how many rows have no finite teacher, and the sum of KL(p || q) at
    temperature 1 where it was asked for. Of a teacher aligned by spans also which rows have no verdict, and the
    gradient of ``later``, [b] each."""

    divergence: Tensor
    weight: Tensor
    acceptance: Tensor
    overlap: Tensor
    bad: Tensor | int
    kl: Tensor | int = 0
    unverified: Tensor | None = None
    grad_later: Tensor | None = None


@torch.no_grad()
def pair_at(
    temperature: float, raw: Tensor, block: slice, teacher: TeacherChunk, rows: Rows, settings: Settings
) -> TokenPair:
    """The pair at another temperature than the loss's, with labels and sequences: what the verifier sees."""
    logits = settings.head.finish(raw[block])
    return replace(teacher.pair(block, logits, temperature), label=rows.label, sequence=rows.sequence)


@torch.no_grad()
def kl_of(pair: TokenPair) -> Tensor:
    """The sum over the rows of KL(p || q)."""
    return forward_kl(pair.logp, pair.logq).sum()


<<<<<<< HEAD
=======
def _closed(
    raw: Tensor, block: slice, teacher: LiveChunk, rows: Rows, settings: Settings, scratch: Scratch,
    closed_form: Callable[[Block], Tensor], verified: TokenPair | None,
) -> Seen:  # fmt: skip
    """A dense teacher and a divergence with a closed form: no autograd, memory reused from block to block."""
    head, temperature, target = settings.head, settings.temperature, raw[block]
    with torch.no_grad():
        kl: Tensor | int = 0
        if settings.also_kl and temperature != 1.0:
            kl = kl_of(pair_at(1.0, raw, block, teacher, rows, settings))
        zq = widened(head, target, "zq", scratch)  # [b, v]
        zp = widened(teacher.head, teacher.raw[block], "zp", scratch)
        capped = zq.clone() if head.softcap is not None and settings.wants_gradient else None
        if teacher.unshared is not None:
            zq.masked_fill_(teacher.unshared, IMPOSSIBLE)
            zp.masked_fill_(teacher.unshared, IMPOSSIBLE)
        if temperature != 1.0:
            zq.div_(temperature)
            zp.div_(temperature)
        b, v = zq.shape
        p, q, spare = (scratch.of(name, b, v, zq)[:b] for name in ("p", "q", "spare"))
        top = argmax(zq)  # [b]
        at = top[:, None]
        torch.softmax(zq, -1, out=q)
        torch.softmax(zp, -1, out=p)
        # the log-sum-exp for free: a logit minus the logarithm of its probability, exact where that is not small
        norm_q = (zq.gather(-1, at).double() - q.gather(-1, at).double().log_())[:, 0]
        norm_p = zp.amax(-1).double() - p.amax(-1).double().log_()
        finite = None
        if not math.isfinite(float(norm_p.sum())):
            finite = torch.isfinite(norm_p)
            for ours, theirs in ((zp, zq), (p, q), (norm_p, norm_q)):
                ours[~finite] = theirs[~finite]
        if head.bias is not None or teacher.head.bias is not None:  # what a bias of -inf forbids
            for z, norm in ((zp, norm_p), (zq, norm_q)):
                z.copy_(torch.where(torch.isneginf(z), (norm[:, None] + LOG_FLOOR).to(z.dtype), z))
        shared = torch.minimum(p, q, out=spare).sum(-1).clamp_(max=1.0)
        pair = verified
        if pair is None:
            free = rows.acceptance is not None or settings.objective.shift_free
            logp, logq = (zp, zq) if free else (torch.log_softmax(z, -1) for z in (zp, zq))
            pair = TokenPair(
                logp=logp, logq=logq, student_top=top, label=rows.label, sequence=rows.sequence, finite=finite,
                shared_mass=shared,
            )  # fmt: skip
        weight, acceptance = settings.objective.weigh(pair, rows.uniform, acceptance=rows.acceptance)
        seen = Block(zp=zp, zq=zq, norm_p=norm_p, norm_q=norm_q, p=p, q=q, out=zq, spare=spare)
        if settings.also_kl and temperature == 1.0:
            kl = forward_value(seen).clamp_(min=0.0).sum()
        divergence = closed_form(seen)
        if settings.wants_gradient:
            finish_gradient(zq, rows.scale * weight, capped, settings)
            if zq is not target:
                target.copy_(zq)
    return Seen(divergence.clamp_(min=0.0), weight, acceptance, pair.overlap, bad_rows(finite), kl)


>>>>>>> i67
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

    Where one is not, the logits of all rows are shifted by their maximum first, in place.
    """
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
    return inverse, inverse.double().log().neg_()


def finish_gradient(
    gradient: Tensor, share: Tensor | None, capped: Tensor | None, settings: Settings
) -> None:
    """Takes the gradient to the tempered logits back to the head's product in place, and times ``share`` [b]."""
    head = settings.head
    if capped is not None and head.softcap is not None:
        gradient.mul_(capped.div_(head.softcap).square_().neg_().add_(1.0))
    factor = head.scale / settings.temperature
    if share is not None:
        gradient.mul_((share * factor)[:, None])
    elif factor != 1.0:
        gradient.mul_(factor)


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
