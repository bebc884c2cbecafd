"""What torch.cuda and its neighbours say while GPUs are pretended."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gpu.pretended import Gpu

TOTAL = 141 << 30
"""Bytes of memory of a pretended GPU."""


def of(gpu: Gpu, free: int) -> list[tuple[Any, str, Any]]:
    """(owner, name, what stands in for it), those torch does not have included."""
    found = [(torch.cuda, name, stand_in) for name, stand_in in cuda(gpu, free).items()]
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is not None:
        for name, stand_in in (
            ("is_available", lambda: True),
            ("current_accelerator", lambda *_, **__: torch.device("cuda")),
            ("device_count", lambda: gpu.devices),
            ("current_device_index", lambda: gpu.current),
            ("current_stream", lambda *_: Stream()),
            ("empty_cache", lambda: gpu.called.update(["empty_cache"])),
            ("synchronize", lambda *_: gpu.sync("synchronize")),
        ):
            found.append((accelerator, name, stand_in))
    found += autocast()
    grouped = by_device(gpu)
    for module in ("torch.nn.utils.clip_grad", "torch.optim.optimizer"):
        owner = importlib.import_module(module)
        found.append((owner, "_group_tensors_by_device_and_dtype", grouped))
    return found


def cuda(gpu: Gpu, free: int) -> dict[str, Any]:
    """Stand-ins for torch.cuda, by name."""
    device_name = "NVIDIA H200 (pretended)"
    properties = SimpleNamespace(
        name=device_name, total_memory=TOTAL, major=9, minor=0, multi_processor_count=132, warp_size=32,
        L2_cache_size=50 << 20, gcnArchName="",
    )  # fmt: skip
    states = [torch.arange(16, dtype=torch.uint8) for _ in range(gpu.devices)]

    def index(device: Any) -> int:
        if isinstance(device, torch.Tensor):
            device = gpu.of(device)
        number = device if isinstance(device, int) else torch.device(device).index
        return gpu.current if number is None else number

    class Current:
        """``torch.cuda.device``: another current device for a while; a negative number leaves it."""

        def __init__(self, device: Any) -> None:
            self.wanted = gpu.current if device is None else index(device)

        def __enter__(self) -> None:
            self.before = gpu.current
            gpu.current = self.wanted if self.wanted >= 0 else self.before

        def __exit__(self, *_: Any) -> None:
            gpu.current = self.before

    def set_device(device: Any) -> None:
        gpu.current = index(device)

    def noted(name: str, answer: Any = None) -> Any:
        def stand_in(*_: Any, **__: Any) -> Any:
            gpu.called[name] += 1
            return answer

        return stand_in

    return {
        "is_available": lambda: True, "is_initialized": lambda: True,
        "init": noted("init"), "_lazy_init": noted("init"),
        "device_count": lambda: gpu.devices, "current_device": lambda: gpu.current, "set_device": set_device,
        "device": Current, "device_of": Current, "_DeviceGuard": Current,
        "get_device_properties": lambda *_: properties, "get_device_name": lambda *_: device_name,
        "get_device_capability": lambda *_: (9, 0), "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (free, TOTAL), "memory_allocated": lambda *_: 0, "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0, "max_memory_reserved": lambda *_: 0,
        "reset_peak_memory_stats": noted("reset_peak_memory_stats"), "empty_cache": noted("empty_cache"),
        "synchronize": lambda *_: gpu.sync("synchronize"), "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device=0: states[index(device)].clone(),
        "get_rng_state_all": lambda: [state.clone() for state in states],
        "set_rng_state": noted("set_rng_state"), "set_rng_state_all": noted("set_rng_state_all"),
        "manual_seed": noted("manual_seed"), "manual_seed_all": noted("manual_seed_all"),
        "Stream": Stream, "Event": Event, "stream": Stream.as_current, "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(), "set_stream": noted("set_stream"),
    }  # fmt: skip


class Event:
    """``torch.cuda.Event``; all that came before it is done."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class Stream:
    """``torch.cuda.Stream``; its work is done at once, in the order it was given."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    class as_current:
        def __init__(self, stream: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...


def autocast() -> list[tuple[Any, str, Any]]:
    """Autocast of a GPU also casts the CPU's operations, which are those of the pretended one."""
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def entered(self: Any) -> Any:
        if self.device == "cuda":
            self.beside = torch.autocast("cpu", dtype=self.fast_dtype, enabled=self._enabled)
            enter(self.beside)
        return enter(self)

    def left(self: Any, *error: Any) -> Any:
        found = leave(self, *error)
        if self.device == "cuda":
            leave(self.beside, *error)
        return found

    return [(torch.autocast, "__enter__", entered), (torch.autocast, "__exit__", left)]


def by_device(gpu: Gpu) -> Any:
    """Groups of tensors for operations on many at once, under the device they say they lie on."""
    real = torch.utils._foreach_utils._group_tensors_by_device_and_dtype

    def grouped(lists: Any, with_indices: bool = False) -> Any:
        found = real(lists, with_indices)
        return {(gpu.of(group[0][0][0]), dtype): group for (_, dtype), group in found.items()}

    return grouped
