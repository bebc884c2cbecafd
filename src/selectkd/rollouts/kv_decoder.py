"""A model that reads texts token by token: from its cache where its logits equal a full pass's, else from the start.

b texts, v vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from selectkd.data.collate import moved, sent
from selectkd.data.vision import Images, joined
from selectkd.errors import ConfigError
from selectkd.loss.head import product_dtype
from selectkd.models.attention import BY_SAMPLE, kind_of
from selectkd.models.head import backbone, decoder_of, head_of, unwrapped
from selectkd.models.shape import UPSTREAM_ERRORS
from selectkd.models.sharded import inside, is_sharded

PROBES = (5, 2)
"""Lengths of the texts that a cache is tried on: one of them padded, the padded one left alone at the end."""
PAD = 0
"""The id of a padded place: masked, so any would do."""
_tried: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_tried_on_images: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

GROWTH = 1.5
"""A full buffer grows by this factor: copies are then a third of a token's cost on the average, and memory half idle at
the most."""


class KVDecoder(Protocol):
    """Reads prompts at once, then one token a text at a time; the model is in evaluation mode while it does.

    ``logits`` is [b, width], fp32, of each text's next token. width: how many leading ids may be written; padding rows
    of a head stay out.
    """

    width: int
    logits: Tensor

    def append(self, token: Tensor) -> None:
        """One more token of each text, [b]; ``logits`` is then of the one after it."""

    def keep(self, rows: Tensor) -> None:
        """Goes on with the texts ``rows`` [m] alone."""


def kv_decoder(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    width: int,
    images: Sequence[Images | None] = (),
) -> KVDecoder:
    """A decoder of ``prompts`` whose logits equal those of a full forward pass over each text alone.

    It reads one token a step from the model's cache. The first call for a model compares the cache with full passes on
    a few tokens; a model whose cache gives other logits reads each whole text again for every token. images: of each
    prompt; the first prompts with some are what such a model's cache is tried on.
    """
    plain = unwrapped(model)
    if any(one is not None and one.refs for one in images):
        if plain not in _tried_on_images:
            _tried_on_images[plain] = _holds_images(model, prompts[:2], images[:2], width)
        kind = CachedDecoder if _tried_on_images[plain] else RecomputingDecoder
        return kind(model, prompts, width=width, images=images)
    if plain not in _tried:
        _tried[plain] = holds(CachedDecoder, model)
        if not _tried[plain] and not holds(RecomputingDecoder, model):
            raise ConfigError(
                f"{type(plain).__name__} computes different logits for a text beside a longer one than for the text "
                "alone, so it cannot write several texts at once. Use policy: dataset, or another model."
            )
    kind = CachedDecoder if _tried[plain] else RecomputingDecoder
    return kind(model, prompts, width=width)


def holds(kind: type[CachedDecoder] | type[RecomputingDecoder], model: nn.Module) -> bool:
    """Whether reading two texts at once, one of which leaves, gives the logits of full passes over each alone.

    Half of the digits must agree: a text read without its history, or with its padding, is off by far more.
    """
    head = head_of(model)
    dtype = product_dtype(head.weight)  # autocast's, where weights are fp32 and products are not
    ids = torch.linspace(1, head.width - 1, sum(PROBES)).long().tolist()
    texts = [ids[: PROBES[0]], ids[PROBES[0] :]]
    given: dict[str, Any] = {"width": head.width}
    alone = [RecomputingDecoder(model, [text], **given) for text in texts]
    try:
        read = kind(model, texts, **given)
        same = agree(read.logits, torch.cat([one.logits for one in alone]), dtype)
        for leaves in (False, True):
            if leaves:
                read.keep(torch.tensor([1]))
                alone = alone[1:]
            token = torch.full((len(alone),), ids[2], device=head.weight.device)
            read.append(token)
            for one in alone:
                one.append(token[:1])
            same = same and agree(read.logits, torch.cat([one.logits for one in alone]), dtype)
    except torch.OutOfMemoryError:
        raise
    except UPSTREAM_ERRORS:  # a model given a cache that it cannot use
        return False
    return same


def _holds_images(
    model: nn.Module, prompts: Sequence[Sequence[int]], images: Sequence[Images | None], width: int
) -> bool:
    """Whether prompts with images, and a token behind each, have the logits of full passes when read from a cache."""
    dtype = product_dtype(head_of(model).weight)
    whole = RecomputingDecoder(model, prompts, width=width, images=images)
    try:
        read = CachedDecoder(model, prompts, width=width, images=images)
        same = agree(read.logits, whole.logits, dtype)
        token = whole.logits.argmax(-1)
        for one in (read, whole):
            one.append(token)
        return same and agree(read.logits, whole.logits, dtype)
    except torch.OutOfMemoryError:
        raise
    except UPSTREAM_ERRORS:  # a model given a cache that it cannot use
        return False


def agree(logits: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits that were computed in ``dtype`` are ``wanted`` in half of their digits."""
    if logits.shape != wanted.shape:
        return False
    off = (logits - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    return bool(off <= torch.finfo(dtype).eps ** 0.5)


class RecomputingDecoder:
    """Every text from its beginning for each token, padded on the right, where no token of a causal model looks."""

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        width: int,
        images: Sequence[Images | None] = (),
    ) -> None:
        self.model, self.decode = model, backbone(model)
        head = head_of(model)
        self.head = None if is_sharded(model) else head  # whole within a pass alone
        self.width = min(width, head.width)
        device = head.weight.device
        self.length = sent(torch.tensor([len(prompt) for prompt in prompts]), device)
        self.ids = torch.full((len(prompts), max(map(len, prompts))), PAD, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            self.ids[row, : len(prompt)] = torch.tensor(list(prompt), dtype=torch.int64)
        self.images = _ending(images, map(len, prompts))
        self.ids = sent(self.ids, device)
        self.logits = self._read()

    @torch.no_grad()
    def append(self, token: Tensor) -> None:
        self.ids = torch.nn.functional.pad(self.ids, (0, 1), value=PAD)
        self.ids.scatter_(1, self.length[:, None], token.to(self.ids.device)[:, None])
        self.length = self.length + 1
        self.logits = self._read()

    def keep(self, rows: Tensor) -> None:
        self.images = [self.images[row] for row in rows.tolist()] if self.images else []
        rows = sent(rows, self.ids.device)
        self.ids, self.length, self.logits = self.ids[rows], self.length[rows], self.logits[rows]

    def _read(self) -> Tensor:
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        mask = (places < self.length[:, None]).long()
        seen = _inputs(self.images, self.ids, self.ids.shape[1])

        def read() -> Tensor:
            hidden = self.decode(input_ids=self.ids, attention_mask=mask, **seen)  # [b, t, d]
            last = hidden[torch.arange(len(hidden), device=hidden.device), self.length - 1]  # [b, d]
            return (self.head or head_of(self.model)).logits(last, self.width)

        return inside(self.model, read)


class CachedDecoder:
    """The texts padded on the left, beside the model's own kind of cache."""

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        width: int,
        images: Sequence[Images | None] = (),
    ) -> None:
        self.model, self.decode = model, backbone(model)
        head = head_of(model)
        self.head, self.dtype = (
            None if is_sharded(model) else head,
            head.weight.dtype,
        )  # whole within a pass alone
        self.width = min(width, head.width)
        self.cache = roomy_cache(unwrapped(model).config)
        takes = inspect.signature(decoder_of(model).forward).parameters
        self.cache_name = "cache_params" if "cache_params" in takes else "past_key_values"
        device = head.weight.device
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), PAD, dtype=torch.int64)
        self.mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.int64)
            self.mask[row, longest - len(prompt) :] = 1
        self.hides = min(map(len, prompts)) < longest or device.type == "cpu"
        self.mask = sent(self.mask, device)
        self.position = (self.mask.cumsum(-1) - 1).clamp(min=0)  # [b, t]
        ids = sent(ids, device)
        seen = _inputs(_ending(images, [longest] * len(prompts)), ids, longest)
        own = (
            "image_grid_thw" in seen
        )  # the model counts places in three dimensions, fewer than there are tokens
        self.logits = self._read(ids, None if own else self.position, seen)
        self.position = self.position[:, -1:]
        if own:
            self.position = self.position + decoder_of(model).rope_deltas.to(device)  # type: ignore[operator]

    @torch.no_grad()
    def append(self, token: Tensor) -> None:
        token = token.to(self.mask.device)
        self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], 1)
        self.position = self.position + 1
        self.logits = self._read(token[:, None], self.position, {})

    def keep(self, rows: Tensor) -> None:
        rows = sent(rows, self.mask.device)
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]
        self.mask, self.position, self.logits = self.mask[rows], self.position[rows], self.logits[rows]

    def _read(self, ids: Tensor, position: Tensor | None, seen: Mapping[str, Tensor]) -> Tensor:
        def read() -> Tensor:
            hidden = self.decode(
                input_ids=ids,
                attention_mask=self._mask(ids.shape[1]),
                position_ids=position,
                use_cache=True,
                **{self.cache_name: self.cache, **seen},
            )  # [b, t, d]
            return (self.head or head_of(self.model)).logits(hidden[:, -1], self.width)

        return inside(self.model, read)

    def _mask(self, new: int) -> Tensor | None:
        """The mask that hides the padding from ``new`` tokens of each text; None where no text is padded.

        A model asks a mask [b, t] at each token whether it hides anything, and the host waits for the answer. On an
        accelerator a single token's mask is therefore given as attention takes it, [b, 1, 1, t], where every layer sees
        the whole text and the mask serves attention alone.
        """
        if not self.hides:
            return None
        config = unwrapped(self.model).config.get_text_config()
        kind = kind_of(unwrapped(self.model))
        rotary = getattr(config, "rope_parameters", None) and not getattr(config, "alibi", False)
        plain = rotary and all(type(layer) is RoomyLayer for layer in self.cache.layers)
        if self.mask.is_cpu or new > 1 or not plain or kind not in ("sdpa", BY_SAMPLE, "eager"):
            return self.mask
        visible = self.mask[:, None, None, :] > 0
        if kind != "eager":
            return visible
        return torch.zeros(visible.shape, dtype=self.dtype, device=visible.device).masked_fill_(
            ~visible, torch.finfo(self.dtype).min
        )


