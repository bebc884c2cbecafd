"""Calls of tools in every form that records have them: read as they are meant, or refused by turn and field."""

from __future__ import annotations

import json

import pytest

from selectkd.data.formats import to_sample
from selectkd.errors import DataError

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ADD = {"name": "add", "arguments": {"a": 2, "b": 3}}
AS_CALL = {"type": "function", "function": ADD}


def talk(*turns, **fields):
    return to_sample({"messages": [USER, *turns], **fields}, "messages", origin="d.jsonl:7")


def calling(**function):
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", **function}}]}


@pytest.mark.parametrize(
    "broken",
    ['{"city": "Oslo",}', "{'city': 'Oslo'}", '{"city": "Os', "Oslo", "[1]", '"{}"', "5", [1], 5, True],
)
@pytest.mark.parametrize("name", ["arguments", "parameters"])
def test_arguments_that_are_no_object_are_refused_by_turn_and_field(broken, name):
    with pytest.raises(
        DataError, match=rf"d\.jsonl:7: messages\[1\]\.tool_calls\[0\]\.function\.{name}: is "
    ):
        talk(calling(**{name: broken}))
    spoken = {"role": "function_call", "content": json.dumps({"name": "add", name: broken})}
    with pytest.raises(DataError, match=rf"d\.jsonl:7: messages\[1\]\.content\.{name}: is "):
        talk(spoken)
    older = {"role": "assistant", "content": None, "function_call": {"name": "add", name: broken}}
    with pytest.raises(DataError, match=rf"d\.jsonl:7: messages\[1\]\.function_call\.{name}: is "):
        talk(older)


@pytest.mark.parametrize("none", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": "null"}])
def test_a_call_without_arguments_has_none(none):
    assert talk(calling(**none)).messages[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("given", [{"a": 2, "b": 3}, '{"a": 2, "b": 3}'])
def test_parameters_are_the_arguments_of_a_call(given):
    (call,) = talk(calling(parameters=given)).messages[1]["tool_calls"]
    assert call["function"] == ADD
    spoken = {"role": "function_call", "content": json.dumps({"name": "add", "parameters": given})}
    assert talk(spoken).messages[1]["tool_calls"] == [AS_CALL]


@pytest.mark.parametrize("call", [ADD, {**ADD, "arguments": json.dumps(ADD["arguments"])}, json.dumps(ADD)])
def test_openais_older_function_call_is_one_call(call):
    functions = [{"name": "add", "parameters": {}}]
    result = {"role": "function", "name": "add", "content": "5"}
    sample = talk(
        {"role": "assistant", "content": None, "function_call": call}, result, REPLY, functions=functions
    )
    assert sample.messages[1] == {"role": "assistant", "tool_calls": [AS_CALL], "content": ""}
    assert sample.messages[2] == {**result, "role": "tool"} and sample.trained == (1, 3)
    assert sample.tools == ({"type": "function", "function": functions[0]},)


def test_an_empty_function_call_of_a_table_is_none():
    for empty in (None, "", {"name": None, "arguments": None}):
        assert talk({**REPLY, "function_call": empty}).messages == (USER, REPLY)
    with pytest.raises(DataError, match=r"messages\[1\]\.function_call: stands"):
        talk({**calling(), "function_call": ADD})


@pytest.mark.parametrize("name", ["tool", "function", "ipython", "observation", "Tool", "IPYTHON"])
def test_a_result_of_a_tool_has_many_names(name):
    assert talk(calling(), {"role": name, "content": "5"}, REPLY).messages[2]["role"] == "tool"


def test_the_case_of_a_role_does_not_matter():
    turns = [{"role": "User", "content": "q"}, {"role": "ASSISTANT", "content": "a"}]
    assert to_sample({"messages": turns}, "messages").messages == (USER, REPLY)
    turns = [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]
    assert to_sample({"conversations": turns}, "conversations").messages == (USER, REPLY)


def test_parallel_calls_are_calls_of_one_turn():
    more = {"name": "take", "arguments": {}}
    both = [AS_CALL, {"type": "function", "function": more}]
    one = {"role": "function_call", "content": json.dumps([ADD, more])}
    two = [{"role": "function_call", "content": json.dumps(call)} for call in (ADD, more)]
    results = [{"role": "tool", "content": "5"}, {"role": "tool", "content": "1"}]
    for turns in ([one], two):
        sample = talk(*turns, *results, REPLY)
        assert sample.messages[1]["tool_calls"] == both and len(sample.messages) == 5
        assert sample.trained == (1, 4)
    with pytest.raises(DataError, match="assistant' after assistant"):
        talk({**two[0], "weight": 0}, {**two[1], "weight": 1}, *results, REPLY)
