"""Building and reading a text takes memory for its index arrays and for the rows of a chunk, not for its records."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pyarrow as pa

from data.test_text_cache import write
from selectkd.data.chunks import Lines
from selectkd.data.examples import SCHEMA
from selectkd.data.order import BatchOptions
from selectkd.data.render import TextRules
from selectkd.data.rendering import Rendering, part_of
from selectkd.data.sources import batches, dataset_source
from selectkd.data.template import ChatTemplate
from selectkd.data.text_cache import TextCache
from selectkd.training.recipe_text import hold_out


def test_memory_does_not_grow_with_the_records(tmp_path, tokenizer, monkeypatch):
    """Four times the records: index arrays and the file's map are added, no text and no token."""
    monkeypatch.setattr("selectkd.data.chunks.FIRST", 1 << 14)
    monkeypatch.setattr("selectkd.data.chunks.CHUNK", 1 << 14)
    options = BatchOptions(4, 0)

    def peak(count):
        path, cache = (
            write(tmp_path, count, 20, f"d{count}.jsonl"),
            TextCache.at(tmp_path / "cache", workers=1),
        )
        found = []
        for _ in range(2):  # the building of the text, then the reading
            tracemalloc.start()
            source = dataset_source(
                {"path": path, "format": "prompt_completion"}, tokenizer, TextRules(128), cache=cache
            )
            (kept,), held, _ = hold_out([source], 0.1)
            epoch = batches([kept], options, 0)
            assert len(held) and len(epoch[0].stream) == 4 and len(kept) > 0.8 * count
            found.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return np.array(found)

    peak(50)  # what is imported or remembered at first
    few, many = peak(200), peak(800)
    assert (many - few < 600 * 400).all(), (few, many)


def test_a_chunk_of_many_short_records_takes_the_memory_of_their_rows(tokenizer, monkeypatch):
    """An example of a few tokens takes some 2 KB, its row in Arrow a few hundred bytes."""
    monkeypatch.setattr("selectkd.data.rendering.BATCH", 64)
    how = Rendering(tokenizer, ChatTemplate.of(tokenizer), TextRules(64), format="prompt_completion")

    def peak(count):
        short = [{"prompt": f"n{i}", "completion": "yes"} for i in range(count)]
        chunk = Lines("a.jsonl", 1, 0, "".join(json.dumps(row) + "\n" for row in short).encode())
        tracemalloc.start()
        part = part_of(chunk, how)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        table = pa.ipc.open_stream(SCHEMA.serialize().to_pybytes() + part.rows).read_all()
        assert part.examples == len(table) == count
        return found

    peak(50)  # what is imported or remembered at first
    assert peak(3200) - peak(800) < 2400 * 1200
