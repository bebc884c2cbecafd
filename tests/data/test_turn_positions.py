"""What is trained of a conversation under the templates of many families."""

from __future__ import annotations

from datetime import datetime
from types import SimpleNamespace

import pytest

from data.rendered import examples, trained
from data.template_zoo import (
    CALL,
    CONVERSATIONS,
    FAMILIES,
    MOMENT,
    MOST,
    OSLO,
    ROME,
    SYSTEM,
    TOOL,
    family,
    ids_of,
    tokenizer_of,
    turns,
)
from selectkd.data.example import Dropped
from selectkd.data.template import ChatTemplate
from selectkd.errors import DataError

TRAINED = [
    (name, title)
    for name in FAMILIES
    for title in CONVERSATIONS
    if title != "long" and not isinstance(family(name).golden[title], str)
]


@pytest.mark.parametrize("title", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_texts_and_masks_are_those_written_by_hand(name, title):
    tokenizer, golden = tokenizer_of(name), family(name).golden[title]
    if isinstance(golden, str):
        with pytest.raises(DataError, match=r"d\.jsonl:3: .*" + golden):
            examples(CONVERSATIONS[title], tokenizer, max_length=MOST)
        return
    found = examples(CONVERSATIONS[title], tokenizer, max_length=MOST if title == "long" else 4096)
    expected = [ids_of(text, tokenizer) for text in golden]
    if title == "long":
        expected = [(ids[:MOST], mask[:MOST]) for ids, mask in expected]
    shown = [tokenizer.decode(one.input_ids) for one in found]
    assert shown == [tokenizer.decode(ids) for ids, _ in expected]
    assert [(one.input_ids, one.completion) for one in found] == expected


def test_the_zoo_is_whole():
    assert len(FAMILIES) == 14 and all(set(family(name).golden) == set(CONVERSATIONS) for name in FAMILIES)


@pytest.mark.parametrize(("name", "title"), TRAINED)
def test_each_trained_turn_stands_behind_the_generation_prompt_that_transformers_writes(
    name, title, monkeypatch
):
    """Token for token what a model is given where it writes the turn itself."""
    tokenizer, row = tokenizer_of(name), CONVERSATIONS[title]
    prompts = [
        one.input_ids[:place]
        for one in examples(row, tokenizer)
        for place in range(1, len(one))
        if one.completion[place] and not one.completion[place - 1]
    ]
    messages = [
        {**turn, "thinking": turn["reasoning_content"]} if "reasoning_content" in turn else turn
        for turn in row["messages"]
    ]
    if name == "deepseek-r1" and title == "tools":
        call = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
        messages[1] = {**messages[1], "tool_calls": [call]}
    numbers = [
        n
        for n, turn in enumerate(messages)
        if turn["role"] == "assistant" and turn != turns(("assistant", ""))[0]
    ]
    moment = SimpleNamespace(now=lambda: datetime.fromisoformat(MOMENT))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", moment)
    asked = [
        tokenizer.apply_chat_template(
            messages[:number], tools=row.get("tools"), add_generation_prompt=True, return_dict=False
        )
        for number in numbers
    ]
    assert prompts == asked


R1_END = family("deepseek-r1").roles["eos_token"]
THOUGHT = {"messages": CONVERSATIONS["reasoning"]["messages"]}
INLINE = {
    "messages": [OSLO[0], {**OSLO[1], "content": "<think>\nOslo is a capital.\n</think>\n\nIn Norway."}]
}


@pytest.mark.parametrize(
    ("name", "whole", "answer"),
    [
        ("qwen3", "<think>\nRome is one too.\n</think>\n\nIn Italy.<|im_end|>", "In Italy.<|im_end|>"),
        ("deepseek-r1", "Rome is one too.\n</think>\n\nIn Italy." + R1_END, "In Italy." + R1_END),
        (
            "gpt-oss",
            "<|channel|>analysis<|message|>Rome is one too.<|end|><|start|>assistant<|channel|>final<|message|>"
            "In Italy.<|return|>",
            "In Italy.<|return|>",
        ),
    ],
)  # fmt: skip
def test_the_last_turn_or_its_answer_alone_is_trained(name, whole, answer):
    tokenizer = tokenizer_of(name)
    assert trained(THOUGHT, tokenizer, train_turns="last") == [whole]
    assert trained(THOUGHT, tokenizer, train_turns="final_answer") == [answer]
    assert len(trained(THOUGHT, tokenizer, train_turns="all")) == 2


def test_a_final_answer_calls_no_tool():
    tokenizer, row = tokenizer_of("qwen2.5"), CONVERSATIONS["tools"]
    assert trained(row, tokenizer, train_turns="final_answer") == ["7 degrees.<|im_end|>"]
    calling = {**row, "messages": row["messages"][:2]}
    assert examples(calling, tokenizer, train_turns="final_answer") == [
        Dropped("d.jsonl:3", "no final answer")
    ]
    assert len(examples(calling, tokenizer, train_turns="last")) == 1


@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1"])
def test_reasoning_in_the_text_and_in_a_field_of_its_own_are_trained_alike(name):
    tokenizer = tokenizer_of(name)
    for field in ("reasoning_content", "thinking", "reasoning"):
        row = {"messages": [OSLO[0], {**OSLO[1], field: "Oslo is a capital."}]}
        assert examples(row, tokenizer) == examples(INLINE, tokenizer)


def test_parts_of_reasoning_are_the_turns_reasoning():
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Oslo is a capital."}]}
    for part in (thought, {"type": "reasoning", "text": "Oslo is a capital."}):
        row = {"messages": [OSLO[0], {**OSLO[1], "content": [part, {"type": "text", "text": "In Norway."}]}]}
        assert examples(row, tokenizer_of("qwen3")) == examples(INLINE, tokenizer_of("qwen3"))
    wrong = [OSLO[0], {**OSLO[1], "content": [{"type": "thinking", "thinking": 5}]}]
    with pytest.raises(DataError, match=r"messages\[1\]\.content\[0\]: needs text, not int"):
        examples({"messages": wrong}, tokenizer_of("qwen3"))


def test_a_turn_of_weight_zero_is_context_alone():
    tokenizer = tokenizer_of("qwen3")
    for switch in ({"weight": 0}, {"train": False}):
        row = {"messages": [OSLO[0], {**OSLO[1], **switch}, *ROME]}
        assert trained(row, tokenizer) == ["<think>\n\n</think>\n\nIn Italy.<|im_end|>"]


def test_an_argument_of_the_recipe_reaches_the_template():
    tokenizer = tokenizer_of("qwen3")
    row = {"messages": [*OSLO, *ROME]}
    assert trained(row, tokenizer, arguments={"enable_thinking": False}) == [
        "In Norway.<|im_end|>",
        "In Italy.<|im_end|>",
    ]
    with pytest.raises(DataError, match=r"turn 1 \(assistant\) has reasoning.*answer at once"):
        examples(THOUGHT, tokenizer, arguments={"enable_thinking": False})
    tokenizer = tokenizer_of("llama3.2")
    (example,) = examples(row, tokenizer, arguments={"date_string": "1 May 2020"})
    assert "Today Date: 1 May 2020" in tokenizer.decode(example.input_ids)


def test_a_system_prompt_and_tools_of_the_recipe_are_for_conversations_without_any():
    tokenizer = tokenizer_of("qwen2.5")
    rules = {"system": "Be kind.", "tools": (TOOL,)}
    (example,) = examples({"messages": OSLO}, tokenizer, **rules)
    text = tokenizer.decode(example.input_ids)
    assert text.startswith("<|im_start|>system\nBe kind.") and '"weather"' in text
    assert trained({"messages": OSLO}, tokenizer, **rules) == ["In Norway.<|im_end|>"]
    (example,) = examples({"messages": [*SYSTEM, *OSLO]}, tokenizer, **rules)
    assert "Be brief." in tokenizer.decode(example.input_ids) and "kind" not in tokenizer.decode(
        example.input_ids
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_train_on_all_has_the_text_of_the_last_turn_as_a_model_meets_it(name):
    tokenizer = tokenizer_of(name)
    title = "plain" if name == "gemma2" else "multi-turn"
    (example,) = examples(CONVERSATIONS[title], tokenizer, train_on="all")
    golden = family(name).golden[title][-1]
    assert example.input_ids == ids_of(golden, tokenizer)[0] and all(example.completion[1:])


@pytest.mark.parametrize("name", ["llama3.2", "gpt-oss", "granite", "mistral-tekken", "smollm3"])
def test_a_template_that_asks_for_the_date_is_known(name):
    assert ChatTemplate.of(tokenizer_of(name)).dated and not ChatTemplate.of(tokenizer_of("qwen3")).dated


def test_a_chat_model_with_another_eos_is_trained_to_the_end_of_its_turns(make_tokenizer):
    tokenizer = make_tokenizer(eos_token="<|endoftext|>")
    assert trained({"messages": [*OSLO, *ROME]}, tokenizer) == ["In Norway.<|im_end|>|In Italy.<|im_end|>"]


# A thought is opened by the generation prompt and closed at once in every turn.
NEMOTRON = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>"
    "{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# The next question's header is what ends a turn.
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
    "<think></think>\n{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_an_answer_that_brings_its_own_end_is_read_as_one_without(name, train_on):
    tokenizer, answer = tokenizer_of(name), {"train_on": train_on}
    plain = examples({"messages": [*OSLO, *ROME]}, tokenizer, **answer)
    last = tokenizer.decode(examples({"messages": OSLO}, tokenizer)[0].input_ids).rpartition("Norway.")[2]
    for end in (last, last.strip() + "\n", f" {last}"):
        brought = [
            {**turn, "content": turn["content"] + end} if turn["role"] == "assistant" else turn
            for turn in (*OSLO, *ROME)
        ]
        assert examples({"messages": brought}, tokenizer, **answer) == plain
    parts = [{"type": "text", "text": f"In Italy.{last}"}]
    listed = [*OSLO, ROME[0], {"role": "assistant", "content": parts}]
    assert examples({"messages": listed}, tokenizer, **answer) == plain


def test_a_thought_that_the_prompt_opens_is_closed_in_the_trained_part(make_tokenizer):
    tokenizer = make_tokenizer(NEMOTRON)
    assert trained(THOUGHT, tokenizer) == [
        "Oslo is a capital.</think>In Norway.<|im_end|>", "Rome is one too.</think>In Italy.<|im_end|>"
    ]  # fmt: skip
    first, second = examples({"messages": [*OSLO, *ROME]}, tokenizer)
    assert tokenizer.decode(first.input_ids).endswith("assistant\n<think>\n</think>In Norway.<|im_end|>\n")
    assert "<think></think>In Norway." in tokenizer.decode(second.input_ids)


def test_the_header_of_the_next_turn_may_end_one(make_tokenizer):
    special = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>"]
    tokenizer = make_tokenizer(GLM, additional_special_tokens=special, eos_token="<|endoftext|>")
    assert trained({"messages": [*OSLO, *ROME]}, tokenizer) == [
        "<think></think>\nIn Norway.<|user|>|<think></think>\nIn Italy.<|endoftext|>"
    ]


def test_a_template_of_parts_is_given_parts(make_tokenizer):
    row = {"messages": [*OSLO, ROME[0], {**ROME[1], "content": [{"type": "text", "text": "In Italy."}]}]}
    assert trained(row, make_tokenizer(PARTS)) == ["In Norway.<|im_end|>|In Italy.<|im_end|>"]
    assert trained(row, make_tokenizer()) == ["In Norway.<|im_end|>|In Italy.<|im_end|>"]


def test_a_token_across_the_end_of_a_prompt_is_cut_there(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}", corpus=["assistant: yes", " yes no : yes"] * 4,
    )  # fmt: skip
    row = {"messages": turns(("user", "no"), ("assistant", "yes"))}
    (example,) = examples(row, tokenizer)
    prompt = tokenizer("user: no\nassistant: ")["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt and example.completion.index(True) == len(prompt)
    assert tokenizer("user: no\nassistant: yes\n")["input_ids"][: len(prompt)] != prompt
    assert tokenizer.decode(example.input_ids) == "user: no\nassistant: yes\n<|im_end|>"


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("", False),
        ("{{ f.arguments.keys() | join(',') }}", False),
        ("{{ f.arguments | tojson }}", True),
        ("{% for k, v in f.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}", True),
        ("{{ f.arguments }}", True),
    ],
)
def test_arguments_that_a_template_drops_are_told(written, kept, make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{% set f = c.function %}{{ f.name }}" + written + "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    arguments = {"city": 'Köln\n"am" Rhein', "days": [12, True, None], "in": {"unit": "C"}}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = list(CONVERSATIONS["tools"]["messages"])
    messages[1] = {**messages[1], "content": None, "tool_calls": [call]}
    if kept:
        assert any(examples({"messages": messages}, tokenizer)[0].completion)
    else:
        with pytest.raises(DataError, match=r"turn 1 \(assistant\).*tool_calls\[0\]\.arguments"):
            examples({"messages": messages}, tokenizer)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3.2", "phi4"])
def test_a_prompt_that_is_too_long_loses_its_oldest_turns_and_keeps_its_system_prompt(name):
    tokenizer = tokenizer_of(name)
    pairs = [(("user", f"Question {n}? " + "word " * 9), ("assistant", f"Answer {n}.")) for n in range(6)]
    talk = [turn for pair in pairs for turn in pair]
    row = {"messages": turns(("system", "Be brief."), *talk)}
    kept = {"messages": turns(("system", "Be brief."), *talk[-4:])}
    (whole,) = examples(kept, tokenizer, train_turns="last")
    limit = whole.completion.index(True)
    (cut,) = examples(row, tokenizer, train_turns="last", max_prompt_length=limit)
    assert (cut.input_ids, cut.completion) == (whole.input_ids, whole.completion)
    assert cut.truncated and cut.cut_prompt and not whole.truncated
    (one,) = examples(row, tokenizer, train_turns="last", max_prompt_length=limit - 1)
    (last,) = examples({"messages": turns(("system", "Be brief."), *talk[-2:])}, tokenizer)
    assert one.input_ids == last.input_ids
    (part,) = examples(row, tokenizer, train_turns="last", max_prompt_length=last.completion.index(True) - 8)
    text = tokenizer.decode(part.input_ids)
    assert (
        "Be brief." in text
        and "Question 5" not in text
        and text.endswith(tokenizer.decode(last.input_ids)[-40:])
    )
    assert examples(row, tokenizer, train_turns="last", max_prompt_length=4) == [
        Dropped("d.jsonl:3", "prompt longer than max_prompt_length")
    ]
    assert examples(row, tokenizer, train_turns="last", max_prompt_length=9, on_too_long="drop") == [
        Dropped("d.jsonl:3", "too long")
    ]
