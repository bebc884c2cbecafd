"""Conversations that templates, limits and ends of turns would train wrong: refused, dropped or kept whole."""

from __future__ import annotations

import time
from typing import Any

import pytest

from data.rendered import examples, trained
from data.template_zoo import OSLO, ROME, tokenizer_of, turns
from selectkd.data.example import Dropped
from selectkd.errors import DataError

LOOK = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}


def calling(name: str, content: str = "", **arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "id": "call00000", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


@pytest.mark.parametrize("name", ["smollm2", "phi3", "phi4"])
@pytest.mark.parametrize(
    "turn",
    [
        calling("time", "Let me check the time."),
        calling("search", "I will search the web for this query: Oslo.", query="Oslo"),
        calling("end", "Yes."),
        calling("f"),
    ],
)
def test_a_call_that_the_template_leaves_out_is_refused_whatever_the_answer_says(name, turn):
    row = [*turns(("user", "What time is it?")), turn]
    with pytest.raises(DataError, match=r"turn 1 .*leaves out its tool_calls\[0\]\.name"):
        examples({"messages": row}, tokenizer_of(name))
    later = [*row, *turns(("user", "Go on."), ("assistant", "It is late."))]
    for rules in ({"train_turns": "last"}, {"train_on": "all"}):
        with pytest.raises(DataError, match=r"turn 1 .*leaves out its tool_calls\[0\]\.name"):
            examples({"messages": later}, tokenizer_of(name), **rules)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3.2", "mistral-v0.3", "gpt-oss"])
def test_an_end_of_turn_in_an_argument_does_not_end_the_turn(name):
    tokenizer = tokenizer_of(name)
    ends = {
        tokenizer.eos_token,
        *(one for one in tokenizer.all_special_tokens if "end" in one or "call" in one),
    }
    forms = [form for end in ends for form in ({"code": f"tok = '{end}';\nx = 1"}, {f"c{end}": "x = 1"})]
    for arguments in forms:
        row = [*turns(("user", "Write it.")), calling("run", **arguments)]
        (text,) = trained({"messages": row}, tokenizer)
        assert "x = 1" in text and not text.endswith("x = 1")
        plain = [*turns(("user", "Write it.")), calling("run", code="x = 1")]
        assert text[-12:] == trained({"messages": plain}, tokenizer)[0][-12:]


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.2", "qwen3"])
@pytest.mark.parametrize("tools", [None, [LOOK]])
def test_a_question_that_is_too_long_keeps_what_the_template_writes_around_it(name, tools):
    tokenizer, words = tokenizer_of(name), [f"w{n}" for n in range(300)]
    row = {"messages": turns(("user", " ".join(words)), ("assistant", "Yes.")), "tools": tools}
    short = {**row, "messages": turns(("user", " ".join(words[-20:])), ("assistant", "Yes."))}
    (few,) = examples(short, tokenizer)
    limit = few.completion.index(True) + 3
    (cut,) = examples(row, tokenizer, max_prompt_length=limit)
    assert limit - 40 < cut.completion.index(True) <= limit and cut.cut_prompt
    start, _, _ = tokenizer.decode(few.input_ids).partition(words[-20])
    text = tokenizer.decode(cut.input_ids)
    assert text.startswith(start) and words[-1] in text and words[0] not in text


def test_a_tool_result_that_is_too_long_is_cut_before_the_question():
    tokenizer = tokenizer_of("qwen2.5")
    words = " ".join(f"w{n}" for n in range(300))
    result = {"role": "tool", "content": words, "name": "time", "tool_call_id": "call00000"}
    row = {
        "messages": [
            *turns(("user", "What time is it?")),
            calling("time"),
            result,
            *turns(("assistant", "Late.")),
        ]
    }
    (cut,) = examples(row, tokenizer, train_turns="last", max_prompt_length=200)
    text = tokenizer.decode(cut.input_ids)
    assert (
        "What time is it?" in text
        and "w299" in text
        and "w0 " not in text
        and cut.completion.index(True) <= 200
    )


@pytest.mark.parametrize("train_turns", ["last", "final_answer"])
def test_a_last_turn_that_is_not_to_be_trained_drops_the_conversation(train_turns):
    row = {"messages": [*OSLO, ROME[0], {**ROME[1], "weight": 0}]}
    (found,) = examples(row, tokenizer_of("smollm2"), train_turns=train_turns)
    assert found == Dropped("d.jsonl:3", "no final answer")


def test_train_on_all_leaves_out_no_reasoning_in_silence():
    thought = [
        {**turn, "reasoning_content": f"About {turn['content']}"} if turn["role"] == "assistant" else turn
        for turn in (*OSLO, *ROME)
    ]
    for row in (thought, [*thought, *turns(("user", "So?"))]):
        with pytest.raises(DataError, match=r"turn 1 .*leaves out its reasoning_content"):
            examples({"messages": row}, tokenizer_of("qwen3"), train_on="all")


@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1", "smollm3"])
def test_a_thought_without_its_opening_is_one(name):
    tokenizer, thought = tokenizer_of(name), "Two and two.\n</think>\n\nFour."
    for rules in ({}, {"train_turns": "final_answer"}):
        whole = {"messages": turns(("user", "?"), ("assistant", f"<think>\n{thought}"))}
        headless = {"messages": turns(("user", "?"), ("assistant", thought))}
        assert examples(headless, tokenizer, **rules) == examples(whole, tokenizer, **rules)
    assert "Two" not in trained(headless, tokenizer, train_turns="final_answer")[0]


@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1"])
@pytest.mark.parametrize("text", ["The tag </think> closes. and <think> opens", "It is </think>."])
def test_a_tag_that_an_answer_mentions_makes_no_reasoning_of_it(name, text):
    row = {"messages": turns(("user", "?"), ("assistant", text))}
    with pytest.raises(DataError, match=r"turn 1 .*leaves out its content, or changes it. It has </think>"):
        examples(row, tokenizer_of(name))


def test_a_question_that_is_cut_to_nothing_is_dropped():
    row = {"messages": turns(("system", "Be brief. " * 4), ("user", "0123456789"), ("assistant", "Yes."))}
    tokenizer = tokenizer_of("llama3.2")
    (whole,) = examples(row, tokenizer)
    full = whole.completion.index(True)
    for limit in range(full - 12, full):
        (found,) = examples(row, tokenizer, max_prompt_length=limit)
        if isinstance(found, Dropped):
            assert found.reason == "prompt longer than max_prompt_length"
        else:
            assert "9<|eot_id|>" in tokenizer.decode(found.input_ids)


def test_a_long_question_beside_long_schemas_is_cut_in_time():
    tokenizer = tokenizer_of("qwen2.5")
    words = {f"field{n}": {"type": "string", "description": "A word of the many. " * 4} for n in range(100)}
    tool = {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": words}},
    }
    row = {"messages": turns(("user", "word " * 600), ("assistant", "Yes.")), "tools": [tool]}
    bare = {**row, "messages": turns(("user", "word"), ("assistant", "Yes."))}
    rules = {"max_length": 1 << 17}
    (short,) = examples(bare, tokenizer, **rules)
    limit = short.completion.index(True) + 200
    start = time.process_time()
    (cut,) = examples(row, tokenizer, max_prompt_length=limit, **rules)
    assert limit - 100 < cut.completion.index(True) <= limit and time.process_time() - start < 5
