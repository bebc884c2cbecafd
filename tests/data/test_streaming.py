"""Streamed text: every record once an epoch, in one order for any number of ranks, of any kind of file."""

from __future__ import annotations

import gzip
import json
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import pytest

from data.conftest import CHATML
from data.template_zoo import turns
from selectkd.data.chunk_index import Chunks
from selectkd.data.collate import collate
from selectkd.data.order import BatchOptions
from selectkd.data.render import TextRules
from selectkd.data.sources import Source, batches, streamed_source, without_share
from selectkd.data.text_cache import TextCache
from selectkd.errors import ConfigError, DataError, ResourceError
from selectkd.training.feed import BatchFeed

OPTIONS = BatchOptions(4, 3)


def rows(first: int, last: int) -> list[dict[str, str]]:
    return [{"prompt": f"number {i}", "completion": f"yes {i}"} for i in range(first, last)]


def lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in records).encode()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks of some 5 records, windows of 12 chunks in all."""
    monkeypatch.setattr("selectkd.data.chunk_index.SIZE", 200)
    monkeypatch.setattr("selectkd.data.lanes.WINDOW", 12)


def write(folder, kind: str):
    """70 records in three files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(exist_ok=True)
    for number, (first, last) in enumerate(((0, 33), (33, 34), (34, 70))):
        file, part = folder / f"train-{number}.{kind}", rows(first, last)
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(part), file, row_group_size=12)
        elif kind == "csv":
            body = "".join(f'{row["prompt"]},"{row["completion"]}"\n' for row in part)
            file.write_text("prompt,completion\n" + body)
        elif kind == "jsonl.gz":
            file.write_bytes(gzip.compress(lines(part)))
        else:
            file.write_bytes(lines(part))
    return str(folder)


def source(
    path: str,
    tokenizer: Any,
    tmp_path: Any,
    spec: dict[str, Any] | None = None,
    rules: TextRules | None = None,
) -> Source:
    cache = TextCache.at(tmp_path / "cache")
    return streamed_source({"path": path, **(spec or {})}, tokenizer, rules or TextRules(64), cache=cache)


def numbers(epoch: Any, tokenizer: Any) -> list[list[int]]:
    """The records of each batch of an epoch, by the number in their text."""
    found = []
    for batch in epoch:
        texts = [tokenizer.decode(ids.tolist()) for ids in batch.samples()]
        found.append([int(text.split("number ")[1].split("<")[0]) for text in texts])
    return found


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "csv"])
def test_an_epoch_has_every_record_once_shuffled_and_epochs_differ(tmp_path, tokenizer, kind):
    text = source(write(tmp_path / "data", kind), tokenizer, tmp_path)
    first, again, later = (numbers(batches([text], OPTIONS, epoch), tokenizer) for epoch in (0, 0, 1))
    assert first == again != later and sorted(map(len, first)) == [2] + [4] * 17
    for order in (first, later):
        assert sorted(n for batch in order for n in batch) == list(range(70))
    flat = [n for batch in first for n in batch]
    assert sum(abs(a - b) > 1 for a, b in pairwise(flat)) > 50
    assert len(text) == 70 and "70 records streamed" in text.summary and text.format == "prompt_completion"


def test_any_batch_is_had_alone_by_a_process_that_has_read_nothing(tmp_path, tokenizer):
    path = write(tmp_path / "data", "jsonl.gz")
    whole = numbers(batches([source(path, tokenizer, tmp_path)], OPTIONS, 0), tokenizer)
    epoch = pickle.loads(pickle.dumps(batches([source(path, tokenizer, tmp_path)], OPTIONS, 0)))
    for index in (16, 2, 9):
        assert numbers([epoch[index]], tokenizer) == [whole[index]]


