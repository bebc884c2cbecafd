"""Records as people have them: any field of any type, nulls of Arrow, tables, folders of several splits."""

from __future__ import annotations

import copy
import json

import pytest

from selectkd.data.detection import FORMATS, detect_format
from selectkd.data.example import Dropped
from selectkd.data.files import Found, read_records
from selectkd.data.formats import to_sample
from selectkd.data.render import TextRules, render
from selectkd.data.sources import dataset_source
from selectkd.errors import ConfigError, DataError, SelectKDError

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALLING = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
SAYS = {"role": "system", "content": "s"}
FULL = {
    "messages": {
        "messages": [
            SAYS,
            {**USER, "name": "u"},
            CALLING,
            {"role": "tool", "content": "1", "tool_call_id": "1"},
            {**REPLY, "weight": 1, "reasoning_content": "r"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    "conversations": {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        "system": "s",
    },
    "prompt_completion": {"prompt": "q", "completion": "a", "system": "s"},
    "instruction": {
        "instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q0", "a0"]],
    },
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "unpaired_preference": {"prompt": "q", "completion": "a", "label": True},
    "text": {"text": "q a"},
    "tokens": {
        "input_ids": [1, 2, 3], "labels": [-100, 2, 3], "completion_mask": [0, 1, 1], "attention_mask": [1, 1, 1],
    },
}  # fmt: skip
VALUES = [
    None,
    True,
    False,
    0,
    7,
    -1.5,
    1e308,
    "",
    "  ",
    "word",
    "[]",
    "{}",
    [],
    [1],
    [None],
    [[]],
    {},
    {"a": 1},
    [{}],
]


def paths(value, under=()):
    """Every place in a record, the fields of its lists and objects too."""
    places = [under] if under else []
    if isinstance(value, dict):
        places += [place for key, each in value.items() for place in paths(each, (*under, key))]
    elif isinstance(value, list):
        places += [place for index, each in enumerate(value) for place in paths(each, (*under, index))]
    return places


def changed(record, place, value):
    record = copy.deepcopy(record)
    here = record
    for step in place[:-1]:
        here = here[step]
    here[place[-1]] = value
    return record


CASES = [(name, place) for name in FULL for place in paths(FULL[name])]


@pytest.mark.parametrize(("name", "place"), CASES, ids=[f"{n}.{'.'.join(map(str, p))}" for n, p in CASES])
def test_a_field_of_any_type_is_read_or_refused_naming_the_row_and_never_trains_nothing(
    name, place, make_tokenizer
):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.reasoning_content or '') + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    for value in VALUES:
        record = changed(FULL[name], place, value)
        try:
            sample = to_sample(record, name, origin="d.jsonl:9999")
            (made,) = render(sample, tokenizer, TextRules(512))
        except DataError as error:
            assert str(error).startswith("d.jsonl:9999") and len(str(error)) < 1500
            continue
        if not isinstance(made, Dropped):
            trained = [i for i, one in zip(made.input_ids, made.completion, strict=True) if one]
            text = tokenizer.decode(trained, skip_special_tokens=True)
            assert name == "tokens" or text.strip(), (value, text)


@pytest.mark.parametrize(
    ("value", "row"), [(5, 1), ({"a": 1}, 1), (["a"], 1), (True, 1), ("word", 1), ({"a": 1}, 9999)]
)
@pytest.mark.parametrize("name", ["messages", "conversations", "input_ids"])
def test_a_row_of_a_wrong_type_is_named_by_its_line_wherever_it_stands(tmp_path, tokenizer, name, value, row):
    format = {"input_ids": "tokens"}.get(name, name)
    good = json.dumps({"input_ids": [1, 2, 3]} if format == "tokens" else FULL[format])
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join([good] * (row - 1) + [json.dumps({name: value})]) + "\n")
    with pytest.raises(DataError, match=rf"data\.jsonl:{row}: {name}"):
        for origin, record in (records := read_records(file)):
            to_sample(record, records.format, origin=origin)


