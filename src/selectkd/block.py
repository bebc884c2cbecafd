"""The elementwise work of the fused loss on one block of rows: from logits to weights and to their gradient.

b rows, v vocabulary, K stored tokens. Three ways, the same result: a closed form where the divergence states one and
the teacher is dense; autograd on the K + 1 outcomes of a top-K teacher; autograd on the whole vocabulary otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selectkd.divergences.gradient import Block, closed_form_of, reads_differences_only
from selectkd.divergences.sorted import is_unpaired, sorted_distance
from selectkd.objective import Judgement, Objective
from selectkd.pair import TokenPair, support_pair
from selectkd.rows import CachedChunk, Head, LiveChunk, Scratch, TeacherChunk
from selectkd.spans import AlignedChunk

IMPOSSIBLE = -1e4
"""The logit of an unshared id in a closed form: its probability is exactly 0, its logarithm still finite."""
LIKELY = 0.05
"""A probability whose logarithm has all its digits: its exponent was a small number."""
LANES = 64
"""Width of the pieces an argmax looks at first."""


@dataclass(frozen=True)
class Settings:
    """What is the same for every block of a call."""

    objective: Objective
    head: Head
    temperature: float
    wants_gradient: bool
    wants_bias: bool


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
    """What came of a block: its part of the loss, its columns [b], its rows without a finite teacher, and the gradients
    of the bias [v] and of ``later`` [b]."""

    loss: Tensor
    divergence: Tensor
    weight: Tensor
    acceptance: Tensor
    overlap: Tensor
    bad: Tensor | int
    grad_bias: Tensor | None
    unverified: Tensor | float = 0.0
    grad_later: Tensor | None = None


def judge(
    raw: Tensor, block: slice, teacher: TeacherChunk, rows: Rows, settings: Settings, scratch: Scratch
) -> Seen:
    """Judges the rows of a block and writes the gradient of the loss to ``raw[block]`` [b, v] over the logits there."""
    if isinstance(teacher, AlignedChunk):
        return _aligned(raw, block, teacher, rows, settings)
    closed_form = closed_form_of(settings.objective.divergence)  # type: ignore[arg-type]
    verified = None
    if rows.acceptance is None and settings.objective.verify_temperature != settings.temperature:
        verified = for_verifier(raw, block, teacher, rows, settings)
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
def for_verifier(
    raw: Tensor, block: slice, teacher: TeacherChunk, rows: Rows, settings: Settings
) -> TokenPair:
    """The pair the verifier sees, at its temperature, with labels, sequences and the reference student."""
    logits = settings.head.finish(raw[block])
    pair = teacher.pair(block, logits, settings.objective.verify_temperature)
    return replace(pair, label=rows.label, sequence=rows.sequence)


def _closed(
    raw: Tensor, block: slice, teacher: LiveChunk, rows: Rows, settings: Settings, scratch: Scratch,
    closed_form: Callable[[Block], tuple[Tensor, Tensor | float | None]], verified: TokenPair | None,
) -> Seen:  # fmt: skip
    """A dense teacher and a divergence with a closed form: no autograd, memory reused from block to block."""
    head, temperature = settings.head, settings.temperature
    b, width = raw[block].shape
    target = raw[block]
    plain = head.is_plain and raw.dtype in (torch.float32, torch.float64)

    with torch.no_grad():
        logits = target if plain else head.finish(target)  # [b, v], fp32 or wider, ours to overwrite
        capped = logits.clone() if head.softcap is not None and settings.wants_gradient else None
        fp = logits.dtype
        p, q, out, spare = (scratch.of(name, b, width, logits)[:b] for name in ("p", "q", "out", "spare"))
        other = teacher.logits(block).to(fp)  # [b, v], ours to overwrite
        unshared = teacher.unshared
        if unshared is not None:
            logits.masked_fill_(unshared, IMPOSSIBLE)
            other.masked_fill_(unshared, IMPOSSIBLE)
        if temperature != 1.0:
            logits, other = logits.div_(temperature), other.div_(temperature)
        top = argmax(logits)
        student_total, _ = softmax_and_total(logits, q, top)
        teacher_total, finite = softmax_and_total(other, p, top)
        if not bool(finite.all()):
            for ours, theirs in ((other, logits), (p, q), (teacher_total, student_total)):
                ours[~finite] = theirs[~finite]
        shared = torch.minimum(p, q, out=spare).sum(-1).clamp(max=1.0)
        shift: Tensor | float = 0.0
        logp, logq = other, logits  # what the verifier reads
        if not reads_differences_only(settings.objective.divergence):  # type: ignore[arg-type]
            logits.sub_(student_total)
            other.sub_(teacher_total)
        else:
            shift = (student_total - teacher_total)[:, 0]
            # the verifier's own copies, so that it changes nothing about the divergence's rounding
            if verified is None and rows.acceptance is None and not settings.objective.shift_free:
                logp, logq = (
                    torch.sub(other, teacher_total, out=out),
                    torch.sub(logits, student_total, out=spare),
                )
        pair = TokenPair(
            logp=logp, logq=logq, student_top=top, label=rows.label, sequence=rows.sequence, finite=finite,
            shared_mass=shared,
        )  # fmt: skip
        seen = pair if verified is None else verified
        weight, acceptance = settings.objective.weigh(seen, rows.uniform, acceptance=rows.acceptance)
        divergence, total = closed_form(
            Block(logp=other, logq=logits, p=p, q=q, out=out, spare=spare, shift=shift)
        )
        divergence = divergence.clamp(min=0.0)
        share = rows.scale.to(fp) * weight  # [b]
        grad_bias = None
        if settings.wants_gradient:
            if total is None:
                total = out.sum(-1)
            scale = share / temperature
            gradient = torch.mul(out, scale[:, None], out=logits)  # the log-probabilities are done with
            if not (isinstance(total, float) and total == 0.0):
                gradient.addcmul_(q, (-scale * total)[:, None])
            grad_bias = finish_gradient(gradient, capped, settings)
            if not plain:
                target.copy_(gradient)
    return Seen(
        (share * divergence).sum(), divergence, weight, acceptance, seen.overlap, (~finite).sum(), grad_bias
    )


def _top_k(
    raw: Tensor, block: slice, teacher: CachedChunk, rows: Rows, settings: Settings, scratch: Scratch,
    verified: TokenPair | None,
) -> Seen:  # fmt: skip
    """A top-K teacher: the objective on K + 1 outcomes by autograd, taken back to the vocabulary in closed form.

    With h = dL / d log q on the K tokens and the rest, the gradient to a logit is h_v - q_v sum(h) for a stored token
    and q_v (h_rest / q_rest - sum(h)) for any other.
    """
    head = settings.head
    b, width = raw[block].shape
    target = raw[block]
    ids, stored = teacher.stored(block, settings.temperature)
    with torch.no_grad():
        logits = head.finish(target)
        capped = logits.clone() if head.softcap is not None and settings.wants_gradient else None
        q = scratch.of("q", b, width, logits)[:b]
        top = argmax(logits)
        total, _ = softmax_and_total(logits, q, top)
        chosen, chosen_log = q.gather(-1, ids), logits.gather(-1, ids) - total  # [b, K]
        q.scatter_(-1, ids, 0.0)
        rest = q.sum(-1, keepdim=True)  # [b, 1]
        support = torch.cat([chosen_log, rest.log()], 1)  # [b, K + 1]
    leaf = support.requires_grad_(settings.wants_gradient)
    with torch.set_grad_enabled(settings.wants_gradient):
        pair = replace(support_pair(ids, stored, leaf, top), label=rows.label, sequence=rows.sequence)
        judged = settings.objective(pair, rows.uniform, verified=verified, acceptance=rows.acceptance)
        loss = (rows.scale.to(leaf.dtype) * judged.weight * judged.divergence).sum()
    grad_bias = None
    if settings.wants_gradient:
        (h,) = torch.autograd.grad(loss, leaf)
        of_tokens, of_rest, sum_h = h[:, :-1], h[:, -1:], h.sum(-1, keepdim=True)
        tiny = torch.finfo(q.dtype).tiny
        gradient = q.mul_(of_rest / rest.clamp(min=tiny) - sum_h)
        gradient.scatter_(-1, ids, of_tokens - chosen * sum_h)
        grad_bias = finish_gradient(gradient, capped, settings)
        target.copy_(gradient)
    return _seen(loss, judged, pair, grad_bias)


def finish_gradient(gradient: Tensor, capped: Tensor | None, settings: Settings) -> Tensor | None:
    """Takes d loss / d logits back through soft-cap and scale in place, and returns the bias's part of it, [v]."""
    head = settings.head
    if capped is not None and head.softcap is not None:
        gradient.mul_(capped.div_(head.softcap).square_().neg_().add_(1.0))
    if head.scale != 1.0:
        gradient.mul_(head.scale)
    return gradient.sum(0) if settings.wants_bias else None


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
    head = settings.head
    with torch.set_grad_enabled(settings.wants_gradient):
        pair = teacher.pair(block, head.finish(leaf), settings.temperature)
        pair = replace(pair, label=rows.label, sequence=rows.sequence)
        judged = settings.objective(pair, rows.uniform, verified=verified, acceptance=rows.acceptance)
        loss = (rows.scale.to(fp) * judged.weight * judged.divergence).sum()
    grad_bias = None
    if settings.wants_gradient:
        leaves = [leaf, head.bias] if settings.wants_bias else [leaf]
        gradients = torch.autograd.grad(loss, leaves)
        raw[block] = gradients[0]
        grad_bias = gradients[1] if settings.wants_bias else None
    return _seen(loss, judged, pair, grad_bias)


