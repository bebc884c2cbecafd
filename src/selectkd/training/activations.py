"""Activations that wait for the backward pass in main memory, or are computed again in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LEAST_BYTES = 1 << 20
"""A smaller tensor stays: its copy would take longer to start than to make."""


@contextmanager
def activations_offloaded(model: nn.Module, *, least: int = LEAST_BYTES) -> Iterator[None]:
    """While it lasts what autograd keeps of a forward pass is copied to main memory, and back for the backward pass.

    Left where they are: tensors of fewer than ``least`` bytes, weights, and the copies of weights that autocast
    multiplies with (known by a weight's shape). The numbers are the same to the bit. Copies are pinned and wait for
    nothing but the device's own queue.
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    shapes = {tuple(sorted(parameter.shape)) for parameter in model.parameters() if parameter.ndim == 2}

    def leave(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        small = tensor.numel() * tensor.element_size() < least
        weight = tensor.ndim == 2 and tuple(sorted(tensor.shape)) in shapes
        if small or weight or tensor.untyped_storage().data_ptr() in weights:
            return tensor
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        kept.copy_(tensor, non_blocking=True)
        return tensor.device, kept

    def fetch(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[1].to(kept[0], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(leave, fetch):
        yield


def checkpoint_activations(student: Any) -> None:
    """Activations recomputed in the backward pass; transformers renames the method in version 6."""
    enable = (
        getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
