"""The elementwise work of the fused loss on one block of rows: from logits to weights and to their gradient.

b rows, v vocabulary, K stored tokens. Three ways, the same result: a closed form where the divergence states one and
the teacher is dense; autograd on the K + 1 outcomes of a top-K teacher; autograd on the whole vocabulary otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selectkd.divergences.gradient import Block, closed_form_of
from selectkd.divergences.kl import LOG_FLOOR, forward_kl, forward_value
from selectkd.divergences.sorted import is_unpaired, sorted_distance
from selectkd.objective import Objective
from selectkd.pair import TokenPair, support_pair
from selectkd.rows import CachedChunk, Head, LiveChunk, Scratch, TeacherChunk
from selectkd.spans import AlignedChunk

IMPOSSIBLE = -1e4
"""The logit of an unshared id in a closed form: its probability is exactly 0, its logarithm still finite."""
LANES = 128
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
    log-probability of the tokens after the first of each span.
    """

    uniform: Tensor
    scale: Tensor
    label: Tensor | None
    sequence: Tensor | None
    acceptance: Tensor | None
    later: Tensor | None = None


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


def judge(
    raw: Tensor, block: slice, teacher: TeacherChunk, rows: Rows, settings: Settings, scratch: Scratch
) -> Seen:
    """Judges the rows of a block and writes the gradient of sum scale * weight * divergence over the head's product in
    ``raw[block]`` [b, v]."""
    if isinstance(teacher, AlignedChunk):
        return _aligned(raw, block, teacher, rows, settings)
    closed_form = closed_form_of(settings.objective.divergence)  # type: ignore[arg-type]
    verified = None
    if rows.acceptance is None and settings.objective.verify_temperature != settings.temperature:
        verified = pair_at(settings.objective.verify_temperature, raw, block, teacher, rows, settings)
    if isinstance(teacher, LiveChunk) and closed_form is not None:
        return _closed(raw, block, teacher, rows, settings, scratch, closed_form, verified)
    if isinstance(teacher, CachedChunk):
        return _top_k(raw, block, teacher, rows, settings, scratch, verified)
    return _autograd(raw, block, teacher, rows, settings, verified)


def has_closed_form(settings: Settings, teacher: TeacherChunk) -> bool:
    """Whether a block is judged without autograd over the vocabulary."""
    if isinstance(teacher, CachedChunk):
        return True
    divergence: Any = settings.objective.divergence
    return isinstance(teacher, LiveChunk) and closed_form_of(divergence) is not None


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


def widened(head: Head, raw: Tensor, name: str, scratch: Scratch) -> Tensor:
    """The logits in fp32 or wider, ours to overwrite: ``raw`` itself where it is them, else memory of ``name``."""
    if not head.is_plain:
        return head.finish(raw)
    if raw.dtype in (torch.float32, torch.float64):
        return raw
    rows, width = raw.shape
    return scratch.of(name, rows, width, raw, torch.float32)[:rows].copy_(raw)


def _top_k(
    raw: Tensor, block: slice, teacher: CachedChunk, rows: Rows, settings: Settings, scratch: Scratch,
    verified: TokenPair | None,
) -> Seen:  # fmt: skip
    """A top-K teacher: the objective on K + 1 outcomes by autograd, taken back to the vocabulary in closed form.

    With h = dD / d log q on the K tokens and the rest, the gradient to a logit is h_v - q_v sum(h) for a stored token
    and q_v (h_rest / q_rest - sum(h)) for any other.
    """
    head, target = settings.head, raw[block]
    ids, stored = teacher.stored(block, settings.temperature)
    with torch.no_grad():
        logits = widened(head, target, "zq", scratch)
        capped = logits.clone() if head.softcap is not None and settings.wants_gradient else None
        q = scratch.of("q", logits.shape[0], logits.shape[1], logits)[: len(logits)]
        top = argmax(logits)
        torch.softmax(logits, -1, out=q)
        chosen = q.gather(-1, ids)  # [b, K]
        norm = logits.gather(-1, top[:, None]) - q.gather(-1, top[:, None]).log()
        chosen_log = logits.gather(-1, ids) - norm  # [b, K]
        q.scatter_(-1, ids, 0.0)
        rest = q.sum(-1, keepdim=True)  # [b, 1]
        support = torch.cat([chosen_log, rest.log()], 1)  # [b, K + 1]
    leaf = support.requires_grad_(settings.wants_gradient)
    with torch.set_grad_enabled(settings.wants_gradient):
        pair = replace(support_pair(ids, stored, leaf, top), label=rows.label, sequence=rows.sequence)
        kl = kl_of(pair) if settings.also_kl else 0  # at temperature 1: a top-K teacher has no other
        loss, seen = _judged(pair, rows, settings, verified)
    if settings.wants_gradient:
        (h,) = torch.autograd.grad(loss, leaf)
        of_tokens, of_rest, sum_h = h[:, :-1], h[:, -1:], h.sum(-1, keepdim=True)
        tiny = torch.finfo(q.dtype).tiny
        gradient = torch.mul(q, of_rest / rest.clamp(min=tiny) - sum_h, out=logits)
        gradient.scatter_(-1, ids, of_tokens - chosen * sum_h)
        finish_gradient(gradient, None, capped, settings)
        if gradient is not target:
            target.copy_(gradient)
    return seen._replace(kl=kl)


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


