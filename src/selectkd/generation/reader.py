"""A model that reads texts token by token: left padded, with a key-value cache that has room to grow. b texts, v
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from selectkd.data.collate import sent
from selectkd.models.head import backbone, head_of, unwrapped
from selectkd.models.sharded import inside, is_sharded

ROOM = 1.5
"""A full buffer grows by this factor: copies are then a third of a token's cost on the average, and memory half idle at
the most."""


class Reader:
    """Reads ``prompts`` at once, then one token a text at a time; the model is in evaluation mode while it does.

    ``logits`` is [b, width], fp32, of each text's next token. width: how many leading ids may be written; padding rows
    of a head stay out.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], *, width: int, pad_id: int
    ) -> None:
        self.model, self.decode = model, backbone(model)
        head = head_of(model)
        self.head, self.dtype = (
            None if is_sharded(model) else head,
            head.weight.dtype,
        )  # whole within a pass alone
        self.width = min(width, head.width)
        self.cache = roomy_cache(unwrapped(model).config)
        device = head.weight.device
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), pad_id, dtype=torch.int64)
        self.mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.int64)
            self.mask[row, longest - len(prompt) :] = 1
        self.hides = min(map(len, prompts)) < longest or device.type == "cpu"
        self.mask = sent(self.mask, device)
        self.position = (self.mask.cumsum(-1) - 1).clamp(min=0)  # [b, t]
        self.logits = self._read(sent(ids, device), self.position)
        self.position = self.position[:, -1:]

    @torch.no_grad()
    def append(self, token: Tensor) -> None:
        """One more token of each text, [b]; ``logits`` is then of the one after it."""
        token = token.to(self.mask.device)
        self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], 1)
        self.position = self.position + 1
        self.logits = self._read(token[:, None], self.position)

    def keep(self, rows: Tensor) -> None:
        """Goes on with the texts ``rows`` [m] alone."""
        rows = sent(rows, self.mask.device)
        self.cache.batch_select_indices(rows)
        self.mask, self.position, self.logits = self.mask[rows], self.position[rows], self.logits[rows]

    def _read(self, ids: Tensor, position: Tensor) -> Tensor:
        def read() -> Tensor:
            hidden = self.decode(
                input_ids=ids,
                attention_mask=self._mask(ids.shape[1]),
                position_ids=position,
                past_key_values=self.cache,
                use_cache=True,
            )  # [b, t, d]
            return (self.head or head_of(self.model)).logits(hidden[:, -1], self.width)

        return inside(self.model, read)

    def _mask(self, new: int) -> Tensor | None:
        """What hides the padding from ``new`` tokens of each text: None where there is none to hide.

        A model asks a mask [b, t] at each token whether it hides anything, and the host waits for the answer. On an
        accelerator a single token's mask is therefore given as attention takes it, [b, 1, 1, t], where every layer sees
        the whole text and the mask serves attention alone.
        """
        if not self.hides:
            return None
        config = unwrapped(self.model).config.get_text_config()
        kind = getattr(config, "_attn_implementation", None)
        rotary = getattr(config, "rope_parameters", None) and not getattr(config, "alibi", False)
        plain = rotary and all(type(layer) is RoomyLayer for layer in self.cache.layers)
        if self.mask.is_cpu or new > 1 or not plain or kind not in ("sdpa", "eager"):
            return self.mask
        seen = self.mask[:, None, None, :] > 0
        if kind == "sdpa":
            return seen
        return torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill_(
            ~seen, torch.finfo(self.dtype).min
        )


class RoomyLayer(DynamicLayer):
    """A dynamic layer that writes into a buffer with room, instead of copying the whole cache for every token."""

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
                larger = states.new_empty(b, heads, int(stop * ROOM) + 8, d)
                larger[..., : self.size, :] = buffer[..., : self.size, :]
                self.buffers[index] = buffer = larger
            buffer[..., self.size : stop, :] = states
        self.size = stop
        self.keys, self.values = (buffer[..., :stop, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[..., : self.size, :] for buffer in self.buffers)


def roomy_cache(config: Any) -> DynamicCache:
    """The model's own kind of cache, its plain growing layers with room; sliding windows and others stay."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
