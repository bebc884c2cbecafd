"""The head of a language model: from hidden states to logits. n rows, c rows of a chunk, v vocabulary, d width."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or wider where the logits are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a head's products: bf16 for an fp32 head under autocast to bf16, its own everywhere else, and where
    nothing is multiplied ([v, 0], ``LogitHead``).

    A product into given memory never asks autocast. fp16 is not followed: a row's gradient, its entries some
    row_scale / v large, falls below its range, and loss scaling comes too late to save it.
    """
    device = weight.device.type
    if weight.dtype == torch.float32 and weight.shape[1] and torch.is_autocast_enabled(device):
        asked = torch.get_autocast_dtype(device)
        return asked if asked == torch.bfloat16 else weight.dtype
    return weight.dtype


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = cap(scale * (hidden weight^T + bias)), cap(z) = softcap tanh(z / softcap).

    weight is [v, d], bias [v] or None. ``scale`` covers Cohere (logit_scale) and Granite (1 / logits_scaling),
    ``softcap`` Gemma. Gradients reach weight and bias where they require them.
    """

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, head: Float[Tensor, "v d"] | Head) -> Head:
        """The head itself, or a plain weight matrix as a head without bias, scale or cap."""
        return head if isinstance(head, Head) else cls(head)

    def to(self, device: torch.device | str) -> Head:
        """The head on ``device``; itself where it is there."""
        if self.weight.device == torch.device(device):
            return self
        bias = None if self.bias is None else self.bias.to(device)
        return Head(self.weight.to(device), bias, self.scale, self.softcap)

    def detach(self) -> Head:
        """The head without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    @property
    def is_plain(self) -> bool:
        """Whether the logits are the product itself: no bias, scale or cap."""
        return self.bias is None and self.scale == 1.0 and self.softcap is None

    def forbidden(self, width: int) -> Int[Tensor, " f"]:
        """The ids below ``width`` that a bias of -inf forbids: their logits are -inf. A soft-cap makes them finite."""
        if self.bias is None or self.softcap is not None:
            return torch.empty(0, dtype=torch.long, device=self.weight.device)
        return self.bias[:width].isneginf().nonzero()[:, 0]

    @property
    def width(self) -> int:
        """Number of rows of the head, padded vocabulary rows included."""
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """Numbers of a row that the head takes: d."""
        return self.weight.shape[1]

    def raw(
        self,
        hidden: Float[Tensor, "*c d"],
        width: int | None = None,
        *,
        out: Float[Tensor, "b w"] | None = None,
    ) -> Float[Tensor, "*c w"]:
        """The matrix product alone, hidden weight[:width]^T in the head's dtype, into ``out`` if given: [c, v]."""
        hidden, weight = hidden.to(self.weight.dtype), self.weight[:width]
        if out is None:
            return functional.linear(hidden, weight)
        return torch.mm(hidden, weight.t(), out=out[: hidden.shape[0]])

    def finish(self, raw: Float[Tensor, "*c w"]) -> Float[Tensor, "*c w"]:
        """fp32 (or wider), bias, scale and soft-cap on top of ``raw``: elementwise and differentiable."""
        return finish_logits(raw, self.bias, self.scale, self.softcap)

    def logits(self, hidden: Float[Tensor, "*c d"], width: int | None = None) -> Float[Tensor, "*c w"]:
        """The logits the model itself would give, in fp32 or wider: [c, v]."""
        return self.finish(self.raw(hidden, width))


@dataclass(frozen=True)
class LogitHead(Head):
    """Stands where a head would where logits [n, v] are given in place of hidden states: ``raw`` is the logits.

    weight is [v, 0]: there is nothing to multiply, and no gradient but that of the logits.
    """

    @classmethod
    def beside(cls, logits: Float[Tensor, "n v"]) -> LogitHead:
        """The head of these logits."""
        return cls(logits.detach().new_empty(logits.shape[1], 0))

    @property
    def inputs(self) -> int:
        return self.width

    def raw(
        self,
        hidden: Float[Tensor, "*c d"],
        width: int | None = None,
        *,
        out: Float[Tensor, "b w"] | None = None,
    ) -> Float[Tensor, "*c w"]:
        """The first ``width`` logits of each row, copied into ``out`` if given: [c, v]."""
        logits = hidden[..., :width]
        return logits if out is None else out[: hidden.shape[0]].copy_(logits)


def finish_logits(
    raw: Float[Tensor, "*c w"], bias: Float[Tensor, " v"] | None, scale: float, softcap: float | None
) -> Float[Tensor, "*c w"]:
    """``Head.finish`` of a head with these."""
    logits = raw if raw.dtype == torch.float64 else raw.float()
    if bias is not None:
        logits = logits + bias[: raw.shape[-1]].to(logits.dtype)
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def log_softmax(logits: Float[Tensor, "n v"], temperature: float) -> Float[Tensor, "n v"]:
    """Log-softmax of logits / temperature over the last axis; a temperature of 1 costs nothing."""
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
