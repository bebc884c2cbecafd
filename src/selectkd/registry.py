"""Names to components: a spec (name, {name, **params}, "module:attribute" or an object) against a table. No torch."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from selectkd.errors import ConfigError

Spec = str | Mapping[str, Any] | Callable[..., Any]


def did_you_mean(word: str, known: list[str]) -> str:
    """' Did you mean X?' for the closest known word, else ''."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def parameters(component: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters a recipe may set, by name: those after the tensors of a function, or of a factory."""
    try:
        every = inspect.signature(component).parameters
    except (TypeError, ValueError):
        return {}
    return {name: p for name, p in every.items() if name not in ("logp", "logq", "self")}


def lookup(table: Mapping[str, Callable[..., Any]], spec: str | Mapping[str, Any], *, kind: str) -> tuple[Any, dict[str, Any]]:
    """The component a spec names and its parameters, checked against the component's own signature."""
    params: dict[str, Any] = {} if isinstance(spec, str) else dict(spec)
    name = spec if isinstance(spec, str) else params.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"a {kind} needs a name, got {spec!r}. Write {{name: ..., parameter: value}}.")
    if name in table:
        component = table[name]
    elif ":" in name:
        component = _imported(name, kind)
    else:
        known = sorted(table)
        raise ConfigError(f"unknown {kind} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    allowed = parameters(component)
    for key in params:
        if key not in allowed and not any(p.kind is p.VAR_KEYWORD for p in allowed.values()):
            takes = ", ".join(allowed) or "none"
            raise ConfigError(
                f"{kind} {name!r} has no parameter {key!r}.{did_you_mean(key, list(allowed))} It takes: {takes}."
            )
    return component, params


def bind(table: Mapping[str, Callable[..., Any]], spec: Spec, *, kind: str) -> Callable[..., Any]:
    """A function with its parameters bound; an object that is already callable passes through."""
    if not isinstance(spec, str | Mapping):
        return _callable(spec, kind)
    function, params = lookup(table, spec, kind=kind)
    return functools.partial(function, **params) if params else function


def build(table: Mapping[str, Callable[..., Any]], spec: Spec, *, kind: str) -> Any:
    """An object made by its factory with the parameters given; an instance passes through."""
    if not isinstance(spec, str | Mapping):
        return _callable(spec, kind)
    factory, params = lookup(table, spec, kind=kind)
    return factory(**params)


def _callable(spec: Any, kind: str) -> Any:
    if not callable(spec):
        raise ConfigError(f"a {kind} must be a name, a mapping with a name, or a callable, got {spec!r}.")
    return spec


def _imported(path: str, kind: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind} {path!r} cannot be imported: {error}. Write 'module:attribute'.") from error
