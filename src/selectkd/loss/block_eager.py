"""The closed forms' way through a block of rows, both models dense: no autograd, and every temporary in the caches.

b rows, v vocabulary; p = teacher, q = student, zp and zq their logits. Where the second-level cache holds a few rows,
all rows of a block are worked on at once. Where it does not, they are one after the other, and their numbers floats:
what a step writes is still in the cache when the next one reads it, and no step is about a few numbers alone.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.loss.block_steps import (
    HIGHEST,
    LOWEST,
    BlockConfig,
    BlockInputs,
    BlockResult,
    argmax,
    bad_rows,
    exp_into,
    exponentials,
    finish_gradient,
    kl_of,
    pair_at,
    statistics_of,
)  # fmt: skip
from selectkd.loss.head import Head, wide
from selectkd.loss.teacher_rows import LiveChunk, Scratch
from selectkd.objective.divergences.closed_form import Block, Column, closed_form_of, dot, narrow, total
from selectkd.objective.divergences.kl import LOG_FLOOR, forward_value
from selectkd.objective.pair import TokenPair
from selectkd.objective.verifiers import STATISTICS, RowStatistics

CompiledBlock = Callable[
    [Tensor, LiveChunk, slice, tuple[str, ...], BlockInputs, Tensor], dict[str, list[Any]] | None
]
"""(raw, teacher, block, reads, rows, out) -> the columns of raw [b, v] by name, each in parts, and the
gradient in out [b, v]; None where a row is not finite."""
LEVEL_TWO = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
BUFFERS = 5
"""Tensors that a closed form works on: zp, zq, p, q, spare."""
FEW_ROWS = 4
"""Below so many rows in the cache one row is worked on at a time."""
ROWS_AT_ONCE = 8
"""Rows of a block whose rows are worked on one after the other: they share the verifier's call."""
RANKS = ("student_top", "rank", "label_rank")
"""Statistics that ask for the order of the logits."""
COMPILED_ENTRIES = 3 << 17
"""Entries of a tensor of a compiled block: more leave the third-level cache, fewer are not worth the call."""


@cache
def level_two_bytes() -> int:
    """Bytes of a core's second-level cache; 1 MiB where the system does not tell."""
    size = LEVEL_TWO.read_text() if LEVEL_TWO.exists() else ""
    kibibytes = re.match(r"(\d+)K", size)
    return int(kibibytes[1]) << 10 if kibibytes else 1 << 20


def cached_rows(width: int, dtype: torch.dtype) -> int:
    """How many rows of every tensor of a closed form the second-level cache holds."""
    return level_two_bytes() // (BUFFERS * width * dtype.itemsize)


def block_rows(width: int, dtype: torch.dtype) -> int:
    """Rows of a block."""
    held = cached_rows(width, dtype)
    return held if held >= FEW_ROWS else ROWS_AT_ONCE


