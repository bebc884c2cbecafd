"""Several teachers of one tokenizer as one: the probabilities averaged, or each stream taught by its own.

n rows, c rows of a chunk, w shared vocabulary, K stored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selectkd.data.examples import Examples
from selectkd.data.routes import Routes
from selectkd.errors import ConfigError
from selectkd.loss.head import Head
from selectkd.loss.teacher_rows import CachedRows, LiveChunk, LiveRows, Scratch, TeacherRows
from selectkd.models.load import Loaded
from selectkd.teachers.protocol import HasWeights, Payload, ReadsAhead, Teacher, TeacherPlan


class SeveralRows:
    """Rows of teachers with hidden states: of row i the weighted mean of their distributions, sum_m share[m, i] p_m.

    share: [m, n], non-negative, each column sums to 1; a column of one 1 is a row with one teacher, and rows[m] holds
    any numbers where share[m] is 0. Exact: the mean is of probabilities, over the ids that all of them share. A
    temperature acts on the mean.
    """

    def __init__(self, rows: Sequence[LiveRows], share: Tensor, reference: TeacherRows | None = None) -> None:
        self.rows, self.share, self.reference = list(rows), share, reference

    @property
    def count(self) -> int:
        return self.share.shape[1]

    def shared_width(self, student_width: int) -> int:
        return min(rows.shared_width(student_width) for rows in self.rows)

    def take(self, index: Tensor) -> SeveralRows:
        reference = None if self.reference is None else self.reference.take(index)
        return SeveralRows([rows.take(index) for rows in self.rows], self.share[:, index], reference)

    @torch.no_grad()
    def open(self, rows: slice, width: int, scratch: Scratch) -> LiveChunk:
        """The log of the mean as a chunk of logits, [c, w]; one more such buffer for the member at hand."""
        unshared = self._unshared(width)
        like = torch.empty(0, device=self.share.device)
        mean = None
        for one, share in zip(self.rows, self.share[:, rows], strict=True):
            taught = share > 0
            if not taught.any():
                continue
            if mean is None:
                count = share.shape[0]
                mean = scratch.of(self, count, width, like)[:count].fill_(-torch.inf)
            raw = one.open(rows, width, scratch).raw  # [c, w]
            logits = one.head.finish(raw)
            if unshared is not None:
                logits = logits.masked_fill(unshared, -torch.inf)
            logp = torch.log_softmax(logits[taught], -1).add_(share[taught].log()[:, None])
            mean[taught] = torch.logaddexp(mean[taught], logp)
        assert mean is not None  # each column of share sums to 1
        return LiveChunk(mean, _PLAIN, unshared)

    def _unshared(self, width: int) -> Tensor | None:
        masks = [~rows.shared[:width] for rows in self.rows if rows.shared is not None]
        return torch.stack(masks).any(0) if masks else None


_PLAIN = Head(torch.empty(0, 0))
"""The head of logits that are finished already."""


@dataclass
class SeveralTeacher:
    """weights [m]: of the average. streams: instead, the teacher of each stream by number. Without either, each sample
    carries the number of its teacher, ``route``.
    """

    members: list[Teacher]
    weights: list[float] | None = None
    streams: list[int] | None = None
    reference: Teacher | None = None

    def __call__(self, batch: Any, position: Tensor) -> TeacherRows:
        """The rows at ``position`` [n]; a routed teacher sees the rows of the batch that hold a sample of its own."""
        device, n = batch.input_ids.device, position.shape[0]
        reference = None if self.reference is None else self.reference(batch, position)
        if self.weights is not None:
            total = math.fsum(self.weights)
            share = torch.tensor([weight / total for weight in self.weights], device=device)
            rows = [member(batch, position) for member in self.members]
            return SeveralRows([_dense(one) for one in rows], share[:, None].expand(-1, n), reference)
        owner = self._owner(batch)[batch.sequence.flatten()[position]]  # [n]
        chosen = [(owner == index).nonzero()[:, 0] for index in range(len(self.members))]
        parts = [
            (at, member(*rows_of(batch, position[at])))
            for at, member in zip(chosen, self.members, strict=True)
            if at.numel()
        ]
        if parts and all(isinstance(rows, CachedRows) for _, rows in parts):
            return _together(parts, n)  # type: ignore[arg-type]
        return _routed([(at, _dense(rows)) for at, rows in parts], n, device, reference)

    def place(self, device: torch.device) -> None:
        """Puts the members that have weights where their rows are wanted."""
        for member in self.members:
            if isinstance(member, HasWeights):
                member.place(device)

    def ahead(self, batch: Any) -> None:
        """As the members do that read ahead."""
        for member in self.members:
            if isinstance(member, ReadsAhead):
                member.ahead(batch)

    def _owner(self, batch: Any) -> Tensor:
        """The teacher of each sample of a batch by number, [samples]."""
        if self.streams is not None:
            return torch.tensor(self.streams, device=batch.stream.device)[batch.stream]
        if batch.route is None or bool((batch.route < 0).any()):
            raise ConfigError(
                "teacher: the teachers are routed by a field of the record, and a sample of this batch names none. Set "
                "Example.route, or route by streams."
            )
        return batch.route


def rows_of(batch: Any, position: Tensor) -> tuple[Any, Tensor]:
    """The batch without the rows that ``position`` [n] has no part in, its samples renumbered, and the positions in it.

    A batch that carries extra model inputs stays whole: how those go with the rows is not known here.
    """
    width = batch.input_ids.shape[1]
    row, place = position // width, position % width
    wanted, at = row.unique(return_inverse=True)
    if batch.extra or wanted.numel() == batch.input_ids.shape[0]:
        return batch, position
    sequence = batch.sequence[wanted]
    samples = sequence[sequence >= 0].unique()
    number = torch.full(
        (batch.stream.shape[0] + 1,), -1, device=sequence.device
    )  # the last entry is padding's
    number[samples] = torch.arange(samples.numel(), device=sequence.device)
    named = ("input_ids", "attention_mask", "completion", "position_ids")
    fewer = {name: getattr(batch, name)[wanted] for name in named}
    small = replace(batch, **fewer, sequence=number[sequence], stream=batch.stream[samples])
    if batch.route is not None:
        small = replace(small, route=batch.route[samples])
    return small, at * width + place


def _dense(rows: TeacherRows) -> LiveRows:
    if not isinstance(rows, LiveRows):
        raise ConfigError(
            "a teacher of K best tokens cannot be joined with others. Use teachers with hidden states."
        )
    return rows


def _routed(
    parts: list[tuple[Tensor, LiveRows]], n: int, device: Any, reference: TeacherRows | None
) -> SeveralRows:
    share = torch.zeros(len(parts), n, device=device)
    whole = []
    for index, (at, rows) in enumerate(parts):
        share[index, at] = 1.0
        hidden = rows.hidden.new_zeros(n, rows.hidden.shape[1]).index_copy(0, at, rows.hidden)
        whole.append(LiveRows(hidden, rows.head, shared=rows.shared))
    return SeveralRows(whole, share, reference)


def _together(parts: list[tuple[Tensor, CachedRows]], n: int) -> CachedRows:
    """Top-K rows of several teachers in the batch's order, each cut to the smallest K."""
    k = min(rows.ids.shape[1] for _, rows in parts)
    first = parts[0][1]
    ids, logp = first.ids.new_zeros(n, k), first.logp.new_zeros(n, k)
    for at, rows in parts:
        best = rows.logp.topk(k, -1)
        ids[at], logp[at] = rows.ids.gather(1, best.indices).to(ids.dtype), best.values.to(logp.dtype)
    return CachedRows(ids, logp, shared=first.shared)  # of the one student


