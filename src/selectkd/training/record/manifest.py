"""manifest.json: what a run was made of, enough to make it again and to know that it is the same."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from selectkd.data.durable import write_whole
from selectkd.errors import ConfigError, IntegrityError

PACKAGES = (
    "selectkd",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages a result depends on, of those installed."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    """Read once: a package's metadata takes milliseconds, and none changes under a process."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device | str) -> str:
    """The device in words."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({platform.machine()}, {threads} thread{'' if threads == 1 else 's'})"


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content`` beside the time it was written, in one rename, so that no reader sees half of it."""
    written = {"written": datetime.now(timezone.utc).isoformat(timespec="seconds"), **content}
    text = json.dumps(written, indent=2, ensure_ascii=False, default=str) + "\n"
    write_whole(path, text.encode("utf-8", "surrogatepass"))


def read_manifest(run: str | os.PathLike[str]) -> dict[str, Any]:
    """A run's manifest.json; ConfigError where there is none, IntegrityError where it is not whole."""
    path = Path(run).expanduser() / "manifest.json"
    if not path.is_file():
        raise ConfigError(f"{run} has no manifest.json, so it is no finished run. Name a run's output_dir.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(
            f"{path} is not valid JSON: {error}. The run's other files are not harmed."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise IntegrityError(
            f"{path} holds no recipe, so it is not as a run writes it. The run's other files are not harmed."
        )
    return content
