"""The records of a teacher's cache: each different sample once, and never all of them in memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest
import xxhash

from selectkd.data.example import Example
from selectkd.data.examples import Examples
from selectkd.teachers.cache.index import TEXT, Record, cut_into_shards, records_of, text_bytes, text_of


def simple(examples):
    found = {}
    for one in examples:
        places = {i - 1 for i, trained in enumerate(one.completion) if trained and i}
        if places:
            found.setdefault(tuple(one.input_ids), set()).update(places)
    return [Record(list(ids), sorted(places)) for ids, places in found.items()]


def some(count, seed=0, size=6, kinds=4):
    draw = random.Random(seed)
    lengths = [draw.randint(1, size) for _ in range(count)]
    return [
        Example(draw.choices(range(kinds), k=n), [draw.random() < 0.4 for _ in range(n)], draw.randint(0, 1))
        for n in lengths
    ]


@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_equal_samples_share_a_record_with_the_places_of_all(count, tmp_path):
    examples = some(count)
    records, expected = records_of(examples), simple(examples)
    assert list(records) == expected and list(records[1:]) == expected[1:]
    assert records.lengths.tolist() == [len(one.ids) for one in expected]
    assert records.counts.tolist() == [len(one.places) for one in expected]
    shards = cut_into_shards(records, 5)
    assert [one for shard in shards for one in shard] == expected
    assert all(len(shard) == 1 or shard.counts.sum() <= 5 for shard in shards)
    content = text_bytes(records)
    (tmp_path / TEXT).write_bytes(content)
    stored = text_of(tmp_path, {"text": {"checksum": xxhash.xxh3_128(content).hexdigest()}})
    assert list(stored) == expected and stored.counts.tolist() == records.counts.tolist()


def test_memory_does_not_grow_with_the_text():
    """Ten times the records: index arrays alone are added, a tenth of the tokens as bytes."""

    def peak(count):
        text = Examples.of(some(count, size=400, kinds=9000))
        tracemalloc.start()
        records = records_of(text)
        assert sum(shard.counts.sum() for shard in cut_into_shards(records, 5000)) == records.counts.sum()
        for record in records:
            assert record.ids
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    few, many = peak(100), peak(1000)
    assert many - few < 900 * 150, (few, many)