def _aligned(raw: Tensor, block: slice, teacher: AlignedChunk, rows: Rows, settings: Settings) -> Seen:
    """A teacher of another vocabulary: the divergence on what both can say, m D + (1 - m) sum_i |p_(i) - q_(i)| with
    the sorted rest, or an unpaired divergence on everything. The verifier sees the teacher's own vocabulary.
    """
    objective, fp = settings.objective, torch.float64 if raw.dtype == torch.float64 else torch.float32
    leaf = raw[block].to(fp, copy=True).requires_grad_(settings.wants_gradient)
    assert rows.later is not None  # the loss of aligned rows gives it
    with torch.set_grad_enabled(settings.wants_gradient):
        logits = settings.head.finish(leaf)
        logp, finite = teacher.teacher_log_probs(block, logits)
        logq = teacher.student_log_probs(block, logits, rows.later)
        pair = teacher.shared_pair(logp, logq)
        divergence = _across(objective.divergence, logp, logq, pair, teacher)
        with torch.no_grad():
            overlap = torch.minimum(pair.logp, pair.logq)[:, :-1].exp().sum(-1).clamp(max=1.0)
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
    grad_bias = grad_later = None
    if settings.wants_gradient:
        leaves = {"logits": leaf}
        if settings.wants_bias and settings.head.bias is not None:
            leaves["bias"] = settings.head.bias
        if rows.later.requires_grad:
            leaves["later"] = rows.later
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        raw[block] = gradients["logits"]
        grad_bias, grad_later = gradients.get("bias"), gradients.get("later")
    return Seen(
        loss.detach(), divergence.detach(), weight, acceptance, overlap, (~finite).sum(), grad_bias,
        unverified.to(fp), grad_later,
    )  # fmt: skip


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


