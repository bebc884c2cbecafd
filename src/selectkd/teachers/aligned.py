"""A teacher of another tokenizer: it reads the student's text in its own tokens, and answers span by span.

n supervised rows, g spans, e teacher width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from selectkd.data.collate import collate, sent
from selectkd.data.crossing import Crossing, Reading, Span, cross
from selectkd.data.example import Example
from selectkd.data.supervised import in_memory
from selectkd.errors import ConfigError
from selectkd.loss.aligned_rows import AlignedRows, Side, Spans, Vocabularies
from selectkd.loss.teacher_rows import LiveRows
from selectkd.loss.token_log_probs import token_log_probs
from selectkd.models.forward import last_hidden
from selectkd.models.head import head_of
from selectkd.models.load import Loaded
from selectkd.models.sharded import inside
from selectkd.objective.divergences import is_unpaired
from selectkd.objective.objective import Objective
from selectkd.objective.registry import name_of
from selectkd.teachers.live import HeldModel
from selectkd.teachers.model import ModelPlan
from selectkd.teachers.placement import Placement
from selectkd.teachers.protocol import Payload, Teacher

Pairing = Literal["spans", "index"]


class Place(NamedTuple):
    """A span of sample ``sample`` of a batch, and the student's rows of its tokens."""

    sample: int
    span: Span
    rows: list[int]