def test_going_on_reads_a_window_and_not_what_stands_before_it(tmp_path, tokenizer, monkeypatch):
    epoch = batches([source(write(tmp_path / "data", "jsonl"), tokenizer, tmp_path)], OPTIONS, 0)
    read: list[int] = []
    chunks = epoch.sources[0].chunks
    plain = type(chunks).read
    monkeypatch.setattr(type(chunks), "read", lambda self, chunk: (read.append(chunk), plain(self, chunk))[1])
    epoch[12]
    assert 0 < len(read) <= 6 and len(chunks.index.rows) > 12


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_an_epoch_reads_each_chunk_once_and_goes_on_in_a_file_where_it_was(
    tmp_path, tokenizer, monkeypatch, kind
):
    path = write(tmp_path / "data", kind)
    text = source(path, tokenizer, tmp_path)
    read: Counter[int] = Counter()
    began: list[int] = []
    plain, unit = Chunks.read, Chunks._unit
    monkeypatch.setattr(Chunks, "read", lambda self, chunk: (read.update([chunk]), plain(self, chunk))[1])
    monkeypatch.setattr(Chunks, "_unit", lambda self, first: (began.append(first), unit(self, first))[1])
    epoch = batches([text], OPTIONS, 0)
    list(epoch)
    units = len(text.streamed.chunks.index.units)
    assert read == Counter(range(len(text.streamed.chunks.index.rows)))
    assert len(began) <= (units + epoch.lanes.lanes if kind != "jsonl" else 0)


def test_each_rank_reads_its_own_chunks_where_the_ranks_divide_the_lanes(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(rows(0, 2000)))
    made = batches([source(str(path), tokenizer, tmp_path)], OPTIONS, 0)
    whole = len(made.sources[0].chunks.index.rows)
    assert made.lanes.lanes == 64 and whole > 256

    def read_by(rank: int, ranks: int) -> set[int]:
        return {chunk for index in range(rank, len(made), ranks) for _, chunk, _ in made.records(index)}

    for ranks in (1, 2, 4, 64):
        counts = [len(read_by(rank, ranks)) for rank in range(ranks)]
        # a chunk that two lanes share is read by both
        assert whole <= sum(counts) <= whole + ranks and max(counts) <= whole / ranks + 2
    assert len(read_by(0, 3)) > whole / 2  # of 3 ranks each reads from all lanes
    every = [place for index in range(len(made)) for place in made.records(index)]
    assert len(set(every)) == len(every) == 2000


def test_a_batch_is_packed_into_as_few_rows_as_hold_its_records(tmp_path, tokenizer):
    path = write(tmp_path / "data", "jsonl")
    text = source(path, tokenizer, tmp_path)
    plain = batches([text], OPTIONS, 0)
    made = batches([text], BatchOptions(4, 3, packing=True, max_length=64), 0)
    assert len(made) == len(plain)
    for one, other in zip(made, plain, strict=True):
        assert one.packed and one.input_ids.shape[0] < max(2, other.input_ids.shape[0])
        assert one.input_ids.shape[1] <= 64
        assert sorted(ids.tolist() for ids in one.samples()) == sorted(
            ids.tolist() for ids in other.samples()
        )


