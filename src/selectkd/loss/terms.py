"""A term, some rows under one objective, and the sum of several. n rows, m of them in a term, v vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from selectkd.loss.aligned_rows import AlignedRows
from selectkd.loss.by_device import chunk_rows
from selectkd.loss.chunks import ROWS, LossCall, scored
from selectkd.loss.distillation import fused_loss
from selectkd.loss.head import Head, log_softmax, product_dtype
from selectkd.loss.options import LossOptions
from selectkd.loss.teacher_rows import CachedRows, LiveRows, Scratch, TeacherRows
from selectkd.objective.objective import Objective
from selectkd.objective.pair import TokenPair, label_log_prob

SCALARS = (
    "n",
    "accepted",
    "weight",
    "divergence",
    "weighted_divergence",
    "overlap",
    "unverified",
    "always_accepted",
    "teacher_nonfinite",
)


@dataclass(frozen=True)
class Forward:
    """What a forward pass of both models gave for n rows; stream [n]: which stream each is of.

    of_stream: the rows of each stream, where they are known beforehand: to look for them waits for the device.
    """

    hidden: Float[Tensor, "n d"]
    head: Head
    teacher: TeacherRows
    labels: Int[Tensor, " n"]
    sequence: Int[Tensor, " n"]
    stream: Int[Tensor, " n"]
    uniform: Float[Tensor, "n r"]
    options: LossOptions = field(default_factory=LossOptions)
    of_stream: Mapping[int, Tensor] | None = None

    def rows_of(self, stream: int) -> Int[Tensor, " m"]:
        """The rows of a stream."""
        if self.of_stream is None:
            return (self.stream == stream).nonzero()[:, 0]
        return self.of_stream.get(stream, self.stream[:0])

    def take(self, rows: Int[Tensor, " m"]) -> Forward:
        """Some rows of the forward pass."""
        columns = {
            name: vars(self)[name][rows] for name in ("hidden", "labels", "sequence", "stream", "uniform")
        }
        return replace(self, teacher=self.teacher.take(rows), of_stream=None, **columns)

    @torch.no_grad()
    def scores(self, selector: object, *, temperature: float = 1.0) -> Float[Tensor, "n m"]:
        """``selector``'s score of all rows at a temperature, from a first pass over them; nan where the teacher's row
        is not finite."""
        n, width = self.hidden.shape[0], self.teacher.shared_width(self.head.width)
        products = product_dtype(self.head.weight)
        call = LossCall(
            teacher=self.teacher,
            objective=Objective("forward_kl", selector, beta=0.0, verify_temperature=temperature),
            uniform=self.uniform,
            row_scale=torch.zeros(n, device=self.hidden.device),
            options=LossOptions(chunk=chunk_rows(n, width, self.options.chunk, products, self.hidden.device)),
            labels=self.labels,
            sequence=self.sequence,
            products=products,
        )
        return scored(self.hidden.detach(), self.head.detach(), call, width)

    @cached_property
    def seen_label_log_probs(self) -> Float[Tensor, "n 2"]:
        """log p(y) and log q(y) of the text's tokens at temperature 1, [n, 2], nan where the teacher's row is not
        finite; costs a head product of both models."""
        if not self.hidden.shape[0]:
            return torch.empty(0, 2, device=self.hidden.device)
        return self.scores(_LabelLogProbs())

    @cached_property
    def label_log_probs(self) -> Float[Tensor, "n 2"]:
        """The same, 0 where the teacher's row is not finite: such a row has weight 0."""
        return self.seen_label_log_probs.nan_to_num(nan=0.0)