class AlignedTeacher(HeldModel):
    """The rows of a model of another tokenizer, beside the student's spans of text; no gradient.

    matched_weight, unverified_weight: as AlignedRows has them. placement: as of ``place_on``. pairing: ``index`` puts
    its i-th completion token beside the student's i-th for divergences that need nothing in common; the others see
    spans all the same.
    """

    def __init__(
        self,
        model: nn.Module,
        crossing: Crossing,
        *,
        student_width: int,
        placement: Placement = "device",
        pairing: Pairing = "spans",
        matched_weight: float | None = None,
        unverified_weight: float | None = None,
    ) -> None:
        super().__init__(model, placement=placement)
        self.crossing, self.pairing = crossing, pairing
        self.matched_weight, self.unverified_weight = matched_weight, unverified_weight
        self.vocabularies = vocabularies(crossing, student_width, self.head.width)

    def place(self, device: torch.device) -> None:
        """Puts the model where its rows are wanted; nothing to do where it is there."""
        super().place(device)
        self.vocabularies = self.vocabularies.to(device)

    @torch.no_grad()
    def __call__(self, batch: Any, position: Tensor) -> AlignedRows:
        """The rows at ``position`` [n], flat indices into the batch's b * t hidden states."""
        device = batch.input_ids.device
        self.place(device)
        samples = [ids.tolist() for ids in batch.samples()]
        readings = [self.crossing.read(ids) for ids in samples]
        rows = row_of_token(batch, position, [len(ids) for ids in samples])
        places = [
            Place(sample, span, own)
            for sample, reading in enumerate(readings)
            for span in reading.spans
            if span.teacher_start > 0
            and -1 not in (own := rows[sample][span.student_start : span.student_stop])
        ]
        hidden, start = self._hidden(readings, device)
        token = batch.input_ids.flatten()[position + 1]  # [n]
        of = (readings, samples, hidden, start, token)
        by_index = (
            self._rows(index_places(readings, rows), *of, merging=False) if self.pairing == "index" else None
        )
        return self._rows(places, *of, merging=True, by_index=by_index)

    def _hidden(self, readings: list[Reading], device: Any) -> tuple[Tensor, list[int]]:
        """(the teacher's hidden states of all its tokens [., e], where each reading's begin)."""
        kept = [
            Example(reading.teacher_ids or [0], [False] * max(1, len(reading.teacher_ids)))
            for reading in readings
        ]
        batch = collate(kept, pad_id=0).to(device)
        with torch.autocast(batch.input_ids.device.type, enabled=False):  # autocast is the student's
            hidden = inside(self.model, lambda: last_hidden(self.model, batch))  # [samples, t, e]
        width = hidden.shape[1]
        return hidden.reshape(-1, hidden.shape[-1]), [sample * width for sample in range(len(readings))]

    def _rows(
        self,
        places: list[Place],
        readings: list[Reading],
        samples: list[list[int]],
        hidden: Tensor,
        start: list[int],
        token: Tensor,
        *,
        merging: bool,
        by_index: AlignedRows | None = None,
    ) -> AlignedRows:
        """The rows of given places. merging: whether a span of several tokens becomes one outcome."""
        device, crossing = hidden.device, self.crossing

        def ints(values: Sequence[int]) -> Tensor:
            return sent(torch.tensor(values, dtype=torch.long), device)

        span_of_row = torch.full(token.shape, -1)
        for number, place in enumerate(places):
            span_of_row[place.rows] = number
        first = ints([samples[p.sample][p.span.student_start] for p in places])
        theirs = ints([readings[p.sample].teacher_ids[p.span.teacher_start] for p in places])
        later = self._later(places, readings, hidden, start)
        several = [p.span.student_stop - p.span.student_start > 1 for p in places]
        student = Side(
            first, torch.zeros_like(later), ints(several).bool(),
            self._spelled(places, crossing.student_id, first, several),
        )  # fmt: skip
        several = [p.span.teacher_stop - p.span.teacher_start > 1 for p in places]
        ours = Side(
            theirs, later, ints(several).bool(), self._spelled(places, crossing.teacher_id, theirs, several)
        )
        single = ints([p.span.single for p in places]).bool()
        merged = (
            ~(single & (self.vocabularies.image[first] == theirs)) if merging else torch.zeros_like(single)
        )
        at = ints([start[p.sample] + p.span.teacher_start - 1 for p in places])
        spans = Spans(
            ints([p.rows[0] for p in places]), sent(span_of_row, device), token, student, ours, merged
        )
        return AlignedRows(
            LiveRows(hidden[at], self.head), self.vocabularies, spans, matched_weight=self.matched_weight,
            unverified_weight=self.unverified_weight, by_index=by_index,
        )  # fmt: skip

    def _spelled(
        self, places: list[Place], known: dict[bytes, int], first: Tensor, several: list[bool]
    ) -> Tensor:
        """The id of the one token that spells each span, [g]: its own where it is one, -1 where there is none."""
        spelled = [known.get(p.span.text, -1) if p.span.text is not None else -1 for p in places]
        return torch.where(
            sent(torch.tensor(several, dtype=torch.bool), first.device),
            sent(torch.tensor(spelled, dtype=torch.long), first.device),
            first,
        )

    def _later(
        self, places: list[Place], readings: list[Reading], hidden: Tensor, start: list[int]
    ) -> Tensor:
        """The log-probability of the teacher's tokens after the first of each span, [g]."""
        owner, at, token = [], [], []
        for number, (sample, span, _) in enumerate(places):
            for place in range(span.teacher_start + 1, span.teacher_stop):
                owner.append(number)
                at.append(start[sample] + place - 1)
                token.append(readings[sample].teacher_ids[place])
        device = hidden.device
        of = token_log_probs(
            hidden[sent(torch.tensor(at, dtype=torch.long), device)],
            self.head,
            sent(torch.tensor(token, dtype=torch.long), device),
            dead=self.vocabularies.dead(self.head.width, of_teacher=True),
        )
        into = sent(torch.tensor(owner, dtype=torch.long), device)
        return of.new_zeros(len(places)).index_add_(0, into, of)


def row_of_token(batch: Any, position: Tensor, lengths: list[int]) -> list[list[int]]:
    """Of each token of each sample the supervised row that predicts it, -1 where there is none."""
    here, position = in_memory(batch, position)
    sample = here.sequence.flatten()[position].tolist()
    place = (here.position_ids.flatten()[position] + 1).tolist()
    rows = [[-1] * length for length in lengths]
    for row, (s, i) in enumerate(zip(sample, place, strict=True)):
        rows[s][i] = row
    return rows


