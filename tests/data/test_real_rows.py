"""Rows as data sets of the hub have them: detected, read, and what is not read is named."""

from __future__ import annotations

import json

import pytest

from data.real_rows import ROWS, A
from data.template_zoo import tokenizer_of
from selectkd.data.detection import FORMATS, detect_format, left_aside
from selectkd.data.files import read_records
from selectkd.data.formats import to_sample
from selectkd.data.inspect import pieces
from selectkd.data.render import TextRules, render


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_read_in_its_format_with_its_answer_trained_and_the_rest_named(name, tmp_path):
    row, format, aside = ROWS[name]
    assert detect_format(row) == format and left_aside(row, format) == aside
    tokenizer = tokenizer_of("qwen3")
    examples = render(to_sample(row, format, origin=name), tokenizer, TextRules(1024))
    trained = ["".join(text for text, one in pieces(example, tokenizer) if one) for example in examples]
    if format != "tokens":
        assert A in trained[-1] and not any("6." in text or "Six" in text for text in trained)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    summary = read_records(tmp_path / "rows.jsonl").summary
    assert f"format {format} (detected)" in summary
    assert summary.endswith(f"not part of the text: {', '.join(aside)}" if aside else "(detected)")


def test_the_order_of_formats_is_that_of_the_table():
    """Of the fields of all formats the first is read; without them the next one, down to plain text."""
    row = {
        "input_ids": [1, 2], "chosen": "a", "rejected": "b", "messages": ROWS["tulu-3-sft-mixture"][0]["messages"],
        "conversations": ROWS["lima"][0]["conversations"], "instruction": "q", "output": "a", "prompt": "q",
        "completion": "a", "text": "t",
    }  # fmt: skip
    order = []
    for names in (
        ["input_ids"],
        ["chosen"],
        ["messages"],
        ["conversations"],
        ["instruction"],
        ["prompt"],
        ["text"],
    ):
        order.append(detect_format(row))
        row = {name: value for name, value in row.items() if name not in names}
    assert order == [name for name in FORMATS if name != "unpaired_preference"]


def test_an_answer_before_any_question_is_left_out():
    sample = to_sample(ROWS["sharegpt"][0], "conversations")
    assert [turn["role"] for turn in sample.messages] == ["user", "assistant"] and sample.trained == (1,)
