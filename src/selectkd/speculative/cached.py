"""A model that remembers what it has read, and can forget the end of it. t tokens, v vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from selectkd.errors import ConfigError


class CachedModel:
    """A causal language model beside its key-value cache, for one sequence.

    Every layer keeps all keys and values, those with a sliding window too: a window that has dropped its oldest
    keys cannot be rolled back. ConfigError for a model whose memory is no list of keys (Mamba and its kin).
    """

    def __init__(self, model: nn.Module) -> None:
        if getattr(model, "_is_stateful", False):
            raise ConfigError(
                f"{type(model).__name__} folds what it has read into one state, which cannot be rolled back to "
                "before a rejected token. Use a model with attention alone."
            )
        self.model = model
        self.cache = DynamicCache()

    @property
    def width(self) -> int:
        """Rows of the model's head, padding included."""
        model: Any = self.model
        return int(model.config.get_text_config().vocab_size)

    @property
    def read(self) -> int:
        """How many tokens the cache holds."""
        return int(self.cache.get_seq_length())

    @torch.no_grad()
    def logits(self, ids: Int[Tensor, " t"]) -> Float[Tensor, "new v"]:
        """The logits after each token of ``ids`` that the cache does not hold yet, in fp64; at least the last one.

        ``ids`` must begin with what was read.
        """
        self.forget(ids.shape[0] - 1)
        # a token beyond a narrower head is read as the last one it has: what a draft says of it is a guess either way
        new = ids[self.read :].clamp(max=self.width - 1)
        model: Any = self.model
        out = model(input_ids=new[None], past_key_values=self.cache, use_cache=True)
        return out.logits[0].double()

    def forget(self, length: int) -> None:
        """Keeps the first ``length`` tokens at the most."""
        if self.read > length:
            self.cache.crop(length - self.read)  # a negative number: how many tokens go
