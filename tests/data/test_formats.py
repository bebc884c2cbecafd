from __future__ import annotations

import json

import pytest

from selectkd.data.detection import FORMATS, detect_format
from selectkd.data.formats import to_sample
from selectkd.errors import DataError

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS = {
    "messages": {"messages": [USER, REPLY]},
    "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "instruction": {"instruction": "q", "input": "", "output": "a"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "unpaired_preference": {"prompt": "q", "completion": "a", "label": True},
    "text": {"text": "q a"},
    "tokens": {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
}


@pytest.mark.parametrize("format", list(FORMATS))
def test_every_format_is_detected_and_read(format):
    row = ROWS[format]
    assert detect_format(row) == format
    sample = to_sample(row, format)
    if format in ("text", "tokens"):
        assert sample.text == "q a" or sample.input_ids == (1, 2, 3)
    else:
        assert list(sample.messages) == [USER, REPLY] and sample.trained == (1,)


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "response": "a", "type": "GSM_AnsAug"},
        {"question": "q", "answer": "a"},
        {"prompt": [USER], "completion": [REPLY]},
        {"prompt": "q", "chosen": [USER, REPLY], "rejected": [USER, REPLY]},
        {"chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "b"}]},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"messages": json.dumps([USER, REPLY]), "id": 3},
        {"messages": [{**USER, "tool_calls": None}, {**REPLY, "weight": 1}], "text": None},
    ],
)
def test_common_variants_give_the_same_conversation(row):
    sample = to_sample(row, detect_format(row))
    assert list(sample.messages) == [USER, REPLY] and sample.trained == (1,)


def test_parts_are_handed_on_as_parts():
    parts = [{"type": "text", "text": "q", "image": None}, "r"]
    sample = to_sample({"messages": [{"role": "user", "content": parts}, REPLY]}, "messages")
    assert sample.messages[0]["content"] == [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("format", ["messages", "conversations", "prompt_completion", "instruction"])
def test_a_row_labelled_false_is_no_good_answer(format, label):
    row = {**ROWS[format], "label": label}
    assert detect_format(row) == "unpaired_preference"
    assert to_sample(row, "unpaired_preference").rejected is not label
    assert detect_format({**row, "label": "positive"}) == format


def test_chosen_is_trained_and_rejected_is_nowhere():
    assert "rejected-text" not in repr(
        to_sample({**ROWS["preference"], "rejected": "rejected-text"}, "preference")
    )


def test_only_the_last_turn_of_a_history_is_trained():
    row = {"instruction": "q", "output": "a", "history": [["q0", "a0"]], "system": "s"}
    sample = to_sample(row, "instruction")
    assert [m["role"] for m in sample.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert sample.trained == (4,)


def test_a_turn_of_weight_zero_and_a_blank_turn_are_not_trained():
    turns = [USER, {**REPLY, "weight": 0}, USER, {**REPLY, "content": " \n"}, USER, REPLY]
    assert to_sample({"messages": turns}, "messages").trained == (5,)


def test_tool_calls_are_supported_in_both_shapes():
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "a"},
    ]
    sample = to_sample({"conversations": turns, "tools": '[{"name": "f"}]'}, "conversations")
    assert [m["role"] for m in sample.messages] == ["user", "assistant", "tool", "assistant"]
    assert sample.trained == (1, 3) and sample.tools == ({"name": "f"},)
    openai = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    assert to_sample({"messages": [USER, openai]}, "messages").trained == (1,)


USE = {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "1"}]}


