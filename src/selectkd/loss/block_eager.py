"""The closed forms' way through a block of rows, both models dense: no autograd, and no temporary beyond the block.

b rows, v vocabulary; p = teacher, q = student, zp and zq their logits. Every number of a row is a column [b, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectkd.errors import ConfigError
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
    statistics_of,
    widened,
)  # fmt: skip
from selectkd.loss.head import Head, wide
from selectkd.loss.teacher_rows import LiveChunk, Scratch
from selectkd.objective.divergences.closed_form import Block, closed_form_of, dot, total
from selectkd.objective.divergences.kl import LOG_FLOOR, forward_value
from selectkd.objective.pair import TokenPair
from selectkd.objective.verifiers import STATISTICS, RowStatistics

CompiledBlock = Callable[
    [Tensor, LiveChunk, slice, tuple[str, ...], BlockInputs, Tensor], dict[str, Tensor] | None
]
"""(raw, teacher, block, reads, rows, out) -> the columns [b] of raw [b, v] by name, and the gradient in out [b, v];
None where a row is not finite."""
RANKS = ("student_top", "token_rank", "label_rank")
"""Statistics that ask for the order of the logits."""
BLOCK_ENTRIES = 3 << 17
"""Entries of a block's tensor on a processor: more leave the third-level cache, fewer are not worth the call."""


