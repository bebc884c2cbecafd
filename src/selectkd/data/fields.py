"""A field of a record: its place for messages, its text checked, its JSON read."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, NoReturn

from selectkd.errors import DataError


class Where(NamedTuple):
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


def from_json(text: str) -> Any:
    """The value that JSON text means, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def refuse(where: Where, problem: str) -> NoReturn:
    """DataError of a problem with a field."""
    raise DataError(f"{where}: {problem}")


def shown(value: Any) -> str:
    """A short form of a value for an error message."""
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
