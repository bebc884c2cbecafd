"""Everything that is wrong with a recipe, in one message of at most six lines."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from selectkd.config.words import VALUES, instead
from selectkd.errors import ConfigError, abridged
from selectkd.objective.registry import did_you_mean

TAGS = {"source", "share", "constant", "change"}
"""Names of the alternatives of the schema; they are no keys of a recipe."""

EXACTLY_ONE = (("student", "model", "from_teacher"), ("training", "max_steps", "epochs"))


@dataclass(frozen=True)
class Problem:
    """A fault of a recipe: its key, the place where that key was written, and a message."""

    path: tuple[str | int, ...]
    where: str
    message: str

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path)) or "the recipe"

    def __str__(self) -> str:
        text = f"{self.where}: {self.key} {self.message}" + ("" if self.message.endswith((".", "?")) else ".")
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def raised(problems: Sequence[Problem], source: str) -> ConfigError:
    """One ConfigError that names every problem: the first ones in full, the keys of the rest."""
    if len(problems) == 1:
        return ConfigError(str(problems[0]))
    lines = [f"{source}: {len(problems)} things are wrong:"]
    shown = problems if len(problems) <= 5 else problems[:4]
    lines += [f"  {problem}" for problem in shown]
    if len(shown) < len(problems):
        lines.append(
            "  and also: " + ", ".join(problem.key for problem in problems[len(shown) :])[:2000] + "."
        )
    return ConfigError("\n".join(lines))


def explained(
    error: ValidationError, model: type[BaseModel], values: Any
) -> list[tuple[tuple[str | int, ...], str]]:
    """(key path, message) for each error of a validation, in the user's words, one per path."""
    found: dict[tuple[str | int, ...], list[str]] = {}
    for one in error.errors(include_url=False):
        path = _path(one["loc"], values)
        at = one.get("ctx", {}).get("at")
        path = (*path, at) if at else path
        message = _message(one, model, path)
        if message not in found.setdefault(path, []):
            found[path].append(message)
    for section, one, other in EXACTLY_ONE:  # pydantic looks at several keys only where each of them is right
        here = values.get(section) if isinstance(values, Mapping) else None
        if isinstance(here, Mapping) and (here.get(one) is None) == (here.get(other) is None):
            found.setdefault((section,), [f"needs exactly one of {one} and {other}"])
    return [(path, " or ".join(message)) for path, message in found.items()]


def _path(loc: Sequence[str | int], values: Any) -> tuple[str | int, ...]:
    """The location without the names of alternatives, which are not in the values."""
    path: list[str | int] = []
    here: Any = values
    for step in loc:
        if _holds(here, step):
            here = here[step]
        elif step == "teacher" and path[:1] == ["teacher"]:
            continue  # one of several teachers, whose keys stand beside its weight
        elif step in TAGS or not isinstance(here, Mapping) or not str(step).isidentifier():
            continue  # the name of an alternative
        else:
            here = None  # a key that is missing
        path.append(step)
    return tuple(path)


def _holds(here: Any, step: str | int) -> bool:
    if isinstance(here, list):
        return isinstance(step, int) and step < len(here)
    return isinstance(here, Mapping) and step in here


def _message(one: Any, model: type[BaseModel], path: tuple[str | int, ...]) -> str:
    kind, value = one["type"], one.get("input")
    limits = one.get("ctx", {})
    if kind == "selectkd":
        return str(limits["message"])
    if kind == "extra_forbidden":
        known = sorted(fields_at(model, path[:-1]))
        if path[-1] in known:  # of another alternative than the one that is meant
            kind_of = str(one["loc"][-2])
            return f"is not a key of {kind_of}, but of another kind. Leave it out, or write that kind"
        return "is not a key." + (
            instead(path) or f"{did_you_mean(str(path[-1]), known)} Known here: {', '.join(known)}"
        )
    if kind == "missing":
        return "is missing"
    shown = f"= {_shown(value)} "
    if kind == "literal_error":
        expected = str(limits["expected"])
        known = expected.replace("'", "").replace(" or ", ", ").split(", ")
        ours = VALUES.get(str(value))
        return f"{shown}must be {expected}." + (
            f" Write {ours}." if ours in known else did_you_mean(str(value), known)
        )
    if kind in ("dict_type", "model_type"):
        return f"{shown}must be a mapping of keys to values{_mapping(value, fields_at(model, path))}"
    words = {
        "int_type": "must be an integer",
        "float_type": "must be a number",
        "bool_type": "must be true or false",
        "string_type": "must be a string",
        "list_type": f"must be a list, such as [{value}]"
        if isinstance(value, str | int)
        else "must be a list",
        "finite_number": "must be finite",
        "string_too_short": "must not be empty",
        "too_short": "must not be empty",
        "string_pattern_mismatch": "may hold letters, digits, '_', '-' and '.', at most 64 of them",
    }
    if kind in words:
        return shown + words[kind]
    signs = {
        "greater_than": ("above", "gt"),
        "greater_than_equal": ("at least", "ge"),
        "less_than": ("below", "lt"),
        "less_than_equal": ("at most", "le"),
    }
    if kind in signs:
        word, limit = signs[kind]
        return f"{shown}must be {word} {limits[limit]}"
    return shown + str(one["msg"])[:1].lower() + str(one["msg"])[1:]


def _mapping(value: Any, known: set[str]) -> str:
    """The mapping to write in place of a plain value; empty where none is known."""
    if value is True:
        return "; {} takes its defaults"
    for key, form in (
        ("model", "{{model: {}}}"),
        ("path", "{{path: {}}}"),
        ("sources", "{{sources: [{{path: {}}}]}}"),
    ):
        if isinstance(value, str) and key in known:
            return f": {form.format(_shown(value))}"
    return ""


def fields_at(model: type[BaseModel], path: Sequence[str | int]) -> set[str]:
    """The keys that a recipe may have below a path; empty where the path leads to no section."""
    places: list[Any] = [model]
    for step in path:
        if isinstance(step, str):  # an item of a list has the keys of its list
            below = [keys[step] for keys in map(_keys, places) if step in keys]
            places = [place for annotation in below for place in _places(annotation)]
    return {name for place in places for name in _keys(place)}


def _places(annotation: Any) -> list[Any]:
    """The sections and mappings that a value of an annotation may be, alone or in a list."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    if typing.get_origin(annotation) is dict:
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _places(part)]


def _keys(place: Any) -> dict[str, Any]:
    """{key: annotation} of a section, or of a mapping whose keys are a few words."""
    if typing.get_origin(place) is not dict:
        return {name: field.annotation for name, field in place.model_fields.items()}
    names, value = typing.get_args(place)
    return dict.fromkeys(typing.get_args(names), value) if typing.get_origin(names) is typing.Literal else {}


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    return abridged(repr(value))
