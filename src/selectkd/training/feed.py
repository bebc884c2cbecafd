"""The endless stream of micro-batches of one rank, epoch after epoch, in the order the data room fixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from selectkd.data.loader import Epochs, load
from selectkd.errors import DataError
from selectkd.training.counts import rank, ranks

Place = tuple[int, int]  # (epoch, index of a micro-batch in it)


class BatchFeed:
    """Micro-batches for this rank: of the stream epoch 0, epoch 1, ... every ranks-th one, from the rank's
    own on.

    micro_batches: the micro-batches of an epoch, a pure function of its number; each is made when it is asked for, so a
    rank makes its own ones alone. ahead: hears of each of this rank's micro-batches while the one before is still at
    work. workers: processes that make them. A step takes ``accumulation`` of them on each rank and may reach into the
    next epoch, so that all steps have the same number of them. A part of a checkpoint: its state is how far the stream
    has been read by all ranks, so it goes on there at once, with another number of ranks too.
    """

    def __init__(
        self,
        micro_batches: Callable[[int], Sequence[Any]],
        ahead: Callable[[Any], None] | None = None,
        workers: int = 0,
    ) -> None:
        self.micro_batches, self.ahead, self.workers = micro_batches, ahead, workers
        self.batch_size: int | None = None  # read by the Trainer of a data loader
        self.epoch, self.taken = 0, 0  # micro-batches of ``epoch`` that all ranks together have taken
        self._epochs = Epochs(micro_batches)

    def state_dict(self) -> dict[str, int]:
        """{"epoch": ..., "taken": micro-batches of it that are behind us}."""
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next ``iter`` starts there."""
        self.epoch, self.taken = state["epoch"], state["taken"]

    @property
    def epochs(self) -> float:
        """How many epochs are behind us, such as 1.5."""
        return self.epoch + (self.taken / self._size(self.epoch) if self.taken else 0)

    def _size(self, epoch: int) -> int:
        return len(self._epochs.epoch(epoch))

    def _places(self) -> Iterator[tuple[Place, Place]]:
        """(this rank's next micro-batch, where the stream is once all ranks have taken theirs), for ever."""
        epoch, taken = self.epoch, self.taken
        while True:
            own = epoch, taken
            for index in range(ranks()):  # to the end: all ranks count alike
                while taken >= self._size(epoch):
                    if not self._size(epoch):
                        raise DataError(
                            f"epoch {epoch} has no batch to train on; check the data with `selectkd data check`."
                        )
                    epoch, taken = epoch + 1, 0
                if index == rank():
                    own = epoch, taken
                taken += 1
            yield own, (epoch, taken)

    def __iter__(self) -> Iterator[Any]:
        waiting: list[tuple[Any, Place]] = []
        for batch, behind in load(self._epochs, self._places(), self.workers):
            waiting.append((batch, behind))
            if self.ahead is not None:
                self.ahead(batch)
                if len(waiting) == 1:
                    continue  # one late: the next one has been heard of by then
            batch, (self.epoch, self.taken) = waiting.pop(0)
            yield batch

    def steps(self, accumulation: int) -> Iterator[list[Any]]:
        """This rank's micro-batches, one list for each optimizer step."""
        here = iter(self)
        while True:
            yield list(islice(here, accumulation))

    def steps_in(self, epochs: float, accumulation: int) -> int:
        """How many optimizer steps ``epochs`` epochs of the first one's length make, at least 1. No batch is made."""
        return max(1, -(-round(epochs * self._size(0)) // (accumulation * ranks())))
