"""The elementwise work of the fused loss on one block of rows: from logits to weights and to their gradient.

b rows, v vocabulary, K stored tokens. Three ways, the same result: a closed form where the divergence states one and
the teacher is dense (``dense``); autograd on the K + 1 outcomes of a top-K teacher; autograd on the whole vocabulary
otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selectkd.loss.aligned_rows import AlignedChunk
from selectkd.loss.block import (
    Rows,
    Seen,
    Settings,
    argmax,
    bad_rows,
    exponentials,
    finish_gradient,
    kl_of,
    pair_at,
    widened,
)
from selectkd.loss.block_compiled import compiled_block
from selectkd.loss.block_eager import judge_dense
from selectkd.loss.teacher_rows import CachedChunk, LiveChunk, Scratch, TeacherChunk, wide
from selectkd.objective.divergences.closed_form import closed_form_of
from selectkd.objective.divergences.kl import forward_kl
from selectkd.objective.divergences.uld import is_unpaired, sorted_distance
from selectkd.objective.pair import TokenPair, support_pair


def judge(
    raw: Tensor, block: slice, teacher: TeacherChunk, rows: Rows, settings: Settings, scratch: Scratch
) -> Seen:
    """Judges the rows of a block and writes the gradient of sum scale * weight * divergence over the head's product in
    ``raw[block]`` [b, v]."""
    if isinstance(teacher, AlignedChunk):
        return _aligned(raw, block, teacher, rows, settings)
    closed_form = closed_form_of(settings.objective.divergence)  # type: ignore[arg-type]
    verified = None
    if rows.acceptance is None and settings.objective.verify_temperature != settings.options.temperature:
        verified = pair_at(settings.objective.verify_temperature, raw, block, teacher, rows, settings)
    if isinstance(teacher, LiveChunk) and closed_form is not None:
        compiled = compiled_block(settings) if settings.options.compiled else None
        return judge_dense(raw, block, teacher, rows, settings, scratch, closed_form, verified, compiled)
    if isinstance(teacher, CachedChunk):
        return _top_k(raw, block, teacher, rows, settings, scratch, verified)
    return _autograd(raw, block, teacher, rows, settings, verified)


def has_closed_form(settings: Settings) -> bool:
    """Whether a block of a live teacher is judged without autograd."""
    divergence: Any = settings.objective.divergence
    return closed_form_of(divergence) is not None


def _top_k(
    raw: Tensor, block: slice, teacher: CachedChunk, rows: Rows, settings: Settings, scratch: Scratch,
    verified: TokenPair | None,
) -> Seen:  # fmt: skip
    """A top-K teacher: the objective on K + 1 outcomes by autograd, taken back to the vocabulary in closed form.

    With h = dD / d log q on the K tokens and the rest, the gradient to a logit is h_v - q_v sum(h) for a stored token
    and q_v (h_rest / q_rest - sum(h)) for any other.
    """
    head, target = settings.head, raw[block]
    ids, stored = teacher.stored(block, settings.options.temperature)
    with torch.no_grad():
        logits = widened(head, target, "zq", scratch)
        capped = logits.clone() if head.softcap is not None and settings.wants_gradient else None
        if teacher.unshared is not None:
            logits.masked_fill_(teacher.unshared, -torch.inf)
        q = scratch.of("q", logits.shape[0], logits.shape[1], logits)[: len(logits)]
        top = argmax(logits)
        (inverse,), norms, _ = exponentials((logits,), (q,))
        chosen_log = (logits.gather(-1, ids) - norms[0][:, None]).to(q.dtype)  # [b, K]
        chosen = q.gather(-1, ids).mul_(inverse)  # [b, K]
        q.scatter_(-1, ids, 0.0)
        rest = q.sum(-1, keepdim=True).mul_(inverse)  # [b, 1]
        support = torch.cat([chosen_log, rest.log()], 1)  # [b, K + 1]
    leaf = support.requires_grad_(settings.wants_gradient)
    with torch.set_grad_enabled(settings.wants_gradient):
        pair = replace(support_pair(ids, stored, leaf, top), label=rows.label, sequence=rows.sequence)
        kl = (
            kl_of(pair) if settings.options.also_kl else None
        )  # at temperature 1: a top-K teacher has no other
        loss, seen = _judged(pair, rows, settings, verified)
    if settings.wants_gradient:
        (h,) = torch.autograd.grad(loss, leaf)
        of_tokens, of_rest, sum_h = h[:, :-1], h[:, -1:], h.sum(-1, keepdim=True)
        tiny = torch.finfo(q.dtype).tiny
        gradient = torch.mul(q, (of_rest / rest.clamp(min=tiny) - sum_h) * inverse, out=logits)
        gradient.scatter_(-1, ids, of_tokens - chosen * sum_h)
        finish_gradient(gradient, None, capped, settings, out=target)
    return seen._replace(kl=kl)


def _autograd(
    raw: Tensor,
    block: slice,
    teacher: TeacherChunk,
    rows: Rows,
    settings: Settings,
    verified: TokenPair | None,
) -> Seen:
    """Any divergence, any teacher: the objective as it stands, differentiated."""
    fp = wide(raw.dtype)
    leaf = raw[block].to(fp, copy=True).requires_grad_(settings.wants_gradient)
    kl: Tensor | None = None
    if settings.options.also_kl and settings.options.temperature != 1.0:
        kl = kl_of(pair_at(1.0, raw, block, teacher, rows, settings))
    with torch.set_grad_enabled(settings.wants_gradient):
        pair = teacher.pair(block, settings.head.finish(leaf), settings.options.temperature)
        pair = replace(pair, label=rows.label, sequence=rows.sequence)
        if settings.options.also_kl and settings.options.temperature == 1.0:
            kl = kl_of(pair)
        loss, seen = _judged(pair, rows, settings, verified)
    if settings.wants_gradient:
        (raw[block],) = torch.autograd.grad(loss, leaf)
    return seen._replace(kl=kl)


def _aligned(raw: Tensor, block: slice, teacher: AlignedChunk, rows: Rows, settings: Settings) -> Seen:
    """A teacher of another vocabulary: the divergence on what both can say, m D + (1 - m) sum_i |p_(i) - q_(i)| with
    the sorted rest, or an unpaired divergence on everything. The verifier sees the teacher's own vocabulary.
    """
    objective, fp = settings.objective, wide(raw.dtype)
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
            kl = _across(forward_kl, logp, logq, pair, teacher) if settings.options.also_kl else None
            column = teacher.proposal(logq)
            seen = TokenPair(
                logp=logp, logq=logp, student_top=column, label=rows.label, sequence=rows.sequence, finite=finite,
                known_overlap=overlap,
            )  # fmt: skip
            weight, acceptance = objective.weigh(seen, rows.uniform)
            unverified = (column < 0) & (objective.teacher_tokens != 0)
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
