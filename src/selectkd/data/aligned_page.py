"""How two tokenizers cut the same text, laid out for a reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from selectkd.data.crossing import Crossing
from selectkd.data.example import Example


@dataclass(frozen=True)
class AlignedSample:
    """A sample span by span: the tokens of both sides, and what is left over.

    spans: (student's tokens, teacher's tokens, whether they are the same one token) in order. tokens: of the student;
    taught: those that are trained; lost: trained ones in no span. teacher_tokens: of the teacher.
    """

    origin: str
    spans: list[tuple[list[str], list[str], bool]]
    tokens: int
    teacher_tokens: int
    taught: int
    lost: int

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def aligned(example: Example, crossing: Crossing) -> AlignedSample:
    """A sample's alignment."""
    ids, reading = example.input_ids, crossing.read(example.input_ids)
    spans, covered = [], set()
    for span in reading.spans:
        ours = ids[span.student_start : span.student_stop]
        theirs = reading.teacher_ids[span.teacher_start : span.teacher_stop]
        same = span.single and crossing.image.get(ours[0]) == theirs[0]
        spans.append((
            [_shown(crossing.student, crossing.student_bytes, i) for i in ours],
            [_shown(crossing.teacher, crossing.teacher_bytes, i) for i in theirs],
            same,
        ))  # fmt: skip
        places = range(span.student_start, span.student_stop)
        if span.teacher_start > 0 and all(example.completion[i] for i in places):
            covered.update(places)
    taught = [i for i, trained in enumerate(example.completion) if trained]
    return AlignedSample(
        origin=example.origin, spans=spans, tokens=len(ids), teacher_tokens=len(reading.teacher_ids),
        taught=len(taught), lost=sum(i not in covered for i in taught),
    )  # fmt: skip


def page(samples: Sequence[AlignedSample], crossing: Crossing) -> str:
    """The samples as Markdown: counts, then every span that is not the same one token on both sides, in its place."""
    both = len(crossing.image)
    lines = [
        f"{both:,} of the student's {len(crossing.student_bytes):,} tokens are among the teacher's "
        f"{len(crossing.teacher_bytes):,}.",
    ]
    for sample in samples:
        same = sum(one for *_, one in sample.spans)
        lines += [
            "",
            f"### {sample.origin}",
            "",
            f"{sample.tokens} tokens of the student, {sample.teacher_tokens} of the teacher, {len(sample.spans)} "
            f"spans, {same} of them the same one token; {sample.lost} of {sample.taught} trained tokens in no span.",
            "",
            "| text before | student | teacher |",
            "|---|---|---|",
        ]
        before: list[str] = []
        for ours, theirs, one in sample.spans:
            if one:
                before += ours
                continue
            shown = "".join(before)
            lines.append(f"| {_cell(shown[-24:])} | {_cells(ours)} | {_cells(theirs)} |")
            before = [*before, *ours]
    return "\n".join(lines) + "\n"


def _shown(tokenizer: Any, table: dict[int, bytes | None], index: int) -> str:
    text = table.get(index)
    if text is None:
        return str(tokenizer.convert_ids_to_tokens(index))
    return text.decode("utf-8", "backslashreplace")


def _cells(tokens: Sequence[str]) -> str:
    return " ".join(_cell(token) for token in tokens)


def _cell(text: str) -> str:
    """A piece of text as code in a Markdown table: line ends and bars spelled out."""
    if not text:
        return ""
    text = (
        text.replace("\\", "\\\\")
        .replace("\n", "\\n")
        .replace("\t", "\\t")
        .replace("|", "\\|")
        .replace("`", "'")
    )
    return f"`{text}`"
