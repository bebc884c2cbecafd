"""Turns of a conversation: roles under their many names, checked one by one, in the order a template can
render.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selectkd.errors import DataError

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}

# Which role may come directly after which; None is the start of the conversation.
FOLLOWS = {
    "system": (None,),
    "developer": (None, "system"),
    "user": (None, "system", "developer", "assistant", "tool"),
    "assistant": ("system", "developer", "user", "tool"),
    "tool": ("assistant", "tool"),
}


@dataclass(frozen=True)
class Where:
    """A place in a record for an error message: ``file:line``, then the path of the field."""

    origin: str
    path: str = ""

    def at(self, step: str | int) -> Where:
        """The place one field or one list index further in."""
        if isinstance(step, int):
            return Where(self.origin, f"{self.path}[{step}]")
        return Where(self.origin, f"{self.path}.{step}" if self.path else step)

    def __str__(self) -> str:
        return f"{self.origin}: {self.path}" if self.path else self.origin


def plain_text(value: Any, where: Where) -> str:
    """The value itself when it is text that can be written as UTF-8.

    Raises DataError for another type, and with the byte offset for a lone surrogate, which no tokenizer can
    encode.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: needs text, not {type(value).__name__} {repr(value)[:60]}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        offset = len(value[: error.start].encode("utf-8"))
        code = ord(value[error.start])
        raise DataError(
            f"{where}: a lone surrogate U+{code:04X} at byte {offset} of the text; it has no UTF-8 form.\n"
            "Write the whole character, or skip such rows with `on_bad_record: skip`."
        ) from None
    return value


def turn_of(item: Any, where: Where) -> dict[str, Any]:
    """One turn as {role, content, ...}; other fields of the turn reach the template untouched.

    Takes role/content and from/value. Content may be text, a list of text parts, or null beside tool_calls.
    """
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: needs a turn such as {{role, content}}, not {type(item).__name__}.")
    turn = {str(name): value for name, value in item.items() if value is not None}
    role_name, text_name = ("role", "content") if "role" in turn else ("from", "value")
    said = turn.pop(role_name, None)
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise DataError(
            f"{where}.{role_name}: no role is called {said!r}. What would work: {', '.join(sorted(ROLES))}."
        )
    content = turn.pop(text_name, None)
    at = where.at(text_name)
    if said == "function_call":
        turn["tool_calls"] = [_tool_call(plain_text(content, at), at)]
        content = ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(part, at.at(index)) for index, part in enumerate(content))
    if content is None and turn.get("tool_calls"):
        content = ""
    turn["content"] = plain_text(content, at)
    return {"role": role, **turn}


def _part(part: Any, where: Where) -> str:
    if isinstance(part, str):
        return plain_text(part, where)
    if isinstance(part, Mapping) and part.get("type") == "text":
        return plain_text(part.get("text"), where.at("text"))
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise DataError(f"{where}: a part of type {kind!r}; only text parts can be trained on.")


def _tool_call(text: str, where: Where) -> dict[str, Any]:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, Mapping) or "name" not in call:
        raise DataError(f"{where}: a function_call needs JSON with name and arguments, not {text[:60]!r}.")
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def check_order(messages: Sequence[Mapping[str, Any]], where: Where) -> None:
    """Nothing when every role may come after the one before it; else DataError naming the turn."""
    before: str | None = None
    for index, message in enumerate(messages):
        role = message["role"]
        if before not in FOLLOWS[role]:
            allowed = ", ".join(name or "the start" for name in FOLLOWS[role])
            raise DataError(
                f"{where}: turn {index} has role {role!r} after {before or 'the start'}; it may "
                f"follow {allowed}."
            )
        before = role