def test_nulls_that_arrow_invented_reach_no_template(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    calls = [
        {"function": {"name": "f", "arguments": {"city": "Oslo"}}},
        {"function": {"name": "g", "arguments": {"days": 3, "deep": {"a": 1}}}},
    ]
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    records = read_records(tmp_path / "data.parquet")
    seen = [to_sample(record, "messages").messages[1]["tool_calls"][0]["function"] for _, record in records]
    assert [one["arguments"] for one in seen] == [{"city": "Oslo"}, {"days": 3, "deep": {"a": 1}}]


@pytest.mark.parametrize("arguments", ['{"x": 1}', {"x": 1}])
@pytest.mark.parametrize("flat", [True, False])
def test_arguments_that_are_json_text_become_the_object(arguments, flat):
    call = {"name": "f", "arguments": arguments}
    turn = {"role": "assistant", "content": "", "tool_calls": [call if flat else {"function": call}]}
    calls = to_sample({"messages": [USER, turn]}, "messages").messages[1]["tool_calls"]
    assert (calls[0] if flat else calls[0]["function"])["arguments"] == {"x": 1}
    as_text = {**turn, "tool_calls": json.dumps(turn["tool_calls"])}
    assert to_sample({"messages": [USER, as_text]}, "messages").messages[1]["tool_calls"] == calls


@pytest.mark.parametrize("name", ["label", "kto_tag"])
@pytest.mark.parametrize("label", [0, 1.0, -1, "false", "True", "bad", "rejected", "undesirable"])
@pytest.mark.parametrize("format", ["messages", "conversations", "prompt_completion", "instruction"])
def test_a_label_that_may_be_a_verdict_asks_for_the_format(tmp_path, label, name, format):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(FULL[format] | {name: label}))
    with pytest.raises(DataError, match=f"set `format: {format}`"):
        read_records(file)
    assert len(read_records(file, format=format)) == 1


@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_answers_labelled_false_are_counted_and_not_trained(tmp_path, tokenizer, name):
    file = tmp_path / "kto.jsonl"
    rows = [{"prompt": "q", "completion": f"a{i}", name: i != 1} for i in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)))
    source = dataset_source({"path": str(file)}, tokenizer, TextRules(64))
    assert len(source) == 2 and source.counts["labelled false"] == 1 and "1 labelled false" in source.summary


def write(folder, *names):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": name}))


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        (["train.jsonl", "test.jsonl"], None, ["train.jsonl"]),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], None, 2),
        (["train_sft-0.jsonl", "train_gen-0.jsonl"], "train_sft", ["train_sft-0.jsonl"]),
        (["gsm8k_train.jsonl", "gsm8k_test.jsonl"], None, ["gsm8k_train.jsonl"]),
        (["alpaca.jsonl", "dolly.jsonl"], None, 2),
        (["only/train_sft.jsonl"], None, 1),
        (["main/train.jsonl", "main/test.jsonl"], None, ["main/train.jsonl"]),
        (["data-1.jsonl", "data-2.jsonl", "eval.jsonl"], None, ["data-1.jsonl", "data-2.jsonl"]),
        (["data.jsonl", "test.jsonl"], "train", ["data.jsonl"]),
        (["train1.jsonl", "train2.jsonl", "test1.jsonl"], None, ["train1.jsonl", "train2.jsonl"]),
        (["b.jsonl", "evals/a.jsonl"], None, ["b.jsonl"]),
        (["train.jsonl", "dataset_infos.json"], None, ["train.jsonl"]),
        (["a.jsonl", "test.jsonl", "dataset_infos.json"], None, ["a.jsonl"]),
        (["data.jsonl", "validation.jsonl", "test.jsonl"], None, ["data.jsonl"]),
        (["data.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
    ],
)
def test_a_folder_gives_the_files_of_one_split(tmp_path, names, split, read):
    write(tmp_path, *names)
    found = read_records(tmp_path, split=split)
    assert len(found) == read if isinstance(read, int) else [row["text"] for row in found.rows] == read
    assert "from" in found.summary and found.rows[0]["text"] in found.summary


@pytest.mark.parametrize(
    ("names", "split", "said"),
    [
        (
            ["train_sft-0.jsonl", "train_gen-0.jsonl", "test_sft-0.jsonl"],
            None,
            "test_sft, train_gen, train_sft",
        ),
        (
            ["validation.jsonl", "test.jsonl"],
            None,
            "test, validation. None is for training by its name: call that",
        ),
        (["data.jsonl", "train_a.jsonl"], None, "train_a and files of none"),
        (["main/train.jsonl", "socratic/train.jsonl"], None, "configurations main, socratic"),
    ],
)
def test_a_folder_that_could_mean_several_things_asks_which(tmp_path, names, split, said):
    write(tmp_path, *names)
    with pytest.raises(ConfigError, match=said):
        read_records(tmp_path, split=split)


def test_a_pattern_of_paths_gives_the_files_that_match(tmp_path):
    write(tmp_path, "data/a-1.jsonl", "data/a-2.jsonl", "data/b.jsonl", "data/deep/c.jsonl")
    (tmp_path / "data" / "a-3.md").write_text("no data")
    for pattern, names in (
        ("data/a-*.jsonl", ["data/a-1.jsonl", "data/a-2.jsonl"]),
        ("data/a-*", ["data/a-1.jsonl", "data/a-2.jsonl"]),
        ("data/**/*.jsonl", ["data/a-1.jsonl", "data/a-2.jsonl", "data/b.jsonl", "data/deep/c.jsonl"]),
    ):
        found = read_records(tmp_path / pattern)
        assert [row["text"] for row in found.rows] == names and "data" in found.summary
    with pytest.raises(DataError, match=r"c-\*\.jsonl: no data file matches"):
        read_records(tmp_path / "data" / "c-*.jsonl")


