"""What is trained of a conversation under the templates of many families."""

from __future__ import annotations

import pytest

from data.template_zoo import ZOO
from selectkd.data.formats import detect_format, to_sample
from selectkd.data.inspect import pieces
from selectkd.data.render import render
from selectkd.data.template import ChatTemplate
from selectkd.errors import DataError

TALK = [
    ("user", "Where is Oslo?"),
    ("assistant", "In Norway."),
    ("user", "And Rome?"),
    ("assistant", "In Italy."),
]
EMPTY = "<think>\n\n</think>\n\n"


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.fixture(scope="module")
def family(make_tokenizer):
    def make(name, template=None):
        own = ZOO[name]
        return make_tokenizer(
            template or own.template, eos_token=own.eos, bos_token=own.bos,
            additional_special_tokens=list(own.special), extra=("<think>", "</think>", "<tool_call>", "</tool_call>"),
        )  # fmt: skip

    return make


def show(messages, tokenizer, **options):
    row = {"messages": messages}
    row |= {name: options.pop(name) for name in ("tools",) if name in options}
    sample = to_sample(row, detect_format(row), origin="d.jsonl:3")
    arguments = options.pop("arguments", None)
    template = ChatTemplate.of(tokenizer, arguments=arguments, moment="2026-01-02T03:04:05")
    made = render(sample, tokenizer, max_length=2048, template=template, **options)
    return made, [text for text, trained in pieces(made, tokenizer) if trained]


FIRST, SECOND = "In Norway.<|im_end|>", "In Italy.<|im_end|>"
TRAINED = {
    "qwen2.5": [FIRST, SECOND],
    "qwen3": [FIRST, EMPTY + SECOND],
    "base qwen": [FIRST, SECOND],
    "llama3.1": ["In Norway.<|eot_id|>", "In Italy.<|eot_id|>"],
    "gemma": ["In Norway.<end_of_turn>", "In Italy.<end_of_turn>"],
    "mistral": ["In Norway.</s>", "In Italy.</s>"],
    "phi3": ["In Norway.<|end|>", "In Italy.<|end|>"],
    "phi4": [FIRST, SECOND],
    "smollm3": ["<|im_start|>assistant\n" + FIRST, "<|im_start|>assistant\n" + SECOND],
    "r1": ["In Norway.</s>", "In Italy.</s>"],
    "nemotron": ["</think>" + FIRST, "</think>" + SECOND],
    "granite": ["In Norway.<|end_of_text|>", "In Italy.<|end_of_text|>"],
    "gpt-oss": [
        "<|channel|>final<|message|>In Norway.<|end|>",
        "<|channel|>final<|message|>In Italy.<|return|>",
    ],
    "glm4.5": ["<think></think>\nIn Norway.<|user|>", "<think></think>\nIn Italy.<|endoftext|>"],
    "parts": [FIRST, SECOND],
    "deepseek3": ["In Norway.</s>", "In Italy.</s>"],
}


@pytest.mark.parametrize("name", ZOO)
def test_each_turn_is_trained_from_its_generation_prompt_to_the_token_that_ends_it(name, family):
    assert show(turns(*TALK), family(name))[1] == TRAINED[name]


@pytest.mark.parametrize("name", ZOO)
def test_a_single_turn_is_trained_as_the_last_of_a_conversation(name, family):
    expected = TRAINED[name][-1].replace("In Italy.", "In Norway.")
    assert show(turns(*TALK[:2]), family(name))[1] == [expected]


@pytest.mark.parametrize("name", ZOO)
def test_a_system_prompt_is_in_the_text_whatever_a_template_does_with_it(name, family):
    tokenizer = family(name)
    for talk in (TALK[:2], TALK):
        made, trained = show(turns(("system", "Be very brief."), *talk), tokenizer)
        text = tokenizer.decode(made.input_ids)
        assert text.count("Be very brief.") == 1 and len(trained) == len(talk) // 2
        everything, _ = show(turns(("system", "Be very brief."), *talk), tokenizer, train_on="all")
        assert "Be very brief." in tokenizer.decode(everything.input_ids)


@pytest.mark.parametrize("name", ZOO)
def test_the_trained_text_is_what_a_model_would_be_asked_to_go_on_with(name, family):
    """The prompt before the last turn is the template's own prompt, but for an opened block of thoughts."""
    tokenizer = family(name)
    messages = turns(*TALK)
    made, _ = show(messages, tokenizer)
    last = max(i for i, t in enumerate(made.completion) if t and not made.completion[i - 1])
    before = tokenizer.decode(made.input_ids[:last])
    if name == "parts":
        return
    asked = tokenizer.apply_chat_template(
        messages[:3], add_generation_prompt=True, tokenize=False, date_string="x"
    )
    shared = before.rpartition("Rome?")[2]
    assert asked.rpartition("Rome?")[2].startswith(
        shared.removesuffix("<|im_start|>assistant\n") if name == "smollm3" else shared
    )


