"""The page of every key of a recipe, docs/recipe.md, from the schema."""

from __future__ import annotations

import json
from typing import Any

from selectkd.config.keys import sections
from selectkd.config.schema import Recipe
from selectkd.config.study import Claim, Study, Trend

INTRODUCTION = """\
# Every key of a recipe

Written by `selectkd schema --markdown` from the descriptions in `src/selectkd/config`; a test holds the two equal.
A recipe is a YAML file of these sections; the keys of a study are at the end. A key outside it is written with dots:
`selectkd train recipe.yaml training.learning_rate=1e-4`, where `N` in a path is a number from 0 and `NAME` a name of
yours.
A default of SelecTKD's is from the paper (arXiv 2510.24021), which takes its training recipe from DistiLLM-2
(arXiv 2503.07067).
"""

STUDY = """\
# Every key of a study

A study is a YAML file for `selectkd study run`: one recipe, several arms that differ from it, seeds, and a statement
that its author wrote before the first run. The folder `studies` has examples. `selectkd study results` writes tables
and verdicts from the rows.
"""

LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
TYPES = {"boolean": "`true` or `false`", "string": "text", "object": "mapping"}


def page() -> str:
    """docs/recipe.md: a table of keys for each section, in the order in which the schema comes to them; then those of a
    study."""
    schema = Recipe.model_json_schema()
    paths = sections(schema)
    parts = [INTRODUCTION, _table(schema)]
    for name, found in paths.items():
        section = schema["$defs"][name]
        shared = any(set(found) & set(others) for other, others in paths.items() if other != name)
        parts += [_heading(section, found, shared), section["description"] + "\n", _table(section)]
    parts += [STUDY, _table(Study.model_json_schema())]
    for key, section in (("claims", Claim), ("trends", Trend)):
        schema = section.model_json_schema()
        parts += [f"## `{key}[N]`\n", schema["description"] + "\n", _table(schema)]
    return "\n".join(parts).strip()


def _heading(section: Any, paths: list[str], shared: bool) -> str:
    """Where the section stands; with its first key where another kind of section may stand there too."""
    key, first = next(iter(section["properties"].items()))
    name = section["properties"].get("name", {}).get("const")
    title = f"name: {name}" if name else f"{key}: {_shown(first['const'])}" if "const" in first else key
    places = ", ".join(f"`{path}`" for path in sorted(dict.fromkeys(paths), key=len))
    return f"## {places}" + (f" with `{title}`" if shared else "") + "\n"


def _table(section: Any) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, node in section["properties"].items():
        default = "needed" if key in section.get("required", ()) else f"`{_shown(node.get('default'))}`"
        default = "" if node.get("default", ...) is None or default == "`null`" else default
        meaning = " ".join(node["description"].split())
        cells = (f"`{key}`", _value(node), default, meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _shown(value: Any) -> str:
    return json.dumps(value).replace('"', "")


def _value(node: Any) -> str:
    """What a key may hold, in words."""
    for kind in ("anyOf", "oneOf"):
        if kind in node:
            each = [_value(one) for one in node[kind] if one.get("type") != "null"]
            return " or ".join(dict.fromkeys(each))
    if "$ref" in node:
        return "mapping"
    if "const" in node or "enum" in node:
        return ", ".join(f"`{_shown(value)}`" for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        return f"list of {_value(node['items'])}"
    if node.get("type") in ("integer", "number"):
        limits = [f"{word} {node[limit]:.10g}" for limit, word in LIMITS.items() if limit in node]
        return " ".join([node["type"], " and ".join(limits)]).strip()
    return TYPES[node["type"]]
