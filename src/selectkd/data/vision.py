"""Images as a model takes them: its processor widens each placeholder once, and makes tensors when a batch is made.

t tokens of a sample, b samples of a batch. The processor alone knows how many tokens an image is and what its tensors
are called; nothing here counts patches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from selectkd.data.image_parts import ImagePart
from selectkd.data.images import ImageRef, ImageRules, found
from selectkd.errors import DataError

TokenTypes = Literal["mm_token_type_ids", "token_type_ids", "prefix"]
"""What a model wants to know of each token beside its id: which are an image's, under one of two names, or which stand
before the answer."""
OF_TOKENS = frozenset(
    {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "mm_token_type_ids",
        "labels",
        "text_replacement_offsets",
    }
)
"""Fields of a processor's answer that are not about the images alone."""
NESTED = ("pixel_values", "pixel_attention_mask")
"""Fields that Idefics' processors give as [1, images, ...]."""
_FAULTS = (
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    ArithmeticError,
    OSError,
    RuntimeError,
    AttributeError,
)
"""Errors that processors raise for an image they cannot take."""

Features = Mapping[str, Tensor]


@dataclass(frozen=True)
class Widened:
    """A text whose placeholders are images' tokens. spans: where those stand in it, [begin, end) in characters, of the
    placeholders at ``slots`` of the text before.
    """

    text: str
    slots: tuple[tuple[int, int], ...]
    spans: tuple[tuple[int, int], ...]

    def place(self, index: int) -> int:
        """Where a character of the text before stands now."""
        shift = 0
        for (_, stop), (_, end) in zip(self.slots, self.spans, strict=True):
            if stop > index:
                break
            shift = end - stop
        return index + shift