@dataclass
class SeveralPlan:
    """The plan of ``teacher: [{...}, {...}]``. weights, streams or when: as the recipe has them, one a teacher."""

    plans: list[TeacherPlan]
    weights: list[float] | None = None
    streams: list[list[str]] | None = None
    when: list[dict[str, Any]] | None = None
    model: str | None = None
    _of_stream: list[int] | None = None

    def __post_init__(self) -> None:
        drawn = [plan.source for plan in self.plans if plan.payload == "sampled"]
        if drawn:
            raise ConfigError(
                f"teacher: {drawn[0]} gives ids drawn from it, which cannot be combined with other teachers' rows. "
                "Use it alone, or teachers with hidden states (live, or a cache built with payload: hidden)."
            )
        other = [plan.source for plan in self.plans if plan.payload == "aligned"]
        if other:
            raise ConfigError(
                f"teacher: {other[0]} has another tokenizer, so its rows cannot be combined with other teachers' rows. "
                "Use it alone, or teachers with the student's tokenizer."
            )
        few = [plan.source for plan in self.plans if plan.payload == "top_k"]
        if few and (self.weights is not None or len(few) < len(self.plans)):
            what = "averaged" if self.weights is not None else "routed beside teachers with hidden states"
            raise ConfigError(
                f"teacher: {few[0]} gives its best tokens and a tail, which cannot be {what}: the others' mass on its "
                "tail is not known. Use teachers with hidden states (live, or a cache built with payload: hidden)."
            )

    @property
    def payload(self) -> Payload:
        kinds = {plan.payload for plan in self.plans}
        return "live" if "live" in kinds else "hidden" if "hidden" in kinds else "top_k"

    @property
    def k(self) -> int | None:
        return min((plan.k for plan in self.plans if plan.k is not None), default=None)

    @property
    def source(self) -> str:
        return " and ".join(plan.source for plan in self.plans)

    @property
    def revision(self) -> str | None:
        return " and ".join(str(plan.revision) for plan in self.plans)

    def tokenizer(self) -> Any | None:
        """The first tokenizer at hand, which all the others must equal."""
        return next((part for plan in self.plans if (part := plan.tokenizer()) is not None), None)

    def check_tokenizer(self, tokenizer: Any) -> None:
        for plan in self.plans:
            plan.check_tokenizer(tokenizer)

    def check_streams(self, names: Sequence[str]) -> None:
        """ConfigError unless every stream of the data has one teacher and every teacher's streams exist."""
        if self.streams is None:
            return
        owner = {stream: index for index, owned in enumerate(self.streams) for stream in owned}
        for stream in [*owner, *names]:
            if stream not in names or stream not in owner:
                what = "is no source of the data" if stream not in names else "has no teacher"
                raise ConfigError(
                    f"teacher: the stream {stream} {what}. The sources are called {', '.join(names)}; name each of "
                    "them under one teacher's streams (data.sources[].name sets a source's name)."
                )
        self._of_stream = [owner[name] for name in names]

    @property
    def routes(self) -> Routes | None:
        """The teacher of each record by its fields; None where teachers are not told apart by them."""
        return None if self.when is None else Routes(tuple(self.when))

    def check_text(self, examples: Sequence[Any]) -> None:
        """Each teacher checks the samples it will teach."""
        text, routed = Examples.of(examples), self._of_stream
        teacher = text.column("route") if routed is None else np.array(routed)[text.streams]
        for index, plan in enumerate(self.plans):
            plan.check_text(text if self.weights is not None else text.where(teacher == index))

    def loaded(self) -> Loaded:
        raise ConfigError(
            "a student cannot be cut from several teachers. Name the student: student: {model: ...}."
        )

    def open(self, tokenizer: Any, *, student: nn.Module, reference: Teacher | None = None) -> SeveralTeacher:
        members = [plan.open(tokenizer, student=student) for plan in self.plans]
        return SeveralTeacher(members, self.weights, self._of_stream, reference)
