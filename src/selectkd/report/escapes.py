"""Text from outside made visible: control, direction and other unprintable characters as escapes."""

from __future__ import annotations

import unicodedata

INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories that move the cursor, turn the direction of text or cannot be printed."""


def clean(text: object, *, keep: str = "\n") -> str:
    r"""``text`` with control and format characters as escapes, except those in ``keep``.

    >>> clean("a\x1b[31mb\u202ec")
    'a\\x1b[31mb\\u202ec'
    """
    return "".join(
        letter
        if letter in keep or unicodedata.category(letter) not in INVISIBLE
        else letter.encode("unicode_escape", "surrogatepass").decode("ascii")
        for letter in str(text)
    )


def shortened(text: object, most: int, *, keep: str = "\n") -> str:
    """The beginning of a text, cleaned, and how many characters were left out.

    >>> shortened("a" * 12, 8)
    'aaaaaaaa … and 4 more characters'
    """
    text = str(text)
    left = len(text) - most
    return clean(text[:most], keep=keep) + (f" … and {left:,} more characters" if left > 0 else "")
