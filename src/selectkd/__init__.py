"""selectkd: distil a large language model into a small one, learning where the teacher agrees with the student.

The student proposes a token, the teacher verifies it, and only accepted tokens get the full distillation
loss; rejected ones get weight beta (SelecTKD, arXiv 2510.24021).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BetaSchedule": "selectkd.objective.schedules",
    "CachedRows": "selectkd.loss.teacher_rows",
    "DIVERGENCES": "selectkd.objective.divergences",
    "DistillConfig": "selectkd.training.distill_config",
    "DistillTrainer": "selectkd.training.distill_trainer",
    "Head": "selectkd.loss.head",
    "LiveRows": "selectkd.loss.teacher_rows",
    "LossOptions": "selectkd.loss.options",
    "Objective": "selectkd.objective.objective",
    "SELECTORS": "selectkd.objective.selectors",
    "TaidSchedule": "selectkd.objective.schedules",
    "TokenPair": "selectkd.objective.pair",
    "VERIFIERS": "selectkd.objective.verifiers",
    "allow_plugin": "selectkd.objective.plugins",
    "component": "selectkd.objective.plugins",
    "dense_pair": "selectkd.objective.pair",
    "distillation_loss": "selectkd.loss.distillation",
    "load_recipe": "selectkd.config",
    "topk_pair": "selectkd.objective.pair",
    "uniforms": "selectkd.objective.uniforms",
}

__all__ = [  # noqa: RUF022 - the order a reader meets them in
    "distillation_loss",
    "Objective",
    "LiveRows",
    "CachedRows",
    "Head",
    "LossOptions",
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
    "DistillConfig",
    "load_recipe",
    "component",
    "allow_plugin",
]

if TYPE_CHECKING:
    from selectkd.config import load_recipe
    from selectkd.loss.distillation import distillation_loss
    from selectkd.loss.head import Head
    from selectkd.loss.options import LossOptions
    from selectkd.loss.teacher_rows import CachedRows, LiveRows
    from selectkd.objective.divergences import DIVERGENCES
    from selectkd.objective.objective import Objective
    from selectkd.objective.pair import TokenPair, dense_pair, topk_pair
    from selectkd.objective.plugins import allow_plugin, component
    from selectkd.objective.schedules import BetaSchedule, TaidSchedule
    from selectkd.objective.selectors import SELECTORS
    from selectkd.objective.uniforms import uniforms
    from selectkd.objective.verifiers import VERIFIERS
    from selectkd.training.distill_config import DistillConfig
    from selectkd.training.distill_trainer import DistillTrainer


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MOVED:
        return import_module(f"selectkd.{name}")
    raise AttributeError(f"module 'selectkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


_MOVED = {
    "divergences": "objective.divergences",
    "pair": "objective.pair",
    "registry": "objective.registry",
    "schedules": "objective.schedules",
    "selectors": "objective.selectors",
    "testing": "objective.contract",
    "verifiers": "objective.verifiers",
    "divergences.gradient": "objective.divergences.closed_form",
    "divergences.power": "objective.divergences.alpha_beta",
    "divergences.sorted": "objective.divergences.uld",
    "divergences.top_k": "objective.divergences.from_top_k",
    "verifiers.statistics": "objective.verifiers.row_statistics",
}
"""Modules that other people's code imports, and their homes of today."""


class _OldHomes(MetaPathFinder, Loader):
    """Imports of a module by its old name give the module, with one deprecation warning a name."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        name = fullname.removeprefix("selectkd.")
        head, dot, rest = name.partition(".")
        if name == fullname or head not in _MOVED:
            return None
        return ModuleSpec(fullname, self, origin=f"selectkd.{_MOVED.get(name, _MOVED[head] + dot + rest)}")

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None and spec.origin is not None
        warnings.warn(
            f"{spec.name} is now {spec.origin}; import it from there", DeprecationWarning, stacklevel=2
        )
        sys.modules[spec.name] = import_module(spec.origin)


sys.meta_path.insert(0, _OldHomes())  # before the finder that would load a package's file a second time
