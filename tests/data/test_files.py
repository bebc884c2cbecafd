from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from selectkd.data.files import read_records
from selectkd.errors import ConfigError, DataError

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(folder, content: bytes, name="data.jsonl"):
    file = folder / name
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return file


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.json"])
@pytest.mark.parametrize(
    "content",
    [
        lines(ROWS),
        lines(ROWS)[:-1],
        b"\xef\xbb\xbf" + lines(ROWS),
        lines(ROWS).replace(b"\n", b"\r\n"),
        b"\n\n" + lines(ROWS).replace(b"\n", b"\n\n  \n"),
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=2).encode(),
        b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=2).encode().replace(b"\n", b"\r\n"),
    ],
    ids=["plain", "no last newline", "bom", "crlf", "blank lines", "array", "pretty array", "bom array crlf"],
)
def test_the_same_rows_are_read_however_json_is_written(tmp_path, name, content):
    records = read_records(write(tmp_path, content, name))
    assert records.rows == ROWS
    assert records.format == "prompt_completion"
    assert "5 records" in records.summary and "prompt_completion" in records.summary


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
@pytest.mark.parametrize("position", [0, 2, 5])
@pytest.mark.parametrize(
    "bad",
    [b'{"prompt": "x', b"[1]", b'"text"', b"nope", b'{"prompt": "\xff"}', b'{"a":' * 10**5],
    ids=range(6),
)
def test_a_bad_line_is_named_by_file_and_line_or_counted(tmp_path, name, position, bad):
    raw = lines(ROWS).splitlines()
    raw.insert(position, bad)
    content = b"\n".join(raw) + (b"" if position == 5 else b"\n")
    file = write(tmp_path, content, name)
    with pytest.raises(DataError, match=rf"{name}:{position + 1}:"):
        read_records(file)
    records = read_records(file, on_bad_record="skip")
    assert records.rows == ROWS and len(records.skipped) == 1 and "1 bad" in records.summary


def test_an_array_that_breaks_off_names_the_line_and_keeps_what_came_before(tmp_path):
    file = write(tmp_path, json.dumps(ROWS, indent=1).encode()[:-12], "data.json")
    with pytest.raises(DataError, match=r"data\.json:20"):
        read_records(file)
    assert read_records(file, on_bad_record="skip").rows == ROWS[:4]


def test_items_of_a_pretty_array_carry_their_own_line(tmp_path):
    records = read_records(write(tmp_path, json.dumps(ROWS, indent=1).encode(), "data.json"))
    assert [origin.rsplit(":", 1)[1] for origin in records.origins] == ["2", "6", "10", "14", "18"]


def test_invalid_utf8_is_named_with_its_byte_offset(tmp_path):
    content = lines(ROWS) + b'{"text": "\xc3\x28"}\n'
    with pytest.raises(DataError, match=f"byte {content.index(0xC3)} "):
        read_records(write(tmp_path, content))


def test_unusual_but_valid_unicode_survives_reading(tmp_path):
    text = "a\u2028b\u2029c\u0085d\u0000e\u202ef\U0001f469\u200d\U0001f4bbg e\u0301 \u00e9"
    rows = [{"text": text}, {"text": "second"}]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    assert read_records(write(tmp_path, content)).rows == rows


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[]", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, content):
    with pytest.raises(DataError, match="no records"):
        read_records(write(tmp_path, content))


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_two_formats_in_one_file_are_refused_with_two_rows(tmp_path, policy):
    file = write(tmp_path, lines([*ROWS, {"text": "t"}]))
    with pytest.raises(DataError) as caught:
        read_records(file, on_bad_record=policy)
    assert "data.jsonl:1" in str(caught.value) and "data.jsonl:6" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 6


def test_of_the_columns_of_two_formats_one_is_read_and_the_others_are_named(tmp_path):
    rows = [{"text": "t", "instruction": "i", "output": "o"}]
    file = write(tmp_path, lines(rows))
    records = read_records(file)
    assert records.format == "instruction" and records.summary.endswith("; not part of the text: text")
    assert read_records(file, format="text").format == "text"