def block_rows(width: int) -> int:
    """Rows of a processor's block, a power of two: each of its tensors has ``BLOCK_ENTRIES`` at most.

    >>> block_rows(49_152)
    8
    """
    return 1 << max(0, (BLOCK_ENTRIES // width).bit_length() - 1)


@torch.no_grad()
def evaluate_closed_form(
    raw: Tensor, block: slice, teacher: LiveChunk, rows: BlockInputs, config: BlockConfig, scratch: Scratch,
    verified: TokenPair | None, compiled: CompiledBlock | None = None,
) -> BlockResult:  # fmt: skip
    """A block by the divergence's closed form; the gradient overwrites ``raw[block]`` [b, v]. verified: the pair at the
    verification temperature where that differs. compiled: does the same work on whole blocks of ``block_rows``."""
    objective, temperature = config.objective, config.options.temperature
    kl: Tensor | None = None
    if config.options.also_kl and temperature != 1.0:
        kl = kl_of(pair_at(1.0, raw, block, teacher, rows, config))
    if verified is None and rows.acceptance is None and not objective.reads_statistics:
        verified = pair_at(objective.verify_temperature, raw, block, teacher, rows, config)
    reads: tuple[str, ...] = ()
    if verified is None and rows.acceptance is None:
        reads = statistics_of(objective.verifier, rows)
    columns, finite, capped, factor = None, None, None, 1.0
    if compiled is not None and len(raw[block]) == block_rows(raw.shape[1]):
        zq = scratch.of("zq", len(raw[block]), raw.shape[1], raw, wide(raw.dtype))[: len(raw[block])]
        columns = compiled(raw[block], teacher, block, reads, rows, zq)
    if columns is None:
        part, finite, capped = block_of(raw[block], teacher, block, config, scratch)
        columns = columns_of(part, raw[block], teacher, reads, rows, config)
        zq, factor = part.out, part.factor

    columns = {name: column.flatten().to(zq.dtype) for name, column in columns.items()}
    overlap = columns["overlap"].clamp_(max=1.0) if verified is None else verified.overlap
    if "kl" in columns:
        kl = columns["kl"].clamp_(min=0.0)
    if verified is not None:
        weight, acceptance = objective.weigh(verified, rows.uniform)
    else:
        acceptance = rows.acceptance
        if acceptance is None:
            statistics = RowStatistics(zq.shape[1], **{name: columns[name] for name in ("overlap", *reads)})
            acceptance = objective.verifier.from_statistics(statistics, rows.uniform)
        weight, acceptance = objective.weight_of(
            acceptance.to(zq.dtype), rows.uniform, label=rows.label, finite=finite
        )
    if config.wants_gradient:
        finish_gradient(zq, rows.scale * weight * factor, capped, config, out=raw[block])
    return BlockResult(
        columns["divergence"].clamp_(min=0.0), weight, acceptance, overlap, bad_rows(finite), kl
    )


def columns_of(
    part: Block,
    raw: Tensor,
    teacher: LiveChunk,
    reads: tuple[str, ...],
    rows: BlockInputs,
    config: BlockConfig,
) -> dict[str, Tensor]:
    """The columns of a block by name: ``divergence``, ``overlap``, the statistics that are read, and ``kl`` where it is
    wanted. The gradient over ``part.factor`` is left in ``part.out``."""
    closed_form = closed_form_of(config.objective.divergence)  # type: ignore[arg-type]
    assert closed_form is not None  # ``evaluate_block`` asks
    top = None
    if (
        "token_rank" in reads or "student_top" in reads
    ):  # the product's own order is that of the logits of a plain head
        top = argmax(raw if config.head.is_plain and teacher.unshared is None else part.zq)
    # ranks first: until what is forbidden has a finite logit
    columns = {name: statistic(name, part, top, rows.label) for name in reads if name in RANKS}
    forbidden = Forbidden.of(config.head, teacher, raw.shape[1])
    if forbidden is not None:
        forbidden.floor(part)
    sums = [name for name in dict.fromkeys(("overlap", *reads)) if name not in RANKS]
    columns |= {name: statistic(name, part, top, rows.label) for name in sums}
    if config.options.also_kl and config.options.temperature == 1.0:
        columns["kl"] = forward_value(part)
    columns["divergence"] = closed_form(part)
    if forbidden is not None:
        forbidden.release(part)
    return columns


def block_of(
    raw: Float[Tensor, "b v"], teacher: LiveChunk, block: slice, config: BlockConfig, scratch: Scratch
) -> tuple[Block, Tensor | None, Tensor | None]:
    """A block as closed forms see it, which of its rows have a finite teacher (None: all), and the logits that the
    student's soft-cap left. A row whose teacher is not finite gets the student for a teacher."""
    zq = widened(config.head, raw, "zq", scratch)
    zp = widened(teacher.head, teacher.raw[block], "zp", scratch)
    b, v = zq.shape
    p, q, spare = (scratch.of(name, b, v, zq)[:b] for name in ("p", "q", "spare"))
    capped = None
    if config.head.softcap is not None and config.wants_gradient:
        capped = scratch.of("capped", b, v, zq)[:b].copy_(zq)
    for z in (zq, zp):
        if config.options.temperature != 1.0:
            z.div_(config.options.temperature)
        if teacher.unshared is not None:
            z.masked_fill_(teacher.unshared, -torch.inf)
    inverse, norms, ordinary = exponentials((zq, zp), (q, p))
    finite = None
    if not ordinary:
        finite = torch.isfinite(norms[1])
        rows = finite[:, None]
        for ours, theirs in (
            (zp, zq),
            (p, q),
            (inverse[1], inverse[0]),
            (norms[1, :, None], norms[0, :, None]),
        ):
            ours.copy_(torch.where(rows, ours, theirs))
    q.mul_(inverse[0])
    p.mul_(inverse[1])
    norm_q, norm_p = norms[:, :, None]
    return Block(zp, zq, norm_q, norm_p, p, q, out=zq, spare=spare), finite, capped


class Forbidden(NamedTuple):
    """Ids whose logit is -inf, with the student and with the teacher; ``alone``: those a bias of the student's forbids
    it, which the teacher may like."""

    student: Int[Tensor, " f"]
    teacher: Int[Tensor, " g"]
    alone: Int[Tensor, " f"]

    @classmethod
    def of(cls, head: Head, teacher: LiveChunk, width: int) -> Forbidden | None:
        """What two heads forbid between them; None where that is nothing."""
        if head.bias is None and teacher.head.bias is None and teacher.unshared is None:
            return None
        alone, theirs = head.forbidden(width), teacher.head.forbidden(width)
        if teacher.unshared is None:
            return cls(alone, theirs, alone)
        dead = teacher.unshared.nonzero()[:, 0]
        return cls(torch.cat([alone, dead]), torch.cat([theirs, dead]), alone)

    def floor(self, block: Block) -> None:
        """Gives them the logarithm ``LOG_FLOOR``; their probability stays 0."""
        for z, norm, ids in (
            (block.zp, block.norm_p, self.teacher), (block.zq, block.norm_q, self.student),
        ):  # fmt: skip
            z[..., ids] = (norm + LOG_FLOOR).to(z.dtype)
        if self.alone.numel():  # a row whose teacher is not finite has the student for one, its -inf included
            lowest = (block.norm_p + LOG_FLOOR).to(block.zp.dtype)
            block.zp[..., self.alone] = block.zp[..., self.alone].clamp(min=lowest)

    def release(self, block: Block) -> None:
        """Takes the part of a token that the student can never say out of the gradient h - q sum(h) in ``block.out``:
        there log q is constant, so h is 0, and the others' q sum(h) goes without it."""
        if self.alone.numel():
            held = block.out[..., self.alone]
            block.out.add_(block.q * total(held))
            block.out[..., self.alone] = 0.0


def statistic(name: str, block: Block, top: Tensor | None, label: Tensor | None) -> Tensor:
    """One of ``STATISTICS`` of the rows of a block with their ``top`` and ``label``; until the closed form has run."""
    if name == "overlap":
        return total(torch.minimum(block.p, block.q, out=block.spare))
    if name == "student_top":
        assert top is not None
        return top
    if name == "token_rank":
        assert top is not None
        return token_rank(block, top)
    if name == "label_rank":
        assert label is not None
        width = block.q.shape[-1]
        known = (label >= 0) & (label < width)
        return torch.where(known[:, None], token_rank(block, label.clamp(0, width - 1)), width)
    if name == "bhattacharyya":
        return total(torch.mul(block.p, block.q, out=block.spare).sqrt_())
    if name == "teacher_entropy":
        return block.norm_p - dot(block.p, block.zp, block.spare)
    if name == "student_entropy":
        return block.norm_q - dot(block.q, block.zq, block.spare)
    raise ConfigError(f"a verifier reads {name!r}; the statistics of a row are {', '.join(STATISTICS)}.")


def token_rank(block: Block, token: Int[Tensor, " b"]) -> Tensor:
    """How many tokens the teacher prefers to ``token`` of each row, [b, 1]; the whole vocabulary where it is
    impossible."""
    chosen = block.zp.gather(-1, token[:, None])  # [b, 1]
    # counted in floats: five times as fast as in booleans
    better = torch.gt(block.zp, chosen, out=block.spare).sum(-1, keepdim=True)
    return better.masked_fill_(torch.isneginf(chosen), block.zp.shape[-1])
