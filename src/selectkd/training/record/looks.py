"""The folder ``probe`` of a run: its texts, and what each look at them found of every token.

A look is a safetensors file of columns [n], n supervised tokens; a page about the run is made of them without a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from selectkd.data.durable import json_bytes, write_whole
from selectkd.data.token_bytes import token_bytes
from selectkd.errors import ConfigError
from selectkd.training.heldout.tokens import WHOLE

FOLDER, TEXTS = "probe", "texts.json"
MOST_ROWS = 4096
"""Tokens of a look that are kept: about 300 kB."""
MOST_LOOKS = 24
"""Looks that stay: the first, the newest, and others evenly between them."""


class LookLog:
    """The folder ``probe`` of a run: the texts once, and a file for each look that stays."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = folder / FOLDER, tokenizer
        self._pieces: dict[int, str] = {}

    def write(self, step: int, columns: Mapping[str, Tensor], batch: Any, streams: Sequence[str]) -> None:
        """Writes the look at ``batch`` after ``step``, the first MOST_ROWS rows of it; the first one with the texts."""
        kept = {
            name: values[:MOST_ROWS].to(torch.int32 if name in WHOLE else torch.float32).cpu().contiguous()
            for name, values in columns.items()
        }
        ids = sorted({one for name in ("proposal", "teacher_top") for one in kept[name].tolist() if one >= 0})
        noted = {
            "step": step,
            "rows": len(columns["sample"]),
            "pieces": dict(zip(map(str, ids), self._named(ids), strict=True)),
        }
        # one key: safetensors writes several in any order, and a run taken up again leaves the same bytes
        content = save(kept, metadata={"look": json.dumps(noted)})
        self.folder.mkdir(parents=True, exist_ok=True)
        if step == 0 or not (self.folder / TEXTS).is_file():
            self.forget_after(-1)
            write_whole(
                self.folder / TEXTS, json_bytes({"format": 1, "samples": self._samples(batch, streams)})
            )
        write_whole(self._path(step), content)
        self._thin()

    def _samples(self, batch: Any, streams: Sequence[str]) -> list[dict[str, Any]]:
        """Of each sample its stream, and its tokens in order with their ids."""
        owner = batch.sequence.reshape(-1)
        ids, place = batch.input_ids.reshape(-1), batch.position_ids.reshape(-1)
        samples = []
        for number, stream in enumerate(batch.stream.tolist()):
            here = (owner == number).nonzero()[:, 0]
            tokens = ids[here[place[here].argsort()]].tolist()
            samples.append({"stream": streams[stream], "ids": tokens, "tokens": self._named(tokens)})
        return samples

    def forget_after(self, step: int) -> None:
        """Deletes what a killed run saw after ``step``."""
        for one in self._steps():
            if one > step:
                self._path(one).unlink()

    def _thin(self) -> None:
        """Deletes the look with the nearest neighbours until MOST_LOOKS are left; never the first or the last."""
        steps = self._steps()
        while len(steps) > MOST_LOOKS:
            at = min(range(1, len(steps) - 1), key=lambda i: steps[i + 1] - steps[i - 1])
            self._path(steps.pop(at)).unlink()

    def _steps(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("step-")) for path in self.folder.glob("step-*.safetensors"))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}.safetensors"

    def _named(self, ids: Iterable[int]) -> list[str]:
        ids = list(ids)
        new = set(ids) - self._pieces.keys()
        if new:
            self._pieces |= pieces(self.tokenizer, new)
        return [self._pieces[one] for one in ids]


def pieces(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """The text of each token by itself: bytes that are no whole letter as ``\\xe2``, a special token by its name."""
    try:
        table = token_bytes(tokenizer)
    except ConfigError:  # of a kind whose bytes are not known
        return {one: tokenizer.decode([one]) for one in ids}
    found = {}
    for one in ids:
        content = table.get(one)
        found[one] = (
            str(tokenizer.convert_ids_to_tokens(one))
            if content is None
            else content.decode("utf-8", "backslashreplace")
        )
    return found
