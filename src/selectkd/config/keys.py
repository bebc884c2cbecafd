"""Every key of a recipe by its dotted path, from the schema."""

from __future__ import annotations

import functools
from typing import Any

from selectkd.config.schema import Recipe


def sections(schema: Any) -> dict[str, list[str]]:
    """Where each section of a recipe's JSON Schema may stand: {its name there: dotted paths}.

    ``N`` stands for the number of an item, ``NAME`` for a name. What is in a section is visited at its first path.
    """
    paths: dict[str, list[str]] = {}
    _visit(schema, "", schema["$defs"], paths)
    return paths


@functools.cache
def keys() -> list[str]:
    """Every key with its path.

    >>> [key for key in keys() if key.endswith("learning_rate")]
    ['training.learning_rate']
    """
    schema = Recipe.model_json_schema()
    found = dict.fromkeys(schema["properties"])
    for name, paths in sections(schema).items():
        found |= {f"{path}.{key}": None for path in paths for key in schema["$defs"][name]["properties"]}
    return list(found)


def _visit(node: Any, path: str, defined: Any, paths: dict[str, list[str]]) -> None:
    if isinstance(node, list):
        for each in node:
            _visit(each, path, defined, paths)
    elif "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        paths.setdefault(name, []).append(path)
        if len(paths[name]) == 1:
            _visit(defined[name], path, defined, paths)
    else:
        for kind in ("anyOf", "oneOf"):
            _visit(node.get(kind, []), path, defined, paths)
        for key, each in node.get("properties", {}).items():
            _visit(each, f"{path}.{key}" if path else key, defined, paths)
        for kind, step in (("items", "N"), ("additionalProperties", "NAME")):
            if isinstance(node.get(kind), dict):
                _visit(node[kind], f"{path}.{step}", defined, paths)
