"""Weights that DeepSpeed's ZeRO-3 keeps in parts over the ranks, put together for as long as they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from selectkd.loss.teacher_rows import Head


def in_parts(tensor: Any) -> bool:
    """Whether ZeRO-3 holds this parameter: its own shape is (0,) then, and ``ds_shape`` that of the whole."""
    return hasattr(tensor, "ds_tensor")


@contextmanager
def gathered(parameters: Iterable[Tensor], *, changed: bool = False) -> Iterator[None]:
    """The parameters whole on every rank while the context lasts; a collective call, and nothing without ZeRO-3.

    changed: what rank 0 writes into them stays, on all ranks. Contexts with the same parameter do not nest.
    """
    parts = [parameter for parameter in parameters if in_parts(parameter)]
    if not parts:
        yield
        return
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if changed else None):
        yield


def head_parameters(head: Head) -> list[Tensor]:
    """What the loss multiplies by from outside the head's own forward pass: its weight, and its bias if it has one."""
    return [head.weight] if head.bias is None else [head.weight, head.bias]
