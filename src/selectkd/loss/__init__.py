"""The fused loss: rows of both models become loss and gradient; no [n, v] tensor exists. Torch and jaxtyping alone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selectkd.loss.aligned_rows import AlignedRows
    from selectkd.loss.distillation import distillation_loss
    from selectkd.loss.head import Head
    from selectkd.loss.options import LossOptions
    from selectkd.loss.teacher_rows import CachedRows, LiveRows
    from selectkd.loss.token_log_probs import token_log_probs

_HOMES = {
    "AlignedRows": "selectkd.loss.aligned_rows",
    "CachedRows": "selectkd.loss.teacher_rows",
    "Head": "selectkd.loss.head",
    "LiveRows": "selectkd.loss.teacher_rows",
    "LossOptions": "selectkd.loss.options",
    "distillation_loss": "selectkd.loss.distillation",
    "token_log_probs": "selectkd.loss.token_log_probs",
}

__all__ = [
    "AlignedRows",
    "CachedRows",
    "Head",
    "LiveRows",
    "LossOptions",
    "distillation_loss",
    "token_log_probs",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return vars(import_module(_HOMES[name]))[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
