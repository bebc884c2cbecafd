"""One checkpoint as a folder: parts as safetensors and JSON, and a manifest that says what every byte must be.

    step-00000012/
      student.json  student.safetensors  optimizer.json  optimizer.safetensors  ...
      MANIFEST.json    format, step, recipe hash, and of every other file its size and xxh3-128; itself sealed

Written into a hidden folder beside it, synced, the manifest last, then renamed: a folder of this name is whole, or
something has damaged it since, which its hashes tell.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from selectkd.data.durable import (
    checksum,
    disk_error,
    fault_point,
    json_bytes,
    os_error_of,
    sealed,
    sync,
    sync_folder,
    unsealed,
)  # fmt: skip
from selectkd.errors import IntegrityError
from selectkd.training.checkpoint.encoding import join, split

FORMAT = 2
MANIFEST = "MANIFEST.json"
PREFIX = "step-"
NAME = re.compile(rf"{PREFIX}\d{{8,}}", re.ASCII)
"""The names of our folders; any other, such as a copy beside them, is not looked at."""

LEFT = re.compile(rf"\.{PREFIX}\d{{8,}}\.(partial|old)", re.ASCII)
"""What a killed run leaves of a checkpoint that it was writing or deleting."""

INVALID = "invalid"
"""Where damaged checkpoints go: kept, in case someone wants to look, and never read again."""

SUPERSEDED = "superseded"
"""Where the checkpoints after the one that ``--resume PATH`` names go: another future."""


class OtherFormatError(IntegrityError):
    """A checkpoint of another version of selectkd: sound, perhaps, and not ours to move."""


@dataclass(frozen=True)
class Found:
    """A checkpoint whose every byte is as written."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


def name_of(step: int) -> str:
    """The folder of a step's checkpoint; names sort as steps do."""
    return f"{PREFIX}{step:08d}"


