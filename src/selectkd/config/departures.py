"""The keys in which a recipe that names a method departs from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selectkd.config.expand import parts_of

WHOLE = ("divergence", "verifier", "selector")
"""Components, which a recipe replaces as a whole."""

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


def departure_warnings(recipe: Any) -> list[str]:
    """A warning where the recipe departs from its method, none elsewhere."""
    found = departures(recipe)
    if not found:
        return []
    each = [
        f"{key} is {as_call(value)}, not {as_call(published)}" for key, (published, value) in found.items()
    ]
    return [
        f"the recipe is not {recipe.method['name']} as published: {'; '.join(each)}. "
        "Leave those keys out to have the method's values."
    ]


def _compare(published: Any, value: Any, at: str, found: dict[str, tuple[Any, Any]]) -> None:
    name = at.rpartition(".")[2]
    both = isinstance(published, Mapping) and isinstance(value, Mapping)
    if (
        both
        and published.get("name") == value.get("name")
        and not (name in WHOLE and set(value) - set(published))
    ):
        for key, part in published.items():
            _compare(part, value.get(key), f"{at}.{key}" if at else key, found)
    elif published != value:
        found[at] = (published, ABSENT if value is None else value)


def as_call(value: Any) -> str:
    """A component as a call; anything else as it is.

    >>> as_call({"name": "generalized_jsd", "beta": 0.5})
    'generalized_jsd(beta=0.5)'
    """
    if isinstance(value, Mapping) and "name" in value:
        rest = ", ".join(f"{key}={each}" for key, each in value.items() if key != "name")
        return f"{value['name']}({rest})" if rest else str(value["name"])
    return str(value)[:80]