@dataclass(frozen=True)
class Vision:
    """A processor, and what is known of it. settings: all that its tensors and token counts rest on, as plain data;
    token_types: as of ``TokenTypes``, None for none; nested: fields are ``NESTED``. folder: where its files are.
    reload: the same again, in another process.
    """

    processor: Any
    settings: Mapping[str, Any] = field(repr=False)
    token_types: TokenTypes | None = None
    nested: bool = False
    folder: str | None = None
    reload: tuple[Callable[..., Vision], tuple[Any, ...]] | None = field(
        default=None, compare=False, repr=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.reload is not None:
            return self.reload
        return Vision, (self.processor, self.settings, self.token_types, self.nested, self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the settings; 32 hexadecimal digits."""
        content = json.dumps(self.settings, sort_keys=True, default=str)
        return xxhash.xxh3_128(content.encode()).hexdigest()

    @property
    def placeholder(self) -> str:
        """The text that stands for an image before it is widened."""
        return self.processor.image_token

    @property
    def image_ids(self) -> frozenset[int]:
        """Token ids that stand for an image's features."""
        ids = [one for one in self.processor.image_token_ids if isinstance(one, int)]
        return frozenset({*ids, int(self.processor.image_token_id)})

    @cached_property
    def placeholder_id(self) -> int | None:
        """The token that ``placeholder`` is; None where it is none of the tokenizer's own."""
        return self.processor.tokenizer.get_vocab().get(self.placeholder)

    def opened(self, parts: Sequence[ImagePart], rules: ImageRules) -> list[ImageRef]:
        """References to the images that a record names. DataError where one is not there."""
        return [found(part.source, rules, part.place, max_pixels=part.max_pixels) for part in parts]

    def widened(self, text: str, refs: Sequence[ImageRef], places: Sequence[str], origin: str) -> Widened:
        """The text with the tokens of its images. DataError where placeholders and images differ in number, or the
        processor cannot take an image.
        """
        count = text.count(self.placeholder)
        if count != len(refs):
            raise DataError(
                f"{origin}: the chat template writes {count} image placeholders ({self.placeholder}) for {len(refs)} "
                "images. What would work: the template of this model's processor, and no placeholder in the text "
                "itself."
            )
        images = [ref.image(place) for ref, place in zip(refs, places, strict=True)]
        answer = self._asked(text, images, origin)
        offsets = answer["text_replacement_offsets"][0]
        slots = tuple(tuple(one["span"]) for one in offsets)
        spans = tuple(tuple(one["new_span"]) for one in offsets)
        pieces, last = [], 0
        for one in offsets:
            pieces += [text[last : one["span"][0]], one["replacement"]]
            last = one["span"][1]
        return Widened("".join([*pieces, text[last:]]), slots, spans)

    def prompt_tokens(
        self, prompt: str, refs: Sequence[ImageRef], origin: str
    ) -> tuple[list[int], tuple[int, ...]]:
        """(ids, spans of the images' tokens) of images and a prompt as the processor itself lays them out.

        For processors without a chat template that put the images first, one run of tokens each.
        """
        text = self.placeholder * len(refs) + prompt
        answer = self._asked(text, [ref.image(origin) for ref in refs], origin)
        ids = list(answer["input_ids"][0])
        spans, start = [], 0
        for one in answer["text_replacement_offsets"][0]:
            stop = start + one["replacement"].count(self.placeholder)
            spans += [start, stop]
            start = stop
        return ids, tuple(spans)

    def features(self, images: Sequence[Any], origin: str = "") -> Features:
        """The tensors of a sample's images (Pillow's), each with the images or their patches in its first dimension."""
        answer = self._asked(self.placeholder * len(images), images, origin)
        tensors = {name: _tensor(value) for name, value in answer.items() if name not in OF_TOKENS}
        if self.nested:
            tensors = {name: value.squeeze(0) if name in NESTED else value for name, value in tensors.items()}
        return tensors

    def types_of(self, ids: Sequence[int], prefix: int) -> list[int]:
        """The type of each token: 1 for an image's, or for those from ``prefix`` on."""
        if self.token_types == "prefix":
            return [int(place >= prefix) for place in range(len(ids))]
        return self.processor.create_mm_token_type_ids([list(ids)])[0]

    def _asked(self, text: str, images: Sequence[Any], origin: str) -> Any:
        try:
            answer = self.processor(
                text=[text],
                images=list(images),
                return_text_replacement_offsets=True,
                add_special_tokens=False,
            )
        except _FAULTS as error:
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise DataError(
                f"{origin}: {type(self.processor).__name__} cannot take these images ({sizes}): "
                f"{' '.join(str(error).split())[:160]}"
            ) from error
        count = len(answer.get("text_replacement_offsets", [[]])[0])
        if count != len(images):
            raise DataError(
                f"{origin}: {type(self.processor).__name__} widens {count} placeholders of {len(images)} images. Use "
                "the processor of this model."
            )
        return answer


@dataclass(frozen=True)
class Images:
    """The images of a sample. spans: where their tokens stand, [begin, end, begin, end, ...]; prefix: where its first
    trained token stands, or a written text began; reader: makes their tensors, ``loaded`` where that is done.

    A sample without any in a text that has some holds no reference.
    """

    refs: tuple[bytes, ...]
    key: bytes
    spans: tuple[int, ...]
    prefix: int
    reader: Vision
    loaded: Features | None = field(default=None, compare=False, repr=False)

    @property
    def identity(self) -> bytes:
        """What tells samples of equal tokens apart; empty without images."""
        if not self.refs:
            return b""
        return self.key + (self.prefix.to_bytes(8, "little") if self.reader.token_types == "prefix" else b"")

    def features(self) -> Features:
        """The tensors of the images, read and made now unless that is done; empty without images."""
        if self.loaded is not None or not self.refs:
            return self.loaded or {}
        return self.reader.features(self.shown())

    def shown(self) -> list[Any]:
        """The images themselves, Pillow's."""
        return [ImageRef.unpacked(ref).image() for ref in self.refs]

    @property
    def places(self) -> list[tuple[int, int]]:
        """[begin, end) of each image's tokens."""
        return list(zip(self.spans[::2], self.spans[1::2], strict=True))

    def narrowed(self, ids: Sequence[int]) -> list[int]:
        """A sample's ids with one placeholder in place of each image's tokens, as before they were widened."""
        found: list[int] = []
        last = 0
        for begin, end in self.places:
            assert self.reader.placeholder_id is not None  # who sends ids looks first
            found += [*ids[last:begin], self.reader.placeholder_id]
            last = end
        return [*found, *ids[last:]]

    @property
    def names(self) -> list[str]:
        """The images for messages: their files, or their numbers where they have none."""
        refs = map(ImageRef.unpacked, self.refs)
        return [
            ref.payload.decode() if ref.by_path else f"image {number}" for number, ref in enumerate(refs, 1)
        ]

    def repainted(self, change: Callable[[Any], Any]) -> Images:
        """``change`` of each image in its place, of the same size, with its tensors."""
        shown = list(map(change, self.shown()))
        refs = tuple(found(one, ImageRules(), "an image").packed() for one in shown)
        return replace(self, refs=refs, loaded=self.reader.features(shown))

    def moved(self, by: int, start: int) -> Images:
        """The images of a sample that has lost ``by`` tokens from ``start`` on."""
        spans = tuple(place - by if place >= start + by else place for place in self.spans)
        return replace(self, spans=spans, prefix=max(0, self.prefix - by))


def images_key(refs: Sequence[ImageRef], vision: Vision) -> bytes:
    """What images under a processor are known by: 16 bytes of their contents, sizes and its settings."""
    content = b"".join(ref.identity for ref in refs) + vision.fingerprint.encode()
    return xxhash.xxh3_128(content).digest()


def joined(
    images: Sequence[Images | None], ids: Sequence[Sequence[int]], width: int
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """(the model inputs of a batch's images, each sample's images with their tensors); empty where no sample has any.

    Samples' tensors lie one after the other in the first dimension, filled up with zeros in the others; token types are
    [b, width]. The samples' own tensors are views of these where nothing was filled up.
    """
    if not any(one is not None and one.refs for one in images):
        return {}, ()
    given = [{} if one is None else one.features() for one in images]
    reader = next(one.reader for one in images if one is not None)
    inputs: dict[str, Any] = {}
    parts: list[dict[str, Tensor]] = [{} for _ in images]
    for name in dict.fromkeys(name for features in given for name in features):
        having = [row for row, features in enumerate(given) if name in features]
        whole = _side_by_side([given[row][name] for row in having])
        ends = list(accumulate(given[row][name].shape[0] for row in having))
        for row, begin, end in zip(having, [0, *ends[:-1]], ends, strict=True):
            own = given[row][name]
            parts[row][name] = whole[begin:end] if whole.shape[1:] == own.shape[1:] else own
        inputs[name] = whole.unsqueeze(0) if reader.nested and name in NESTED else whole
    if reader.token_types is not None:
        name = "token_type_ids" if reader.token_types == "prefix" else reader.token_types
        inputs[name] = torch.zeros(len(ids), width, dtype=torch.int64)
        for row, (one, of) in enumerate(zip(ids, images, strict=True)):
            types = reader.types_of(one, width if of is None else of.prefix)
            inputs[name][row, : len(one)] = torch.tensor(types, dtype=torch.int64)
    carried = (
        None if one is None else replace(one, loaded=part) for one, part in zip(images, parts, strict=True)
    )
    return inputs, tuple(carried)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(one.shape[1:] for one in tensors), strict=True)]
    if all(list(one.shape[1:]) == shape for one in tensors):
        return torch.cat(list(tensors))
    whole = tensors[0].new_zeros(sum(one.shape[0] for one in tensors), *shape)
    start = 0
    for one in tensors:
        whole[(slice(start, start + one.shape[0]), *(slice(0, size) for size in one.shape[1:]))] = one
        start += one.shape[0]
    return whole


def _tensor(value: Any) -> Tensor:
    """A processor's value as a tensor; a list of arrays is filled up to the largest."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and value and hasattr(value[0], "shape"):
        return _side_by_side([torch.as_tensor(np.asarray(one))[None] for one in value])
    return torch.as_tensor(np.asarray(value))
