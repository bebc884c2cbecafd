"""A block of rows by autograd: on the K + 1 outcomes of a top-K teacher, on the spans of a teacher of another
tokenizer, and on the whole vocabulary otherwise. b rows, v vocabulary, K stored tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selectkd.loss.aligned_rows import AlignedChunk
from selectkd.loss.block_steps import (
    BlockConfig,
    BlockInputs,
    BlockResult,
    argmax,
    bad_rows,
    exponentials,
    finish_gradient,
    kl_of,
    pair_at,
    widened,
)
from selectkd.loss.head import wide
from selectkd.loss.teacher_rows import CachedChunk, Scratch, TeacherChunk
from selectkd.objective.divergences.kl import forward_kl
from selectkd.objective.divergences.uld import is_unpaired, sorted_distance
from selectkd.objective.pair import TokenPair, support_pair


def evaluate_top_k(
    raw: Tensor, block: slice, teacher: CachedChunk, rows: BlockInputs, config: BlockConfig, scratch: Scratch,
    verified: TokenPair | None,
) -> BlockResult:  # fmt: skip
    """A top-K teacher: the objective on K + 1 outcomes by autograd, taken back to the vocabulary in closed form.

    With h = dD / d log q on the K tokens and the rest, the gradient to a logit is h_v - q_v sum(h) for a stored token
    and q_v (h_rest / q_rest - sum(h)) for any other.
    """
    head, target = config.head, raw[block]
    ids, stored = teacher.stored(block, config.options.temperature)
    with torch.no_grad():
        logits = widened(head, target, "zq", scratch)
        capped = logits.clone() if head.softcap is not None and config.wants_gradient else None
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
    leaf = support.requires_grad_(config.wants_gradient)
    with torch.set_grad_enabled(config.wants_gradient):
        pair = replace(support_pair(ids, stored, leaf, top), label=rows.label, sequence=rows.sequence)
        kl = kl_of(pair) if config.options.also_kl else None  # at temperature 1: a top-K teacher has no other
        loss, result = _weighed(pair, rows, config, verified)
    if config.wants_gradient:
        (h,) = torch.autograd.grad(loss, leaf)
        of_tokens, of_rest, sum_h = h[:, :-1], h[:, -1:], h.sum(-1, keepdim=True)
        tiny = torch.finfo(q.dtype).tiny
        gradient = torch.mul(q, (of_rest / rest.clamp(min=tiny) - sum_h) * inverse, out=logits)
        gradient.scatter_(-1, ids, of_tokens - chosen * sum_h)
        finish_gradient(gradient, None, capped, config, out=target)
    return result._replace(kl=kl)


def evaluate_by_autograd(
    raw: Tensor,
    block: slice,
    teacher: TeacherChunk,
    rows: BlockInputs,
    config: BlockConfig,
    verified: TokenPair | None,
) -> BlockResult:
    """Any divergence, any teacher: the objective as it stands, differentiated."""
    fp = wide(raw.dtype)
    leaf = raw[block].to(fp, copy=True).requires_grad_(config.wants_gradient)
    kl: Tensor | None = None
    if config.options.also_kl and config.options.temperature != 1.0:
        kl = kl_of(pair_at(1.0, raw, block, teacher, rows, config))
    with torch.set_grad_enabled(config.wants_gradient):
        pair = teacher.pair(block, config.head.finish(leaf), config.options.temperature)
        pair = replace(pair, label=rows.label, sequence=rows.sequence)
        if config.options.also_kl and config.options.temperature == 1.0:
            kl = kl_of(pair)
        loss, result = _weighed(pair, rows, config, verified)
    if config.wants_gradient:
        (raw[block],) = torch.autograd.grad(loss, leaf)
    return result._replace(kl=kl)


def evaluate_aligned(
    raw: Tensor, block: slice, teacher: AlignedChunk, rows: BlockInputs, config: BlockConfig
) -> BlockResult:
    """A teacher of another vocabulary: the divergence on what both can say, m D + (1 - m) sum_i |p_(i) - q_(i)| with
    the sorted rest, or an unpaired divergence on everything. The verifier sees the teacher's own vocabulary.
    """
    objective, fp = config.objective, wide(raw.dtype)
    leaf = raw[block].to(fp, copy=True).requires_grad_(config.wants_gradient)
    assert rows.later is not None  # the loss of aligned rows gives it
    later = rows.later.detach().requires_grad_(config.wants_gradient)
    with torch.set_grad_enabled(config.wants_gradient):
        logits = config.head.finish(leaf)
        logp, finite = teacher.teacher_log_probs(block, logits)
        logq = teacher.student_log_probs(block, logits, later)
        pair = teacher.shared_pair(logp, logq)
        divergence = _across(objective.divergence, logp, logq, pair, teacher)
        with torch.no_grad():
            overlap = torch.minimum(pair.logp, pair.logq)[:, :-1].exp().sum(-1).clamp(max=1.0)
            kl = _across(forward_kl, logp, logq, pair, teacher) if config.options.also_kl else None
            column = teacher.proposal(logq)
            across = TokenPair(
                logp=logp, logq=logp, student_top=column, label=rows.label, sequence=rows.sequence, finite=finite,
                known_overlap=overlap,
            )  # fmt: skip
            weight, acceptance = objective.weigh(across, rows.uniform)
            unverified = (column < 0) & (objective.teacher_tokens != 0)
            if teacher.unverified_weight is not None:
                weight = torch.where(unverified, teacher.unverified_weight * finite.to(fp), weight)
        loss = (rows.scale.to(fp) * weight * divergence).sum()
    grad_later = None
    if config.wants_gradient:
        raw[block], grad_later = torch.autograd.grad(loss, (leaf, later))
    return BlockResult(
        divergence.detach(), weight, acceptance, overlap, bad_rows(finite), kl, unverified.to(fp), grad_later
    )


def _across(divergence: Any, logp: Tensor, logq: Tensor, pair: TokenPair, teacher: AlignedChunk) -> Tensor:
    """The divergence between two vocabularies, [b]."""
    if is_unpaired(divergence):
        return divergence(logp, logq)
    matched, of = teacher.matched_weight, teacher.vocabularies
    value = matched * divergence(pair.logp, pair.logq)
    if matched < 1.0:
        own_p, own_q = logp.index_select(1, of.own_teacher), logq.index_select(1, of.own_student)
        value = value + (1.0 - matched) * sorted_distance(own_p.exp(), own_q.exp())
    return value


def _weighed(
    pair: TokenPair, rows: BlockInputs, config: BlockConfig, verified: TokenPair | None
) -> tuple[Tensor, BlockResult]:
    """The objective on a pair: its part of the loss, with a gradient, and what came of its rows."""
    divergence, weight, acceptance, overlap = config.objective(
        pair, rows.uniform, verified=verified, acceptance=rows.acceptance
    )
    loss = (rows.scale.to(divergence.dtype) * weight * divergence).sum()
    return loss, BlockResult(divergence.detach(), weight, acceptance, overlap, bad_rows(pair.finite))
