"""Batches made ahead of their use, by processes of their own where there are some."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import tee
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from selectkd.data.text_cache import end_with_parent
from selectkd.errors import SelectKDError

Behind = TypeVar("Behind")
AHEAD = 4
"""Batches that a worker has made before they are wanted."""


class Epochs(Dataset[Any]):
    """The batches of all epochs by (epoch, index); an epoch's order is worked out once.

    An error a user can meet is given in the place of its batch: a worker's traceback would hide it.
    """

    def __init__(self, of_epoch: Callable[[int], Sequence[Any]]) -> None:
        self.of_epoch = of_epoch
        self._epochs: dict[int, Sequence[Any]] = {}

    def epoch(self, number: int) -> Sequence[Any]:
        """The batches of an epoch; the last two that were asked for are kept."""
        if number not in self._epochs:
            self._epochs = dict([*list(self._epochs.items())[-1:], (number, self.of_epoch(number))])
        return self._epochs[number]

    def __getitem__(self, place: tuple[int, int]) -> Any:
        try:
            return self.epoch(place[0])[place[1]]
        except SelectKDError as error:
            return error


def load(
    epochs: Epochs,
    places: Iterable[tuple[tuple[int, int], Behind]],
    workers: int = 0,
) -> Iterator[tuple[Any, Behind]]:
    """The batches at (epoch, index) of ``places``, each with what stands beside its place, in order.

    workers: processes that make them, ``AHEAD`` batches each before they are wanted; with 0 each is made when it is
    taken. The batches are the same.
    """
    batches = (
        ((epochs[place], behind) for place, behind in places)
        if not workers
        else _ahead(epochs, places, workers)
    )
    for batch, behind in batches:
        if isinstance(batch, SelectKDError):
            raise batch
        yield batch, behind


def _ahead(epochs: Epochs, places: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    wanted, kept = tee(places)
    loader = DataLoader(
        epochs,
        batch_size=None,
        sampler=(place for place, _ in wanted),  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=AHEAD,
        generator=torch.Generator(),  # the global one's state belongs to the run
        worker_init_fn=_begin,
    )
    for batch, (_, behind) in zip(loader, kept, strict=False):
        yield batch, behind


def _begin(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the keyboard is for the parent alone
    torch.set_num_threads(1)
    # A worker has the lock of the run's folder too, which a run that goes on after a kill asks for at once.
    threading.Thread(target=end_with_parent, daemon=True).start()
