"""Tokenised text on disk: built once, mapped by all, taken up where a kill left it, refused where it is damaged."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import time

import numpy as np
import pytest

from faults.forked import run_forked
from selectkd.cli import main
from selectkd.data import text_cache
from selectkd.data.chunks import given
from selectkd.data.example import Example
from selectkd.data.examples import Examples, record_key
from selectkd.data.render import TextRules
from selectkd.data.rendering import Rendering
from selectkd.data.routes import Routes
from selectkd.data.sources import dataset_source
from selectkd.data.template import ChatTemplate
from selectkd.data.text_cache import DATA, MANIFEST, TextCache
from selectkd.errors import DataError, IntegrityError, ResourceError

EXAMPLES = [
    Example(
        list(range(3, 3 + size)),
        [i >= size // 2 for i in range(size)],
        size % 2,
        f"row {size}",
        route=size % 3,
    )
    for size in (3, 9, 17, 2, 7, 64)
]


def rows(count: int, size: int = 3) -> list[dict[str, str]]:
    return [{"prompt": f"number {i} of many", "completion": "yes " * size + str(i)} for i in range(count)]


def write(path, count: int, size: int = 3, name: str = "data.jsonl") -> str:
    file = path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(count, size)))
    return str(file)


@pytest.fixture
def small(monkeypatch):
    """Chunks of a few records, so that a small file has many; each but the first is rendered by a worker."""
    monkeypatch.setattr("selectkd.data.chunks.FIRST", 400)
    monkeypatch.setattr("selectkd.data.chunks.CHUNK", 400)


def test_examples_come_out_of_arrow_as_they_went_in_whole_sliced_joined_and_pickled():
    text = Examples.of(EXAMPLES)
    assert list(text) == EXAMPLES and text[-1] == EXAMPLES[-1] and list(text[1:5:2]) == EXAMPLES[1:5:2]
    assert list(Examples.joined([text[2:], text[:2]])) == [*EXAMPLES[2:], *EXAMPLES[:2]]
    assert list(pickle.loads(pickle.dumps(text[1:]))) == EXAMPLES[1:]
    assert text.lengths.tolist() == [len(example) for example in EXAMPLES]
    assert text.streams.tolist() == [example.stream for example in EXAMPLES]
    assert text.column("route").tolist() == [example.route for example in EXAMPLES]
    assert text.column("trained").tolist() == [sum(example.completion) for example in EXAMPLES]
    assert bytes(text.column("key")[2]) == record_key(EXAMPLES[2].input_ids)
    assert list(text.where(text.lengths > 5)) == [example for example in EXAMPLES if len(example) > 5]
    assert list(Examples.of([])) == [] and len(Examples.of([]).lengths) == 0
    with pytest.raises(IndexError):
        text[len(EXAMPLES)]


def test_a_fingerprint_is_of_ids_and_masks_in_order_however_they_are_held():
    text = Examples.of(EXAMPLES)
    assert Examples.joined([text[:3], Examples.of(EXAMPLES[3:])]).fingerprint == text.fingerprint
    masked = [*EXAMPLES[:-1], Example(EXAMPLES[-1].input_ids, [True] * 64)]
    others = [EXAMPLES[::-1], EXAMPLES[1:], masked]
    assert len({text.fingerprint, *(Examples.of(other).fingerprint for other in others)}) == 4


def test_a_second_reading_renders_nothing_and_gives_the_same(tmp_path, tokenizer, monkeypatch):
    path, cache = write(tmp_path, 30), TextCache.at(tmp_path / "cache")
    template = ChatTemplate.of(tokenizer)
    first = dataset_source({"path": path}, tokenizer, TextRules(64), cache=cache, template=template)
    monkeypatch.setattr(text_cache, "part_of", None)
    again = ChatTemplate.of(tokenizer)
    second = dataset_source({"path": path}, tokenizer, TextRules(64), cache=cache, template=again)
    assert list(second.examples) == list(first.examples) and second.counts == first.counts
    assert (second.summary, second.format) == (first.summary, first.format)
    ends = [set().union(*one.ends.values()) for one in (template, again)]
    assert ends[0] == ends[1] != set()
    assert second.examples.tables[0].path is not None


@pytest.mark.parametrize(
    "change",
    [
        "max_length",
        "train_on",
        "eos_ids",
        "template",
        "tokenizer",
        "limit",
        "file",
        "routes",
        "on_too_long",
        "apart",
    ],
)
def test_whatever_a_sample_rests_on_is_in_its_key(tmp_path, make_tokenizer, change):
    path, cache = write(tmp_path, 5), TextCache.at(tmp_path / "cache")
    settings = {"spec": {"path": path}, "tokenizer": make_tokenizer(), "rules": TextRules(64), "cache": cache}
    dataset_source(**settings)
    other = {
        "max_length": {"rules": TextRules(63)}, "eos_ids": {"eos_ids": [7]},
        "train_on": {"rules": TextRules(64, train_on="all")},
        "template": {"tokenizer": make_tokenizer("{% for m in messages %}{{ m.content }}!{% endfor %}")},
        "tokenizer": {"tokenizer": make_tokenizer(extra=("number",))}, "limit": {"spec": {"path": path, "limit": 4}},
        "file": {}, "routes": {"routes": Routes(({"prompt": [row["prompt"] for row in rows(5)]},))},
        "on_too_long": {"rules": TextRules(64, on_too_long="drop")},
        "apart": {"tokenizer": make_tokenizer(split_special_tokens=True)},
    }[change]  # fmt: skip
    if change == "file":
        write(tmp_path, 5, size=4)
    dataset_source(**{**settings, **other})
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_stated_date_is_in_the_key_of_templates_that_write_it_alone(tmp_path, make_tokenizer):
    dated = make_tokenizer("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}!{% endfor %}")
    path, cache = write(tmp_path, 2), TextCache.at(tmp_path / "cache")
    for tokenizer, texts in ((make_tokenizer(), 1), (dated, 3)):
        for date in ("2020-01-01", "2021-01-01"):
            template = ChatTemplate.of(tokenizer, moment=date)
            dataset_source({"path": path}, tokenizer, TextRules(64), cache=cache, template=template)
        assert len(list(cache.folder.iterdir())) == texts


@pytest.mark.parametrize("limit", [None, 3, 37])
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_several_processes_give_what_one_gives(tmp_path, tokenizer, small, limit, policy):
    path = write(tmp_path, 60)
    with open(path, "a") as file:
        file.write("nope\n" * (policy == "skip"))
    found = []
    for workers in (1, 2):
        cache = TextCache(tmp_path / str(workers), workers)
        spec = {"path": path, "limit": limit}
        found.append(dataset_source(spec, tokenizer, TextRules(64, on_bad_record=policy), cache=cache))
    one, two = found
    assert list(one.examples) == list(two.examples) and len(one) == (limit or 60)
    assert (one.counts, one.summary, one.problems) == (two.counts, two.summary, two.problems)


def test_a_bad_record_in_a_workers_chunk_is_named_and_leaves_no_tokens(tmp_path, tokenizer, small):
    path = write(tmp_path, 60)
    with open(path, "a") as file:
        file.write('{"prompt": "q", "completion": 5}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:61: completion"):
        dataset_source({"path": path}, tokenizer, TextRules(64), cache=TextCache(tmp_path / "cache", 2))
    assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] == ["lock"]


BUILD = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
import selectkd.data.chunks as chunks
from selectkd.data.render import TextRules
from selectkd.data.sources import dataset_source
from selectkd.data.text_cache import TextCache
chunks.FIRST = chunks.CHUNK = 400
cache = TextCache(Path(sys.argv[3]), 2, say=lambda message: print(message, flush=True))
source = dataset_source({"path": sys.argv[2]}, AutoTokenizer.from_pretrained(sys.argv[1]), TextRules(64), cache=cache)
print(len(source), source.fingerprint)
"""