def _seen(loss: Tensor, judged: Judgement, pair: TokenPair, grad_bias: Tensor | None) -> Seen:
    bad = 0 if pair.finite is None else (~pair.finite).sum()
    divergence, weight, acceptance, overlap = judged
    return Seen(loss.detach(), divergence.detach(), weight, acceptance, overlap, bad, grad_bias)


def softmax_and_total(logits: Tensor, probabilities: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves softmax(logits) in ``probabilities``; (log-sum-exp [b, 1], whether finite [b]).

    log-sum-exp = z_y - log softmax(z)_y, for a ``column`` y [b] of each row: no second exponential, and exact to the
    last digits where the probabilities are. y must be a likely token; where one is not, argmaxes are looked for.
    """
    torch.softmax(logits, -1, out=probabilities)
    at = column[:, None]
    if bool((probabilities.gather(-1, at) <= LIKELY).any()):
        at = argmax(logits)[:, None]
    logarithm = probabilities.gather(-1, at).log()  # [b, 1]
    return logits.gather(-1, at) - logarithm, torch.isfinite(logarithm[:, 0])


def argmax(x: Tensor) -> Tensor:
    """The column of the first largest entry of each row, [b]: the best piece of LANES columns, then inside it."""
    b, v = x.shape
    whole = v - v % LANES
    if whole < 2 * LANES or not x.is_contiguous():
        return x.argmax(-1)
    pieces = x[:, :whole].unflatten(-1, (-1, LANES))  # [b, v / LANES, LANES]
    piece = pieces.amax(-1).argmax(-1)  # [b]
    inside = pieces.gather(1, piece[:, None, None].expand(b, 1, LANES))[:, 0].argmax(-1)
    best = piece * LANES + inside
    if whole < v:
        rest = x[:, whole:].max(-1)
        best = torch.where(rest.values > x.gather(-1, best[:, None])[:, 0], whole + rest.indices, best)
    return best