def index_places(readings: list[Reading], rows: list[list[int]]) -> list[Place]:
    """The i-th supervised token of each sample beside the teacher's i-th from the same span on, up to the shorter."""
    places = []
    for sample, (reading, own) in enumerate(zip(readings, rows, strict=True)):
        taught = [i for i, row in enumerate(own) if row >= 0]
        begin = next(
            (
                s.teacher_start
                for s in reading.spans
                if taught and s.student_start >= taught[0] and s.teacher_start
            ),
            len(reading.teacher_ids),
        )
        for i, j in zip(taught, range(begin, len(reading.teacher_ids)), strict=False):
            places.append(Place(sample, Span(i, i + 1, j, j + 1, None), [own[i]]))
    return places


def vocabularies(crossing: Crossing, student_width: int, teacher_width: int) -> Vocabularies:
    """The tensors of a crossing, for heads of these widths; ConfigError where a head is too narrow."""
    for side, table, width in (
        ("student", crossing.student_bytes, student_width),
        ("teacher", crossing.teacher_bytes, teacher_width),
    ):
        if max(table) >= width:
            raise ConfigError(
                f"the {side}'s head has {width} rows, but its tokenizer has ids up to {max(table)}."
            )
    image = torch.full((student_width,), -1, dtype=torch.long)
    shared = sorted(crossing.image.items())
    ours, theirs = (torch.tensor([pair[i] for pair in shared], dtype=torch.long) for i in (0, 1))
    image[ours] = theirs
    taken = set(crossing.image.values())
    return Vocabularies(
        image,
        ours,
        theirs,
        torch.tensor(
            [i for i in sorted(crossing.student_bytes) if i not in crossing.image], dtype=torch.long
        ),
        torch.tensor([i for i in sorted(crossing.teacher_bytes) if i not in taken], dtype=torch.long),
    )


@dataclass
class AlignedPlan:
    """The plan of ``teacher: {model: ..., cross_tokenizer: ...}``."""

    own: ModelPlan
    pairing: Pairing = "spans"
    matched_weight: float | None = None
    unverified_weight: float | None = None
    payload: Payload = "aligned"
    k: int | None = None
    _crossing: Crossing | None = field(default=None, repr=False)

    @property
    def source(self) -> str:
        return self.own.source

    @property
    def revision(self) -> str | None:
        return self.own.revision

    @property
    def model(self) -> str | None:
        return self.own.model

    def tokenizer(self) -> Any:
        return self.own.tokenizer()

    def check_tokenizer(self, tokenizer: Any) -> None:
        """ConfigError where the bytes of either's tokens are not known."""
        self._cross(tokenizer)

    def check_objective(self, objective: Objective) -> None:
        """ConfigError where tokens paired by index cannot serve the objective."""
        if self.pairing != "index":
            return
        if not is_unpaired(objective.divergence):
            raise ConfigError(
                f"teacher.cross_tokenizer.pairing = index puts tokens of different text side by side, which "
                f"{name_of(objective.divergence)} cannot compare. Use pairing: spans, or objective.divergence: uld."
            )
        if objective.teacher_tokens != 0:
            raise ConfigError(
                f"teacher.cross_tokenizer.pairing = index puts tokens of different text side by side, and "
                f"{name_of(objective.verifier)} has nothing to verify there. Use pairing: spans, or "
                "objective.verifier: always."
            )

    def check_text(self, examples: Sequence[Any]) -> None:
        """ConfigError where the text has special tokens that the teacher has not."""
        if self._crossing is not None:
            self._crossing.check({index for example in examples for index in example.input_ids})

    def loaded(self) -> Loaded:
        return self.own.loaded()

    def open(self, tokenizer: Any, *, student: nn.Module, reference: Teacher | None = None) -> AlignedTeacher:
        if reference is not None:
            raise ConfigError(
                "a reference student cannot be combined with a teacher of another tokenizer. "
                "Use a verifier: greedy_topk, always or matched_random."
            )
        return AlignedTeacher(
            self.own.loaded().model,
            self._cross(tokenizer),
            student_width=head_of(student).width,
            placement=self.own.placement,
            pairing=self.pairing,
            matched_weight=self.matched_weight,
            unverified_weight=self.unverified_weight,
        )

    def _cross(self, tokenizer: Any) -> Crossing:
        if self._crossing is None or self._crossing.student is not tokenizer:
            self._crossing = cross(tokenizer, self.own.tokenizer())
        return self._crossing
