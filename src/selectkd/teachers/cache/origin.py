"""Where a cache's rows come from: a model in memory, or a server (``teachers/remote/origin.py``). n rows, e width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import xxhash
from safetensors.torch import save
from torch import Tensor, nn

from selectkd.data.collate import collate
from selectkd.data.example import Example
from selectkd.data.supervised import supervised
from selectkd.data.vision import Images
from selectkd.errors import CacheError
from selectkd.loss.head import Head
from selectkd.models.forward import hidden_rows
from selectkd.models.head import head_of
from selectkd.models.load import Loaded
from selectkd.models.sharded import whole
from selectkd.teachers.cache.codec import Bytes
from selectkd.teachers.cache.index import Record
from selectkd.teachers.cache.payloads import Stored

BATCH = 8
"""Samples a model reads at once: the shortest of a shard together, so that little is padding."""


class Origin(Protocol):
    """What computes the rows of records.

    teacher: whose numbers they are, as the index has it. engine: what computes them. vocabulary: ids lie below it.
    head: for hidden states; None where only best tokens are given. batch: records taken at once.
    """

    @property
    def teacher(self) -> dict[str, Any]: ...

    @property
    def engine(self) -> dict[str, Any]: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def head(self) -> Head | None: ...

    @property
    def batch(self) -> int: ...

    def rows(self, records: Sequence[Record], payload: Stored) -> list[Bytes]:
        """The encoded rows of each record at its places."""
        ...


class ModelOrigin:
    """A model in memory, named in the index as it was loaded."""

    batch = BATCH

    def __init__(self, loaded: Loaded, *, model: str, dtype: str, quantization: str | None = None) -> None:
        self.model = loaded.model
        self.head = head_of(self.model)
        self.vocabulary = self.head.width
        self.teacher: dict[str, Any] = {
            "model": model,
            "revision": loaded.revision,
            "dtype": dtype,
            "quantization": quantization,
            "weights": weights_checksum(self.model),
        }
        self.engine: dict[str, Any] = {"torch": torch.__version__, "device": self.head.weight.device.type}

    @torch.no_grad()
    def rows(self, records: Sequence[Record], payload: Stored) -> list[Bytes]:
        """The encoded rows of each record at its places."""
        hidden = hidden_of(self.model, records)
        return encoded(hidden, self.head, records, payload)


def encoded(hidden: Sequence[Tensor], head: Head, records: Sequence[Record], payload: Stored) -> list[Bytes]:
    """Hidden states of each record as a payload stores them; a record's own key decides what is drawn for it."""
    seeds = [int.from_bytes(record.key[:8], "little") >> 1 for record in records]
    return [payload.encode(rows, head, seed) for rows, seed in zip(hidden, seeds, strict=True)]


@torch.no_grad()
def hidden_of(model: nn.Module, records: Sequence[Record]) -> list[torch.Tensor]:
    """The last hidden states of each record at its places."""
    examples = []
    for record in records:
        chosen = {place + 1 for place in record.places}
        trained = [i in chosen for i in range(len(record.ids))]
        examples.append(Example(record.ids, trained, images=images_of(record)))
    batch = collate(examples, pad_id=0).to(head_of(model).weight.device)
    rows = hidden_rows(model, batch, supervised(batch).position)
    return list(rows.split([len(record.places) for record in records]))


def images_of(record: Record) -> Images | None:
    """The images of a record; CacheError where it has some that are not at hand."""
    if record.seen and record.images is None:
        raise CacheError(
            "a sample of this cache has images, which the cache does not keep. Name the recipe it was built from: "
            "selectkd cache repair RECIPE."
        )
    return record.images


def head_bytes(head: Head) -> bytes:
    """The head as safetensors."""
    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    return save(tensors)


def weights_checksum(model: nn.Module, *, frozen: bool = False) -> str:
    """The xxh3-128 of every weight and buffer, in order of their names; a collective call for a sharded model.

    frozen: without the weights that train.
    """
    digest = xxhash.xxh3_128()
    parameters = model.named_parameters(remove_duplicate=False) if frozen else ()
    trained = {name for name, parameter in parameters if parameter.requires_grad}
    for name, tensor in sorted(model.state_dict().items()):
        if name in trained:
            continue
        digest.update(name.encode())
        here: Any = whole(tensor).cpu()
        digest.update(here.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
