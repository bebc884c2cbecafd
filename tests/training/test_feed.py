"""The order of training: the same on any number of ranks, from any place, whoever makes the batches."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from selectkd.data.example import Example
from selectkd.data.order import BatchOptions
from selectkd.data.sources import Source, batches
from selectkd.errors import DataError
from selectkd.training.feed import BatchFeed

EXAMPLES = [
    Example([1, number, 2] + [3] * (number % 7), [False, True, True] + [True] * (number % 7))
    for number in range(61)
]
SOURCES = [Source.of(EXAMPLES[:40], "a"), Source.of(EXAMPLES[40:], "b", weight=1.5)]
WAYS = {"plain": {}, "bucket": {"bucket": True}, "packing": {"packing": True, "max_length": 16}}


def feed(way: str = "plain", **options: Any) -> BatchFeed:
    return BatchFeed(lambda epoch: batches(SOURCES, BatchOptions(3, 7, **WAYS[way]), epoch), **options)


def on_ranks(
    monkeypatch: pytest.MonkeyPatch, ranks: int, number: int, made: BatchFeed, steps: int
) -> list[Any]:
    monkeypatch.setattr("selectkd.training.feed.ranks", lambda: ranks)
    monkeypatch.setattr("selectkd.training.feed.rank", lambda: number)
    stream = iter(made)
    return [next(stream) for _ in range(steps)]


def digest(given: Sequence[Any]) -> str:
    found = hashlib.sha256()
    for batch in given:
        found.update(batch.input_ids.numpy().tobytes() + batch.completion.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("way", WAYS)
def test_the_order_is_the_same_on_1_2_and_3_ranks(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    orders = []
    for ranks in (1, 2, 3):
        each = [on_ranks(monkeypatch, ranks, number, feed(way), 60 // ranks) for number in range(ranks)]
        orders.append(digest([batch for together in zip(*each, strict=True) for batch in together]))
    assert len(set(orders)) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_feed_that_is_stopped_anywhere_goes_on_with_nothing_repeated_and_nothing_lost(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    whole = digest(on_ranks(monkeypatch, 1, 0, feed(way), 60))
    draw = random.Random(0)
    stops = sorted(draw.sample(range(1, 10), 5))
    given: list[Any] = []
    state = {"epoch": 0, "taken": 0}
    for ranks, steps in zip((1, 2, 3, 2, 1, 3), [*stops, 60], strict=True):
        steps = min(steps, (60 - len(given)) // ranks)
        each = []
        for number in range(ranks):
            made = feed(way)
            made.load_state_dict(state)
            each.append(on_ranks(monkeypatch, ranks, number, made, steps))
        state = made.state_dict()
        given += [batch for together in zip(*each, strict=True) for batch in together]
    rest = feed(way)
    rest.load_state_dict(state)
    given += on_ranks(monkeypatch, 1, 0, rest, 60 - len(given))
    assert digest(given) == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_batches_and_leave_the_random_numbers_of_the_run_alone(
    monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    torch.manual_seed(5)
    own, before = feed("packing"), torch.random.get_rng_state()
    plain = on_ranks(monkeypatch, 1, 0, own, 40)
    ahead = feed("packing", workers=workers)
    stream = iter(ahead)
    for step, batch in enumerate(plain):
        assert next(stream).input_ids.equal(batch.input_ids), step
        assert ahead.epoch * 10**6 + ahead.taken == positions(step)
    assert torch.random.get_rng_state().equal(before)


def positions(step: int) -> int:
    """Where a feed is behind a step, as one number: what is made ahead does not count."""
    made = feed("packing")
    stream = iter(made)
    for _ in range(step + 1):
        next(stream)
    return made.epoch * 10**6 + made.taken


def test_an_error_of_a_worker_is_the_one_that_it_met() -> None:
    class Broken(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            raise DataError("data.jsonl:7: nothing")

    stream = iter(BatchFeed(lambda _: Broken([1, 2]), workers=1))
    with pytest.raises(DataError, match=r"^data\.jsonl:7: nothing$"):
        next(stream)


def test_a_rank_makes_its_own_batches_alone_and_counts_steps_without_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    class Noted(list[int]):
        def __getitem__(self, index: Any) -> Any:
            made.append(index)
            return index

    monkeypatch.setattr("selectkd.training.feed.ranks", lambda: 3)
    monkeypatch.setattr("selectkd.training.feed.rank", lambda: 1)
    own = BatchFeed(lambda _: Noted(range(10)))
    assert own.steps_in(2, 2) == 4 and made == []
    own.load_state_dict({"epoch": 0, "taken": 6})
    stream = iter(own)
    assert [next(stream) for _ in range(3)] == [7, 0, 3] and made == [7, 0, 3]