THINKING = [*TALK[:3], ("assistant", "<think>\nRome is a capital.\n</think>\n\nIn Italy.")]


@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("r1",)])
def test_thoughts_of_the_last_turn_are_trained_where_the_template_keeps_them(name, family):
    trained = show(turns(*THINKING), family(name))[1]
    assert "Rome is a capital." in trained[-1] and "In Italy." in trained[-1]


@pytest.mark.parametrize("name", ["qwen3", "r1"])
def test_thoughts_that_a_template_drops_are_refused_by_turn_and_field(name, family):
    early = [TALK[0], ("assistant", "<think>\nOslo is a capital.\n</think>\n\nIn Norway."), *TALK[2:]]
    with pytest.raises(DataError, match=r"d\.jsonl:3: turn 1 \(assistant\).*leaves out its content"):
        show(turns(*early), family(name))


@pytest.mark.parametrize("name", ["gpt-oss", "qwen3"])
def test_a_field_of_reasoning_that_is_dropped_is_refused_by_its_name(name, family):
    messages = turns(*TALK)
    messages[1]["reasoning_content"] = "Oslo is a capital."
    with pytest.raises(DataError, match=r"turn 1 \(assistant\).*leaves out its reasoning_content"):
        show(messages, family(name))
    del messages[1]["reasoning_content"]
    messages[3]["reasoning"] = "Rome is a capital."
    assert "Rome is a capital." in show(messages, family(name))[1][-1]


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
}
USING = [*turns(("user", "Weather in Oslo?")), CALL, *turns(("tool", "7"), ("assistant", "7 degrees."))]


@pytest.mark.parametrize(
    ("name", "called"),
    [
        (
            "qwen2.5",
            '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
        ),
        (
            "qwen3",
            '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
        ),
        ("llama3.1", '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]</s>'),
        ("gpt-oss", ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'),
        ("deepseek3", '<|call|>weather\n{"city": "Oslo"}</s>'),
    ],
)
def test_a_call_is_trained_to_its_end_with_its_arguments_as_the_template_takes_them(name, called, family):
    trained = show(USING, family(name))[1]
    assert trained[0].lstrip("\n") == called.lstrip("\n") and "7 degrees." in trained[1]


@pytest.mark.parametrize("name", ["phi3", "granite", "phi4"])
def test_a_call_that_a_template_drops_is_told(name, family):
    with pytest.raises(DataError, match=r"turn 1 \(assistant\).*tool_calls\[0\]\.name"):
        show(USING, family(name))


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
    record = {"messages": [USING[0], {**CALL, "tool_calls": [call]}, *USING[2:]]}
    if kept:
        assert any(render(to_sample(record, "messages", origin="f:1"), tokenizer, max_length=400).completion)
    else:
        with pytest.raises(DataError, match=r"turn 1 \(assistant\).*tool_calls\[0\]\.arguments"):
            render(to_sample(record, "messages", origin="f:1"), tokenizer, max_length=400)


def test_an_argument_of_the_recipe_reaches_the_template(family):
    tokenizer = family("qwen3")
    off = show(turns(*TALK), tokenizer, arguments={"enable_thinking": False})
    assert off[1] == [FIRST, SECOND] and off[0].input_ids == show(turns(*TALK), tokenizer)[0].input_ids
    tokenizer = family("llama3.1")
    made, _ = show(turns(*TALK), tokenizer, arguments={"date_string": "1 May 2020"})
    assert "Today Date: 1 May 2020" in tokenizer.decode(made.input_ids)


@pytest.mark.parametrize("name", ["llama3.1", "gpt-oss"])
def test_a_template_that_asks_for_the_date_is_given_one_and_says_so(name, family):
    tokenizer = family(name)
    made, _ = show(turns(*TALK), tokenizer)
    text = tokenizer.decode(made.input_ids)
    assert "02 Jan 2026" in text or "2026-01-02" in text
    assert ChatTemplate.of(tokenizer).dated and not ChatTemplate.of(family("qwen3")).dated


@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("parts", "mistral", "gpt-oss")])
def test_a_rendering_is_that_of_transformers(name, family):
    tokenizer = family(name)
    messages = turns(("system", "Be brief."), *TALK)
    made, _ = show(messages, tokenizer, arguments={"date_string": "1 May 2020"})
    theirs = tokenizer.apply_chat_template(messages, tokenize=False, date_string="1 May 2020")
    ours = tokenizer.decode(made.input_ids)
    assert ours == theirs or ours == theirs + "<|endoftext|>"