def compiled_rows(width: int) -> int:
    """Rows of a block that is compiled, a power of two: each of its tensors has COMPILED_ENTRIES at most."""
    return 1 << max(0, (COMPILED_ENTRIES // width).bit_length() - 1)


@torch.no_grad()
def evaluate_closed_form(
    raw: Tensor, block: slice, teacher: LiveChunk, rows: BlockInputs, config: BlockConfig, scratch: Scratch,
    verified: TokenPair | None, compiled: CompiledBlock | None = None,
) -> BlockResult:  # fmt: skip
    """A block by the divergence's closed form; the gradient overwrites ``raw[block]`` [b, v]. verified: the pair at the
    verification temperature where that differs. compiled: does the same work on whole blocks of ``compiled_rows``."""
    objective, temperature = config.objective, config.options.temperature
    kl: Tensor | None = None
    if config.options.also_kl and temperature != 1.0:
        kl = kl_of(pair_at(1.0, raw, block, teacher, rows, config))
    if verified is None and rows.acceptance is None and not objective.reads_statistics:
        verified = pair_at(objective.verify_temperature, raw, block, teacher, rows, config)
    reads: tuple[str, ...] = ()
    if verified is None and rows.acceptance is None:
        reads = statistics_of(objective.verifier, rows)
    pieces, capped, factor = None, None, 1.0
    if compiled is not None and len(raw[block]) == compiled_rows(raw.shape[1]):
        zq = scratch.of("zq", len(raw[block]), raw.shape[1], raw, wide(raw.dtype))[: len(raw[block])]
        pieces = compiled(raw[block], teacher, block, reads, rows, zq)
    if pieces is None:
        zq, capped, pieces, factor = by_parts(raw[block], teacher, block, reads, rows, config, scratch)

    finite = None if all(x is True for x in pieces["finite"]) else joined(pieces["finite"], zq).bool()
    columns = {name: joined(pieces[name], zq) for name in ("divergence", "overlap", *reads)}
    overlap = columns["overlap"].clamp_(max=1.0) if verified is None else verified.overlap
    if pieces["kl"]:
        kl = joined(pieces["kl"], zq).clamp_(min=0.0)
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


def by_parts(
    raw: Float[Tensor, "b v"], teacher: LiveChunk, block: slice, reads: tuple[str, ...], rows: BlockInputs,
    config: BlockConfig, scratch: Scratch,
) -> tuple[Tensor, Tensor | None, dict[str, list[Any]], float]:  # fmt: skip
    """The gradient [b, v], the logits that a soft-cap left [b, v], the columns of each part by name, and the factor
    that the gradient still lacks."""
    closed_form = closed_form_of(config.objective.divergence)  # type: ignore[arg-type]
    assert closed_form is not None  # ``evaluate_block`` asks
    zq, capped = widening(config.head, raw, "zq", scratch), None
    if config.head.softcap is not None and config.wants_gradient:
        capped = scratch.of("capped", zq.shape[0], zq.shape[1], zq)[: len(zq)]
    pieces: dict[str, list[Any]] = {name: [] for name in ("divergence", "finite", "kl", "overlap", *reads)}
    factor, ranks = 1.0, "rank" in reads or "student_top" in reads
    ranked = [name for name in reads if name in RANKS]
    sums = [name for name in dict.fromkeys(("overlap", *reads)) if name not in RANKS]
    forbidden = Forbidden.of(config.head, teacher, zq.shape[1])
    tops = None
    if ranks and config.head.is_plain and teacher.unshared is None:
        tops = argmax(raw)  # of all rows at once, where the product's own order is that of the logits
    for at, part, finite in parts(zq, raw, teacher.raw[block], capped, teacher, config, scratch):
        top, label = None, None if rows.label is None else rows.label[at]
        if ranks:
            top = top_of(part) if tops is None else tops[at]
        pieces["finite"].append(finite)
        for name in ranked:  # as long as what is forbidden has no finite logit
            pieces[name].append(statistic(name, part, top, label))
        if forbidden is not None:
            forbidden.floor(part)
        for name in sums:
            pieces[name].append(statistic(name, part, top, label))
        if config.options.also_kl and config.options.temperature == 1.0:
            pieces["kl"].append(forward_value(part))
        pieces["divergence"].append(closed_form(part))
        if forbidden is not None:
            forbidden.release(part)
        factor = part.factor
    return zq, capped, pieces, factor


def widening(head: Head, raw: Float[Tensor, "b v"], name: str, scratch: Scratch) -> Float[Tensor, "b v"]:
    """Where the logits of ``raw`` are worked on: ``raw`` itself where it is them, else fp32 memory of ``name``."""
    if head.is_plain and raw.dtype in (torch.float32, torch.float64):
        return raw
    return scratch.of(name, raw.shape[0], raw.shape[1], raw, wide(raw.dtype))[: len(raw)]


def parts(
    zq: Tensor, raw_q: Tensor, raw_p: Tensor, capped: Tensor | None, teacher: LiveChunk, config: BlockConfig,
    scratch: Scratch,
) -> Iterator[tuple[slice | int, Block, Tensor | bool]]:  # fmt: skip
    """The rows of a block as closed forms see them, all at once or one by one; with where they are, and which of them
    have a finite teacher (True: all). A row whose teacher is not finite gets the student for a teacher.

    zq [b, v] receives the student's logits, and capped [b, v] the values that the soft-cap gives.
    """
    b, v = zq.shape
    single = zq.device.type == "cpu" and cached_rows(v, zq.dtype) < FEW_ROWS
    at_once = 1 if single else b
    zp = widening(teacher.head, raw_p[:at_once], "zp", scratch)  # memory of these rows, or raw_p itself
    in_place_q, in_place_p = (x.data_ptr() == y.data_ptr() for x, y in ((zq, raw_q), (zp, raw_p)))
    memory = [scratch.of(name, at_once, v, zq)[:at_once] for name in ("p", "q", "spare")]
    if single:
        zp, memory = zp[0], [x[0] for x in memory]
    where: Iterable[slice | int] = range(b) if single else (slice(0, b),)
    together = one_row if single else many_rows
    for at in where:
        ours = zq[at] if in_place_q else finished(config.head, raw_q[at], zq[at])
        theirs = raw_p[at] if in_place_p else finished(teacher.head, raw_p[at], zp)
        if capped is not None:
            capped[at] = ours
        for z in (ours, theirs):
            if config.options.temperature != 1.0:
                z.div_(config.options.temperature)
            if teacher.unshared is not None:
                z.masked_fill_(teacher.unshared, -torch.inf)
        part, finite = together(ours, theirs, *memory)
        yield at, part, finite


def finished(head: Head, raw: Tensor, out: Tensor) -> Tensor:
    """The logits of ``raw`` in ``out``."""
    return out.copy_(raw if head.is_plain else head.finish(raw))


def many_rows(zq: Tensor, zp: Tensor, p: Tensor, q: Tensor, spare: Tensor) -> tuple[Block, Tensor | bool]:
    """Rows that are worked on at once, [b, v] each, and which of them have a finite teacher."""
    inverse, norms, ordinary = exponentials((zq, zp), (q, p))
    finite: Tensor | bool = True
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
    return Block(zp, zq, norm_q, norm_p, p, q, out=zq, spare=spare), finite


def one_row(zq: Tensor, zp: Tensor, p: Tensor, q: Tensor, spare: Tensor) -> tuple[Block, bool]:
    """A row on its own, [v] each, and whether its teacher is finite."""
    norm_q, norm_p = softmax_row(zq, q), softmax_row(zp, p)
    finite = math.isfinite(norm_p)
    if not finite:
        zp.copy_(zq)
        p.copy_(q)
        norm_p = norm_q
    return Block(zp, zq, norm_q, norm_p, p, q, out=zq, spare=spare), finite


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
            z[..., ids] = narrow(norm + LOG_FLOOR, z)
        if self.alone.numel():  # a row whose teacher is not finite has the student for one, its -inf included
            lowest = narrow(block.norm_p + LOG_FLOOR, block.zp)
            block.zp[..., self.alone] = block.zp[..., self.alone].clamp(min=lowest)

    def release(self, block: Block) -> None:
        """Takes the part of a token that the student can never say out of the gradient h - q sum(h) in ``block.out``:
        there log q is constant, so h is 0, and the others' q sum(h) goes without it."""
        if self.alone.numel():
            held = block.out[..., self.alone]
            block.out.add_(block.q * total(held))
            block.out[..., self.alone] = 0.0


def softmax_row(z: Float[Tensor, " v"], out: Float[Tensor, " v"]) -> float:
    """The softmax of a row in ``out``; returns the log-sum-exp, true to what ``out`` sums to.

    A row whose log-sum-exp is out of the ordinary is shifted by its maximum, in place; nan if it is not finite."""
    mass = exp_into(z, out).sum().item()
    if not math.exp(LOWEST) < mass < math.exp(HIGHEST):  # nan is not
        z.sub_(z.max())
        mass = exp_into(z, out).sum().item()
        if not mass > 0.0 or math.isinf(mass):
            return math.nan
    inverse = 1.0 / mass if z.dtype == torch.float64 else ctypes.c_float(1.0 / mass).value
    out.mul_(inverse)
    return -math.log(inverse)


def statistic(name: str, block: Block, top: Tensor | None, label: Tensor | None) -> Column:
    """One of ``STATISTICS`` of the rows of a block with their ``top`` and ``label``; until the closed form has run."""
    width = block.q.shape[-1]
    if name == "overlap":
        return total(torch.minimum(block.p, block.q, out=block.spare))
    if name == "student_top":
        assert top is not None
        return top
    if name == "rank":
        assert top is not None
        return rank(block, top)
    if name == "label_rank":
        assert label is not None
        known = (label >= 0) & (label < width)
        return torch.where(known, torch.as_tensor(rank(block, label.clamp(0, width - 1))).flatten(), width)
    if name == "bhattacharyya":
        return total(torch.mul(block.p, block.q, out=block.spare).sqrt_())
    if name == "teacher_entropy":
        return block.norm_p - dot(block.p, block.zp, block.spare)
    if name == "student_entropy":
        return block.norm_q - dot(block.q, block.zq, block.spare)
    raise ConfigError(f"a verifier reads {name!r}; the statistics of a row are {', '.join(STATISTICS)}.")


def top_of(block: Block) -> Int[Tensor, "*b"]:
    """The student's own proposal in each row."""
    return argmax(block.zq) if block.zq.ndim == 2 else argmax(block.zq[None])[0]


def rank(block: Block, token: Int[Tensor, "*b"]) -> Column:
    """How many tokens the teacher prefers to ``token`` of each row; the whole vocabulary where it is impossible."""
    width = block.zp.shape[-1]
    # counted in floats: five times as fast as in booleans
    if block.zp.ndim == 1:
        chosen = block.zp[token].item()
        return float(width) if chosen == -math.inf else total(torch.gt(block.zp, chosen, out=block.spare))
    chosen = block.zp.gather(-1, token[:, None])  # [b, 1]
    better = torch.gt(block.zp, chosen, out=block.spare).sum(-1, keepdim=True)
    return better.masked_fill_(torch.isneginf(chosen), width)


def joined(values: list[Any], like: Tensor) -> Tensor:
    """The columns of a block's parts as one tensor [b] in the dtype of ``like``."""
    if len(values) == 1 and isinstance(values[0], Tensor):
        return values[0].flatten().to(like.dtype)
    return torch.tensor([float(x) for x in values], dtype=like.dtype, device=like.device)
