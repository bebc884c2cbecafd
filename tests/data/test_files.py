from __future__ import annotations

import gzip
import json

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


def test_a_missing_file_suggests_a_near_one(tmp_path):
    write(tmp_path, lines(ROWS), "trains.jsonl")
    with pytest.raises(DataError, match=r"Did you mean .*trains\.jsonl"):
        read_records(tmp_path / "train.jsonl")


def test_settings_that_cannot_be_are_config_errors(tmp_path):
    file = write(tmp_path, lines(ROWS))
    for setting in ({"limit": 0}, {"format": "message"}, {"on_bad_record": "ignore"}):
        with pytest.raises(ConfigError):
            read_records(file, **setting)
