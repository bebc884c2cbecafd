"""Where a recipe that names a method says something else than the method does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selectkd.config.expand import parts_of

WHOLE = ("divergence", "verifier", "selector")
"""Components: what a recipe says of one is all there is of it."""

ABSENT = "nothing"


def departures(recipe: Any) -> dict[str, tuple[Any, Any]]:
    """{key: (what the method has there, what the recipe has)} for each part of a method that the recipe overrides.

    Empty without a method, and for the verifier and beta of a ``selection``, which is meant to be laid over a method.
    """
    if recipe.method is None:
        return {}
    found: dict[str, tuple[Any, Any]] = {}
    _compare(parts_of(recipe.method), recipe.model_dump(exclude_none=True), "", found)
    if recipe.selection is not None:
        gate = ("objective.verifier", "objective.beta", "objective.selector")
        found = {key: pair for key, pair in found.items() if not key.startswith(gate)}
    return found


def told_of(recipe: Any) -> list[str]:
    """A warning where the recipe departs from its method, none elsewhere."""
    found = departures(recipe)
    if not found:
        return []
    each = [f"{key} is {_short(own)}, not {_short(methods)}" for key, (methods, own) in found.items()]
    return [
        f"this is not {recipe.method['name']} as published: {'; '.join(each)}. "
        "Leave those keys out to have the method's own."
    ]


def _compare(methods: Any, own: Any, at: str, found: dict[str, tuple[Any, Any]]) -> None:
    name = at.rpartition(".")[2]
    both = isinstance(methods, Mapping) and isinstance(own, Mapping)
    if both and methods.get("name") == own.get("name") and not (name in WHOLE and set(own) - set(methods)):
        for key, value in methods.items():
            _compare(value, own.get(key), f"{at}.{key}" if at else key, found)
    elif methods != own:
        found[at] = (methods, ABSENT if own is None else own)


def _short(value: Any) -> str:
    """A component as a call, generalized_jsd(beta=0.5); anything else as it is."""
    if isinstance(value, Mapping) and "name" in value:
        rest = ", ".join(f"{key}={each}" for key, each in value.items() if key != "name")
        return f"{value['name']}({rest})" if rest else str(value["name"])
    return str(value)[:80]
