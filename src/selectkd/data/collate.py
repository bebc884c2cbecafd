"""Examples side by side: padded, one per row, or packed, several per row that cannot see each other.

b rows, t tokens. Padding is decided by length, never by a token id, so a pad token that equals EOS costs
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from selectkd.data.example import Example
from selectkd.data.vision import Images, joined
from selectkd.errors import ConfigError, DataError


def moved(values: Mapping[Any, Any], device: torch.device | str) -> dict[Any, Any]:
    """The tensors of ``values`` on ``device``. A copy from main memory to a CUDA device is made from pinned memory, so
    that the host does not wait until the device has done its earlier work.
    """
    return {name: sent(v, device) if isinstance(v, Tensor) else v for name, v in values.items()}


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on ``device``, as of ``moved``."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class Batch:
    """The tensors of one step. ``sequence`` is the index of a token's sample in the batch, -1 on padding.

    ``completion`` says whether token i is trained, ``stream`` is the stream of each sample, ``route`` the teacher its
    record names, -1 for none. ``extra`` passes to the model untouched. ``images``: of each sample, in main memory, None
    for a sample of a text without any; empty where no sample has one. ``extra`` has their tensors then.
    """

    input_ids: Tensor  # [b, t] int64
    attention_mask: Tensor  # [b, t] int64, 0 on padding
    completion: Tensor  # [b, t] bool
    position_ids: Tensor  # [b, t] int64, from 0 in each sample
    sequence: Tensor  # [b, t] int64
    stream: Tensor  # [samples] int64
    packed: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    route: Tensor | None = None  # [samples] int64
    images: tuple[Images | None, ...] = ()
    origin: Batch | None = field(default=None, init=False, repr=False, compare=False)
    found: Any = field(default=None, init=False, repr=False, compare=False)
    """origin: the batch in main memory that this one is a copy of; found: what ``supervised`` found. ``replace`` drops
    both."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; tensors of ``extra`` move too. The one it came from stays as ``origin``."""
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.init and f.name not in ("extra", "images")
        }
        copy = replace(self, **moved(values, device), extra=moved(self.extra, device))
        copy.note("origin", self.in_memory)
        return copy

    @property
    def in_memory(self) -> Batch:
        """The batch in main memory where this is a copy of one, for what is read on the host; else this one."""
        return self if self.origin is None else self.origin

    def note(self, name: str, value: Any) -> None:
        """Sets ``origin`` or ``found``."""
        object.__setattr__(self, name, value)

    def samples(self) -> list[Tensor]:
        """The token ids of each sample without its padding, in order: what a cache or a server knows it by. They lie in
        main memory where the batch came from there.

        Flat position i of the batch belongs to sample ``sequence.flatten()[i]``, at ``position_ids.flatten()[i]``.
        """
        here = self.in_memory
        ids, owner = here.input_ids.flatten(), here.sequence.flatten()
        return [ids[owner == sample] for sample in range(self.stream.shape[0])]

    def keys(self) -> list[bytes]:
        """What tells each sample from others of the same tokens: ``Images.identity``, empty without images."""
        seen = self.images or (None,) * self.stream.shape[0]
        return [b"" if one is None else one.identity for one in seen]

    def model_inputs(self) -> dict[str, Any]:
        """The inputs of a Hugging Face model that reads one sample a row; ``models.forward`` reads packed rows too.

        A model with places in three dimensions counts them itself, from the sizes of the images (``*_grid_thw``).
        """
        inputs = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            **self.extra,
        }
        if "image_grid_thw" in self.extra:
            del inputs["position_ids"]
        return inputs