def test_parts_that_call_tools_and_give_results_become_turns():
    text = {"type": "text", "text": "more"}
    turns = [
        USER,
        {"role": "assistant", "content": [text, USE]},
        {"role": "user", "content": [RESULT, text]},
        REPLY,
    ]
    sample = to_sample({"messages": turns}, "messages")
    call = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}
    assert sample.messages == (
        USER,
        {"role": "assistant", "content": [text], "tool_calls": [call]},
        {"role": "tool", "content": RESULT["content"], "tool_call_id": "c1", "name": "f"},
        {"role": "user", "content": [text]},
        REPLY,
    )
    assert sample.trained == (1, 4)
    plain = {**RESULT, "content": "1", "tool_use_id": None}
    alone = to_sample({"messages": [*turns[:2], {"role": "user", "content": [plain]}, REPLY]}, "messages")
    assert alone.messages[2] == {"role": "tool", "content": "1"} and alone.trained == (1, 3)


@pytest.mark.parametrize(
    ("turns", "named"),
    [
        ([{"role": "user", "content": [USE]}, REPLY], r"content\[0\].*tool_use"),
        ([USER, {"role": "assistant", "content": [RESULT]}], r"messages\[1\].*tool_result"),
        ([USER, {"role": "assistant", "content": [USE, "x"]}], r"content\[1\].*behind a tool_use"),
        ([USER, {"role": "assistant", "content": [{**USE, "input": 3}]}], r"content\[0\].arguments"),
        (
            [USER, {"role": "assistant", "content": [USE]}, {"role": "user", "content": ["x", RESULT]}],
            r"content\[1\]",
        ),
        ([REPLY, USER], r"turn 0"),
        ([USER, REPLY, {"role": "system", "content": "s"}], r"turn 2"),
        ([USER, {"role": "narrator", "content": "x"}], r"messages\[1\]\.role.*narrator"),
        ([USER, {"role": ["x"], "content": "x"}], r"messages\[1\]\.role"),
        ([USER, {"role": "assistant", "content": None}], r"messages\[1\]\.content.*NoneType"),
        ([USER, {"role": "assistant", "content": 7}], r"messages\[1\]\.content.*int"),
        ([{"role": "user", "content": [{"type": "audio"}]}, REPLY], r"content\[0\].*audio"),
        ([USER, "text"], r"messages\[1\]"),
        ("text", r"messages: needs text or a list"),
        ([], r"messages"),
        ([USER, {"role": "assistant", "content": "ab\u00e9\ud800"}], r"U\+D800 at byte 4"),
    ],
)
def test_a_turn_that_cannot_be_is_named_by_row_and_field(turns, named):
    with pytest.raises(DataError, match=r"d\.jsonl:7.*" + named):
        to_sample({"messages": turns}, "messages", origin="d.jsonl:7")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"input_ids": [1, 2.5]}, r"input_ids\[1\]"),
        ({"input_ids": "12"}, "input_ids"),
        ({"input_ids": [1, 2], "labels": [2, 3]}, r"labels\[0\] *:? is 2"),
        ({"input_ids": [1, 2], "completion_mask": [1]}, "1 entries"),
    ],
)
def test_wrong_token_ids_are_named(row, named):
    with pytest.raises(DataError, match=named):
        to_sample(row, "tokens")


def test_padding_of_pretokenised_rows_goes_by_the_attention_mask():
    row = {
        "input_ids": [0, 0, 5, 0, 6],
        "attention_mask": [0, 0, 1, 1, 1],
        "labels": [-100, -100, -100, 0, 6],
    }
    sample = to_sample(row, "tokens")
    assert sample.input_ids == (5, 0, 6) and sample.mask == (False, True, True)


@pytest.mark.parametrize(
    "name", ["completion_mask", "assistant_masks", "assistant_mask", "loss_mask", "response_mask"]
)
def test_a_mask_of_pretokenised_rows_is_read_by_each_of_its_names(name):
    row = {"input_ids": [5, 6, 7], name: [0, 1, 1], "special_tokens_mask": [1, 0, 0]}
    assert to_sample(row, "tokens").mask == (False, True, True)
    both = {**row, "labels": [5, 6, -100]}
    assert to_sample(both, "tokens").mask == (False, True, False)
    two = {**row, "completion_mask": [0, 1, 1], "loss_mask": [0, 1, 0]}
    assert to_sample(two, "tokens").mask == (False, True, False)


