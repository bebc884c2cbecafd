"""What a divergence states of itself beside its value, kept by the identity of its function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from selectkd.objective.registry import unbound

if TYPE_CHECKING:
    from selectkd.objective.divergences.closed_form import ClosedForm
    from selectkd.objective.divergences.from_top_k import Exactness

F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Divergence:
    """A divergence, value(logp, logq, **params) -> [n], and what holds where it states nothing.

    closed_form: its value and gradient together, with the same parameters; the contract suite holds the two equal.
    from_top_k: what it is from a top-K teacher, always the same or a function of its parameters. pairs: whether a
    column is the same outcome on both sides.
    """

    value: Callable[..., Tensor]
    closed_form: ClosedForm | None = None
    from_top_k: Exactness | Callable[..., Exactness] | None = None
    pairs: bool = True


_STATED: dict[int, Divergence] = {}
"""By ``id`` of the function, which its record keeps alive: one that has the name of another is not taken for it."""


def states(
    *,
    closed_form: ClosedForm | None = None,
    from_top_k: Exactness | Callable[..., Exactness] | None = None,
    pairs: bool = True,
) -> Callable[[F], F]:
    """A decorator by which a divergence states the fields of its ``Divergence``; the function stays as it is."""

    def state(function: F) -> F:
        _STATED[id(function)] = Divergence(function, closed_form, from_top_k, pairs)
        return function

    return state


def record_of(divergence: Callable[..., Any]) -> tuple[Divergence, Mapping[str, Any]]:
    """What a divergence states, and the parameters bound to it."""
    function, params = unbound(divergence)
    return _STATED.get(id(function)) or Divergence(function), params
