"""A teacher of another vocabulary beside the student, span by span of the same text.

n supervised rows, g spans, c spans of a chunk, b of a block, v / w student / teacher vocabulary, m tokens of both. A
span is the shortest stretch of text that both tokenizers cut at both ends; its distributions are those at its first
token.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.loss.teacher_rows import LiveChunk, LiveRows, Scratch, TeacherRows
from selectkd.objective.pair import TokenPair, logsumexp

SURE = -1e-7
"""A continuation is taken to be at least this far from certain: below, 1 - e^x has no digit left in fp32."""


@dataclass(frozen=True)
class Vocabularies:
    """What two vocabularies have in common: tokens of the same bytes, and ends of sequence.

    image: [v], of each student's id the teacher's with the same bytes, -1 where there is none. shared_student,
    shared_teacher: [m], the pairs. own_student, own_teacher: ids without a counterpart. Rows of a head that are in
    neither are dead.
    """

    image: Int[Tensor, " v"]
    shared_student: Int[Tensor, " m"]
    shared_teacher: Int[Tensor, " m"]
    own_student: Int[Tensor, " a"]
    own_teacher: Int[Tensor, " b"]

    @property
    def shared_fraction(self) -> float:
        """The part of the teacher's vocabulary that the student has as well, in [0, 1]."""
        both = self.shared_teacher.shape[0]
        return both / max(1, both + self.own_teacher.shape[0])

    def dead(self, width: int, *, of_teacher: bool = False) -> Bool[Tensor, " v"]:
        """The rows of a head that stand for no token."""
        ids = (
            (self.shared_teacher, self.own_teacher) if of_teacher else (self.shared_student, self.own_student)
        )
        dead = torch.ones(width, dtype=torch.bool, device=self.image.device)
        dead[torch.cat(ids)] = False
        return dead

    def to(self, device: torch.device | str) -> Vocabularies:
        """The same on ``device``."""
        return Vocabularies(**{name: ids.to(device) for name, ids in vars(self).items()})


@dataclass(frozen=True)
class Side:
    """How one side wrote the g spans: first: [g], the id of the first token; later: [g], log-probability of the tokens
    after it, given those before each; several: [g], whether there are any; whole: [g], the id of the one token with
    the span's bytes, -1 where there is none.
    """

    first: Int[Tensor, " g"]
    later: Float[Tensor, " g"]
    several: Bool[Tensor, " g"]
    whole: Int[Tensor, " g"]

    def __getitem__(self, spans: slice | Tensor) -> Side:
        return Side(**{name: column[spans] for name, column in vars(self).items()})


@dataclass(frozen=True)
class Spans:
    """The g spans of a text of n supervised rows.

    first: [g], the student's row of each span's first token, ascending. span: [n], the span of each row, -1 where its
    text could not be aligned. token: [n], the text's tokens. student, ours: the two sides; the loss fills
    ``student.later`` in. merged: [g], whether the span is anything but the same one token on both sides.
    """

    first: Int[Tensor, " g"]
    span: Int[Tensor, " n"]
    token: Int[Tensor, " n"]
    student: Side
    ours: Side
    merged: Bool[Tensor, " g"]