def _autograd(
    raw: Tensor,
    block: slice,
    teacher: TeacherChunk,
    rows: Rows,
    settings: Settings,
    verified: TokenPair | None,
) -> Seen:
    """Any divergence, any teacher: the objective as it stands, differentiated."""
    fp = torch.float64 if raw.dtype == torch.float64 else torch.float32
    leaf = raw[block].to(fp, copy=True).requires_grad_(settings.wants_gradient)
    kl: Tensor | int = 0
    if settings.also_kl and settings.temperature != 1.0:
        kl = kl_of(pair_at(1.0, raw, block, teacher, rows, settings))
    with torch.set_grad_enabled(settings.wants_gradient):
        pair = teacher.pair(block, settings.head.finish(leaf), settings.temperature)
        pair = replace(pair, label=rows.label, sequence=rows.sequence)
        if settings.also_kl and settings.temperature == 1.0:
            kl = kl_of(pair)
        loss, seen = _judged(pair, rows, settings, verified)
    if settings.wants_gradient:
        (raw[block],) = torch.autograd.grad(loss, leaf)
    return seen._replace(kl=kl)


def _aligned(raw: Tensor, block: slice, teacher: AlignedChunk, rows: Rows, settings: Settings) -> Seen:
    """A teacher of another vocabulary: the divergence on what both can say, m D + (1 - m) sum_i |p_(i) - q_(i)| with
    the sorted rest, or an unpaired divergence on everything. The verifier sees the teacher's own vocabulary.
    """
    objective, fp = settings.objective, torch.float64 if raw.dtype == torch.float64 else torch.float32
    leaf = raw[block].to(fp, copy=True).requires_grad_(settings.wants_gradient)
    assert rows.later is not None  # the loss of aligned rows gives it
    later = rows.later.detach().requires_grad_(settings.wants_gradient)
    with torch.set_grad_enabled(settings.wants_gradient):
        logits = settings.head.finish(leaf)
        logp, finite = teacher.teacher_log_probs(block, logits)
        logq = teacher.student_log_probs(block, logits, later)
        pair = teacher.shared_pair(logp, logq)
        divergence = _across(objective.divergence, logp, logq, pair, teacher)
        with torch.no_grad():
            overlap = torch.minimum(pair.logp, pair.logq)[:, :-1].exp().sum(-1).clamp(max=1.0)
            kl = _across(forward_kl, logp, logq, pair, teacher).sum() if settings.also_kl else 0
            column = teacher.proposal(logq)
            seen = TokenPair(
                logp=logp, logq=logp, student_top=column, label=rows.label, sequence=rows.sequence, finite=finite,
                shared_mass=overlap,
            )  # fmt: skip
            weight, acceptance = objective.weigh(seen, rows.uniform)
            unverified = (column < 0) & (objective.verifier.teacher_tokens != 0)
            if teacher.unverified_weight is not None:
                weight = torch.where(unverified, teacher.unverified_weight * finite.to(fp), weight)
        loss = (rows.scale.to(fp) * weight * divergence).sum()
    grad_later = None
    if settings.wants_gradient:
        raw[block], grad_later = torch.autograd.grad(loss, (leaf, later))
    return Seen(
        divergence.detach(), weight, acceptance, overlap, bad_rows(finite), kl, unverified.to(fp), grad_later
    )


def _across(divergence: Any, logp: Tensor, logq: Tensor, pair: TokenPair, teacher: AlignedChunk) -> Tensor:
    """The divergence between two vocabularies, [b]."""
    if is_unpaired(divergence):
        return divergence(logp, logq)
    share, of = teacher.matched_weight, teacher.vocabularies
    value = share * divergence(pair.logp, pair.logq)
    if share < 1.0:
        own_p, own_q = logp.index_select(1, of.own_teacher), logq.index_select(1, of.own_student)
        value = value + (1.0 - share) * sorted_distance(own_p.exp(), own_q.exp())
    return value


def _judged(
    pair: TokenPair, rows: Rows, settings: Settings, verified: TokenPair | None
) -> tuple[Tensor, Seen]:
    """The objective on a pair: its part of the loss, with a gradient, and what is told of its rows."""
    judged = settings.objective(pair, rows.uniform, verified=verified, acceptance=rows.acceptance)
    loss = (rows.scale.to(judged.divergence.dtype) * judged.weight * judged.divergence).sum()
    divergence, weight, acceptance, overlap = judged
    return loss, Seen(divergence.detach(), weight, acceptance, overlap, bad_rows(pair.finite))


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
