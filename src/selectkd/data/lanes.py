"""An order of records that any number of ranks reads in parts of its own: batches that take turns among lanes.

The chunks of an epoch, drawn in a random order, are cut into lanes of as many batches each. Batch i is the next one of
lane i mod l. So on r ranks, where r divides l, the batches of a rank are those of its l / r lanes, and it reads nothing
else; on any other number of ranks the order is the same and a rank reads more. The records of a few chunks in a row,
a window, are shuffled among each other. c chunks, l lanes, n records.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from selectkd.data.order import shuffled

MOST = 64
"""Lanes at most: so many ranks read parts of their own."""
UNITS = 4
"""Units a lane has at least, so that what two lanes share of one, where it is cut, stays little."""
WINDOW = 256
"""Chunks of the windows of all lanes together: 64 MB, some 30,000 records of 2 KB."""
HELD = 1 << 28
"""Bytes of the units that all lanes read from, at most."""


def lanes_for(units: int, largest: int) -> int:
    """The lanes of an epoch of ``units`` units, the largest of which has ``largest`` bytes in memory: a power of two.

    >>> [lanes_for(*some) for some in ((3, 1), (70, 1), (1000, 1 << 18), (1000, 1 << 26))]
    [1, 16, 64, 4]
    """
    most = max(1, min(MOST, units // UNITS, HELD // max(1, largest)))
    return 1 << (most.bit_length() - 1)


class Lanes:
    """Which records each batch has. records: of each chunk, [c]; size: records of a batch; about: what decides the
    shuffles.
    """

    def __init__(self, records: NDArray[np.int64], size: int, lanes: int, *about: int | str) -> None:
        self.size, self.about = size, about
        self.first = np.concatenate([[0], np.cumsum(records)])  # the records before each chunk, [c + 1]
        self.total = int(self.first[-1])
        self.lanes = min(lanes, 1 << max(0, len(self).bit_length() - 1))
        self.window = max(1, WINDOW // self.lanes)
        # Lane i has every l-th batch from i on. The lanes of a rank lie side by side, so that ranks share few chunks.
        lane, bits = np.arange(self.lanes), self.lanes.bit_length() - 1
        reversed_bits = sum(((lane >> bit) & 1) << (bits - 1 - bit) for bit in range(bits)) + 0 * lane
        batches = -(-(len(self) - lane) // self.lanes)
        order = np.argsort(reversed_bits)
        self.begins = np.empty(self.lanes, np.int64)
        self.begins[order] = np.cumsum(batches[order]) - batches[order]  # the batches that lie before a lane
        self.batches = batches
        self._orders: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        """How many batches there are."""
        return -(-self.total // self.size)

    def windows(self, index: int) -> tuple[list[range], list[tuple[int, int]]]:
        """The chunks of the windows of a batch, and the (chunk, record of it) of each of its records."""
        lane, step = index % self.lanes, index // self.lanes
        begin, count = int(self.begins[lane]), int(self.batches[lane])
        low, high = begin * self.size, min((begin + count) * self.size, self.total)
        start = (begin + step) * self.size
        found = [self._record(lane, low, high, at) for at in range(start, min(start + self.size, high))]
        return list(dict.fromkeys(chunks for chunks, _ in found)), [place for _, place in found]

    def _record(self, lane: int, low: int, high: int, position: int) -> tuple[range, tuple[int, int]]:
        """The record at a position of a lane that has those from ``low`` to ``high``; the chunks of its window."""
        begin = self._chunk(low)
        number = (self._chunk(position) - begin) // self.window
        chunks = range(
            begin + number * self.window, min(begin + (number + 1) * self.window, self._chunk(high - 1) + 1)
        )
        start, stop = max(low, int(self.first[chunks.start])), min(high, int(self.first[chunks.stop]))
        order = self._orders.get((lane, number))
        if order is None:
            order = self._orders[lane, number] = shuffled(
                stop - start, "selectkd/window", *self.about, lane, number
            )
            while len(self._orders) > 2 * MOST:
                self._orders.popitem(last=False)
        there = start + int(order[position - start])
        chunk = self._chunk(there)
        return chunks, (chunk, there - int(self.first[chunk]))

    def _chunk(self, position: int) -> int:
        """The chunk of a record."""
        return int(np.searchsorted(self.first, position, side="right")) - 1
