"""Two tokenizers over one text: bytes of tokens, spans, special tokens, and what is left out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selectkd.data.alignment import PROBES
from selectkd.data.crossing import cross
from selectkd.data.token_bytes import first_with, token_bytes
from selectkd.errors import ConfigError
from teachers.tokens import TEXT, byte_level, sentence_piece
from training.tiny import tiny_tokenizer

STUDENT, TEACHER, PIECES = byte_level(300, text=TEXT[1:]), byte_level(330, end="<|stop|>"), sentence_piece()
PAIRS = {
    "byte-level": cross(STUDENT, TEACHER),
    "into SentencePiece": cross(STUDENT, PIECES),
    "from SentencePiece": cross(PIECES, STUDENT),
}


def spans_of(crossing, ids):
    reading = crossing.read(ids)
    for span in reading.spans:
        if span.text is not None:
            ours = b"".join(crossing.student_bytes[i] for i in ids[span.student_start : span.student_stop])
            theirs = b"".join(
                crossing.teacher_bytes[i] for i in reading.teacher_ids[span.teacher_start : span.teacher_stop]
            )
            assert ours.lstrip() == theirs.lstrip() == span.text.lstrip()
    return reading


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("text", [*TEXT, *PROBES])
def test_every_byte_of_a_text_is_in_one_span_and_the_same_on_both_sides(pair, text):
    crossing = PAIRS[pair]
    ids = crossing.student(text, add_special_tokens=False)["input_ids"]
    reading = spans_of(crossing, ids)
    assert b"".join(span.text for span in reading.spans) == text.encode()
    covered = [i for span in reading.spans for i in range(span.student_start, span.student_stop)]
    assert covered == [i for i in range(len(ids)) if i in covered] and covered[-1] == len(ids) - 1
    for before, after in zip(reading.spans, reading.spans[1:], strict=False):
        assert before.teacher_stop == after.teacher_start


@settings(derandomize=True, deadline=None, max_examples=60)
@given(text=st.text(min_size=1, max_size=24), pair=st.sampled_from(sorted(PAIRS)))
def test_any_text_at_all_is_aligned_whole(text, pair):
    crossing = PAIRS[pair]
    said = crossing.student.decode(crossing.student(text, add_special_tokens=False)["input_ids"])
    ids = crossing.student(text, add_special_tokens=False)["input_ids"]
    reading = spans_of(crossing, ids)
    assert b"".join(span.text for span in reading.spans).decode().strip() == said.strip()


def test_spans_are_the_shortest_stretches_that_both_cut():
    crossing = PAIRS["byte-level"]
    ids = crossing.student(TEXT[0], add_special_tokens=False)["input_ids"]
    for span in crossing.read(ids).spans:
        ends = []
        for table, tokens in (
            (crossing.student_bytes, ids[span.student_start : span.student_stop]),
            (crossing.teacher_bytes, crossing.read(ids).teacher_ids[span.teacher_start : span.teacher_stop]),
        ):
            size, inner = 0, set()
            for token in tokens[:-1]:
                size += len(table[token])
                inner.add(size)
            ends.append(inner)
        assert not ends[0] & ends[1]


def test_an_end_of_sequence_answers_to_the_other_whatever_it_is_called():
    crossing = PAIRS["byte-level"]
    assert STUDENT.eos_token != TEACHER.eos_token
    ids = [*STUDENT(TEXT[0])["input_ids"], STUDENT.eos_token_id]
    reading = crossing.read(ids)
    assert reading.teacher_ids[-1] == TEACHER.eos_token_id
    assert reading.spans[-1].text is None and reading.spans[-1].single


def test_the_name_of_a_special_token_in_a_text_is_text_to_the_teacher():
    crossing = PAIRS["byte-level"]
    ids = STUDENT(f"a {TEACHER.eos_token} b", add_special_tokens=False)["input_ids"]
    reading = crossing.read(ids)
    assert TEACHER.eos_token_id not in reading.teacher_ids
    assert TEACHER.decode(reading.teacher_ids) == f"a {TEACHER.eos_token} b"


def test_a_letter_that_was_cut_in_the_middle_is_in_no_span_and_the_rest_is():
    cut = STUDENT("the caf", add_special_tokens=False)["input_ids"]
    reading = PAIRS["byte-level"].read([*cut, first_with(token_bytes(STUDENT))[b"\xc3"]])
    assert reading.spans[-1].student_stop == len(cut)


def test_a_special_token_that_the_teacher_has_not_is_refused_by_name():
    student = byte_level(300)
    student.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    crossing = cross(student, TEACHER)
    ids = student("<|user|>tokens", add_special_tokens=False)["input_ids"]
    with pytest.raises(ConfigError, match=r"'<\|user\|>' .* teacher's tokenizer does not have"):
        crossing.check(ids)
    crossing.check(ids[1:])
    assert crossing.read(ids).spans[0].student_start == 1


def test_a_tokenizer_whose_tokens_have_no_bytes_is_refused():
    with pytest.raises(ConfigError, match="no known bytes"):
        cross(tiny_tokenizer(), TEACHER)


def test_shared_tokens_are_those_of_the_same_bytes():
    crossing = PAIRS["byte-level"]
    for ours, theirs in crossing.image.items():
        if crossing.student_bytes[ours] is not None:
            assert crossing.student_bytes[ours] == crossing.teacher_bytes[theirs]
    assert len(set(crossing.image.values())) == len(crossing.image)
    assert {b for b in crossing.student_bytes.values() if b} - set(crossing.teacher_bytes.values())