def repainted(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    """The batch with ``change`` of each of its images (Pillow's) in its place, of the same size; tokens stay."""
    images = [one if one is None or not one.refs else one.repainted(change) for one in batch.images]
    extra, kept = joined(images, [ids.tolist() for ids in batch.samples()], batch.input_ids.shape[1])
    return replace(batch, extra=moved(extra, batch.input_ids.device), images=kept)


def collate(examples: Sequence[Example], *, pad_id: int, pad_to_multiple_of: int = 8) -> Batch:
    """One example per row, filled up on the right to the longest, rounded up to ``pad_to_multiple_of``."""
    return _lay_out([[example] for example in examples], pad_id, pad_to_multiple_of, packed=False)


def collate_packed(
    bins: Sequence[Sequence[Example]], *, pad_id: int = 0, pad_to_multiple_of: int = 8
) -> Batch:
    """One bin per row: its examples one after the other, positions from 0 in each, the rest padding."""
    return _lay_out(bins, pad_id, pad_to_multiple_of, packed=True)


def _lay_out(bins: Sequence[Sequence[Example]], pad_id: int, multiple: int, *, packed: bool) -> Batch:
    if not bins or not all(len(row) and all(len(example) for example in row) for row in bins):
        raise DataError("A batch needs at least one example with at least one token in every row.")
    if multiple < 1:
        raise ConfigError(f"pad_to_multiple_of is {multiple}. What would work: 1 or more.")
    longest = max(sum(len(example) for example in row) for row in bins)
    width = -(-longest // multiple) * multiple
    shape = (len(bins), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    completion = torch.zeros(shape, dtype=torch.bool)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    sequence = torch.full(shape, -1, dtype=torch.int64)
    stream: list[int] = []
    route: list[int] = []
    for row, examples in enumerate(bins):
        start = 0
        for example in examples:
            place = slice(start, start + len(example))
            input_ids[row, place] = torch.tensor(example.input_ids, dtype=torch.int64)
            attention_mask[row, place] = 1
            completion[row, place] = torch.tensor(example.completion, dtype=torch.bool)
            position_ids[row, place] = torch.arange(len(example))
            sequence[row, place] = len(stream)
            stream.append(example.stream)
            route.append(example.route)
            start += len(example)
    streams, routes = (torch.tensor(each, dtype=torch.int64) for each in (stream, route))
    extra, images = _seen(bins, width, packed=packed)
    return Batch(
        input_ids, attention_mask, completion, position_ids, sequence, streams, packed, extra, routes, images
    )


def _seen(
    bins: Sequence[Sequence[Example]], width: int, *, packed: bool
) -> tuple[dict[str, Any], tuple[Images | None, ...]]:
    """The model inputs of the images of padded rows, and each sample's images."""
    examples = [example for row in bins for example in row]
    if not any(example.images is not None and example.images.refs for example in examples):
        return {}, ()
    if packed:
        raise ConfigError(
            "rows with images are not packed. Set data.packing to false; data.bucket saves padding too."
        )
    reader = next(one.images.reader for one in examples if one.images is not None)
    images = [_without(one, reader) if one.images is None else one.images for one in examples]
    return joined(images, [one.input_ids for one in examples], width)


def _without(example: Example, reader: Any) -> Images:
    """No image, and where the answer of a sample begins, which some models need."""
    mask = example.completion
    return Images((), b"", (), mask.index(True) if True in mask else len(mask), reader)


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """``examples`` in the bins of ``bins_of``."""
    bins = bins_of([len(example) for example in examples], max_length, examples.__getitem__)
    return [[examples[index] for index in one] for one in bins]


def bins_of(lengths: Sequence[int], max_length: int, at: Callable[[int], Example]) -> list[list[int]]:
    """Bins of at most ``max_length`` tokens, first fit decreasing: the longest first, each into the first bin it fits.

    A bin holds indices of ``lengths``. Deterministic; equal lengths keep their order. Needs at most 11/9 of the fewest
    possible bins, plus 6/9. Raises DataError for an example longer than ``max_length``, which ``at`` gives.
    Source: Dosa 2007, the tight bound of FFD.
    """
    size = 1
    while size < max(1, len(lengths)):
        size *= 2
    # A tree over the bins whose nodes hold the most free space below them finds the first fitting bin in log time.
    space = [max_length] * (2 * size)
    bins: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[place]
        if length > max_length:
            raise DataError(
                f"{at(place).origin}: {length} tokens do not fit a bin of max_length {max_length}. Raise "
                "max_length, or use on_too_long: truncate | drop."
            )
        node = 1
        while node < size:
            node *= 2
            if space[node] < length:
                node += 1
        index = node - size
        if index == len(bins):
            bins.append([])
        bins[index].append(place)
        space[node] -= length
        while node > 1:
            node //= 2
            space[node] = max(space[2 * node], space[2 * node + 1])
    return bins
