"""From the student's tokens to a teacher's of another tokenizer, and the spans of text that both cut alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from selectkd.data.encoding import eos_ids_of
from selectkd.data.plain import with_start
from selectkd.data.token_bytes import first_with, token_bytes
from selectkd.errors import ConfigError


class Span(NamedTuple):
    """Tokens student_start ... student_stop - 1 and teacher_start ... teacher_stop - 1, which are the same text."""

    student_start: int
    student_stop: int
    teacher_start: int
    teacher_stop: int
    text: bytes | None  # None for a special token

    @property
    def single(self) -> bool:
        """Whether it is one token on both sides."""
        return self.student_stop - self.student_start == 1 == self.teacher_stop - self.teacher_start


class Reading(NamedTuple):
    """A text as the teacher reads it, and its spans in order; what is in no span could not be aligned."""

    teacher_ids: list[int]
    spans: list[Span]


@dataclass(frozen=True)
class Crossing:
    """Two tokenizers side by side. ``image``: of each student's id the teacher's with the same bytes.

    Ends of sequence answer to each other, whatever they are called; other special tokens by name.
    """

    student: Any
    teacher: Any
    student_bytes: dict[int, bytes | None]
    teacher_bytes: dict[int, bytes | None]
    image: dict[int, int]

    @cached_property
    def student_id(self) -> dict[bytes, int]:
        """The student's token that spells given bytes."""
        return first_with(self.student_bytes)

    @cached_property
    def teacher_id(self) -> dict[bytes, int]:
        """The teacher's token that spells given bytes."""
        return first_with(self.teacher_bytes)

    def read(self, ids: Sequence[int]) -> Reading:
        """The student's tokens as the teacher's, special tokens translated, text tokenised by the teacher.

        Where the teacher's tokenizer changes the text (a normalizer), or the text is no UTF-8 (a sample that was cut
        inside a letter), the rest up to the next special token is in no span.
        """
        out = with_start([], self.teacher)
        spans: list[Span] = []
        start = 0
        while start < len(ids):
            stop = start
            while stop < len(ids) and self.student_bytes.get(ids[stop]) is not None:
                stop += 1
            if stop > start:
                self._read_text(ids, start, stop, out, spans)
            if stop < len(ids):
                other = self.image.get(ids[stop])
                if other is not None and not (out == [other] and stop == 0):
                    spans.append(Span(stop, stop + 1, len(out), len(out) + 1, None))
                    out.append(other)
            start = stop + 1
        return Reading(out, spans)

    def check(self, ids: Iterable[int]) -> None:
        """ConfigError where the text has special tokens that the teacher has not: it would read another text."""
        start = getattr(self.student, "bos_token_id", None)
        for index in ids:
            if self.student_bytes.get(index) is None and index not in self.image and index != start:
                name = self.student.convert_ids_to_tokens(index)
                raise ConfigError(
                    f"the text has the student's special token {name!r} (id {index}), which the teacher's tokenizer "
                    "does not have. Use prompt and completion without a chat template, or a teacher with the same "
                    "template."
                )

    def _read_text(
        self, ids: Sequence[int], start: int, stop: int, out: list[int], spans: list[Span]
    ) -> None:
        pieces = [self.student_bytes[index] or b"" for index in ids[start:stop]]
        content = b"".join(pieces)
        if not any(span.text for span in spans) and content.startswith(b" "):
            decoded = self.student.decode(ids[start:stop], clean_up_tokenization_spaces=False)
            if not decoded.startswith(" "):  # the space SentencePiece puts before a text is not the text's
                pieces[0], content = pieces[0][1:], content[1:]
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            text = content[: error.start].decode()
        teacher_ids = list(
            self.teacher(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )
        theirs = [self.teacher_bytes.get(index) or b"" for index in teacher_ids]
        if theirs and b"".join(theirs) == b" " + text.encode():
            theirs[0] = theirs[0][1:]  # SentencePiece puts a space before a text
        before = len(out)
        out.extend(teacher_ids)
        ours, others = list(accumulate(map(len, pieces))), list(accumulate(map(len, theirs)))
        read = b"".join(theirs)
        i = j = begin_i = begin_j = 0
        begin = 0
        while i < len(ours) and j < len(others):
            if ours[i] != others[j]:
                i, j = (i + 1, j) if ours[i] < others[j] else (i, j + 1)
                continue
            end = ours[i]
            if content[begin:end] != read[begin:end]:
                return
            if end > begin:
                spans.append(
                    Span(start + begin_i, start + i + 1, before + begin_j, before + j + 1, content[begin:end])
                )
            begin, begin_i, begin_j = end, i + 1, j + 1
            i, j = begin_i, begin_j


def cross(student: Any, teacher: Any) -> Crossing:
    """The crossing of two tokenizers; ConfigError where the bytes of either's tokens are not known."""
    student_bytes, teacher_bytes = token_bytes(student), token_bytes(teacher)
    theirs = first_with(teacher_bytes)
    ours = first_with(student_bytes)
    image = {index: theirs[text] for text, index in ours.items() if text in theirs}
    taken: set[int] = set()
    ends, teacher_ends = _ends(student), _ends(teacher)
    if ends and teacher_ends:
        image |= {ends[0]: teacher_ends[0]}
        taken.add(teacher_ends[0])
    names = {teacher.convert_ids_to_tokens(index): index for index in _special(teacher_bytes)}
    for index in _special(student_bytes):
        other = names.get(student.convert_ids_to_tokens(index))
        if index not in image and other is not None and other not in taken:
            image[index] = other
            taken.add(other)
    start, other = (getattr(each, "bos_token_id", None) for each in (student, teacher))
    if start is not None and other is not None and start not in image and other not in taken:
        image[start] = other
    return Crossing(student, teacher, student_bytes, teacher_bytes, image)


def _special(table: dict[int, bytes | None]) -> Collection[int]:
    return [index for index, text in sorted(table.items()) if text is None]


def _ends(tokenizer: Any) -> list[int]:
    return sorted(eos_ids_of(tokenizer))
