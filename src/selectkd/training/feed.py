"""The endless stream of micro-batches of one rank, epoch after epoch, in the order the data room fixes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

from selectkd.errors import DataError
from selectkd.training.counts import rank, ranks


class BatchFeed:
    """Micro-batches for this rank: of the stream epoch 0, epoch 1, ... every ranks-th one, from the rank's
    own on.

    micro_batches: the micro-batches of an epoch, a pure function of its number. ahead: hears of each of this rank's
    micro-batches of an epoch while the one before is still at work. A step takes ``accumulation``
    of them on each rank and may reach into the next epoch, so that all steps have the same number of them.
    A part of a checkpoint: its state is how far the stream has been read by all ranks, so it goes on there, with
    another number of ranks too; the micro-batches before are made again and passed over, some .1 ms each.
    """

    def __init__(
        self, micro_batches: Callable[[int], Iterable[Any]], ahead: Callable[[Any], None] | None = None
    ) -> None:
        self.micro_batches, self.ahead = micro_batches, ahead
        self.batch_size: int | None = None  # read by the Trainer of a data loader
        self.epoch, self.taken = 0, 0  # micro-batches of ``epoch`` that all ranks together have taken

    def state_dict(self) -> dict[str, int]:
        """{"epoch": ..., "taken": micro-batches of it that are behind us}."""
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next ``iter`` starts there."""
        self.epoch, self.taken = state["epoch"], state["taken"]

    def _stream(self) -> Iterator[Any]:
        """All ranks' micro-batches from where the feed is; moves it along."""
        numbers = count()
        while True:
            some = False
            for batch in self._announced(islice(self.micro_batches(self.epoch), self.taken, None), numbers):
                some = True
                self.taken += 1
                yield batch
            if not some and self.taken == 0:
                raise DataError(
                    f"epoch {self.epoch} has no batch to train on; check the data with `selectkd data check`."
                )
            self.epoch, self.taken = self.epoch + 1, 0

    def _announced(self, batches: Iterable[Any], numbers: Iterator[int]) -> Iterator[Any]:
        """The batches, ``ranks`` of them late; ``ahead`` has heard of those of this rank by then."""
        if self.ahead is None:
            yield from batches
            return
        waiting: deque[Any] = deque()
        for batch in batches:
            if next(numbers) % ranks() == rank():
                self.ahead(batch)
            waiting.append(batch)
            if len(waiting) > ranks():
                yield waiting.popleft()
        yield from waiting

    def __iter__(self) -> Iterator[Any]:
        stream = self._stream()
        while True:
            for index, batch in enumerate(islice(stream, ranks())):  # to the end: all ranks count alike
                if index == rank():
                    own = batch
            yield own

    def steps(self, accumulation: int) -> Iterator[list[Any]]:
        """This rank's micro-batches, one list for each optimizer step."""
        here = iter(self)
        while True:
            yield list(islice(here, accumulation))

    def steps_in(self, epochs: float, accumulation: int) -> int:
        """How many optimizer steps ``epochs`` epochs of the first one's length make, at least 1."""
        micro = sum(1 for _ in self.micro_batches(0))
        return max(1, -(-round(epochs * micro) // (accumulation * ranks())))
