"""Text from outside made visible: control, direction and other unprintable characters as escapes."""

from __future__ import annotations

import re
import unicodedata

INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories that move the cursor, turn the direction of text or cannot be printed."""
PILED = re.compile(r"(?<=[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]{4})"
                   r"[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+")  # fmt: skip
"""Marks above or below a letter beyond four of them, which would be drawn over the lines beside it."""


def clean(text: object, *, keep: str = "\n") -> str:
    r"""``text`` with control and format characters as escapes, except those in ``keep``.

    >>> clean("a\x1b[31mb\u202ec")
    'a\\x1b[31mb\\u202ec'
    """
    text = PILED.sub(lambda piled: _escaped(piled[0]), str(text))
    if text.isprintable():
        return text
    return "".join(letter if letter in keep or not _hidden(letter) else _escaped(letter) for letter in text)


def _hidden(letter: str) -> bool:
    """Whether a character is of INVISIBLE, or none that text may hold (U+FFFE and its like, which XML forbids)."""
    code = ord(letter)
    return unicodedata.category(letter) in INVISIBLE or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF


def _escaped(text: str) -> str:
    return text.encode("unicode_escape", "surrogatepass").decode("ascii")


def shortened(text: object, most: int, *, keep: str = "\n") -> str:
    """The beginning of a text, cleaned, and how many characters were left out.

    >>> shortened("a" * 12, 8)
    'aaaaaaaa … and 4 more characters'
    """
    text = str(text)
    left = len(text) - most
    return clean(text[:most], keep=keep) + (
        f" … and {left:,} more character{'' if left == 1 else 's'}" if left > 0 else ""
    )
