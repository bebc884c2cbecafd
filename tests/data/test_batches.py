from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from selectkd.data.collate import collate, collate_packed, pack
from selectkd.data.example import Example
from selectkd.data.inspect import check
from selectkd.data.order import BatchOptions, draw
from selectkd.data.render import TextRules
from selectkd.data.sources import Source, batches, dataset_source
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError, DataError
from selectkd.models.forward import last_hidden

PAD = 2


def example(size, *, seed=0, stream=0, trained=None):
    ids = torch.randint(3, 300, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
    ids[-1] = PAD  # the sample's own last token equals the pad id
    first = max(1, size // 2) if trained is None else trained
    return Example(ids, [i >= first for i in range(size)], stream, f"row {seed}")


EXAMPLES = [example(size, seed=size, stream=size % 2) for size in (3, 9, 5, 2, 7, 4)]


def test_padding_goes_by_length_and_not_by_token_id():
    batch = collate(EXAMPLES, pad_id=PAD)
    assert batch.input_ids.shape == (6, 16)
    assert batch.attention_mask.sum(1).tolist() == [3, 9, 5, 2, 7, 4]
    assert all(PAD in e.input_ids and e.completion[-1] for e in EXAMPLES)
    assert batch.completion.sum(1).tolist() == [sum(e.completion) for e in EXAMPLES]
    assert (batch.sequence >= 0).equal(batch.attention_mask.bool())


def test_the_shift_pairs_each_trained_token_with_the_hidden_state_before_it():
    batch = collate(EXAMPLES, pad_id=PAD)
    rows = supervised(batch)
    expected = [
        (r * 16 + i - 1, e.input_ids[i], r, e.stream, n)
        for r, e in enumerate(EXAMPLES)
        for n, i in enumerate(i for i, c in enumerate(e.completion) if c)
    ]
    found = zip(
        *(v.tolist() for v in (rows.position, rows.labels, rows.sequence, rows.stream, rows.offset)),
        strict=True,
    )
    assert list(found) == expected and rows.sequences == 6


def test_the_first_token_of_a_packed_sample_is_never_predicted_from_its_neighbour():
    batch = collate_packed([[example(4, trained=0), example(3, trained=0)]])
    assert supervised(batch).position.tolist() == [0, 1, 2, 4, 5]


def test_positions_begin_again_with_every_packed_sample():
    # Rotary positions are relative, so hidden states alone would not show a position that runs on.
    batch = collate_packed([[example(4), example(3)], [example(2)]], pad_id=PAD)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.sequence.tolist() == [[0, 0, 0, 0, 1, 1, 1, -1], [2, 2, -1, -1, -1, -1, -1, -1]]


def test_a_batch_without_trained_tokens_has_no_rows():
    rows = supervised(collate([example(4, trained=9)], pad_id=PAD))
    assert len(rows) == 0 and rows.sequences == 0


def test_packed_and_padded_rows_are_the_same_rows():
    bins = pack(EXAMPLES, 12)
    packed, padded = collate_packed(bins, pad_id=PAD), collate([e for b in bins for e in b], pad_id=PAD)
    a, b = supervised(packed), supervised(padded)
    for name in ("labels", "sequence", "stream", "offset"):
        assert getattr(a, name).equal(getattr(b, name))
    assert a.sequences == b.sequences


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_hidden_states_equal_padded_ones(make_model, attention):
    model = make_model(attention)
    bins = pack(EXAMPLES, 12)
    packed, padded = collate_packed(bins, pad_id=7), collate([e for b in bins for e in b], pad_id=PAD)
    assert packed.packed and len(bins) < len(EXAMPLES)
    with torch.no_grad():
        hidden = [last_hidden(model, batch).flatten(0, 1) for batch in (packed, padded)]
    a, b = (h[supervised(batch).position] for h, batch in zip(hidden, (packed, padded), strict=True))
    assert torch.isfinite(hidden[0]).all()
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_leaks_between_packed_samples(make_model, attention):
    model = make_model(attention)
    first, second = example(5, seed=1), example(6, seed=2)
    other = example(5, seed=3)
    with torch.no_grad():
        a, b = (last_hidden(model, collate_packed([[e, second]]))[0, 5:11] for e in (first, other))
    assert a.equal(b)


def test_packing_is_first_fit_decreasing():
    sizes = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    data = [example(s, seed=i) for i, s in enumerate(sizes)]
    bins, simple = pack(data, 64), []
    for e in sorted(data, key=len, reverse=True):
        target = next((b for b in simple if sum(map(len, b)) + len(e) <= 64), None)
        if target is None:
            simple.append([e])
        else:
            target.append(e)
    assert [[e.origin for e in b] for b in bins] == [[e.origin for e in b] for b in simple]
    with pytest.raises(DataError, match="do not fit"):
        pack([example(65)], 64)
    assert pack([], 64) == []


def test_an_epoch_is_a_function_of_seed_and_epoch():
    sources = [Source.of(EXAMPLES, "a"), Source.of([example(4, seed=90 + i) for i in range(4)], "b")]
    one, two, other, later = (
        [b.input_ids.tolist() for b in batches(sources, BatchOptions(3, s, pad_id=PAD), e)]
        for s, e in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert one == two != other and one != later and len(one) == 4
    resumed = batches(sources, BatchOptions(3, 1, pad_id=PAD), 0)
    assert [b.input_ids.tolist() for b in resumed[2:]] == one[2:] and len(resumed) == 4


@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_every_example_comes_once_per_epoch_however_it_is_batched(bucket, packing):
    epoch = batches(
        [Source.of(EXAMPLES)], BatchOptions(2, 0, packing=packing, max_length=12, bucket=bucket), 3
    )
    found = Counter(e.origin for i in range(len(epoch)) for row in epoch.rows(i) for e in row)
    assert found == Counter(e.origin for e in EXAMPLES)


def test_weights_say_how_often_a_source_is_seen():
    epochs = [Counter(draw([10, 10], [0.5, 2], seed=0, epoch=epoch).tolist()) for epoch in range(2)]
    assert epochs[0] + epochs[1] == Counter(dict.fromkeys(range(10), 1) | dict.fromkeys(range(10, 20), 4))
    assert sum(epochs[0].values()) == 25


def test_a_batch_moves_with_its_extra_inputs():
    from dataclasses import replace

    batch = replace(collate(EXAMPLES, pad_id=PAD), extra={"pixel_values": torch.ones(2), "n": 3}).to("meta")
    assert (
        batch.input_ids.device.type == "meta" and batch.model_inputs()["pixel_values"].device.type == "meta"
    )


def write(folder, rows):
    file = folder / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_source_counts_what_it_kept_dropped_and_cut(tmp_path, tokenizer):
    rows = [{"prompt": "hello", "completion": text} for text in ("yes", "", "no " * 200, "yes")]
    bad = {"prompt": "hello", "completion": 5}
    path = write(tmp_path, [*rows, bad])
    source = dataset_source(
        {"path": path, "weight": 2, "stream": 3}, tokenizer, TextRules(64, on_bad_record="skip")
    )
    assert source.name == "chat" and source.weight == 2 and source[0].stream == 3
    counts = {
        "read": 5,
        "kept": 3,
        "truncated": 1,
        "empty completion": 1,
        "bad": 1,
        "cut to max_length 64": 1,
    }
    assert {name: count for name, count in source.counts.items() if count} == counts
    assert "prompt_completion (detected)" in source.summary and "chat.jsonl:5" in source.problems[0]
    with pytest.raises(DataError, match=r"chat\.jsonl:5"):
        dataset_source({"path": path}, tokenizer, TextRules(64))
    report = check(source, held_out=source.examples[:1])
    assert (
        report.examples == 3 and report.duplicates == 1 and report.overlap == 2 and len(report.warnings) == 2
    )
    assert sum(report.lengths.values()) == 3 and report.longest == 64


def test_a_source_with_nothing_left_is_refused(tmp_path, tokenizer):
    path = write(tmp_path, [{"prompt": "hello", "completion": " "}] * 3)
    with pytest.raises(DataError, match="3 empty completion"):
        dataset_source({"path": path}, tokenizer, TextRules(64))


@pytest.mark.parametrize(
    "spec", [{}, {"path": "x", "pth": 1}, {"path": "x", "weight": 0}, {"path": "x", "weight": "2"}]
)
def test_a_source_entry_that_cannot_be_is_a_config_error(tokenizer, spec):
    with pytest.raises(ConfigError):
        dataset_source(spec, tokenizer, TextRules(64))


def test_a_batch_gives_back_its_samples_padded_or_packed() -> None:
    texts = [[5, 6, 7], [8, 9], [1, 2, 3, 4]]
    examples = [Example(ids, [i > 0 for i in range(len(ids))]) for ids in texts]
    for batch in (collate(examples, pad_id=0), collate_packed(pack(examples, 8), pad_id=0)):
        found = sorted(ids.tolist() for ids in batch.samples())
        assert found == sorted(texts)


def test_a_long_epoch_is_packed_in_windows_of_itself(monkeypatch):
    monkeypatch.setattr("selectkd.data.order.PACKED", 16)
    data = [example(size, seed=size) for size in range(2, 60)]
    epoch = batches([Source.of(data)], BatchOptions(2, 3, packing=True, max_length=64), 0)
    rows = [row for index in range(len(epoch)) for row in epoch.places(index)]
    place = {one: index for index, one in enumerate(epoch.drawn.tolist())}
    assert sorted(one for row in rows for one in row) == list(range(58))
    assert all(sum(len(data[one]) for one in row) <= 64 for row in rows)
    assert all(len({place[one] // 16 for one in row}) == 1 for row in rows)
    monkeypatch.setattr("selectkd.data.order.PACKED", 64)
    whole = batches([Source.of(data)], BatchOptions(2, 3, packing=True, max_length=64), 0)
    bins = pack([data[one] for one in draw([58], [1.0], seed=3, epoch=0).tolist()], 64)
    assert sorted(map(sorted, (row for i in range(len(whole)) for row in whole.places(i)))) == sorted(
        sorted(data.index(one) for one in row) for row in bins
    )