class AlignedRows:
    """A teacher of another tokenizer: its distribution at the first token of g spans of the student's n rows.

    teacher: its rows, one a span. later: [r], the rows of the spans' other tokens.
    matched_weight: what the divergence on the shared tokens counts, and 1 minus it the sorted distance of the others;
    None for the shared part of the teacher's vocabulary. unverified_weight: the weight of a span whose proposal has no
    counterpart; None for beta, as if it were rejected. by_index: the same teacher with its i-th token beside the
    student's i-th, for divergences that need nothing in common.
    """

    def __init__(
        self,
        teacher: LiveRows,
        vocabularies: Vocabularies,
        spans: Spans,
        *,
        matched_weight: float | None = None,
        unverified_weight: float | None = None,
        by_index: AlignedRows | None = None,
    ) -> None:
        if teacher.count != spans.first.shape[0]:
            raise ConfigError(
                f"the teacher has {teacher.count} rows and there are {spans.first.shape[0]} spans."
            )
        self.teacher, self.vocabularies = teacher, vocabularies
        self.first, self.span, self.token = spans.first, spans.span, spans.token
        self.student, self.ours, self.merged = spans.student, spans.ours, spans.merged
        self.matched_weight = vocabularies.shared_fraction if matched_weight is None else matched_weight
        self.unverified_weight = unverified_weight
        self.by_index = by_index
        self.reference: TeacherRows | None = None  # its rows would have no place beside another vocabulary

    @property
    def count(self) -> int:
        return self.span.shape[0]

    @property
    def later(self) -> Int[Tensor, " r"]:
        """The rows of the tokens after the first of their span."""
        is_first = torch.zeros_like(self.span, dtype=torch.bool)
        is_first[self.first] = True
        return ((self.span >= 0) & ~is_first).nonzero()[:, 0]

    def with_later(self, later: Float[Tensor, " g"]) -> AlignedRows:
        """The same rows, the student's later tokens filled in."""
        filled = copy(self)
        filled.student = replace(self.student, later=later)
        return filled

    def take(self, index: Int[Tensor, " m"]) -> AlignedRows:
        """The rows at ``index``; ConfigError where a span lies in them in part."""
        place = torch.full_like(self.span, -1)
        place[index] = torch.arange(index.shape[0], device=index.device)
        size, taken = (
            self.span[rows].bincount(minlength=self.first.shape[0])
            for rows in (self.span >= 0, (self.span >= 0) & (place >= 0))
        )
        cut = (taken > 0) & (taken < size)
        if bool(cut.any()):
            raise ConfigError(
                f"the {index.shape[0]} rows chosen of {self.count} hold {int(cut.sum())} spans of text in "
                "part, and a teacher of another tokenizer compares whole ones. Choose whole spans or samples, or use a "
                "teacher of the student's tokenizer."
            )
        kept = (taken > 0).nonzero()[:, 0]
        number = torch.full_like(self.first, -1)
        number[kept] = torch.arange(kept.shape[0], device=kept.device)
        span = self.span[index]
        chosen = copy(self)
        chosen.teacher, chosen.token = self.teacher.take(kept), self.token[index]
        chosen.first, chosen.span = (
            place[self.first[kept]],
            torch.where(span >= 0, number[span.clamp(min=0)], -1),
        )
        chosen.student, chosen.ours, chosen.merged = self.student[kept], self.ours[kept], self.merged[kept]
        chosen.by_index = None if self.by_index is None else self.by_index.take(index)
        return chosen

    def shared_width(self, student_width: int) -> int:
        return student_width

    def open(self, rows: slice, width: int, scratch: Scratch) -> AlignedChunk:
        """A chunk of spans; ``width`` is the student's head's."""
        teacher = self.teacher.open(rows, self.teacher.head.width, scratch)
        return AlignedChunk(self, rows, teacher, width)