@dataclass(frozen=True)
class Term:
    """rows [m] (None: all) under an objective. scale: factor of their loss, one number or [m].

    weighs: False for rows that count in the metrics alone: weight 0, no gradient. beside: on top of what the rows cost
    in another term, and in no metric. alone: beside, and without the teacher: the student and the labels.
    acceptance: the verifier's verdicts where a ranking has given them.
    """

    objective: Objective
    rows: Int[Tensor, " m"] | None = None
    scale: float | Float[Tensor, " m"] = 1.0
    weighs: bool = True
    beside: bool = False
    alone: bool = False
    acceptance: Float[Tensor, " m"] | None = None

    def within(self, rows: Int[Tensor, " m"], **changed: object) -> Term:
        """The same term on fewer rows: ``rows`` counts within the term's own."""
        scale = self.scale[rows] if isinstance(self.scale, Tensor) else self.scale
        acceptance = None if self.acceptance is None else self.acceptance[rows]
        chosen = rows if self.rows is None else self.rows[rows]
        return replace(self, rows=chosen, scale=scale, acceptance=acceptance, **changed)

    def options(self, options: LossOptions) -> LossOptions:
        """A forward pass's options as the term's: labels alone have no temperature, and what is beside no KL."""
        temperature = 1.0 if self.alone else options.temperature
        return replace(options, temperature=temperature, also_kl=options.also_kl and not self.beside)

    def of(self, values: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
        """The entries of a column [n], or of any [n, ...], that belong to the term's rows."""
        return values if self.rows is None else values[self.rows]


def weighted_sum(
    terms: Sequence[Term], forward: Forward, row_scale: Float[Tensor, " n"]
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The sum over terms of sum_i row_scale_i scale_i V_i D_i, and sums as ``distillation_loss`` returns them.

    Every row is in exactly one term that is not ``beside``. One term of all rows at scale 1 is ``distillation_loss``
    itself, bit for bit.
    """
    n, device = forward.hidden.shape[0], forward.hidden.device
    losses: list[Tensor] = []
    scalars = (*SCALARS, "kl") if forward.options.also_kl else SCALARS
    total = {name: torch.zeros((), device=device) for name in scalars}
    columns = [name for name in ROWS if name != "kl" or forward.options.also_kl]
    rows = {f"row_{name}": torch.zeros(n, device=device) for name in columns}
    for term in terms:
        whole = term.rows is None
        if not whole and not term.rows.numel():  # type: ignore[union-attr]
            continue
        scale = term.of(row_scale)
        if isinstance(term.scale, Tensor) or term.scale != 1.0:
            scale = scale * term.scale
        hidden = term.of(forward.hidden)
        teacher = forward.teacher if whole else None
        if term.alone:
            teacher = LabelsAlone(hidden.shape[0], unshared_of(forward.teacher, forward.head.width))
        elif teacher is None:
            teacher = forward.teacher.take(term.rows)  # type: ignore[arg-type]
        with torch.set_grad_enabled(torch.is_grad_enabled() and term.weighs):
            call = LossCall(
                teacher,
                term.objective,
                term.of(forward.uniform),
                scale,
                term.of(forward.labels),
                term.of(forward.sequence),
                term.acceptance,
                term.options(forward.options),
            )
            loss, sums = fused_loss(hidden if term.weighs else hidden.detach(), forward.head, call)
        if term.weighs:
            losses.append(loss)
        else:
            zero = torch.zeros((), device=device)
            sums["weighted_divergence"], sums["weight"] = zero, zero
            sums["row_weight"] = torch.zeros_like(sums["row_weight"])
        if term.beside:
            continue
        if whole and len(terms) == 1 and term.weighs:
            return loss, sums
        for name in scalars:
            total[name] = total[name] + sums[name].to(device)
        for name, column in rows.items():
            part = sums[name].to(column.dtype)
            rows[name] = part if whole else column.index_copy(0, term.rows, part)  # type: ignore[arg-type]
    loss = torch.stack([one.to(device) for one in losses]).sum() if losses else forward.hidden.sum() * 0.0
    return loss, total | rows


@dataclass(frozen=True)
class LabelsAlone:
    """Rows of no teacher, for a loss that reads the student and the labels: the pair of the student with itself.

    unshared: [v], the ids that are none of the text's vocabulary: dead rows of the student's head take no part.
    """

    count: int
    unshared: Bool[Tensor, " v"] | None = None
    reference: TeacherRows | None = None

    def shared_width(self, student_width: int) -> int:
        return student_width

    def take(self, index: Int[Tensor, " m"]) -> LabelsAlone:
        return replace(self, count=int(index.shape[0]))

    def open(self, rows: slice, width: int, scratch: Scratch) -> LabelsAlone:
        return self

    def pair(self, block: slice, logits: Float[Tensor, "b w"], temperature: float) -> TokenPair:
        if self.unshared is not None:
            logits = logits.masked_fill(self.unshared, -torch.inf)
        logq = log_softmax(logits, temperature)
        return TokenPair(logp=logq.detach(), logq=logq, student_top=logits.detach().argmax(-1))


def unshared_of(teacher: TeacherRows, width: int) -> Bool[Tensor, " v"] | None:
    """Which rows of the student's head, of ``width``, stand for no token as far as the teacher's rows tell, or None."""
    if isinstance(teacher, AlignedRows):
        return teacher.vocabularies.dead(width)
    if not isinstance(teacher, LiveRows | CachedRows):
        return None
    both = teacher.shared_width(width)
    if teacher.shared is None and both == width:
        return None
    where = teacher.hidden if isinstance(teacher, LiveRows) else teacher.ids
    dead = torch.ones(width, dtype=torch.bool, device=where.device)
    dead[:both] = False if teacher.shared is None else ~teacher.shared[:both]
    return dead


@dataclass(frozen=True)
class _LabelLogProbs:
    """A selector that keeps what it saw: log p(y) and log q(y)."""

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n 2"]:
        name = "the method"
        return torch.stack([label_log_prob(pair, log_a, name) for log_a in (pair.logp, pair.logq)], -1)

    def keep(self, scores: Float[Tensor, "n 2"], sequence: Int[Tensor, " n"]) -> Float[Tensor, "n 2"]:
        return scores

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n 2"]:
        return self.score(pair, uniform)
