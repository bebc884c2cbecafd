"""The endless stream of micro-batches of one rank, epoch after epoch, in the order the data room fixes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from selectkd.errors import DataError
from selectkd.training.counts import rank, ranks


class Feed:
    """Micro-batches for this rank: of the stream epoch 0, epoch 1, ... every ranks-th one, from the rank's
    own on.

    micro_batches: the micro-batches of an epoch, a pure function of its number. A step takes ``accumulation``
    of them on each rank and may reach into the next epoch, so that all steps have the same number of them.
    """

    def __init__(self, micro_batches: Callable[[int], Iterable[Any]]) -> None:
        self.micro_batches = micro_batches
        self.batch_size: int | None = None  # read by the Trainer of a data loader

    def stream(self) -> Iterator[Any]:
        """All ranks' micro-batches."""
        epoch = 0
        while True:
            some = False
            for batch in self.micro_batches(epoch):
                some = True
                yield batch
            if not some:
                raise DataError(
                    f"epoch {epoch} has no batch to train on; check the data with `selectkd data check`."
                )
            epoch += 1

    def __iter__(self) -> Iterator[Any]:
        return islice(self.stream(), rank(), None, ranks())

    def steps(self, accumulation: int) -> Iterator[list[Any]]:
        """This rank's micro-batches, one list for each optimizer step."""
        here = iter(self)
        while True:
            yield list(islice(here, accumulation))

    def steps_in(self, epochs: float, accumulation: int) -> int:
        """How many optimizer steps ``epochs`` epochs of the first one's length make, at least 1."""
        micro = sum(1 for _ in self.micro_batches(0))
        return max(1, -(-round(epochs * micro) // (accumulation * ranks())))
