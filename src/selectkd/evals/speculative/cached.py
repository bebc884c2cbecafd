"""A model that remembers what it has read, and can forget the end of it. t tokens, v vocabulary."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from selectkd.errors import ConfigError
from selectkd.models.shape import UPSTREAM_ERRORS
from selectkd.rollouts.kv_decoder import agree

TRIED = 6
"""Tokens that a model's cache is tried on, three of which are forgotten."""
_tried: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class CachedModel:
    """A causal language model beside its key-value cache, for one sequence.

    Every layer keeps all keys and values, those with a sliding window too: a window that has dropped its oldest
    keys cannot be rolled back. ConfigError for a model whose memory is no list of keys (Mamba, hybrids and their kin):
    a few tokens are read, forgotten and read again, and must give the logits of one full pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.cache = DynamicCache()
        if model not in _tried:
            _tried[model] = not getattr(model, "_is_stateful", False) and self._rolls_back()
            self.cache = DynamicCache()
        if not _tried[model]:
            raise ConfigError(
                f"{type(model).__name__} folds what it has read into one state, which cannot be rolled back to "
                "before a rejected token. Use a model with attention alone."
            )

    @torch.no_grad()
    def _rolls_back(self) -> bool:
        model: Any = self.model
        head = model.get_output_embeddings().weight
        ids = torch.linspace(1, self.width - 1, TRIED, device=head.device).long()
        whole = model(input_ids=ids[None], use_cache=False).logits[0].double()
        try:
            self.logits(ids[:-1])
            self.forget(TRIED - 3)
            again = self.logits(ids)
        except torch.OutOfMemoryError:
            raise
        except UPSTREAM_ERRORS:  # a model given a cache that it cannot use
            return False
        return agree(again, whole[-3:], head.dtype)

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
