"""What a record shows beside its text and nobody reads: videos, sounds, images in fields of other names, and marks such
as ``<image>`` in a question without anything to show there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from selectkd.data.image_parts import COLUMNS, MEDIA, PLACEHOLDER
from selectkd.data.images import in_base64
from selectkd.data.jinja_process import REASONING
from selectkd.data.turns import text_of
from selectkd.errors import DataError

MARKS = (PLACEHOLDER, "<video>", "<audio>")
ALONE = re.compile(r"\A\s*<(image|video|audio)>(?! +\S)|\n[ \t]*<(image|video|audio)>\s*\Z")
"""A mark where converters put one: at the beginning of a text, if no space and a word follow, or as its last line."""
STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
"""How the files of images begin."""
PATH = re.compile(r"[^\s<>\"']+\.(?:png|jpe?g|webp|gif|bmp|tiff?)(?:\?\S*)?", re.IGNORECASE)
LONGEST = 2048
"""Characters of a path or an address at most."""
FILE = frozenset({"bytes", "path"})
"""Fields of an object that is a file, as data sets of the Hugging Face library store it."""
OF_TURNS = frozenset({"role", "content", "name", "tool_call_id", "tool_calls", *REASONING})
"""Fields of a turn that hold text, which may be the name of a file."""


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


def unread_images(
    record: Mapping[str, Any], texts: Collection[str], turns: Sequence[Mapping[str, Any]] = ()
) -> tuple[str, ...]:
    """Fields of other names than those of ``COLUMNS`` that plainly hold an image, its bytes or its path, of a record
    and of its turns. texts: fields of a record that hold text, which may be the name of a file.
    """
    found = [name for name in _with_images(record) if name not in texts]
    found += [name for turn in turns for name in _with_images(turn) if name not in OF_TURNS]
    return tuple(dict.fromkeys(found))


def _with_images(fields: Mapping[str, Any]) -> Iterator[str]:
    return (
        name
        for name, value in fields.items()
        if name not in COLUMNS and name not in MEDIA and _is_image(value)
    )


def _is_image(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and _is_image(value[0])
    if isinstance(value, Mapping):
        return _is_image(value.get("bytes")) or (value.keys() <= FILE and _is_image(value.get("path")))
    if isinstance(value, bytes):
        return value.startswith(STARTS)
    if isinstance(value, str):
        return (
            value.startswith("data:image/")
            or in_base64(value)
            or (len(value) <= LONGEST and PATH.fullmatch(value) is not None)
        )
    return hasattr(value, "save") and hasattr(value, "mode")  # Pillow's
