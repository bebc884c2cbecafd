"""selectkd: distil a large language model into a small one, learning where the teacher agrees with the student.

The student proposes a token, the teacher verifies it, and only accepted tokens get the full distillation
loss; rejected ones get weight beta (SelecTKD, arXiv 2510.24021).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BetaSchedule": "selectkd.schedules",
    "CachedRows": "selectkd.rows",
    "DIVERGENCES": "selectkd.divergences",
    "DistillTrainer": "selectkd.training.trainer",
    "Head": "selectkd.rows",
    "LiveRows": "selectkd.rows",
    "Objective": "selectkd.objective",
    "SELECTORS": "selectkd.selectors",
    "TaidSchedule": "selectkd.schedules",
    "TokenPair": "selectkd.pair",
    "VERIFIERS": "selectkd.verifiers",
    "allow_plugin": "selectkd.plugins",
    "component": "selectkd.plugins",
    "dense_pair": "selectkd.pair",
    "distillation_loss": "selectkd.distill",
    "load_recipe": "selectkd.config",
    "topk_pair": "selectkd.pair",
    "uniforms": "selectkd.randomness",
}

__all__ = [  # noqa: RUF022 - the order a reader meets them in
    "distillation_loss",
    "Objective",
    "LiveRows",
    "CachedRows",
    "Head",
    "uniforms",
    "DIVERGENCES",
    "VERIFIERS",
    "SELECTORS",
    "TokenPair",
    "dense_pair",
    "topk_pair",
    "BetaSchedule",
    "TaidSchedule",
    "DistillTrainer",
    "load_recipe",
    "component",
    "allow_plugin",
]

if TYPE_CHECKING:
    from selectkd.config import load_recipe
    from selectkd.distill import distillation_loss
    from selectkd.divergences import DIVERGENCES
    from selectkd.objective import Objective
    from selectkd.pair import TokenPair, dense_pair, topk_pair
    from selectkd.plugins import allow_plugin, component
    from selectkd.randomness import uniforms
    from selectkd.rows import CachedRows, Head, LiveRows
    from selectkd.schedules import BetaSchedule, TaidSchedule
    from selectkd.selectors import SELECTORS
    from selectkd.training.trainer import DistillTrainer
    from selectkd.verifiers import VERIFIERS


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'selectkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