def test_a_source_of_a_pattern_has_a_name_and_trains(tmp_path, tokenizer):
    write(tmp_path, "rows/a-1.jsonl", "rows/a-2.jsonl")
    for pattern, name in (("rows/*.jsonl", "rows"), ("rows/a-*.jsonl", "a")):
        source = dataset_source({"path": str(tmp_path / pattern)}, tokenizer, TextRules(64))
        assert len(source) == 2 and source.name == name


def test_a_split_is_never_a_part_of_another_ones_name(tmp_path):
    write(tmp_path, "train_sft-0.jsonl", "train_gen-0.jsonl")
    with pytest.raises(DataError, match=r"no file of split 'train'.*train_gen, train_sft"):
        read_records(tmp_path, split="train")


def test_a_configuration_of_a_folder_is_named_by_config(tmp_path):
    write(tmp_path, "main/train.jsonl", "socratic/train.jsonl")
    assert [row["text"] for row in read_records(tmp_path, config="main").rows] == ["main/train.jsonl"]


def test_every_error_of_a_record_is_ours():
    assert set(FULL) == set(FORMATS) and issubclass(DataError, SelectKDError)


def test_fields_of_text_that_a_format_does_not_read_are_named(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"question": "q", "answer": "a", "id": 1}, {"question": "q", "answer": "a", "context": "c"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read_records(file).summary.endswith("; not part of the text: context")
    file.write_text(json.dumps({"instruction": "q", "output": "a", "context": "c", "system": "s"}))
    assert "not part" not in read_records(file).summary


@pytest.mark.parametrize("name", ["label", "kto_tag", "desirable"])
@pytest.mark.parametrize("format", ["messages", "conversations", "prompt_completion", "instruction"])
def test_a_row_labelled_false_is_not_trained_whoever_names_its_format(tmp_path, tokenizer, name, format):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(FULL[format] | {name: label}) for label in (True, False, None)))
    if format != "messages":
        source = dataset_source({"path": str(file), "format": format}, tokenizer, TextRules(64))
        assert len(source) == 2 and "1 labelled false" in source.summary
        assert f"not part of the text: {name}" in source.summary
    assert to_sample(FULL[format] | {name: False}, format).rejected


def test_rows_with_and_without_a_label_say_what_to_do(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [FULL["prompt_completion"] | {"label": label} for label in (True, None, False)]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"data\.jsonl:2: the row has no label, and rows before it have one"):
        read_records(file)
    assert len(read_records(file, on_bad_record="skip")) == 2
    file.write_text("\n".join(map(json.dumps, rows[1:])))
    with pytest.raises(DataError, match="Give every row a label, true or false") as told:
        read_records(file)
    assert "or name one" not in str(told.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "q", "role": "prompter", "parent_id": None}, "one turn of a conversation, with the role 'prompter'"),
        ({"text": "q", "role": "assistant", "id": "1"}, "one turn of a conversation, with the role 'assistant'"),
        ({"content": "q", "role": "user"}, "one turn of a conversation, with the role 'user'"),
        ({"question": "q", "answer": None}, "has 'question', and beside it answer is missing or null"),
        ({"instruction": "q", "response": None}, "has 'instruction', and beside it response is missing or null"),
        ({"prompt": None, "completion": "a"}, "has 'completion', and beside it prompt is missing or null"),
        ({"messages": None, "text": None, "id": 3}, "Of these messages, text are null"),
        ({"text": None}, "Of these text is null"),
        ({"question": "q"}, "beside it completion or response or solution is missing"),
        ({"prompt": "q", "chosen": "a"}, "has 'chosen', and beside it rejected is missing or null"),
    ],
)  # fmt: skip
def test_a_row_of_no_format_says_what_it_lacks(tmp_path, row, said):
    with pytest.raises(DataError, match=said):
        detect_format(row)
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(DataError, match=said):
        read_records(file)


@pytest.mark.parametrize("first", ["unpaired_preference", "prompt_completion"])
def test_chunks_with_and_without_labels_say_what_to_do(first):
    formats = ["unpaired_preference", "prompt_completion"]
    one, other = (Found(1, formats=(name,)) for name in sorted(formats, key=lambda name: name != first))
    with pytest.raises(DataError, match="Give every row a label, true or false"):
        one.add(other)


def test_text_about_people_of_some_role_is_text():
    assert detect_format({"text": "t", "role": "engineer"}) == "text"
