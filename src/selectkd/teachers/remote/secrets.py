"""Keys: where they come from, and how they stay out of everything that is printed."""

from __future__ import annotations

import json
import os
import re
from urllib.parse import quote

from selectkd.errors import ConfigError

PIECE = 8
"""Letters of a key in a row that are hidden wherever they stand, so that a key that was cut short is too."""

NAME = re.compile(r"[A-Z][A-Z0-9]{0,14}(_[A-Z0-9]{1,15})+|[A-Z]{1,15}")
"""What is surely the name of a variable, MY_KEY or TOKEN, and no key that was written in its place."""


def named(variable: str) -> str:
    """A variable's name for a message; words in its place where it may be a key that was written there by mistake.

    >>> named("TEACHER_KEY"), named("sk-proj-4f1b")
    ('TEACHER_KEY', 'a variable (not shown: it may be a key itself)')
    """
    return variable if NAME.fullmatch(variable) else "a variable (not shown: it may be a key itself)"


def key_of(variable: str | None, setting: str) -> str | None:
    """The key in a variable of the environment; ConfigError, naming ``setting``, where it is not set or no key."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if key and key.isascii() and key.isprintable():
        return key
    shown = named(variable)
    example = shown if shown == variable else "NAME"
    instead = "" if shown == variable else f", and write {setting}: NAME"
    raise ConfigError(
        f"{setting} names {shown}, which is {'no key' if key else 'not set'}. Set it: export {example}=...{instead}"
    )


def without_key(text: str, key: str | None) -> str:
    """``text`` with [key] in place of the key and of any 8 letters or more of it, however they were cut.

    >>> without_key("bad key 0123456789ab, and 89abcdefgh...", "0123456789abcdefghij")
    'bad key [key], and [key]...'
    """
    if not key:
        return text
    size = min(PIECE, len(key))
    pieces = {key[i : i + size] for i in range(len(key) - size + 1)}
    hidden = bytearray(len(text))
    for i in range(len(text) - size + 1):
        if text[i : i + size] in pieces:
            hidden[i : i + size] = b"\1" * size
    shown, before = [], 0
    for letter, secret in zip(text, hidden, strict=True):
        if not secret:
            shown.append(letter)
        elif not before:
            shown.append("[key]")
        before = secret
    return "".join(shown)


def without_key_bytes(body: bytes, key: str | None) -> bytes:
    """``body`` with [key] in place of the key, as it is and as JSON or a URL would write it."""
    if not key:
        return body
    for form in {key, json.dumps(key)[1:-1], key.replace("/", "\\/"), quote(key, safe="")}:
        body = body.replace(form.encode(), b"[key]")
    return body
