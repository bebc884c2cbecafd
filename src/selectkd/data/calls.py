"""Calls of tools in the forms that records have them, as those of OpenAI: a name and an object of arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selectkd.data.fields import Where, from_json, plain_text
from selectkd.errors import DataError


def spoken_calls(value: Any, where: Where) -> list[dict[str, Any]]:
    """The calls that a function_call turn has as its text: JSON of one, or of a list of them."""
    found = from_json(plain_text(value, where)) if not isinstance(value, Mapping | list | tuple) else value
    calls = [found] if isinstance(found, Mapping) else found
    if (
        not isinstance(calls, list | tuple)
        or not calls
        or not all(isinstance(call, Mapping) and "name" in call for call in calls)
    ):
        raise DataError(
            f"{where}: a function_call needs JSON with name and arguments, not {str(value)[:60]!r}."
        )
    return [{"type": "function", "function": function_of(call, where)} for call in calls]


def legacy_call(value: Any, where: Where) -> list[dict[str, Any]]:
    """The call of a turn's ``function_call`` field, {name, arguments} or JSON text of it; none where it is empty."""
    if value in (None, "") or (isinstance(value, Mapping) and all(each is None for each in value.values())):
        return []
    return spoken_calls(value, where)


def tool_calls(value: Any, where: Where) -> list[dict[str, Any]]:
    """The calls of a turn, given as a list or as JSON text of one, with the fields they have."""
    calls = from_json(value) if isinstance(value, str) and value.strip() else value
    if calls == "":
        return []
    if not isinstance(calls, list | tuple):
        raise DataError(f"{where}: needs a list of calls, not {type(value).__name__} {repr(value)[:60]}.")
    checked = []
    for index, call in enumerate(calls):
        at = where.at(index)
        if not isinstance(call, Mapping):
            raise DataError(f"{at}: needs a call such as {{name, arguments}}, not {repr(call)[:60]}.")
        kept = {str(name): each for name, each in call.items() if each is not None}
        for name in ("id", "type"):
            if name in kept:
                plain_text(kept[name], at.at(name))
        if "function" in kept:
            if not isinstance(kept["function"], Mapping):
                raise DataError(
                    f"{at}.function: needs {{name, arguments}}, not {repr(kept['function'])[:60]}."
                )
            checked.append({**kept, "function": function_of(kept["function"], at.at("function"))})
        else:
            checked.append(function_of(kept, at))
    return checked


def function_of(call: Mapping[str, Any], where: Where) -> dict[str, Any]:
    """A call's own fields, its name text and its arguments an object. Llama's ``parameters`` are its arguments.

    Arguments that are missing, null or empty text are none. DataError for text that is no JSON of an object.
    """
    name = plain_text(call.get("name"), where.at("name"))
    if not name:
        raise DataError(f"{where}.name: is empty; a call needs the name of what it calls.")
    call = dict(call)
    given, field = call.pop("arguments", None), "arguments"
    if given is None:
        given, field = call.pop("parameters", None), "parameters"
    if given is None or (isinstance(given, str) and given.strip() in ("", "null")):
        return {**call, "name": name, "arguments": {}}
    arguments = from_json(given) if isinstance(given, str) else given
    if not isinstance(arguments, Mapping):
        kind = "is text that is no JSON object" if isinstance(given, str) else "is no object"
        raise DataError(
            f'{where}.{field}: {kind}: {repr(given)[:60]}. What would work: {{"city": "Oslo"}}, as an object or as '
            "JSON text."
        )
    return {**call, "name": name, "arguments": dict(arguments)}
