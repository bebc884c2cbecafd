"""Text that is never tokenised as a whole: records are read, rendered and batched as training goes on.

The order of an epoch is a function of (seed, epoch, index) alone (``data.lanes``), and each batch is read from the
chunks of its window (``data.chunk_index``), so a run goes on at any batch and each rank reads its own chunks.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from selectkd.data.chunk_index import Chunks
from selectkd.data.chunks import Chunk, Given, Item
from selectkd.data.collate import Batch, bins_of
from selectkd.data.example import Example
from selectkd.data.files import Checked, Found
from selectkd.data.formats import to_sample
from selectkd.data.lanes import Lanes, lanes_for
from selectkd.data.order import Batches, BatchOptions, draw_with_walks, shuffled
from selectkd.data.prompts import is_held_out, packed, prompt_keys, prompt_of
from selectkd.data.rendering import Rendering, rendered
from selectkd.errors import DataError


@dataclass(frozen=True)
class Streamed:
    """A source that is read as training goes on. before: what was found in its first chunk. share: of its prompts that
    are held out.
    """

    chunks: Chunks
    how: Rendering
    before: Found
    stream: int = 0
    share: float = 0.0

    def examples(self, records: Iterable[tuple[int, int, int]]) -> list[Example]:
        """At most one example of each record: a chunk, a place in it, and how often it came before. There is none of
        one that is held out, dropped, or bad and skipped (a line of the log). A conversation that becomes several
        examples gives the next one each time.
        """
        how = self.how
        times: defaultdict[str, list[int]] = defaultdict(list)

        def items() -> Iterator[Item]:
            for chunk, record, before in records:
                item = self.chunks.item(chunk, record)
                times[item[0]].append(before)
                yield item

        checked = Checked(
            items(), format=how.format, on_bad_record=how.rules.on_bad_record, before=self.before
        )
        found: list[Example] = []
        for results in rendered(checked, how):
            kept = [one for one in results or () if isinstance(one, Example)]
            if kept and not is_held_out(kept[0].prompt, self.share):
                turn = times[kept[0].origin].pop(0) + int.from_bytes(kept[0].prompt[:8], "little")
                found.append(replace(kept[turn % len(kept)], stream=self.stream))
        for message in checked.found.problems:
            logging.getLogger("selectkd").warning(message)
        return found

    def held_out(self, most: int) -> Iterator[Chunk]:
        """At most ``most`` records whose prompts are held out, from chunks all over the source in a fixed order."""
        index, left = self.chunks.index, most
        units = np.append(index.units, len(index.rows)).tolist()
        for unit in shuffled(len(units) - 1, "selectkd/held-out").tolist():
            for chunk in range(units[unit], units[unit + 1]):
                records = int(index.rows[chunk, 4])
                checked = Checked(
                    (self.chunks.item(chunk, record) for record in range(records)),
                    format=self.how.format, on_bad_record="skip", before=self.before,
                )  # fmt: skip
                chosen = []
                for origin, record in checked:
                    try:
                        prompt = prompt_of(to_sample(record, checked.found.format, origin=origin))
                    except DataError:  # training meets it
                        continue
                    if is_held_out(packed(prompt_keys(prompt)), self.share):
                        chosen.append((origin, record))
                if chosen:
                    yield Given(tuple(chosen[:left]))
                left -= len(chosen)
                if left <= 0:
                    return


class StreamEpoch(Batches):
    """The batches of an epoch of streamed sources. A batch has a sample of each of ``batch_size`` records; it has fewer
    where some are held out or dropped, and one of a token that is not trained where all are. With packing they lie in
    as few rows as hold them.
    """

    def __init__(
        self, sources: Sequence[Streamed], weights: Sequence[float], options: BatchOptions, epoch: int
    ) -> None:
        self.sources, self.options, self.epoch = sources, options, epoch
        indices = [source.chunks.index for source in sources]
        drawn, walks = draw_with_walks(
            [len(one.units) for one in indices], weights, seed=options.seed, epoch=epoch
        )
        begin = np.cumsum([0, *(len(one.rows) for one in indices)])
        starts = np.concatenate([one.units + at for one, at in zip(indices, begin, strict=False)])
        rows = np.concatenate([one.rows for one in indices])
        # chunks [c] of the epoch in order, numbered over all sources one after the other; how often each came before
        stops = np.append(starts, len(rows))[drawn + 1]
        self._chunks, self._walks = _runs(starts[drawn], stops), np.repeat(walks, stops - starts[drawn])
        self._begin = begin
        lanes = lanes_for(len(drawn), int(rows[self._chunks, 5].max(initial=0)))
        self.lanes = Lanes(rows[self._chunks, 4], options.batch_size, lanes, options.seed, epoch)
        if not self.lanes.total:
            raise DataError("This epoch has no records. Raise the sources' weight, or add data.")

    def __len__(self) -> int:
        return len(self.lanes)

    def records(self, index: int) -> list[tuple[int, int, int]]:
        """(source, chunk, record) of each record of a batch."""
        return [(*self._place(chunk), record) for chunk, record in self.lanes.windows(index)[1]]

    def _place(self, chunk: int) -> tuple[int, int]:
        """The source of a chunk of the epoch, and its number there."""
        number = int(self._chunks[chunk])
        source = int(np.searchsorted(self._begin, number, side="right")) - 1
        return source, number - int(self._begin[source])

    def batch(self, index: int) -> Batch:
        windows, records = self.lanes.windows(index)
        for window in windows:
            for source, chunk in map(self._place, window):
                self.sources[source].chunks.load(chunk)
        wanted: list[list[tuple[int, int, int]]] = [[] for _ in self.sources]
        for chunk, record in records:
            source, there = self._place(chunk)
            wanted[source].append((there, record, int(self._walks[chunk])))
        found = [
            example
            for source, some in zip(self.sources, wanted, strict=True)
            for example in source.examples(some)
        ] or [Example([self.options.pad_id], [False])]
        if not self.options.packing:
            return self.options.laid_out([[example] for example in found])
        lengths = [len(example) for example in found]
        bins = bins_of(lengths, self.options.max_length or max(lengths), found.__getitem__)
        return self.options.laid_out([[found[place] for place in row] for row in bins])


def _runs(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers from each start to its stop, one run after the other.

    >>> _runs(np.array([3, 0]), np.array([6, 2])).tolist()
    [3, 4, 5, 0, 1]
    """
    sizes = stops - starts
    return np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
