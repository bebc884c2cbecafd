"""The closed forms' way through a block of rows, both models dense: no autograd, and every temporary in the caches.

b rows, v vocabulary; p = teacher, q = student, zp and zq their logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selectkd.block import (
    IMPOSSIBLE,
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
)  # fmt: skip
from selectkd.divergences.gradient import Block
from selectkd.divergences.kl import forward_value
from selectkd.pair import TokenPair
from selectkd.rows import LiveChunk, Scratch


@torch.no_grad()
def judge_dense(
    raw: Tensor, block: slice, teacher: LiveChunk, rows: Rows, settings: Settings, scratch: Scratch,
    closed_form: Callable[[Block], Tensor], verified: TokenPair | None,
) -> Seen:  # fmt: skip
    """Judges a block and writes the gradient over ``raw[block]`` [b, v]; ``verified`` is the pair at the verification
    temperature where that differs."""
    head, temperature, target = settings.head, settings.temperature, raw[block]
    kl: Tensor | int = 0
    if settings.also_kl and temperature != 1.0:
        kl = kl_of(pair_at(1.0, raw, block, teacher, rows, settings))
    zq = widened(head, target, "zq", scratch)  # [b, v]
    zp = widened(teacher.head, teacher.raw[block], "zp", scratch)
    capped = zq.clone() if head.softcap is not None and settings.wants_gradient else None
    for z in (zq, zp):
        if temperature != 1.0:
            z.div_(temperature)
        if teacher.unshared is not None:
            z.masked_fill_(teacher.unshared, IMPOSSIBLE)
    b, v = zq.shape
    p, q, spare = (scratch.of(name, b, v, zq)[:b] for name in ("p", "q", "spare"))
    norms, finite = softmax_pair(zq, zp, q, p)
    seen = Block(zp=zp, zq=zq, norms=norms, p=p, q=q, out=zq, spare=spare)
    weight, acceptance, overlap = _weigh(seen, rows, settings, finite, verified)
    if settings.also_kl and temperature == 1.0:
        kl = forward_value(seen).clamp_(min=0.0).sum()
    divergence = closed_form(seen)
    if settings.wants_gradient:
        finish_gradient(zq, rows.scale * weight, capped, settings)
        if zq is not target:
            target.copy_(zq)
    return Seen(divergence.clamp_(min=0.0), weight, acceptance, overlap, bad_rows(finite), kl)


def softmax_pair(
    zq: Float[Tensor, "b v"], zp: Float[Tensor, "b v"], q: Float[Tensor, "b v"], p: Float[Tensor, "b v"]
) -> tuple[Float[Tensor, "2 b"], Bool[Tensor, " b"] | None]:
    """Fills q and p with the softmaxes; returns the log-sum-exps of both in fp64, true to what q and p sum to.

    Rows whose log-sum-exp is out of the ordinary are shifted by their maximum, in zq and zp, too. A teacher's row that
    is not finite becomes the student's, and is False in the second value; None means that all are finite.
    """
    inverse, norms, ordinary = exponentials((zq, zp), (q, p))
    finite = None
    if not ordinary:
        finite = torch.isfinite(norms[1])
        for ours, theirs in ((zp, zq), (p, q), (inverse[1], inverse[0]), (norms[1], norms[0])):
            ours[~finite] = theirs[~finite]
    q.mul_(inverse[0])
    p.mul_(inverse[1])
    return norms, finite


def _weigh(
    block: Block, rows: Rows, settings: Settings, finite: Tensor | None, verified: TokenPair | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, acceptance, overlap) of the rows: from their statistics where the verifier asks no more, else from a
    pair."""
    objective = settings.objective
    statistics = BlockStatistics(block, rows)
    if verified is None and (rows.acceptance is not None or objective.reads_statistics):
        acceptance = rows.acceptance
        if acceptance is None:
            acceptance = objective.verifier.from_statistics(statistics, rows.uniform)
        weighed = objective.weight_of(
            acceptance.to(block.q.dtype), rows.uniform, label=rows.label, finite=finite
        )
        return *weighed, statistics.overlap
    pair = verified
    if pair is None:
        pair = TokenPair(
            logp=torch.log_softmax(block.zp, -1), logq=torch.log_softmax(block.zq, -1),
            student_top=statistics.student_top, finite=finite,
        )  # fmt: skip
    pair = replace(pair, label=rows.label, sequence=rows.sequence)
    return *objective.weigh(pair, rows.uniform, acceptance=rows.acceptance), pair.overlap


class BlockStatistics:
    """The ``RowStatistics`` of a block, each computed when it is asked for; until the closed form has run."""

    def __init__(self, block: Block, rows: Rows) -> None:
        self.block, self.rows = block, rows
        self.width = block.q.shape[-1]

    @cached_property
    def student_top(self) -> Int[Tensor, " b"]:
        return argmax(self.block.zq) if self.rows.top is None else self.rows.top

    @cached_property
    def rank(self) -> Float[Tensor, " b"]:
        return self._rank_of(self.student_top)

    @cached_property
    def label_rank(self) -> Float[Tensor, " b"]:
        label = self.rows.label
        if label is None:
            return torch.full_like(self.overlap, self.width)
        known = (label >= 0) & (label < self.width)
        return torch.where(known, self._rank_of(label.clamp(0, self.width - 1)), self.width)

    def _rank_of(self, column: Tensor) -> Tensor:
        chosen = self.block.zp.gather(-1, column[:, None])  # [b, 1]
        # counted in floats: five times as fast as in booleans
        better = torch.gt(self.block.zp, chosen, out=self.block.spare).sum(-1)
        return better.masked_fill_(chosen[:, 0] <= IMPOSSIBLE, self.width)

    @cached_property
    def overlap(self) -> Float[Tensor, " b"]:
        return torch.minimum(self.block.p, self.block.q, out=self.block.spare).sum(-1).clamp_(max=1.0)

    @cached_property
    def teacher_entropy(self) -> Float[Tensor, " b"]:
        return self._entropy(self.block.p, self.block.zp, self.block.norm_p)

    @cached_property
    def student_entropy(self) -> Float[Tensor, " b"]:
        return self._entropy(self.block.q, self.block.zq, self.block.norm_q)

    def _entropy(self, probability: Tensor, logits: Tensor, norm: Tensor) -> Tensor:
        mean = torch.mul(probability, logits, out=self.block.spare).sum(-1)
        return (norm - mean).to(probability.dtype).clamp_(min=0.0)

    @cached_property
    def affinity(self) -> Float[Tensor, " b"]:
        return torch.mul(self.block.p, self.block.q, out=self.block.spare).sqrt_().sum(-1)