def _ending(images: Sequence[Images | None], ends: Iterable[int]) -> list[Images | None]:
    """The images of prompts that end at these places, behind which an answer begins."""
    pairs = zip(images, ends, strict=False)
    return [None if one is None else replace(one, prefix=end) for one, end in pairs]


def _inputs(images: Sequence[Images | None], ids: Tensor, width: int) -> dict[str, Tensor]:
    """The model inputs of texts' images, [b, width] where they are of tokens; empty without images. ids: [b, width]."""
    extra, _ = joined(images, ids.tolist(), width)
    return moved(extra, ids.device)


class RoomyLayer(DynamicLayer):
    """A dynamic layer that writes into a buffer with spare capacity instead of copying the cache for every token."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *given: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.size = 0
            self.buffers = [key_states[..., :0, :], value_states[..., :0, :]]
        new = (key_states, value_states)
        stop = self.size + key_states.shape[-2]
        for index, (buffer, states) in enumerate(zip(self.buffers, new, strict=True)):
            if stop > buffer.shape[-2]:
                b, heads, _, d = states.shape
                larger = states.new_empty(b, heads, int(stop * GROWTH) + 8, d)
                larger[..., : self.size, :] = buffer[..., : self.size, :]
                self.buffers[index] = buffer = larger
            buffer[..., self.size : stop, :] = states
        self.size = stop
        self.keys, self.values = (buffer[..., :stop, :] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.buffers = [buffer[beam_idx] for buffer in self.buffers]
        self.keys, self.values = (buffer[..., : self.size, :] for buffer in self.buffers)


def roomy_cache(config: Any) -> DynamicCache:
    """The model's own kind of cache, its growing layers with spare capacity; sliding windows and others stay."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
