"""A prompt and a reply that repeats some of it: each turn stands once, and the answer alone is trained."""

from __future__ import annotations

import json

import pytest

from selectkd.data.detection import detect_format
from selectkd.data.formats import to_sample
from selectkd.errors import DataError


def says(*texts, system=None):
    """Turns of a user and an assistant in turn."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return [*([{"role": "system", "content": system}] if system else []), *turns]


def answer(text):
    return [{"role": "assistant", "content": text}]


def read(row):
    return to_sample(row, detect_format(row), origin="d.jsonl:7")


@pytest.mark.parametrize("reply", ["completion", "chosen"])
@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (says("q", system="s"), says("q", "c")),
        (says("q", system="s"), says("q", "c", system="s")),
        (says("q", system="s"), says("q", "c", system=" s\n")),
        (says("q"), says("q", "c", system="s")),
        ("q", says("q", "c", system="s")),
        ("q ", says("q", "c", system="s")),
        ("\nq", says("q", "c", system="s")),
        (says("q ", system="s"), says("q", "c", system="s")),
        (says("q", system="s"), answer("c")),
    ],
)
def test_a_question_that_stands_in_prompt_and_reply_is_asked_once(prompt, told, reply):
    row = {"prompt": prompt, reply: told, **({"rejected": "b"} if reply == "chosen" else {})}
    sample = read(row)
    assert [turn["role"] for turn in sample.messages] == ["system", "user", "assistant"]
    assert [turn["content"].strip() for turn in sample.messages] == ["s", "q", "c"]
    assert sample.trained == (2,)


@pytest.mark.parametrize(
    "prompt", ["q2", "q2 ", says("q2"), says("q", "a", "q2"), says("q0", "a0", "q", "a", "q2")]
)
def test_a_reply_with_the_whole_history_is_the_conversation(prompt):
    told = says("q", "a", "q2", "c")
    sample = read({"prompt": prompt, "chosen": told, "rejected": "b"})
    assert list(sample.messages)[-4:] == told and sample.trained == (len(sample.messages) - 1,)


def test_a_prompt_that_is_the_first_question_has_all_answers_trained():
    sample = read({"prompt": "q", "completion": says("q", "a", "q2", "c")})
    assert list(sample.messages) == says("q", "a", "q2", "c") and sample.trained == (1, 3)


def test_a_repeated_last_question_of_a_long_prompt_is_asked_once():
    sample = read({"prompt": says("q", "a", "q2"), "completion": says("q2", "c")})
    assert list(sample.messages) == says("q", "a", "q2", "c") and sample.trained == (3,)


@pytest.mark.parametrize(
    ("prompt", "told", "named"),
    [
        (
            "q",
            says("other", "c"),
            r"chosen: begins with a question that is not the prompt's: 'other', not 'q'",
        ),
        (
            says("q", system="s"),
            says("q", "c", system="t"),
            "chosen: its own system text is not that of the prompt",
        ),
    ],
)
def test_a_reply_to_another_question_is_refused(prompt, told, named):
    with pytest.raises(DataError, match=rf"d\.jsonl:7: {named}"):
        read({"prompt": prompt, "chosen": told, "rejected": "b"})


def test_calls_of_tools_tell_turns_apart():
    calls = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name}}]}
        for name in ("f", "g")
    ]
    result = {"role": "tool", "content": "1"}
    prompt = [*says("q"), calls[0], result]
    assert len(read({"prompt": prompt, "completion": [*prompt, *answer("c")]}).messages) == 4
    with pytest.raises(DataError):
        read({"prompt": prompt, "completion": [*says("q"), calls[1], result, *answer("c")]})


@pytest.mark.parametrize("name", ["messages", "conversations"])
@pytest.mark.parametrize("chosen", ["c", answer("c"), says("q", "a", "q2", "c")])
@pytest.mark.parametrize("judged", ["c", "b", "x"])
def test_a_chosen_answer_takes_the_place_of_the_last_one_of_a_whole_talk(name, chosen, judged):
    talk = says("q", "a", "q2", judged)
    for value in (talk, json.dumps(talk), talk[:-1]):
        sample = read({name: value, "chosen": chosen, "rejected": "b"})
        assert list(sample.messages) == says("q", "a", "q2", "c") and sample.trained == (3,)