class AlignedChunk:
    """A chunk of spans: both sides as distributions over their tokens and, last, the text of the span."""

    def __init__(self, rows: AlignedRows, spans: slice, teacher: LiveChunk, width: int) -> None:
        self.matched_weight, self.unverified_weight = rows.matched_weight, rows.unverified_weight
        self.vocabularies, self.teacher = rows.vocabularies, teacher
        self.student, self.ours, self.merged = rows.student[spans], rows.ours[spans], rows.merged[spans]
        self.dead = self.vocabularies.dead(width)
        self.dead_teacher = self.vocabularies.dead(self.width, of_teacher=True)

    @property
    def width(self) -> int:
        """Rows of the teacher's head."""
        return self.teacher.raw.shape[1]

    @torch.no_grad()
    def teacher_log_probs(
        self, block: slice, like: Tensor
    ) -> tuple[Float[Tensor, "b w1"], Bool[Tensor, " b"]]:
        """(log p [b, w + 1], whether finite [b]); uniform where it is not."""
        logits = self.teacher.logits(block).to(like.dtype)
        dead = self.dead_teacher
        logp = torch.log_softmax(logits.masked_fill_(dead, -torch.inf), -1)
        finite = ~logp.isnan().any(-1)
        if not bool(finite.all()):
            logp[~finite] = torch.log_softmax(torch.zeros_like(logp[0]).masked_fill(dead, -torch.inf), -1)
        side = self.ours[block]
        return with_span(logp, side, side.later.to(logp.dtype), self.merged[block]), finite

    def student_log_probs(
        self, block: slice, logits: Float[Tensor, "b v"], later: Float[Tensor, " b"]
    ) -> Float[Tensor, "b v1"]:
        """log q [b, v + 1], with gradients to the logits and to the later tokens' log-probability."""
        logq = torch.log_softmax(logits.masked_fill(self.dead, -torch.inf), -1)
        return with_span(logq, self.student[block], later.to(logq.dtype), self.merged[block])

    def pair(self, block: slice, logits: Float[Tensor, "b v"], temperature: float) -> TokenPair:
        """The pair of a block on what both can say, at temperature 1 alone; see ``shared_pair``."""
        if temperature != 1.0:
            raise ConfigError(
                f"temperature = {temperature} with a teacher of another tokenizer: the probability of a span is a "
                "product of its tokens' at temperature 1. Set temperature to 1.0."
            )
        logp, finite = self.teacher_log_probs(block, logits)
        logq = self.student_log_probs(block, logits, self.student.later[block])
        return replace(self.shared_pair(logp, logq), finite=finite)

    def shared_pair(self, logp: Float[Tensor, "b w1"], logq: Float[Tensor, "b v1"]) -> TokenPair:
        """The pair on what both can say: the m shared tokens, the span's text, and all the rest as one tail."""
        of = self.vocabularies
        columns = [
            torch.cat([x.index_select(1, shared), x[:, -1:], logsumexp(x.index_select(1, own))], 1)
            for x, shared, own in (
                (logp, of.shared_teacher, of.own_teacher),
                (logq, of.shared_student, of.own_student),
            )
        ]
        best = columns[1][:, :-1].detach().max(-1)
        top = torch.where(best.values >= logq.detach().amax(-1), best.indices, -1)
        return TokenPair(logp=columns[0], logq=columns[1], student_top=top, tail=True)

    @torch.no_grad()
    def proposal(self, logq: Float[Tensor, "b v1"]) -> Int[Tensor, " b"]:
        """The teacher's column with the bytes of the student's likeliest outcome, [b]; -1 where there is none."""
        image = self.vocabularies.image
        span = torch.full_like(image[:1], self.width)  # the span's text is last on both sides
        return torch.cat([image, span])[logq.argmax(-1)]


def with_span(
    logp: Float[Tensor, "b v"], side: Side, later: Float[Tensor, " b"], merged: Bool[Tensor, " b"]
) -> Float[Tensor, "b v1"]:
    """A distribution over tokens as one over tokens and, last, the text of the span: [b, v + 1], of the same sum.

    By the chain rule the span's text has P(first) P(later | first), and P(whole) where one token spells it too. What is
    left at the first token, P(first) (1 - P(later | first)), is the first token followed by something else. A span that
    is not ``merged`` keeps its tokens, and its text a probability of 0.
    """
    column = torch.where(merged, side.first, 0)[:, None]  # [b, 1]
    whole = torch.where(merged & (side.whole >= 0), side.whole, 0)[:, None]
    spelled, several = merged & (side.whole >= 0), merged & side.several
    impossible = logp.new_full((), -torch.inf)
    at_first = logp.gather(1, column)[:, 0]
    later = torch.where(several, later, -1.0).clamp(
        max=SURE
    )  # any number where there is none: no nan in a gradient
    written = torch.where(several, at_first + later, impossible)
    single = torch.where(spelled, logp.gather(1, whole)[:, 0], impossible)
    text = logsumexp(torch.stack([written, single], 1))  # [b, 1]
    left = torch.where(several, at_first + torch.log(-torch.expm1(later)), at_first)
    logp = logp.scatter(1, column, left[:, None])
    gone = torch.where(spelled[:, None], impossible, logp.gather(1, whole))
    return torch.cat([logp.scatter(1, whole, gone), text], 1)
