"""A GPU that is not there: CPU tensors that say they lie on cuda:N and are refused what CUDA would refuse.

The numbers, autograd and modules are the real ones of a CPU build of torch. Each storage has a home, which its views
share. An operation on tensors of two homes is refused. Host syncs, copies from pageable memory and launches are counted
with the line of the package that caused them.

What cannot be seen here: times, streams that overlap, NCCL, and what only CUDA's own kernels round.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

import selectkd
from gpu import stand_ins

CPU = torch.device("cpu")
PACKAGE = str(Path(selectkd.__file__).parent)
HERE = str(Path(__file__).parent)
MANY = 100_000
"""Homes after which those of storages that are gone are forgotten."""

real_device = torch._C.TensorBase.device.__get__


class Refused(RuntimeError):
    """What CUDA would refuse."""


class Event(NamedTuple):
    """One thing that happened, and the line that caused it."""

    what: str
    where: str


class Gpu:
    """The pretended devices: where each tensor lives, and what has happened since the last ``reset``."""

    def __init__(self, devices: int) -> None:
        self.devices, self.current = devices, 0
        self.syncs: Counter[Event] = Counter()
        self.launched: Counter[Event] = Counter()
        self.launched_on: Counter[torch.device] = Counter()
        self.pageable: Counter[Event] = Counter()
        self.called: Counter[str] = Counter()
        self.home_of_new: torch.device | None = None
        self.silent = 0
        self._homes: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self._pinned: dict[int, StorageWeakRef] = {}

    # where tensors live

    def of(self, tensor: torch.Tensor) -> torch.device:
        """The device a tensor says it lies on."""
        try:
            storage = torch.Tensor.untyped_storage(tensor)
        except (NotImplementedError, RuntimeError):  # a wrapper without a storage of its own
            return real_device(tensor)
        known = self._homes.get(storage._cdata)
        if known is None or known[0].expired():
            return real_device(tensor)
        return known[1]

    def put(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Says that a tensor lies on ``device``; a CPU takes the word back."""
        storage = torch.Tensor.untyped_storage(tensor)
        if device.type != "cuda":
            self._homes.pop(storage._cdata, None)
            return tensor
        self._homes[storage._cdata] = (StorageWeakRef(storage), self.numbered(device))
        if len(self._homes) > MANY:
            self._homes = {key: known for key, known in self._homes.items() if not known[0].expired()}
        return tensor

    def numbered(self, device: torch.device) -> torch.device:
        """``device`` with its number: the current one's where it has none."""
        if device.type != "cuda":
            return device
        index = self.current if device.index is None else device.index
        if not 0 <= index < self.devices:
            raise Refused(f"CUDA error: invalid device ordinal, {device} of {self.devices}")
        return torch.device("cuda", index)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Says that a tensor lies in memory the device can read by itself."""
        storage = torch.Tensor.untyped_storage(tensor)
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether the device could read a tensor's memory by itself."""
        known = self._pinned.get(torch.Tensor.untyped_storage(tensor)._cdata)
        return known is not None and not known.expired()

    # what happens

    def sync(self, what: str) -> None:
        """The host waits for the device."""
        self.syncs[Event(what, caller())] += 1

    def launch(self, what: str, device: torch.device) -> None:
        """A kernel starts on ``device``."""
        self.launched[Event(what, caller())] += 1
        self.launched_on[device] += 1

    def copied(self, tensor: torch.Tensor, there: torch.device, *, waits: bool) -> None:
        """A tensor goes from one device to another."""
        here = self.of(tensor)
        if here.type == "cpu" and not self.is_pinned(tensor):
            self.pageable[Event("copy from pageable memory", caller())] += 1
        if waits and "cpu" in (here.type, there.type):
            self.sync("copy to the device" if there.type == "cuda" else "copy to the host")
        else:
            self.launch("copy", there if there.type == "cuda" else here)

    @contextlib.contextmanager
    def silence(self) -> Iterator[None]:
        """Operations inside are the machinery's own: neither checked nor counted."""
        self.silent += 1
        try:
            yield
        finally:
            self.silent -= 1

    # what is told

    @property
    def launches(self) -> int:
        return sum(self.launched.values())

    def waits(self) -> dict[str, int]:
        """The host syncs that the package caused, by line; those of libraries alone left out."""
        found: Counter[str] = Counter()
        for event, times in self.syncs.items():
            if not event.where.startswith("("):
                found[f"{event.where}: {event.what}"] += times
        return dict(found)

    def reset(self) -> None:
        """Forgets what has happened."""
        for counter in (self.syncs, self.launched, self.launched_on, self.pageable, self.called):
            counter.clear()

    def report(self, most: int = 20) -> str:
        """The counts, and the lines that caused most of them."""
        parts = []
        for name, counter in (
            ("syncs", self.syncs),
            ("pageable", self.pageable),
            ("launches", self.launched),
        ):
            parts.append(f"{sum(counter.values())} {name}")
            parts += [
                f"  {times:6d}  {event.what:28s} {event.where}" for event, times in counter.most_common(most)
            ]
        return "\n".join(parts)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in what an operation is given or gives: in lists, tuples and dictionaries too, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for part in value for tensor in tensors_in(part)]


def caller() -> str:
    """The innermost line of the package that is running; in brackets that of another library where there is none."""
    frame, other = sys._getframe(2), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{name[len(PACKAGE) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        if not other and "site-packages" in name and "/torch/" not in name:
            other = f"({name.split('site-packages/')[-1]}:{frame.f_lineno} {frame.f_code.co_name})"
        frame = frame.f_back
    return other or "(elsewhere)"


@contextlib.contextmanager
def pretended(devices: int = 1, *, free: int = 100 << 30) -> Iterator[Gpu]:
    """``devices`` GPUs with ``free`` bytes of memory, as long as the block runs."""
    from gpu.asked import Asked
    from gpu.operations import Operations

    gpu = Gpu(devices)
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in stand_ins.of(gpu, free):
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, stand_in))
        for owner, name in (
            (torch.autograd.function.BackwardCFunction, "apply"),
            (torch.nn.Module, "_call_impl"),
        ):
            stack.enter_context(mock.patch.object(owner, name, _watched(getattr(owner, name), gpu)))
        stack.enter_context(Asked(gpu))
        stack.enter_context(Operations(gpu))
        yield gpu


def _watched(run: Any, gpu: Gpu) -> Any:
    """``run`` under the function mode, which is off where the autograd engine or a handler calls Python."""
    from gpu.asked import Asked

    def watched(*args: Any, **kwargs: Any) -> Any:
        if torch._C._len_torch_function_stack():
            return run(*args, **kwargs)
        with Asked(gpu):
            return run(*args, **kwargs)

    return watched


@contextlib.contextmanager
def as_it_is() -> Iterator[None]:
    """No mode inside: tensors are the CPU's again."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield
