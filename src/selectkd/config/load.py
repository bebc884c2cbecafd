"""A recipe from a file and ``a.b=value`` overrides."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from selectkd.config.problems import Problem, explained, fields_at, raised
from selectkd.config.schema import Recipe
from selectkd.config.words import instead
from selectkd.config.yaml_text import MOST_BYTES, Document, read
from selectkd.errors import ConfigError
from selectkd.objective.plugins import search
from selectkd.objective.registry import did_you_mean

OPEN = {
    "divergence",
    "verifier",
    "selector",
    "extras",
    "method",
    "selection",
    "policy",
    "template_arguments",
    "when",
}
"""Keys whose mapping may hold any key: most hold {name, **params}, and the component says which parameters it has."""


KeyPath = tuple[str | int, ...]
INSTEAD: dict[KeyPath, KeyPath] = {
    ("training", "max_steps"): ("training", "epochs"),
    ("training", "epochs"): ("training", "max_steps"),
    ("student", "model"): ("student", "from_teacher"),
    ("student", "from_teacher"): ("student", "model"),
}
"""Keys of which a recipe has exactly one: an override of the one takes the other out."""


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with ``a.b=value`` overrides laid over it. Imports no torch.

    Raises one ConfigError that names every problem, with file:line (or the override) and what would work.
    Its folder is searched for modules that ``allow_plugin`` named.
    Names and parameters of divergences, verifiers and selectors are checked where those are built.
    """
    source = str(path)
    document = read(text_of(Path(path)), source=source)
    search(Path(path).parent)
    return _checked(document, source, overrides)


def recipe_from(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a mapping of plain values, checked as a file is."""
    return _checked(Document(dict(values)), "recipe", overrides)


def text_of(path: Path, *, kind: str = "recipe") -> str:
    """The text of a YAML file; ConfigError where it is none of a ``kind`` that can be read."""
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; a {kind} is a YAML file.")
        if not path.is_file():
            near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
            raise ConfigError(
                f"there is no {kind} {path}.{did_you_mean(path.name, near)}"
                + (" `selectkd init NAME.yaml` writes one." if kind == "recipe" else "")
            )
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ConfigError(f"{path} has {size:,} bytes. A {kind} has at most {MOST_BYTES:,}.")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the {kind} {str(path)[:200]!r} cannot be read: {error}.") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}. "
            "Save it as UTF-8."
        ) from None


def values_of(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a recipe file with overrides laid over them, for a recipe that ``load_recipe`` takes."""
    values = _copied(read(text_of(Path(path)), source=str(path)).value)
    laid = [_parsed(override) for override in overrides]
    for key, value in laid:
        _lay(values, key, value)
    _take_out(values, dict(laid))
    return values


def _checked(document: Document, source: str, overrides: Sequence[str]) -> Recipe:
    values = document.value
    if values is None:
        raise ConfigError(f"{source}: empty. A recipe has teacher, student, data, objective and training.")
    if not isinstance(values, dict):
        raise ConfigError(
            f"{source}: a recipe is a mapping (teacher: ..., student: ...), not {type(values).__name__}."
        )
    values = _copied(values)
    problems: list[Problem] = []
    laid: dict[KeyPath, Any] = {}
    for override in overrides:
        try:
            path, value = _parsed(override)
            changed = _copied(values)  # one that is refused half-way leaves nothing behind
            _lay(changed, path, value)
            values, laid[path] = changed, value
        except ConfigError as error:
            problems.append(Problem((), "--set", f"cannot take {override[:60]!r}: {error}"))
    _take_out(values, laid)
    set_by = {path: f"--set {'.'.join(map(str, path))}" for path in laid}

    def where(path: tuple[str | int, ...]) -> str:
        for length in range(len(path), 0, -1):
            if path[:length] in set_by:
                return set_by[path[:length]]
        line = document.line(path)
        return source if line is None else f"{source}:{line}"

    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += [
            Problem(path, where(path), message) for path, message in explained(error, Recipe, values)
        ]
    if recipe is None or problems:
        raise raised(sorted(problems, key=lambda problem: document.line(problem.path) or 0), source)
    return recipe


def _copied(value: Any) -> Any:
    """A copy of plain values, which overrides may change."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _parsed(override: str) -> tuple[tuple[str | int, ...], Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override[:80]!r} is not KEY=VALUE. Write --set training.learning_rate=1e-4.")
    path: tuple[str | int, ...] = tuple(
        int(part) if part.isascii() and part.isdigit() and len(part) < 9 else part
        for part in key.strip().split(".")
    )
    if any(part == "" or (isinstance(part, int) and part > 9999) for part in path) or len(path) > 16:
        raise ConfigError(f"{key[:80]!r} is not a key such as training.learning_rate.")
    for depth, step in enumerate(path, start=1):
        known = fields_at(Recipe, path[: depth - 1])
        if known and not isinstance(step, int) and step not in known:
            hint = instead(path[:depth]) or did_you_mean(step, known)
            raise ConfigError(f"there is no {'.'.join(map(str, path[:depth]))}.{hint}")
        if not known and OPEN.intersection(map(str, path[: depth - 1])):
            break  # a parameter of a component
        if not known and not isinstance(step, int):
            raise ConfigError(
                f"there is no {'.'.join(map(str, path[:depth]))[:80]}; the key before it has no keys of its own"
            )
    return path, read(text, source=f"--set {key.strip()[:60]}").value


def _lay(values: dict[str, Any], path: tuple[str | int, ...], value: Any) -> None:
    """Set ``value`` at ``path``: missing sections appear, a component's bare name becomes a mapping."""
    here: Any = values
    for depth, step in enumerate(path):
        so_far = ".".join(map(str, path[: depth + 1]))
        if isinstance(here, list) and (not isinstance(step, int) or step >= len(here)):
            raise ConfigError(f"{so_far}: the list has {len(here)} items, counted from 0")
        if isinstance(here, dict) and isinstance(step, int):
            raise ConfigError(f"{so_far}: only a list has numbered items")
        if depth == len(path) - 1:
            _put(here, step, value)
            return
        below = here[step] if isinstance(here, list) else here.get(step)  # type: ignore[index]
        if isinstance(below, str) and step in OPEN:
            below = {"name": below}
        elif below is None or (not isinstance(below, dict | list) and fields_at(Recipe, path[: depth + 1])):
            below = {}
        if not isinstance(below, dict | list):
            raise ConfigError(f"{so_far} holds {below!r}, which has no key {path[depth + 1]!r}")
        _put(here, step, below)
        here = below


def _take_out(values: dict[str, Any], laid: Mapping[KeyPath, Any]) -> None:
    """Sets to null what an override stands ``INSTEAD`` of, unless an override sets that as well."""
    sections = {path[:2]: values.get(str(path[0])) for path in laid}
    named = {
        path for path, section in sections.items()
        if len(path) == 2 and isinstance(section, dict) and section.get(str(path[1])) is not None
    }  # fmt: skip
    for path in named.intersection(INSTEAD):
        section, other = INSTEAD[path]
        if INSTEAD[path] not in named and isinstance(values.get(str(section)), dict):
            values[str(section)][str(other)] = None


def _put(place: Any, step: str | int, value: Any) -> None:
    place[step] = value
