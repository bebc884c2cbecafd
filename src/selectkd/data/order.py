"""The order of training: which examples a batch has, as a function of (seed, epoch, index) alone.

An order is that of hashes of the indices, in whole numbers, so that no library's generator decides it and any part of
it can be had without the rest. n examples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from selectkd.data.collate import Batch, bins_of, collate, collate_packed
from selectkd.data.example import Example
from selectkd.data.examples import Examples
from selectkd.errors import ConfigError, DataError

WINDOW = 50
"""Batches among which ``bucket`` puts examples of like length together."""

PACKED = 8192
"""Examples that are packed together: more fill bins no better, and take memory."""


def shuffled(n: int, *about: int | str) -> NDArray[np.int64]:
    """The numbers 0 to n - 1 in an order that ``about`` decides: [n]. Hashes are those of SplitMix64.

    >>> sorted(shuffled(5, "seed", 1).tolist()), shuffled(5, "seed", 1).tolist() == shuffled(5, "seed", 2).tolist()
    ([0, 1, 2, 3, 4], False)

    Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators.
    """
    base = xxhash.xxh3_64_intdigest("/".join(map(str, about)).encode())
    with np.errstate(over="ignore"):
        z = np.uint64(base) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable")


def draw(sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The examples of one epoch in order, numbered over all sources one after the other: [n].

    A source of weight w gives w * size examples (rounded down over all epochs so far): it walks through one
    shuffle of itself after the other, so no example comes twice before every other has come once.
    """
    return draw_with_walks(sizes, weights, seed=seed, epoch=epoch)[0]


def draw_with_walks(
    sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``draw``, and how often the source of each example had been walked through before it came, [n] each."""
    drawn, walks = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    start = 0
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        at = np.arange(int(epoch * weight * size), int((epoch + 1) * weight * size))
        for cycle in np.unique(at // size).tolist() if size else ():
            places = at[at // size == cycle] % size
            drawn.append(start + shuffled(size, "selectkd/source", seed, number, cycle)[places])
            walks.append(np.full(len(places), cycle))
        start += size
    chosen = np.concatenate(drawn)
    order = shuffled(len(chosen), "selectkd/epoch", seed, epoch)
    return chosen[order], np.concatenate(walks)[order]


def bins_in_windows(
    lengths: NDArray[np.int32], max_length: int, at: Callable[[int], Example]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The bins of ``bins_of`` each PACKED examples one after the other: the examples [n] bin by bin, and where each bin
    begins among them, with the end, [bins + 1].
    """
    order, sizes = [np.empty(0, np.int64)], [np.zeros(1, np.int64)]
    for start in range(0, len(lengths), PACKED):
        found = bins_of(
            lengths[start : start + PACKED].tolist(), max_length, lambda place, start=start: at(start + place)
        )
        order.append(start + np.fromiter(chain.from_iterable(found), np.int64))
        sizes.append(np.fromiter(map(len, found), np.int64))
    return np.concatenate(order), np.concatenate(sizes).cumsum()


@dataclass(frozen=True)
class BatchOptions:
    """How examples become batches: so many rows each, packed up to ``max_length`` tokens, or examples of like length
    together (``bucket``); padding by ``pad_id`` to a multiple of ``multiple``.
    """

    batch_size: int
    seed: int
    pad_id: int = 0
    packing: bool = False
    max_length: int | None = None
    bucket: bool = False
    multiple: int = 8

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}. What would work: 1 or more.")
        if self.packing and self.max_length is None:
            raise ConfigError("packing needs max_length, the size of a bin in tokens.")

    def laid_out(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """The batch of ``rows``, which have several examples each only with packing."""
        if self.packing:
            return collate_packed(rows, pad_id=self.pad_id, pad_to_multiple_of=self.multiple)
        return collate([row[0] for row in rows], pad_id=self.pad_id, pad_to_multiple_of=self.multiple)


class Batches(Sequence[Batch]):
    """Batches that are each made when they are asked for."""

    @abstractmethod
    def batch(self, index: int) -> Batch:
        """The batch of an index from 0 to the length."""

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self.batch(one) for one in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.batch(index)

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(index) for index in range(len(self)))


class Epoch(Batches):
    """The batches of one epoch, each made when it is asked for; how many there are follows from lengths alone."""

    def __init__(
        self, examples: Examples, drawn: NDArray[np.int64], options: BatchOptions, epoch: int
    ) -> None:
        if not len(drawn):
            raise DataError("This epoch has no examples. Raise the sources' weight, or add data.")
        self.examples, self.options = examples, options
        size, about = options.batch_size, ("selectkd/batches", options.seed, epoch)
        self._bins: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        if options.packing:
            assert options.max_length is not None
            packed, bounds = bins_in_windows(
                examples.lengths[drawn], options.max_length, lambda i: examples[int(drawn[i])]
            )
            drawn, self._bins = drawn[packed], (bounds, shuffled(len(bounds) - 1, *about))
        elif options.bucket:
            window = WINDOW * size
            lengths = examples.lengths[drawn]
            drawn = np.concatenate(
                [
                    drawn[start : start + window][np.argsort(lengths[start : start + window], kind="stable")]
                    for start in range(0, len(drawn), window)
                ]
            )
        self.drawn = drawn
        count = -(-(len(drawn) if self._bins is None else len(self._bins[1])) // size)
        self._order = shuffled(count, *about) if options.bucket and not options.packing else np.arange(count)

    def __len__(self) -> int:
        return len(self._order)

    def places(self, index: int) -> list[list[int]]:
        """The rows of a batch, a row being the numbers of its examples (one, unless packed)."""
        start = int(self._order[index]) * self.options.batch_size
        stop = start + self.options.batch_size
        if self._bins is None:
            return [[place] for place in self.drawn[start:stop].tolist()]
        bounds, order = self._bins
        return [self.drawn[bounds[one] : bounds[one + 1]].tolist() for one in order[start:stop].tolist()]

    def rows(self, index: int) -> list[list[Example]]:
        """The examples of a batch, row by row."""
        return [[self.examples[place] for place in row] for row in self.places(index)]

    def batch(self, index: int) -> Batch:
        return self.options.laid_out(self.rows(index))


class Padded(Batches):
    """Examples in order as padded batches, each made when it is asked for."""

    def __init__(self, examples: Sequence[Example], *, pad_id: int, batch_size: int) -> None:
        self.examples, self.pad_id, self.batch_size = Examples.of(examples), pad_id, batch_size

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def batch(self, index: int) -> Batch:
        start = index * self.batch_size
        return collate(self.examples[start : start + self.batch_size], pad_id=self.pad_id)
