"""Selectors that rank rows: a score per row times a keep rule. SELECTORS names them all.

A selector is a frozen dataclass with ``score(pair, uniform) -> [n, m]`` (token-local, gathered in a first pass over
the vocabulary) and ``keep(scores, sequence) -> acceptance [n]``. In training it is handed the rows of a whole optimizer
step, or, where it has ``scope = "sequence"``, whole sequences at least. An Objective takes one in place of a verifier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from selectkd.objective.pair import TokenPair
from selectkd.objective.selectors.ranked import adakd, adaspec, atkd, rho_1, se_kd, teachability, tip


@runtime_checkable
class Selector(Protocol):
    """What an objective needs of a selector: a verifier with a first pass."""

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]: ...

    def keep(self, scores: Float[Tensor, "n m"], sequence: Int[Tensor, " n"]) -> Float[Tensor, " n"]: ...

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]: ...


SELECTORS: Mapping[str, Callable[..., Selector]] = MappingProxyType(
    {
        "se_kd": se_kd,
        "tip": tip,
        "teachability": teachability,
        "adaspec": adaspec,
        "atkd": atkd,
        "adakd": adakd,
        "rho_1": rho_1,
    }
)

__all__ = [
    "SELECTORS",
    "Selector",
    "adakd",
    "adaspec",
    "atkd",
    "rho_1",
    "se_kd",
    "teachability",
    "tip",
]
