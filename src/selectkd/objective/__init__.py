"""What one token costs: a divergence, a verifier or selector, and beta. Imports torch and jaxtyping alone.

The names below load on first use, so that recipes are checked without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selectkd.objective.divergences import DIVERGENCES
    from selectkd.objective.objective import Objective
    from selectkd.objective.pair import TokenPair, dense_pair, topk_pair
    from selectkd.objective.plugins import allow_plugin, component
    from selectkd.objective.registry import build
    from selectkd.objective.schedules import BetaSchedule, TaidSchedule
    from selectkd.objective.selectors import SELECTORS
    from selectkd.objective.uniforms import uniforms
    from selectkd.objective.verifiers import VERIFIERS

_HOMES = {
    "BetaSchedule": "selectkd.objective.schedules",
    "DIVERGENCES": "selectkd.objective.divergences",
    "Objective": "selectkd.objective.objective",
    "SELECTORS": "selectkd.objective.selectors",
    "TaidSchedule": "selectkd.objective.schedules",
    "TokenPair": "selectkd.objective.pair",
    "VERIFIERS": "selectkd.objective.verifiers",
    "allow_plugin": "selectkd.objective.plugins",
    "build": "selectkd.objective.registry",
    "component": "selectkd.objective.plugins",
    "dense_pair": "selectkd.objective.pair",
    "topk_pair": "selectkd.objective.pair",
    "uniforms": "selectkd.objective.uniforms",
}

__all__ = [
    "DIVERGENCES",
    "SELECTORS",
    "VERIFIERS",
    "BetaSchedule",
    "Objective",
    "TaidSchedule",
    "TokenPair",
    "allow_plugin",
    "build",
    "component",
    "dense_pair",
    "topk_pair",
    "uniforms",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return vars(import_module(_HOMES[name]))[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