@pytest.mark.parametrize("packing", [False, True])
def test_a_conversation_that_becomes_several_samples_gives_one_an_epoch_and_all_in_turn(
    tmp_path, make_tokenizer, packing
):
    earlier = CHATML.replace("message['content']", "('' if loop.last else 'old ') + message['content']")
    talks = [
        [
            *chain(
                *(
                    turns(("user", f"ask {n}"), ("assistant", f"number {n} {part}"))
                    for part in range(1 + n % 3)
                )
            )
        ]
        for n in range(30)
    ]
    file = tmp_path / "data.jsonl"
    file.write_bytes(lines([{"messages": talk} for talk in talks]))
    text = source(str(file), tokenizer := make_tokenizer(earlier), tmp_path, rules=TextRules(96))
    assert "one of its samples an epoch" in text.summary
    options, seen = BatchOptions(4, 3, packing=packing, max_length=96), Counter()
    twice = source(str(file), tokenizer, tmp_path, {"weight": 2}, rules=TextRules(96))
    pairs = [
        tokenizer.decode(ids.tolist()).rpartition("number ")[2]
        for batch in batches([twice], options, 0)
        for ids in batch.samples()
    ]
    assert len(pairs) == 60 and len(set(pairs)) == 50  # two of those that have two or three
    for epoch in range(6):
        answers = []
        for batch in batches([text], options, epoch):
            assert len(batch.input_ids) <= 4
            texts = [tokenizer.decode(ids.tolist()) for ids in batch.samples()]
            answers += [one.rpartition("number ")[2].split("<")[0] for one in texts]
        assert sorted(int(one.split()[0]) for one in answers) == list(range(30))
        seen.update(answers)
    assert seen == {f"{n} {part}": 6 // (1 + n % 3) for n in range(30) for part in range(1 + n % 3)}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_share_of_the_prompts_is_held_out_of_a_stream(tmp_path, tokenizer, kind):
    text = source(write(tmp_path / "data", kind), tokenizer, tmp_path)
    cache = TextCache.at(tmp_path / "cache")
    kept, held = without_share(text, 0.2, 1000, cache)
    out = numbers([collate(held[:], pad_id=0)], tokenizer)[0]
    left = [
        n
        for batch in batches([kept], OPTIONS, 0)
        if batch.completion.any()
        for n in numbers([batch], tokenizer)[0]
    ]
    assert sorted(out + left) == list(range(70)) and 5 < len(out) < 25
    few = without_share(text, 0.2, 4, cache)[1]
    assert len(few) == 4 and set(numbers([collate(few[:], pad_id=0)], tokenizer)[0]) < set(out)
    again = source(write(tmp_path / "other", "jsonl"), tokenizer, tmp_path)
    same = without_share(again, 0.2, 1000, cache)[1]
    assert sorted(numbers([collate(same[:], pad_id=0)], tokenizer)[0]) == sorted(out)


def test_the_order_is_the_same_on_1_2_and_3_ranks_and_after_any_stop(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "data", "jsonl")

    def given(
        ranks: int, number: int, state: dict[str, int], steps: int
    ) -> tuple[list[list[int]], dict[str, int]]:
        monkeypatch.setattr("selectkd.training.feed.ranks", lambda: ranks)
        monkeypatch.setattr("selectkd.training.feed.rank", lambda: number)
        text = source(path, tokenizer, tmp_path)
        feed = BatchFeed(lambda epoch: batches([text], OPTIONS, epoch))
        feed.load_state_dict(state)
        stream = iter(feed)
        return numbers([next(stream) for _ in range(steps)], tokenizer), feed.state_dict()

    begin = {"epoch": 0, "taken": 0}
    whole = given(1, 0, begin, 36)[0]
    for ranks in (2, 3):
        each = [given(ranks, number, begin, 36 // ranks)[0] for number in range(ranks)]
        assert [batch for together in zip(*each, strict=True) for batch in together] == whole
    found: list[list[int]] = []
    state = begin
    for ranks, steps in ((1, 5), (3, 2), (2, 4), (1, 1), (2, 3), (1, 10)):
        each = [given(ranks, number, state, steps) for number in range(ranks)]
        state = each[0][1]
        found += [batch for together in zip(*(one for one, _ in each), strict=True) for batch in together]
    assert found == whole


def test_workers_stream_the_same_batches(tmp_path, tokenizer):
    text = source(write(tmp_path / "data", "jsonl"), tokenizer, tmp_path)
    plain, ahead = (iter(BatchFeed(lambda epoch: batches([text], OPTIONS, epoch), workers=n)) for n in (0, 2))
    for _ in range(20):
        assert next(plain).input_ids.equal(next(ahead).input_ids)


def test_sources_are_mixed_by_their_weights(tmp_path, tokenizer):
    one, two = (tmp_path / name for name in ("one.jsonl", "two.jsonl"))
    one.write_bytes(lines(rows(0, 60)))
    two.write_bytes(lines(rows(100, 160)))
    sources = [
        source(str(one), tokenizer, tmp_path, {"weight": 0.5}),
        source(str(two), tokenizer, tmp_path, {"stream": 1}),
    ]
    both: Counter[int] = Counter()
    for epoch in range(2):
        made = batches(sources, OPTIONS, epoch)
        found = numbers(made, tokenizer)
        assert any(len({n >= 100 for n in batch}) == 2 for batch in found)
        assert all(
            [n >= 100 for n in batch] == [s == 1 for s in made[i].stream.tolist()]
            for i, batch in enumerate(found)
        )
        both.update(n for batch in found for n in batch)
    assert both == Counter(dict.fromkeys(range(60), 1) | dict.fromkeys(range(100, 160), 2))


def test_a_weight_that_takes_nothing_of_a_file_read_from_its_beginning_is_refused(tmp_path, tokenizer):
    (tmp_path / "one.jsonl.gz").write_bytes(gzip.compress(lines(rows(0, 60))))
    assert source(str(tmp_path / "one.jsonl.gz"), tokenizer, tmp_path, {"weight": 1.5})
    with pytest.raises(ConfigError, match="in 1 parts, and weight"):
        source(str(tmp_path / "one.jsonl.gz"), tokenizer, tmp_path, {"weight": 0.5})


def test_records_that_are_dropped_or_skipped_make_a_batch_smaller_and_never_empty(
    tmp_path, tokenizer, caplog
):
    file = tmp_path / "data.jsonl"
    file.write_bytes(lines(rows(0, 1)) + b'{"prompt": "number 9", "completion": ""}\n' * 8 + b"nope\n")
    with pytest.raises(DataError, match=r"data\.jsonl:10: not valid JSON"):
        list(batches([source(str(file), tokenizer, tmp_path)], OPTIONS, 0))
    text = source(str(file), tokenizer, tmp_path, rules=TextRules(64, on_bad_record="skip"))
    made = list(batches([text], OPTIONS, 0))
    assert [int(batch.completion.any()) for batch in made].count(1) == 1 and len(made) == 3
    assert all(batch.input_ids.shape[0] == 1 for batch in made)
    assert any("data.jsonl:10" in record.message for record in caplog.records)


def test_a_second_format_is_refused_where_it_is_met(tmp_path, tokenizer):
    file = tmp_path / "data.jsonl"
    file.write_bytes(lines(rows(0, 20)) + b'{"text": "t"}\n')
    with pytest.raises(DataError, match="more than one format"):
        list(batches([source(str(file), tokenizer, tmp_path)], OPTIONS, 0))


def test_a_limit_counts_records(tmp_path, tokenizer):
    text = source(write(tmp_path / "data", "jsonl"), tokenizer, tmp_path, {"limit": 13})
    assert sorted(n for batch in numbers(batches([text], OPTIONS, 0), tokenizer) for n in batch) == list(
        range(13)
    )


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path, tokenizer):
    path = write(tmp_path / "data", "jsonl")
    epoch = batches([source(path, tokenizer, tmp_path)], OPTIONS, 0)
    (tmp_path / "data" / "train-2.jsonl").write_bytes(lines(rows(0, 3)))
    with pytest.raises(DataError, match="has changed since it was indexed"):
        list(epoch)


def test_files_at_a_url_are_streamed(tmp_path, tokenizer):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/streamed/train-0.jsonl", lines(rows(0, 40)))
    memory.pipe("/streamed/train-1.jsonl.gz", gzip.compress(lines(rows(40, 70))))
    text = source("memory://streamed", tokenizer, tmp_path)
    assert sorted(n for b in numbers(batches([text], OPTIONS, 0), tokenizer) for n in b) == list(range(70))


def test_an_index_that_cannot_be_written_is_refused_and_one_that_is_there_is_only_read(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(rows(0, 3)))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ResourceError, match="cannot write"):
        source(str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "file")
    source(str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "cache")
    (lock,) = (tmp_path / "cache").rglob("*.lock")
    lock.unlink()
    source(str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "cache")
    assert not lock.exists()


def test_what_cannot_be_streamed_is_refused(tmp_path, tokenizer):
    import datasets

    datasets.Dataset.from_list(rows(0, 3)).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match="saved data set"):
        source(str(tmp_path / "saved"), tokenizer, tmp_path)
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match="no records"):
        source(str(tmp_path / "empty.jsonl"), tokenizer, tmp_path)
