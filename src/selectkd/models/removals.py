"""What was measured of a teacher's layers, kept for the next command: the doctor measures a cut, a run takes it over.

A greedy choice removes one layer after another, so a cut of fewer layers goes on where one of more stopped, and so does
one that was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from selectkd.data.durable import sealed, unsealed, write_whole
from selectkd.errors import ResourceError


@dataclass
class Removals:
    """Layers in the order in which they went, each with KL(teacher || rest) without it, in nats; rows: the positions
    compared. file: where they are kept; None: nowhere.
    """

    file: Path | None = None
    order: list[tuple[int, float]] = field(default_factory=list)
    rows: int = 0

    def add(self, layer: int, kl: float, rows: int) -> None:
        """Notes a removal; a folder that cannot be written keeps nothing."""
        self.order.append((layer, kl))
        self.rows = rows
        if self.file is None:
            return
        with suppress(OSError, ResourceError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, sealed({"order": self.order, "rows": rows}))


def removals_of(
    teacher: nn.Module, batches: Iterable[tuple[Mapping[str, Tensor], Tensor | None]]
) -> Removals:
    """What is kept of a teacher on these texts; nothing yet where it was not measured on them.

    The file's name is a hash of the teacher's settings and weights and of the texts, so another teacher of the same
    name has another. Weights that are not in memory have no hash, and nothing is kept of them.
    """
    if any(weight.is_meta for weight in teacher.parameters()):
        return Removals()
    hashed = xxhash.xxh3_128()
    config: Any = getattr(teacher, "config", None)
    about = {} if config is None else {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    device = next(teacher.parameters()).device.type
    hashed.update(json.dumps([about, device, torch.__version__], sort_keys=True, default=str).encode())
    for name, tensor in teacher.state_dict().items():
        _add(hashed, name, tensor)
    for inputs, rows in batches:
        for name, tensor in (*sorted(inputs.items()), ("rows", rows)):
            _add(hashed, name, tensor)
    file = _folder() / f"{hashed.hexdigest()}.json"
    content = unsealed(file.read_bytes()) if file.is_file() else None
    if content is None:
        return Removals(file)
    return Removals(file, [(layer, kl) for layer, kl in content["order"]], content["rows"])


def _add(hashed: Any, name: str, tensor: Any) -> None:
    hashed.update(name.encode())
    if isinstance(tensor, Tensor):
        hashed.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "selectkd" / "layers"