def build(tmp_path, folder: str, *, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    paths = (str(tmp_path / name) for name in ("tokenizer", "data.jsonl", folder))
    return run_forked("-c", BUILD, *paths, **({"SELECTKD_FAULT": fault} if fault else {}))


def test_a_build_that_was_killed_goes_on_and_leaves_the_bytes_of_one_that_was_not(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write(tmp_path, 60)
    whole = build(tmp_path, "whole")
    for at in (1, 4):
        killed = build(tmp_path, "cut", fault=f"text chunk@{at}=kill")
        assert killed.returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "cut").iterdir()
    with (folder / DATA).open("ab") as file:
        file.write(b"half a chunk")
    lines = (folder / "journal.jsonl").read_bytes()
    assert lines.count(b"\n") == 5
    (folder / "journal.jsonl").write_bytes(lines + b'{"end": 1')
    done = build(tmp_path, "cut", fault="text chunk@100=kill")
    # a worker of the killed process may hold the text for a moment, which the next one says
    assert done.returncode == 0 and done.stdout.splitlines()[-1:] == whole.stdout.splitlines()
    (one,), (two,) = (list((tmp_path / name).glob(f"*/{DATA}")) for name in ("whole", "cut"))
    assert one.read_bytes() == two.read_bytes()


def test_no_worker_outlives_a_build(tmp_path, tokenizer, small):
    path = write(tmp_path, 60)
    dataset_source({"path": path}, tokenizer, TextRules(64), cache=TextCache(tmp_path / "cache", 2))
    assert multiprocessing.active_children() == []
    with open(path, "a") as file:
        file.write('{"prompt": "q", "completion": 5}\n')
    with pytest.raises(DataError):
        dataset_source({"path": path}, tokenizer, TextRules(64), cache=TextCache(tmp_path / "cache", 2))
    assert multiprocessing.active_children() == []


def test_a_full_disk_is_a_resource_error_and_the_next_start_goes_on(tmp_path, tokenizer, small, monkeypatch):
    path, cache = write(tmp_path, 60), TextCache(tmp_path / "cache", 1)
    monkeypatch.setenv("SELECTKD_FAULT", "text chunk@3=enospc")
    monkeypatch.setattr("selectkd.data.durable._passed", __import__("collections").Counter())
    with pytest.raises(ResourceError, match="bytes are free"):
        dataset_source({"path": path}, tokenizer, TextRules(64), cache=cache)
    monkeypatch.delenv("SELECTKD_FAULT")
    assert len(dataset_source({"path": path}, tokenizer, TextRules(64), cache=cache)) == 60


def test_one_changed_byte_of_a_token_or_mask_is_noticed_before_it_is_trained_on(tmp_path, tokenizer):
    path, cache = write(tmp_path, 20), TextCache.at(tmp_path / "cache")
    source = dataset_source({"path": path}, tokenizer, TextRules(64), cache=cache)
    file = source.examples.tables[0].path
    raw = file.read_bytes()
    ids = np.array(source[7].input_ids, "<i4").tobytes()
    assert raw.count(ids) == 1
    file.write_bytes(raw.replace(ids, ids[:4] + bytes([ids[4] ^ 1]) + ids[5:]))
    damaged = dataset_source({"path": path}, tokenizer, TextRules(64), cache=cache)
    assert len(list(damaged.examples[:7])) == 7
    with pytest.raises(IntegrityError, match="Delete the folder"):
        damaged[7]


def test_a_text_that_was_cut_short_is_built_again(tmp_path, tokenizer):
    path, cache = write(tmp_path, 20), TextCache.at(tmp_path / "cache")
    source = dataset_source({"path": path}, tokenizer, TextRules(64), cache=cache)
    before, file = list(source.examples), source.examples.tables[0].path
    for damage in (
        lambda: file.write_bytes(file.read_bytes()[:-40]),
        lambda: (file.parent / MANIFEST).write_text("{}"),
    ):
        damage()
        assert list(dataset_source({"path": path}, tokenizer, TextRules(64), cache=cache).examples) == before


def test_two_processes_build_a_text_once_and_the_other_waits_with_a_line(tmp_path, tokenizer):
    began, go, told = multiprocessing.Event(), multiprocessing.Event(), []

    def parts(rendered):
        for number, chunk in enumerate(given((f"x[{i}]", row) for i, row in enumerate(rows(6)))):
            rendered.append(number)
            began.set()
            go.wait(20)
            yield chunk

    rules = Rendering(tokenizer, ChatTemplate.of(tokenizer), TextRules(64))
    cache = TextCache(tmp_path / "cache", 1)
    child = multiprocessing.get_context("fork").Process(
        target=text_cache.text_of, args=("x", [], lambda: parts([]), rules, cache)
    )
    child.start()
    assert began.wait(20)
    own: list[int] = []

    def say(message: str) -> None:
        told.append(message)
        go.set()

    found = text_cache.text_of("x", [], lambda: parts(own), rules, TextCache(tmp_path / "cache", 1, say))
    child.join(20)
    assert child.exitcode == 0 and own == [] and len(found.table) == 6
    assert told and "another process tokenises this text; 0 records read" in told[0]


def test_a_worker_ends_when_its_parent_is_killed(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write(tmp_path, 60)
    assert build(tmp_path, "cut", fault="text chunk@4=kill").returncode == -signal.SIGKILL
    end = time.monotonic() + 10
    while alive := [line for line in processes() if str(tmp_path / "cut") in line]:
        assert time.monotonic() < end, alive
        time.sleep(0.1)


def processes() -> list[str]:
    found = []
    for folder in os.scandir("/proc"):
        if folder.name.isdecimal():
            try:
                with open(f"/proc/{folder.name}/cmdline", encoding="utf-8", errors="replace") as file:
                    found.append(file.read())
            except OSError:
                continue
    return found


def test_a_data_set_at_hand_is_kept_by_its_content(tmp_path, tokenizer):
    import datasets

    cache, spec = TextCache.at(tmp_path / "cache"), {"path": "train_dataset"}
    data = datasets.Dataset.from_list(rows(5))
    sources = [
        dataset_source(spec, tokenizer, TextRules(64), cache=cache, data=one)
        for one in (rows(5), rows(5), data, datasets.Dataset.from_list(rows(5)), data.select(range(4)))
    ]
    assert len(list(cache.folder.iterdir())) == 3
    assert [len(source) for source in sources] == [5, 5, 5, 5, 4]
    assert sources[0].examples[3].origin == "train_dataset[3]"
    assert list(sources[0].examples) == list(sources[2].examples)


def test_rules_can_be_sent_to_a_process_that_is_not_a_fork(tokenizer):
    rules = Rendering(tokenizer, ChatTemplate.of(tokenizer), TextRules(64), routes=Routes(({"a": 1},)))
    assert pickle.loads(pickle.dumps(rules)).identity() == rules.identity()


def test_texts_are_listed_and_the_least_used_are_deleted(tmp_path, tokenizer, capsys):
    place, paths = tmp_path / "cache", [write(tmp_path, 5, size, f"d{size}.jsonl") for size in (3, 4, 5)]
    cache = TextCache.at(place)

    def read(number):
        return dataset_source({"path": paths[number]}, tokenizer, TextRules(64), cache=cache).examples

    folders = [read(number).tables[0].path.parent for number in range(3)]
    for days, folder in zip((3, 2, 1), folders, strict=True):
        os.utime(folder / DATA, (0, 0))
        os.utime(folder / MANIFEST, (time.time() - days * 86400,) * 2)
    mapped, answer = read(0), tmp_path / "answer.json"  # reading notes the use
    with (folders[2] / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a process builds it
        assert main(["cache", "texts", str(place), "--keep-gb", "0.000001", "--json", str(answer)]) == 0
    assert capsys.readouterr().out.count("deleted") == 2
    found = {row["folder"]: row for row in json.loads(answer.read_text())["texts"]}
    assert [found[str(folder)]["deleted"] for folder in folders] == [True, True, False]
    assert [found[str(folder)]["samples"] for folder in folders] == [5, 5, 5]
    assert [(folder / DATA).is_file() for folder in folders] == [False, False, True]
    assert len(list(mapped)) == 5  # what is mapped stays
    assert main(["cache", "texts", str(place), "--keep-days", "2"]) == 0
    assert "1 texts" in capsys.readouterr().out and list(read(0)) == list(mapped)
    assert main(["cache", "texts", str(place), "--keep-days", "0"]) == 0
    assert "0 texts, 0.0 MB" in capsys.readouterr().out
    assert main(["cache", "texts", str(tmp_path / "none")]) == 0
