"""Devices: the one that a word names, those of this machine, their free memory and their clock."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

from selectkd.errors import ConfigError

WORDS = "auto, cpu, cuda, cuda:N, mps, xpu"

OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "STATUS_ALLOC_FAILED",  # of cuBLAS, cuDNN, cuSPARSE, hipBLAS: their own workspaces
    "STATUS_NOT_INITIALIZED when calling `cublasCreate",  # its handle needs memory, too
    "hipErrorOutOfMemory",
    "UR_RESULT_ERROR_OUT_OF_",  # device memory, host memory and resources of XPU
)
"""How the libraries below torch say that an allocation failed, where torch has no error class of its own for it."""


def available_devices() -> list[str]:
    """Every device that torch can use in this process, the best first; the last is ``cpu``."""
    found = []
    if torch.cuda.is_available():
        found += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.xpu.is_available():
        found += [f"xpu:{index}" for index in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def use_device(word: str | torch.device = "auto") -> torch.device:
    """``device_of`` a word, made the current device of its kind: kernels are launched and generators seeded there."""
    device = device_of(word)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "xpu":
        torch.xpu.set_device(device)
    return device


def training_device(word: str | torch.device = "auto") -> torch.device:
    """``use_device``; ConfigError for a device on which the loss cannot be summed."""
    device = use_device(word)
    if device.type == "mps":
        raise ConfigError(
            "--device mps cannot train: the loss keeps sums in fp64, which Apple's GPUs do not have. Use --device cpu."
        )
    return device


def device_of(word: str | torch.device = "auto") -> torch.device:
    """The device that ``word`` names; it is chosen here and nowhere else, and nothing starts on it.

    ``auto`` is the first accelerator of ``available_devices`` but ``mps``, which does not train; each of several
    processes on one machine takes another by LOCAL_RANK; ``cpu`` where there is none, or under ``accelerate launch
    --cpu``.
    ``cuda`` and ``xpu`` mean the first of their kind in the same way. ConfigError for a word that is none, and for a
    device that is not there.

    >>> device_of("cpu")
    device(type='cpu')
    """
    text = str(word).strip().lower()
    found = available_devices()
    if text == "auto":
        kinds = [name.partition(":")[0] for name in found if name != "mps"]  # see ``training_device``
        text = "cpu" if _cpu_forced() else kinds[0]
    kind, colon, number = text.partition(":")
    if kind not in ("cpu", "cuda", "mps", "xpu") or (colon and not number.isdecimal()):
        raise ConfigError(
            f"--device {word} is not a device. Use one of: {WORDS}; this machine has {', '.join(found)}."
        )
    if kind == "cpu" or kind == "mps":
        name = kind
    elif colon and _processes() > 1:
        raise ConfigError(
            f"--device {word} would put {_processes()} processes on one device. Use --device {kind}: each process takes"
            " the one of its rank."
        )
    else:
        name = f"{kind}:{int(number) if colon else int(os.environ.get('LOCAL_RANK', '0'))}"
    if name not in found:
        raise ConfigError(f"--device {word}: {_why_not(kind, name)} This machine has {', '.join(found)}.")
    return torch.device(name)


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that may still be allocated on ``device``; None where the system does not report them."""
    device = torch.device(device)
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + max(0, idle)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    if device.type == "xpu":
        return int(torch.xpu.mem_get_info(device)[0])
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.is_file():
        return None
    row = next((line for line in table.read_text().splitlines() if line.startswith("MemAvailable:")), None)
    return None if row is None else int(row.split()[1]) * 1024


def peak_memory(device: torch.device | str) -> int:
    """The most bytes in use so far: of a CUDA device by this process, else main memory of this process."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def wait_for(device: torch.device | str) -> None:
    """Returns once ``device`` has done what it was given: before a clock is read. A CPU has nothing waiting."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "xpu":
        torch.xpu.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocation that failed, on an accelerator or in main memory.

    >>> out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def _processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1")


def _cpu_forced() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")


def _why_not(kind: str, name: str) -> str:
    if kind == "cuda" and not torch.cuda.is_available() and (torch.version.cuda or torch.version.hip) is None:
        return f"torch {torch.__version__} is built without CUDA."
    return f"torch sees no {name}."