@pytest.mark.parametrize("name", ["prompt_mask", "train_masks"])
def test_a_mask_of_an_unknown_name_is_refused(name):
    with pytest.raises(DataError, match=rf"record: {name}: no mask is called so"):
        to_sample({"input_ids": [5, 6], name: [0, 1]}, "tokens")


@pytest.mark.parametrize("row", [{}, {"foo": 1}, {"prompt": "only"}, {"text": None}])
def test_a_row_of_no_format_names_its_fields(row):
    with pytest.raises(DataError, match="no known format"):
        detect_format(row)


@pytest.mark.parametrize("name", ["train", "training", "loss", "trainable", "loss_mask"])
def test_a_turn_that_is_switched_off_is_not_trained(name):
    turns = [{"role": role, "content": role} for role in ("user", "assistant") * 2]
    turns[1][name], turns[3][name] = False, True
    sample = to_sample({"messages": turns}, "messages")
    assert sample.trained == (3,) and all(name not in turn for turn in sample.messages)


@pytest.mark.parametrize("weight", [0.5, 2, -1, True, "1"])
def test_a_weight_other_than_nothing_or_all_is_refused(weight):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": weight}]
    with pytest.raises(DataError, match=r"messages\[1\]\.weight"):
        to_sample({"messages": turns}, "messages")


@pytest.mark.parametrize("name", ["train", "training", "loss", "trainable", "loss_mask"])
def test_a_switch_is_yes_or_no_in_a_form_that_is_read(name):
    for off in (False, 0, 0.0):
        assert to_sample({"messages": [USER, {**REPLY, name: off}, USER, REPLY]}, "messages").trained == (3,)
    assert to_sample({"messages": [USER, {**REPLY, name: 1}, USER, REPLY]}, "messages").trained == (1, 3)
    for wrong in ("false", "no", 0.5, [0]):
        with pytest.raises(DataError, match=rf"messages\[1\]\.{name}: needs true"):
            to_sample({"messages": [USER, {**REPLY, name: wrong}]}, "messages")


def test_a_turn_that_is_masked_is_not_trained():
    for masked in (True, 1):
        turns = [{**USER, "masked": True}, {**REPLY, "masked": masked}, USER, {**REPLY, "masked": False}]
        sample = to_sample({"messages": turns}, "messages")
        assert sample.trained == (3,) and all("masked" not in turn for turn in sample.messages)
    with pytest.raises(DataError, match=r"messages\[1\]\.masked: needs false \(trained\) or true"):
        to_sample({"messages": [USER, {**REPLY, "masked": "yes"}]}, "messages")


@pytest.mark.parametrize("name", ["mask", "train_on", "is_trained", "no_loss"])
def test_a_switch_of_an_unknown_name_is_refused(name):
    for value in (True, False, 0, 1):
        with pytest.raises(DataError, match=rf"messages\[1\]\.{name}: no switch of training is called so"):
            to_sample({"messages": [USER, {**REPLY, name: value}]}, "messages")
    turns = [USER, {**REPLY, name: "text"}]
    assert to_sample({"messages": turns}, "messages").messages[1][name] == "text"


def test_several_answers_to_one_question_are_no_turns():
    for answer in (["1 May", "May", "May 1st"], ["1 May"], []):
        with pytest.raises(DataError, match=rf"answer: needs one answer, not a list of {len(answer)} texts"):
            to_sample({"question": "when", "answer": answer}, "prompt_completion")


def test_parts_of_openais_newer_interface_are_text():
    asked = {"role": "user", "content": [{"type": "input_text", "text": "q"}]}
    told = {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}
    found = to_sample({"messages": [asked, told]}, "messages").messages
    plain = to_sample({"messages": [USER, REPLY]}, "messages").messages
    assert [one["role"] for one in found] == [one["role"] for one in plain]
    assert [part["type"] for one in found for part in one["content"]] == ["text", "text"]
