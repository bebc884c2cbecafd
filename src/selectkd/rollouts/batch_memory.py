"""Prompts to be continued, and how many of them fit a device's memory at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from selectkd.data.vision import Images
from selectkd.models.devices import free_memory
from selectkd.models.head import head_of, unwrapped
from selectkd.rollouts.kv_decoder import GROWTH

BATCH_TOKENS = 8192
"""Prompt and completion tokens of a batch on a CPU, a prompt counted at its longest neighbour's length."""
SHARE = 0.5
"""Of an accelerator's free memory: the rest is for what attention takes and for pieces too small to be used."""
MOST_ROWS = 1024
"""Rows of a batch there: more write no faster."""

LOGITS = 40
"""Bytes a vocabulary entry takes while a token is drawn: logits and probabilities, sorted and summed in fp64."""


@dataclass(frozen=True)
class Request:
    """A prompt as ids, and how many tokens may follow. copy: 0, 1, ... for several texts of one prompt; images: those
    that the prompt shows.
    """

    prompt: Sequence[int]
    limit: int
    copy: int = 0
    images: Images | None = None


@dataclass(frozen=True)
class BatchMemory:
    """Limits of a batch: a token costs ``token`` units, a row ``row``, a batch ``size``; at most ``most`` rows.

    With ``most`` set, the number of rows is a power of two: slightly different free memory then changes no batch.
    """

    size: int
    token: int = 1
    row: int = 0
    most: int | None = None

    @classmethod
    def of(cls, models: Sequence[nn.Module], device: torch.device) -> BatchMemory:
        """BATCH_TOKENS on a CPU; on an accelerator SHARE of its free bytes, a token costing its bytes in the caches."""
        free = None if device.type == "cpu" else free_memory(device)
        if free is None:
            return cls(BATCH_TOKENS)
        heads = [head_of(model) for model in models]
        token = sum(
            _token_bytes(unwrapped(model).config, head) for model, head in zip(models, heads, strict=True)
        )
        row = LOGITS * sum(head.width for head in heads)
        return cls(int(SHARE * free), token, row, MOST_ROWS)

    def rows(self, requests: Sequence[Request]) -> int:
        """How many of the requests, the longest prompt first, make a batch; at least 1."""
        longest, limit, size = len(requests[0].prompt), 0, 0
        for request in requests:
            limit = max(limit, request.limit)
            if size and (size + 1) * ((longest + limit) * self.token + self.row) > self.size:
                break
            size += 1
        if self.most is None or size == len(requests) <= self.most:
            return size
        return 1 << (min(size, self.most).bit_length() - 1)


def _token_bytes(config: Any, head: Any) -> int:
    """Bytes of a token: its keys and values in every layer, and one layer's activations while the prompt is read."""
    text = config.get_text_config()
    width = head.weight.shape[1]
    heads = getattr(text, "num_attention_heads", None) or 1
    each = getattr(text, "head_dim", None) or width // heads
    cached = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * each
    passing = 8 * width + 3 * (getattr(text, "intermediate_size", None) or 4 * width)
    return int((GROWTH * cached + passing) * head.weight.element_size())
