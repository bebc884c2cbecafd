"""Every key of a recipe with a value of every type: taken, or refused in words; never another error."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from selectkd.config import Recipe, recipe_from
from selectkd.errors import ConfigError

BASE: dict[str, Any] = {
    "teacher": {"model": "a"},
    "student": {"model": "b"},
    "data": {"sources": [{"path": "c"}]},
    "training": {"output_dir": "r", "max_steps": 2, "batch_size": 2},
}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 0.5, -0.5, 1e300, 10**400, "", "x", "1", "auto", [], [1], ["x"],
    [[]], [{}], [None], {},
    {"name": "x"}, {"name": 1}, {"name": None}, {"name": []}, {"name": {}}, {"a": {}}, {1: 2}, {None: 1},
    {"name": "x", 1: 2}, {"start": 1}, {"model": 1}, [{"name": 1}], [{"name": []}],
    {"verifier": [1]}, {"name": "gkd", 1: 2},
]  # fmt: skip


def keys() -> list[tuple[str | int, ...]]:
    """Every key of the schema, through its references and alternatives."""
    schema = Recipe.model_json_schema()
    found: set[tuple[str | int, ...]] = set()

    def walk(node: Any, path: tuple[str | int, ...], above: tuple[str, ...]) -> None:
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            if name not in above:
                walk(schema["$defs"][name], path, (*above, name))
            return
        for alternative in [one for kind in ("anyOf", "oneOf", "allOf") for one in node.get(kind, [])]:
            walk(alternative, path, above)
        inside = [(name, each) for name, each in node.get("properties", {}).items()]
        inside += [(0, node["items"])] if isinstance(node.get("items"), dict) else []
        more = node.get("additionalProperties")
        inside += [("dataset", more)] if isinstance(more, dict) else []
        for step, each in inside:
            found.add((*path, step))
            walk(each, (*path, step), above)

    walk(schema, (), ())
    return sorted(found, key=str)


def laid(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    here: Any = (values := copy.deepcopy(BASE))
    for step, below in zip(path, [*path[1:], None], strict=True):
        empty: Any = [] if isinstance(below, int) else {}
        if isinstance(here, list):
            here.extend({} for _ in range(len(here), int(step) + 1))
        if below is None:
            here[step] = value
        else:
            there = here[step] if isinstance(here, list) else here.get(step)
            if not isinstance(there, type(empty)):
                here[step] = empty
            here = here[step]
    return values


def outcomes() -> Iterator[tuple[tuple[str | int, ...], Any, bool]]:
    for path in keys():
        for value in VALUES:
            try:
                recipe_from(laid(path, value))
                yield path, value, True
            except ConfigError as error:
                assert str(error) and len(str(error).splitlines()) <= 6, (path, value)
                yield path, value, False


def test_a_value_of_any_type_at_any_key_is_taken_or_refused_in_words() -> None:
    seen = list(outcomes())
    taken = sum(good for _, _, good in seen)
    assert len(seen) > 9_000 and 100 < taken < len(seen) // 10


@pytest.mark.parametrize("path", [("method",), ("selection",), ("objective", "extras")])
def test_top_words_of_any_type_are_refused_in_words(path: tuple[str, ...]) -> None:
    for value in (7, [], [[]], {"name": ["gkd"]}, {"name": {"gkd": 1}}, {1: 1}):
        try:
            recipe_from(laid(path, value))
        except ConfigError as error:
            assert path[0] in str(error)
