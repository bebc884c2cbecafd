"""``method`` and ``selection`` written out: a recipe's short words become the parts they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from selectkd.config.methods import METHODS, Method
from selectkd.config.section import refuse
from selectkd.objective.registry import did_you_mean

GATE_KEYS = ("verifier", "selector", "beta")
"""The keys of ``objective`` that ``selection`` speaks for."""


def expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's values with ``method`` and ``selection`` laid out beneath what the recipe says itself.

    Raises the error of ``refuse`` for an unknown method or option, for a need that is not met, and where the
    objective says something else than the selection.
    """
    result = dict(values)
    if result.get("method") is not None:
        parts = parts_of(result["method"])
        method = METHODS[_spec(result["method"])["name"]]
        for need in method.needs:
            if _at(result, need) is None:
                raise refuse(f"needs {need} beside it. {method.source}", at="method")
        result = {**laid(parts, result)}
    if result.get("selection") is not None:
        result["objective"] = _selected(result.get("objective"), values.get("objective"), result["selection"])
    return result


def parts_of(spec: Any) -> dict[str, Any]:
    """The parts of ``method: NAME`` or ``{name: NAME, OPTION: true}``, options laid over the method's own."""
    given = dict(_spec(spec))
    method = METHODS[given.pop("name")]
    parts: dict[str, Any] = _plain(method.parts)
    for name, wanted in given.items():
        _check_option(name, wanted, method)
        if wanted:
            parts = laid(parts, _plain(method.options[name].parts))
    return parts


def laid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``: mappings are joined key by key, but a component of another name replaces the first;
    a verifier and a selector replace each other."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        joined = isinstance(under, Mapping) and isinstance(value, Mapping)
        if key in ("divergence", "verifier", "selector", "policy") and isinstance(value, str):
            value = under if isinstance(under, Mapping) and under.get("name") == value else {"name": value}
            joined = False
        if joined and value.get("name", under.get("name")) == under.get("name"):  # type: ignore[union-attr]
            value = laid(under, value)  # type: ignore[arg-type]
        result[key] = value
    for one, other in (("verifier", "selector"), ("selector", "verifier")):
        if above.get(one) is not None and other not in above and one not in below:
            result.pop(other, None)
    return result


def _selected(objective: Any, given: Any, selection: Any) -> Any:
    """The objective with the selection's verifier or selector and its beta in it."""
    if not isinstance(selection, Mapping) or not isinstance(objective, Mapping | None):
        return objective  # the check of the section reports the wrong type
    wanted = {**gates_of(selection), "beta": selection.get("beta", 0.01)}
    for key, value in wanted.items():
        written = given.get(key) if isinstance(given, Mapping) else None
        written = {"name": written} if key != "beta" and isinstance(written, str) else written
        if written is not None and written != value:
            raise refuse(
                f"sets {key} = {value}, but objective.{key} is {written}; leave out one of the two",
                at="selection",
            )
    kept = dict(objective or {})
    if "verifier" not in wanted and not (isinstance(given, Mapping) and given.get("verifier") is not None):
        kept.pop("verifier", None)
    return {**kept, **wanted}


def gates_of(selection: Mapping[str, Any]) -> dict[str, Any]:
    """The verifier and the selector that a selection names, with the parameters beside the name, which are those of the
    one that is named, or of the verifier where none is.
    """
    named = [key for key in ("verifier", "selector") if selection.get(key) is not None]
    params = {key: value for key, value in selection.items() if key not in GATE_KEYS}
    for key in params:
        if not isinstance(key, str) or key == "name":
            raise refuse(
                f"has the key {key!r}. Write {{verifier: NAME, PARAMETER: value, beta: value}}",
                at="selection",
            )
        if near := get_close_matches(key, GATE_KEYS, 1, 0.75):
            raise refuse(f"has the key {key!r}. Did you mean {near[0]}?", at="selection")
    if len(named) == 2 and params:
        raise refuse(
            f"names a verifier and a selector, and {next(iter(params))!r} could belong to either; write "
            "{name: ..., parameter: value} for both",
            at="selection",
        )
    found: dict[str, Any] = {}
    for key in named or ["verifier"]:
        spec = selection.get(key, "greedy_topk") if named else "greedy_topk"
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
            raise refuse(
                f"has {key} = {str(spec)[:60]!r}; it must be a name or {{name: ..., parameter: value}}",
                at="selection",
            )
        found[key] = {**spec, **params}
        if found[key] == {"name": "greedy_topk"}:
            found[key]["k"] = 5
    return found


def _at(values: Any, key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    for step in key.split("."):
        values = values.get(step) if isinstance(values, Mapping) else None
    return values


def _spec(spec: Any) -> Mapping[str, Any]:
    spec = {"name": spec} if isinstance(spec, str) else spec
    name = spec.get("name") if isinstance(spec, Mapping) else None
    if not isinstance(name, str) or name not in METHODS:
        raise refuse(
            f"= {str(name)[:80]!r} is no method.{did_you_mean(str(name), METHODS)} Known: {', '.join(METHODS)}",
            at="method",
        )
    return spec


def _check_option(name: str, wanted: Any, method: Method) -> None:
    if name not in method.options:
        known = ", ".join(method.options) or "none"
        near = did_you_mean(name, method.options)
        raise refuse(f"has no option {name!r}.{near} It has: {known}", at="method")
    if not isinstance(wanted, bool):
        raise refuse(f"has the option {name} = {wanted!r}, which must be true or false", at="method")


def _plain(value: Any) -> Any:
    """Mappings and sequences anew, as a file would give them."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
