"""What a record shows beside its text and nobody reads: videos, sounds, images in fields of other names, and marks such
as ``<image>`` in a question without anything to show there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from selectkd.data.image_parts import COLUMNS, PLACEHOLDER, filled
from selectkd.data.turns import text_of
from selectkd.errors import DataError

MEDIA = {
    name: kind
    for kind in ("video", "audio")
    for name in (
        kind,
        f"{kind}s",
        *(f"{kind}{end}" for one in ("_path", "_file", "_url") for end in (one, f"{one}s")),
    )
}
"""Fields of a record that hold what is not read, with what that is."""
MARKS = (PLACEHOLDER, "<video>", "<audio>")
ALONE = re.compile(r"\A\s*<(image|video|audio)>|^[ \t]*<(image|video|audio)>[ \t]*$", re.MULTILINE)
"""A mark where converters put one: at the beginning of a text, or as a line of its own."""
STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
"""How the files of images begin."""


def check_media(record: Mapping[str, Any], origin: str) -> None:
    """DataError where a conversation comes with a video or a sound, without which it would be trained blind."""
    for name, kind in MEDIA.items():
        if filled(record.get(name)):
            raise DataError(
                f"{origin}: has the field {name!r}, and {kind} is not read. Leave the row out, or take the field out "
                "where the text does not need it."
            )


def check_marks(
    messages: Sequence[Mapping[str, Any]], origin: str, *, sees: bool, fields: Sequence[str] = ()
) -> None:
    """DataError where a question has a mark for an image, a video or a sound that was not read.

    sees: of a model that sees images, for which ``<image>`` is a mark wherever it stands; else one begins a text or is
    a line of its own, and is a word in any other place. A text with the closing tag (``</image>``) is markup. fields:
    those of the record that hold images, for the message.
    """
    for number, message in enumerate(messages):
        if message["role"] != "user":
            continue
        text = text_of(message["content"])
        mark = next(_marks(text, sees), None)
        if mark is not None:
            kind = mark[1:-1]
            found = (
                f" The field {fields[0]!r} holds one: call it image." if fields and kind == "image" else ""
            )
            way = (
                f"one of {', '.join(COLUMNS)}, or a part of the turn"
                if kind == "image"
                else "none: leave it out"
            )
            raise DataError(
                f"{origin}: turn {number} has {mark} in its text, and no {kind} was read for it.{found} What would "
                f"work: {way}."
            )


def _marks(text: str, sees: bool) -> Iterator[str]:
    for mark in MARKS:
        if mark in text and f"</{mark[1:]}" not in text:
            alone = any(mark[1:-1] in found.groups() for found in ALONE.finditer(text))
            if alone or (sees and mark == PLACEHOLDER):
                yield mark


def unread_images(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of other names than those of ``COLUMNS`` that hold the bytes of an image."""
    return tuple(
        name
        for name, value in record.items()
        if name not in COLUMNS and name not in MEDIA and _is_image(value)
    )


def _is_image(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and _is_image(value[0])
    if isinstance(value, Mapping):
        return _is_image(value.get("bytes"))
    if isinstance(value, bytes):
        return value.startswith(STARTS)
    if hasattr(value, "save") and hasattr(value, "mode"):  # Pillow's
        return True
    return isinstance(value, str) and value.startswith("data:image/")