def test_limit_stops_before_a_later_bad_row(tmp_path):
    assert len(read_records(write(tmp_path, lines(ROWS) + b"{"), limit=5)) == 5


def test_damaged_gzip_and_parquet_are_data_errors(tmp_path):
    cut = gzip.compress(lines(ROWS * 50))[:-20]
    (tmp_path / "cut.jsonl.gz").write_bytes(cut)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    for name in ("cut.jsonl.gz", "bad.parquet"):
        with pytest.raises(DataError, match=name):
            read_records(tmp_path / name)


def test_parquet_and_saved_data_sets_are_read(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "data.parquet")
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select(range(2))}).save_to_disk(tmp_path / "two")
    assert read_records(tmp_path / "data.parquet").rows == ROWS
    assert read_records(tmp_path / "one").rows == ROWS
    assert read_records(tmp_path / "two").rows == ROWS
    assert read_records(tmp_path / "two", split="test").rows == ROWS[:2]
    with pytest.raises(DataError, match="train, test"):
        read_records(tmp_path / "two", split="dev")


def test_a_folder_of_files_gives_its_split(tmp_path):
    write(tmp_path, lines(ROWS[:3]), "train-00000.jsonl")
    write(tmp_path, lines(ROWS[3:]), "train-00001.jsonl.gz")
    write(tmp_path, lines(ROWS[:1]), "test.jsonl")
    assert read_records(tmp_path).rows == ROWS
    assert read_records(tmp_path, split="test").rows == ROWS[:1]
    with pytest.raises(DataError, match="no file of split"):
        read_records(tmp_path, split="dev")
    assert read_records(tmp_path / "test.jsonl", split="test").rows == ROWS[:1]
    with pytest.raises(ConfigError, match="has no split 'test'"):
        read_records(tmp_path / "train-00000.jsonl", split="test")


def test_a_missing_file_suggests_a_near_one(tmp_path):
    write(tmp_path, lines(ROWS), "trains.jsonl")
    with pytest.raises(DataError, match=r"Did you mean .*trains\.jsonl"):
        read_records(tmp_path / "train.jsonl")


def test_settings_that_cannot_be_are_config_errors(tmp_path):
    file = write(tmp_path, lines(ROWS))
    for setting in ({"limit": 0}, {"format": "message"}, {"on_bad_record": "ignore"}):
        with pytest.raises(ConfigError):
            read_records(file, **setting)


def test_a_json_array_is_read_in_parts_whatever_is_cut(tmp_path, monkeypatch):
    rows = [
        {"text": "é\n" * (i % 5) + "\\u12ab", "n": -i / 7, "v": [None, True, {"a": i}]} for i in range(40)
    ]
    for indent in (None, 1):
        file = tmp_path / f"array{indent}.json"
        file.write_text(json.dumps(rows, indent=indent, ensure_ascii=indent is None))
        whole = read_records(file)
        for size in (1, 7, 64):
            monkeypatch.setattr("selectkd.data.json_array.BLOCK", size)
            monkeypatch.setattr("selectkd.data.chunks.FIRST", size)
            found = read_records(file)
            assert found.rows == rows and found.origins == whole.origins
    lines = json.dumps(rows, indent=1).replace('"n": -1.0', '"n": oops').encode()
    number = lines[: lines.index(b"oops")].count(b"\n") + 1
    for content, message in (
        (lines, rf"bad\.json:{number}: the JSON array breaks off here: Expecting value"),
        (lines[:-400].replace(b"oops", b"0"), "breaks off here"),
        (lines.replace(b"oops", b"\xff"), rf"bad\.json:{number}: not UTF-8"),
    ):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_records(tmp_path / "bad.json")


