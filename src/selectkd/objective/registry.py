"""Names to components: a spec (name, {name, **params}, "module:attribute" or an object) against a table."""

from __future__ import annotations

import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from selectkd.errors import ConfigError
from selectkd.objective.plugins import load

Spec = str | Mapping[str, Any] | Callable[..., Any]

TENSORS = ("logp", "logq", "column", "self")
"""Names a recipe cannot set: the two distributions and the label of a loss, and a bound object."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the closest known word, else ''."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def parameters(component: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters a recipe may set, by name: those after the tensors of a function, or of a factory."""
    try:
        every = inspect.signature(component).parameters
    except (TypeError, ValueError):
        return {}
    return {name: p for name, p in every.items() if name not in TENSORS and p.kind is not p.VAR_POSITIONAL}


def lookup(
    table: Mapping[str, Callable[..., Any]], spec: str | Mapping[str, Any], *, kind: str
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The component a spec names and its parameters, checked against the component's own signature.

    Raises ConfigError for an unknown name or parameter (with the closest known one), a value of the wrong
    type, and a parameter that is missing. Nothing is called; ``module:object`` imports what the user allowed alone,
    see ``plugins``.

    >>> table = {"clip": lambda logp, logq, *, low=0.0: logp}
    >>> lookup(table, {"name": "clip", "low": 0.1}, kind="divergence")[1]
    {'low': 0.1}
    """
    params: dict[Any, Any] = {} if isinstance(spec, str) else dict(spec)
    name = spec if isinstance(spec, str) else params.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"a {kind} needs a name, got {spec!r}. Write {{name: ..., parameter: value}}.")
    if name in table:
        component = table[name]
    elif ":" in name:
        component = load(name, kind)
    else:
        known = sorted(table)
        raise ConfigError(f"unknown {kind} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    _check(component, name, params, kind)
    return component, params


def bind(table: Mapping[str, Callable[..., Any]], spec: Spec, *, kind: str) -> Callable[..., Any]:
    """A function with its parameters bound; an object that is already callable passes through.

    With parameters the result is a functools.partial that carries ``name``, the name the spec gave.
    """
    if not isinstance(spec, str | Mapping):
        return _callable(spec, kind)
    function, params = lookup(table, spec, kind=kind)
    if not params:
        return function
    bound = functools.partial(function, **params)
    bound.name = spec if isinstance(spec, str) else spec["name"]  # type: ignore[attr-defined]
    return bound


def build(table: Mapping[str, Callable[..., Any]], spec: Spec, *, kind: str) -> Any:
    """An object made by its factory with the parameters given; an instance passes through, a class is
    made with its defaults."""
    if not isinstance(spec, str | Mapping):
        return _callable(spec, kind)() if isinstance(spec, type) else _callable(spec, kind)
    factory, params = lookup(table, spec, kind=kind)
    return factory(**params)


def tried(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """(what a call to a component gives, None), or (None, its error) where it lacks an argument that it reads.

    >>> tried(lambda: None + 1)[1]
    TypeError("unsupported operand type(s) for +: 'NoneType' and 'int'")
    """
    try:
        return call(), None
    except (ConfigError, TypeError, AttributeError) as error:
        return None, error


def name_of(component: Any) -> str:
    """The name a component goes by in messages and logs: of a bound function, a function or an instance."""
    for attribute in ("name", "__name__"):
        name = getattr(component, attribute, None)
        if isinstance(name, str):
            return name
    return type(component).__name__


def unbound(component: Any) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """A function without the parameters bound to it, and those."""
    if isinstance(component, functools.partial):
        return component.func, component.keywords
    return component, {}


def name_in(table: Mapping[str, Callable[..., Any]], component: Any) -> str | None:
    """The name a table has a function under, its parameters bound or not; None for any other, whatever it is called.

    >>> name_in({"length": len}, functools.partial(len)), name_in({"length": len}, lambda x: x)
    ('length', None)
    """
    function, _ = unbound(component)
    return next((name for name, known in table.items() if known is function), None)


def _check(component: Callable[..., Any], name: str, params: Mapping[Any, Any], kind: str) -> None:
    allowed = parameters(component)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in allowed.values())
    named = {key: p for key, p in allowed.items() if p.kind is not p.VAR_KEYWORD}
    takes = ", ".join(k if p.default is p.empty else f"{k}={p.default!r}" for k, p in named.items()) or "none"
    kinds = _annotations(component)
    for key, value in params.items():
        if key in TENSORS or (key not in named and not open_ended):
            raise ConfigError(
                f"{kind} {name!r} has no parameter {key!r}.{did_you_mean(key, named)} It takes: {takes}."
            )
        if not _fits(value, kinds.get(key, Any)):
            raise ConfigError(
                f"{kind} {name!r}: {key} = {value!r} must be {_spelled(kinds[key])}. It takes: {takes}."
            )
    missing = [key for key, p in named.items() if p.default is p.empty and key not in params]
    if missing:
        raise ConfigError(f"{kind} {name!r} needs {', '.join(missing)}. It takes: {takes}.")


def _annotations(component: Callable[..., Any]) -> dict[str, Any]:
    """What the parameters are annotated with; empty where an annotation cannot be resolved."""
    try:
        return typing.get_type_hints(component.__init__ if isinstance(component, type) else component)
    except (NameError, TypeError, AttributeError):
        return {}


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value of a recipe may go where ``wanted`` is expected; True wherever that is not plain."""
    if isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union:
        return any(_fits(value, one) for one in typing.get_args(wanted))
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if wanted in (bool, str, type(None)):
        return isinstance(value, wanted)
    return True


def _spelled(wanted: Any) -> str:
    words = {float: "a number", int: "an integer", bool: "true or false", str: "a string", type(None): "null"}
    parts = typing.get_args(wanted) or (wanted,)
    return " or ".join(words.get(part, str(part)) for part in parts)


def _callable(spec: Any, kind: str) -> Any:
    if not callable(spec):
        raise ConfigError(f"a {kind} must be a name, a mapping with a name, or a callable, got {spec!r}.")
    return spec
