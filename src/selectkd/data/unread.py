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
ALONE = re.compile(r"\A\s*<(image|video|audio)>(?! +\S)|\n[ \t]*<(image|video|audio)>\s*\Z")
"""A mark where converters put one: at the beginning of a text, if no space and a word follow, or as its last line."""
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


def check_seen(
    messages: Sequence[Mapping[str, Any]], origin: str, *, sees: bool, images: int, fields: Sequence[str]
) -> None:
    """DataError where a model would be trained blind: on images it does not see, on a field that holds one and is not
    read (one of ``fields``), or on a question with a mark for something that was not read.

    sees: whether the model sees images, of which ``images`` were read. ``<image>`` is a mark wherever it stands for
    such a model, and in a record with ``fields``. Else a mark begins a text, or is its last line, and is a word in any
    other place. A text with the closing tag (``</image>``) is markup.
    """
    if images and not sees:
        raise DataError(
            f"{origin}: has {images} image{'s' * (images != 1)}, and the model sees none, or its folder has no "
            "processor. Use a model that sees images, leave the row out, or take its images out where the text does "
            "not need them."
        )
    _check_marks(messages, origin, fields, sees or bool(fields))
    if fields and sees:
        raise DataError(
            f"{origin}: the field {fields[0]!r} holds an image and is not read. Call it image, or take it out where "
            "the text does not need it."
        )


def _check_marks(
    messages: Sequence[Mapping[str, Any]], origin: str, fields: Sequence[str], anywhere: bool
) -> None:
    for number, message in enumerate(messages):
        if message["role"] != "user":
            continue
        text = text_of(message["content"])
        mark = next(_marks(text, anywhere), None)
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


def _marks(text: str, anywhere: bool) -> Iterator[str]:
    for mark in MARKS:
        if mark in text and f"</{mark[1:]}" not in text:
            alone = any(mark[1:-1] in found.groups() for found in ALONE.finditer(text))
            if alone or (anywhere and mark == PLACEHOLDER):
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
