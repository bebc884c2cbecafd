"""A JSON array of records, read an item at a time: a file of it may be larger than memory."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from selectkd.errors import DataError


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object of ``pairs``; ValueError where a key stands twice, of which one would be lost in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return found


DECODER, SPACE = json.JSONDecoder(object_pairs_hook=once), re.compile(r"[ \t\r\n]*")
BLOCK = 1 << 18
"""Bytes that are read at once."""
LONGEST_WORD = 16
"""Characters of a word of JSON, such as -Infinity or \\u12ab, that may be cut at the end of what has been read."""


class ArrayItems:
    """The items of a JSON array, each with the line it begins on, read as they are wanted.

    head: the bytes that have been read, from the line ``number`` on.
    """

    def __init__(self, name: str, stream: BinaryIO, head: bytes, number: int) -> None:
        self.name, self.stream, self.line = name, stream, number
        self.utf8 = codecs.getincrementaldecoder("utf-8")()
        self.text, self.position, self.ended = "", 0, False
        self.counted = 0  # the characters whose lines ``line`` counts
        self.head = head

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        try:
            yield from self._items()
        except UnicodeDecodeError as error:
            before: bytes = error.object[: error.start]
            at = f"{self.name}:{self.line + self.text.count(chr(10)) + before.count(10)}"
            yield at, DataError(f"{at}: not UTF-8. Save the file as UTF-8.")

    def _items(self) -> Iterator[tuple[str, Any]]:
        self._next()
        self.position += 1  # the bracket
        while self._next() != "]":
            origin = self._at(self.position)
            try:
                value = self._value()
            except UnicodeDecodeError:
                raise
            except (ValueError, RecursionError) as error:
                broken = isinstance(error, json.JSONDecodeError)
                at = self._at(error.pos if broken else self.position)
                reason = error.msg if broken else str(error)[:80]
                yield at, DataError(f"{at}: the JSON array breaks off here: {reason}.")
                return
            yield origin, object_of(value, origin)
            if self._next() == ",":
                self.position += 1
            elif self._next() != "]":
                at = self._at(self.position)
                yield at, DataError(f"{at}: the JSON array needs a comma or its closing bracket here.")
                return
        self.position += 1
        if self._next():
            at = self._at(self.position)
            yield at, DataError(f"{at}: text after the end of the JSON array.")

    def _at(self, position: int) -> str:
        self.line += self.text.count("\n", self.counted, position)
        self.counted = position
        return f"{self.name}:{self.line}"

    def _more(self) -> bool:
        """Whether there was more text, which is behind the rest of the text at hand now."""
        if self.ended:
            return False
        raw = self.head or self.stream.read(max(BLOCK, len(self.text) - self.position))
        self.head, self.ended = b"", not raw
        self._at(self.position)
        self.text, self.position, self.counted = self.text[self.position :], 0, 0
        self.text += self.utf8.decode(raw, final=self.ended)
        return not self.ended

    def _next(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            match = SPACE.match(self.text, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self.text) or not self._more():
                return self.text[self.position : self.position + 1]

    def _value(self) -> Any:
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos + LONGEST_WORD > len(self.text)
                if cut and self._more():
                    continue
                raise
            if end == len(self.text) and self._more():
                continue  # a number may go on
            self.position = end
            return value


def is_one_row(body: bytes) -> bool:
    """Whether a first line with an opening bracket is a bad row of JSON Lines, not a JSON array of rows."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return not isinstance(value, list) or (bool(value) and not any(isinstance(item, dict) for item in value))


def object_of(value: Any, origin: str) -> Any:
    """``value`` where it is a JSON object, else the DataError that says so."""
    if isinstance(value, dict):
        return value
    return DataError(f"{origin}: needs a JSON object, not {type(value).__name__} {repr(value)[:40]}.")
