"""An export as its runtime reads it: text to ids, ids to logits, the ends of a text, the chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Exported:
    """What was read back. t tokens, v vocabulary.

    encode: (text, whether the tokenizer adds its own ends) -> ids. logits: ids [t] -> fp32 [t, v]. ends: ids that end
    a text. model: where the export is a torch module. read_by: whose code read it. differences: settings that came
    back otherwise, in words.
    """

    encode: Callable[[str, bool], list[int]]
    logits: Callable[[Tensor], Tensor]
    ends: frozenset[int]
    template: str | None
    read_by: str
    model: nn.Module | None = None
    differences: list[str] = field(default_factory=list)


def encoder(tokenizer: Any) -> Callable[[str, bool], list[int]]:
    """``Exported.encode`` of a tokenizer of transformers."""
    return lambda text, special: list(tokenizer(text, add_special_tokens=special)["input_ids"])


def model_logits(model: Any) -> Callable[[Tensor], Tensor]:
    """``Exported.logits`` of a model of transformers."""

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        device = next(model.parameters()).device
        return model(input_ids=ids[None].to(device), use_cache=False).logits[0].float()  # [t, v]

    return logits


def template_of(tokenizer: Any) -> str | None:
    """The chat template of a tokenizer; of several the default one."""
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found