def all_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first, whether valid or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def write(
    folder: Path,
    step: int,
    parts: Mapping[str, Callable[[], Any]],
    *,
    recipe: str = "",
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Writes the checkpoint of ``step`` into ``folder``; parts: what gives the state of each, by name.

    ``beside`` may write more files into the folder before it is sealed (other ranks do). ResourceError, with bytes
    needed and free, where the disk is too small: nothing half-written is left then, and older ones are as they were.
    """
    final, partial = folder / name_of(step), folder / f".{name_of(step)}.partial"
    needed = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, state_of in parts.items():
            state = state_of()
            needed += size_of(state)
            write_part(partial, name, state)
        if beside is not None:
            beside(partial)
        seal(partial, step, recipe)
        publish(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise disk_error(error, final, needed=needed) from error
    return final


def write_part(folder: Path, name: str, state: Any) -> None:
    """Writes one part's files; OSError where they cannot be written."""
    tensors: dict[str, torch.Tensor] = {}
    plain = split(state, tensors)
    (folder / f"{name}.json").write_bytes(json_bytes({"state": plain}))
    if tensors:
        size, free = size_of(tensors), shutil.disk_usage(folder).free
        if size > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            save_file(tensors, folder / f"{name}.safetensors")
        except SafetensorError as error:  # how safetensors says that the disk is full
            raise os_error_of(error) from error
    fault_point("part")


def size_of(state: Any) -> int:
    """Bytes of all tensors in a state."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(size_of(each) for each in state.values())
    if isinstance(state, list | tuple):
        return sum(size_of(each) for each in state)
    return 0


def seal(partial: Path, step: int, recipe: str) -> None:
    """Syncs the files, then writes the manifest that makes a checkpoint of them."""
    sync_folder(partial)
    files = {
        path.name: {"size": path.stat().st_size, "xxh3_128": checksum(path)} for path in sorted(partial.iterdir())
    }  # fmt: skip
    fault_point("before manifest")
    manifest = {"format": FORMAT, "step": step, "recipe": recipe, "files": files}
    (partial / MANIFEST).write_bytes(sealed(manifest))
    fault_point("after manifest")
    sync(partial / MANIFEST)
    sync(partial)


def publish(partial: Path, final: Path) -> None:
    """Gives a sealed folder its name."""
    fault_point("before rename")
    if final.exists():  # of a future that was given up, or the same step saved again
        set_aside(final, SUPERSEDED)
    partial.rename(final)
    fault_point("after rename")
    sync(final.parent)


def check(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is as written; IntegrityError names what is not."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise IntegrityError(f"the checkpoint {path} has no {MANIFEST}.")
    content = unsealed(manifest.read_bytes())
    if content is None:
        raise IntegrityError(f"the checkpoint {path} is damaged: {MANIFEST} does not match its own checksum.")
    if content["format"] != FORMAT:
        raise OtherFormatError(
            f"the checkpoint {path} has format {content['format']}, this version of selectkd reads {FORMAT}. "
            "Use the version that wrote it."
        )
    files = content["files"]
    if NAME.fullmatch(path.name) and path.name != name_of(content["step"]):
        raise IntegrityError(f"the checkpoint {path} is damaged: it is a copy of step {content['step']}.")
    hidden = {
        file.name for file in path.iterdir() if file.name.startswith(".")
    }  # a file manager's own, never read
    there = {file.name for file in path.iterdir()} - {MANIFEST} - hidden
    for name in sorted(there | set(files)):
        if name not in there:
            raise IntegrityError(f"the checkpoint {path} is damaged: {name} is missing.")
        if name not in files:
            raise IntegrityError(f"the checkpoint {path} is damaged: {name} does not belong there.")
        size = (path / name).stat().st_size
        if size != files[name]["size"]:
            raise IntegrityError(
                f"the checkpoint {path} is damaged: {name} has {size:,} bytes, not {files[name]['size']:,}."
            )
        if checksum(path / name) != files[name]["xxh3_128"]:
            raise IntegrityError(f"the checkpoint {path} is damaged: {name} does not match its checksum.")
    return content


def newest(folder: Path) -> tuple[Found | None, list[tuple[Path, str]]]:
    """(the newest valid checkpoint of a run, each newer one with what is wrong with it). Changes nothing.

    (None, []) where there is none at all; IntegrityError where there are some and every one is damaged: a run must not
    begin anew by itself over what it has done.
    """
    damaged: list[tuple[Path, str]] = []
    for path in all_in(folder):
        try:
            return Found(path, check(path)), damaged
        except OtherFormatError:
            raise
        except IntegrityError as error:
            damaged.append((path, str(error)))
    if damaged:
        raise IntegrityError(
            f"no checkpoint of {len(damaged)} in {folder} is sound: {damaged[0][1]} Restore a copy of one, or start "
            "over in another training.output_dir."
        )
    return None, []


def find(folder: Path) -> tuple[Found | None, list[str]]:
    """(the newest valid checkpoint of a run, what was wrong with newer ones), as of ``newest``.

    Damaged ones move to ``invalid/`` where an older one is sound; what a killed run left half-written goes.
    """
    for left in folder.iterdir() if folder.is_dir() else ():
        if LEFT.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)
    found, damaged = newest(folder)
    warnings = [
        f"{error} It was moved to {set_aside(path, INVALID)}; the one before it is used."
        for path, error in damaged
    ]
    return found, warnings


def set_aside(path: Path, where: str) -> Path:
    """Moves a checkpoint into a folder beside the others, under a name that is free, and returns that."""
    place = path.parent / where
    place.mkdir(exist_ok=True)
    number, target = 0, place / path.name
    while target.exists():
        number += 1
        target = place / f"{path.name}-{number}"
    path.rename(target)
    return target


def rotate(folder: Path, keep: int) -> None:
    """Deletes all but the newest ``keep`` checkpoints; a folder loses its name before it loses a file."""
    for path in all_in(folder)[keep:]:
        gone = path.with_name(f".{path.name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        fault_point("rotation")
        shutil.rmtree(gone, ignore_errors=True)


def has_part(path: Path, name: str) -> bool:
    """Whether a checkpoint holds a part."""
    return (path / f"{name}.json").is_file()


def read_part(path: Path, name: str) -> Any:
    """The state of one part of a checkpoint that ``check`` found sound."""
    plain = path / f"{name}.json"
    if not plain.is_file():
        raise IntegrityError(
            f"the checkpoint {path} holds no {name}: it was written by another recipe or version. "
            "Start over in another training.output_dir."
        )
    file = path / f"{name}.safetensors"
    mapped = load_file(file) if file.is_file() else {}
    copied = {key: tensor.clone() for key, tensor in mapped.items()}  # rotation may delete the mapped file
    return join(json.loads(plain.read_bytes())["state"], copied)