def test_a_key_that_stands_twice_in_an_object_is_refused(tmp_path):
    row = '{"prompt": "q", "completion": "a", "meta": {"x": 1, "x": 2}}'
    for name, content in (("a.jsonl", row), ("a.json", f"[{row}]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name}:1: .*the key 'x' stands twice"):
            read_records(tmp_path / name)


def test_parquet_with_bytes_that_are_not_utf8_names_its_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    offsets = pa.array([0, 2, 4, 6], pa.int32()).buffers()[1]
    prompts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"w1\xff\xfew3")])
    pq.write_table(pa.table({"prompt": prompts, "completion": ["a"] * 3}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet:row 1: not UTF-8"):
        read_records(tmp_path / "a.parquet")
    found = read_records(tmp_path / "a.parquet", on_bad_record="skip")
    assert [row["prompt"] for row in found.rows] == ["w1", "w3"] and len(found.skipped) == 1


def test_a_file_whose_name_is_no_text_is_read_under_a_name_that_is(tmp_path):
    for name in ("a\udcff.jsonl", "b\n.jsonl"):
        (tmp_path / name).write_text('{"prompt": "q", "completion": "a"}\n')
    found = read_records(tmp_path)
    assert [Path(origin).name for origin in found.origins] == ["a\\udcff.jsonl:1", "b\\x0a.jsonl:1"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet", "arrow"])
def test_a_file_is_never_all_in_memory(tmp_path, kind):
    """A hundredth of what `benchmarks/large_text.py` reads. A reader that holds the file needs 20 MB and more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from selectkd.data.chunks import of_file
    from selectkd.data.places import DataFile

    file, rows = tmp_path / f"a.{kind}", [{"prompt": f"{n}", "completion": "x" * 2000} for n in range(10_000)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=5000, use_dictionary=False)
    elif kind == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
    elif kind == "json":
        file.write_text(json.dumps(rows))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file.write_bytes(gzip.compress(text, 1) if kind.endswith("gz") else text)
    del rows
    text = None
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    held, good = 0, 0
    for chunk in of_file(DataFile(str(file), str(file)), 1 << 20):
        held = max(held, pa.total_allocated_bytes() - before)
        good += sum(isinstance(row, dict) for _, row in chunk.items())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert good == 10_000 and peak + held < 10_000_000, (peak, held)


TABLE = "prompt,completion\np0,c0\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt,completion,prompt\np0,c0,q0\n", r"has 2 columns with the name 'prompt'"),
        (TABLE + "p1\n", r":3: has 1 fields, and the header has 2"),
        (TABLE + "p1,c1,d1\n", r":3: has 3 fields, and the header has 2"),
        (TABLE + 'p1,"c1\n', r":3: not a table: unexpected end of data"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_table_that_would_lose_a_field_is_refused(tmp_path, content, said, kind):
    file = tmp_path / f"data.{kind}"
    good = '\ufeffprompt,completion\np0,c0\np1,"c,\n1"\n'
    file.write_text(good.replace(",", "\t" if kind == "tsv" else ","), "utf-8")
    assert [row["completion"] for row in read_records(file).rows] == [
        "c0",
        "c\t\n1" if kind == "tsv" else "c,\n1",
    ]
    file.write_text(content.replace(",", "\t" if kind == "tsv" else ","))
    with pytest.raises(DataError, match=said):
        read_records(file)


def test_a_table_of_arrow_with_a_column_twice_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.ipc

    table = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="2 columns with the name 'text'"):
        read_records(tmp_path / "a.arrow")


def test_a_record_of_several_lines_is_told_to_be_one_of_an_array(tmp_path):
    file = write(tmp_path, json.dumps(ROWS[0], indent=1).encode(), "data.json")
    with pytest.raises(DataError, match=r"data\.json:1: not valid JSON.* belongs into a JSON array"):
        read_records(file)


def test_a_file_named_as_one_of_a_saved_data_set_makes_no_data_set(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    write(tmp_path, lines(ROWS))
    assert len(read_records(tmp_path)) == 5
