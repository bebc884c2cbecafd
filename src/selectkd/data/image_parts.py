"""Where the images of a record stand among its turns: as parts of a message, at ``<image>`` in a text, in a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selectkd.errors import DataError

COLUMNS = ("images", "image")
PLACEHOLDER = "<image>"
"""What stands for an image in a text, in LLaVA's and ms-swift's files."""
SOURCES = ("image", "image_url", "url", "path", "bytes", "base64", "data")
"""Fields of a part that say where its image is."""
PARTS = ("image", "image_url", "input_image")
"""Types of parts: transformers' and the two of OpenAI's interfaces."""


@dataclass(frozen=True)
class ImagePart:
    """An image as a record names it; source: for ``images.found``; place: the field, for messages."""

    source: Any
    place: str
    max_pixels: int | None = None


def image_part(part: Mapping[str, Any], where: Any) -> dict[str, Any] | None:
    """A part of a message as {type: image, source, place, max_pixels}; None for one that is no image."""
    if part.get("type") not in PARTS:
        return None
    name = next((key for key in SOURCES if part.get(key) is not None), None)
    source = None if name is None else part[name]
    if name == "base64":
        source = {"base64": source}
    most = part.get("max_pixels")
    return {"type": "image", "source": source, "place": str(where), "max_pixels": _pixels(most, where)}


def images_of(record: Mapping[str, Any]) -> list[Any]:
    """The images of a record's own column, in order."""
    for name in COLUMNS:
        value = record.get(name)
        if value is not None and not (isinstance(value, str | Sequence) and len(value) == 0):
            return list(value) if isinstance(value, list | tuple) else [value]
    return []


def placed(
    messages: Sequence[dict[str, Any]], record: Mapping[str, Any], origin: str
) -> tuple[tuple[dict[str, Any], ...], tuple[ImagePart, ...]]:
    """(messages whose image parts say nothing but their type, the images in the order of these parts).

    A part or ``<image>`` without an image of its own takes the next of the record's column; without any of them the
    column's images stand before the first question. DataError where their numbers differ.
    """
    column = images_of(record)
    if not column and not any(_images(message) for message in messages):
        return tuple(messages), ()
    if not any(_images(message) for message in messages):
        messages = [_split(message) for message in messages]
        if not any(_images(message) for message in messages):
            messages = _before_question(messages, len(column), origin)
    slots = sum(part["source"] is None for message in messages for part in _images(message))
    if slots != len(column):
        some = f"{len(column)} image{'s' * (len(column) != 1)}"
        raise DataError(
            f"{origin}: {some} in the column {' or '.join(COLUMNS)}, and {slots} placeholder{'s' * (slots != 1)} "
            "in the turns. Give each image its placeholder, or name it in its part."
        )
    most, left = _pixels(record.get("max_pixels"), f"{origin}: max_pixels"), iter(enumerate(column))
    shown, found = [], []
    for number, message in enumerate(messages):
        if _images(message) and message["role"] == "assistant":
            raise DataError(
                f"{origin}: turn {number} (assistant) has an image; images stand in turns that ask."
            )
        for part in _images(message):
            source, place = part["source"], part["place"]
            if source is None:
                index, source = next(left)
                place = f"{origin}: image {index}"
            found.append(ImagePart(source, place, part["max_pixels"] or most))
        shown.append(_without_sources(message))
    return tuple(shown), tuple(found)


def count_of(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many images stand in turns.

    >>> count_of([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}])
    1
    """
    return sum(len(_images(message)) for message in messages)


def _images(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return [part for part in content if part.get("type") == "image"] if isinstance(content, list) else []


def _slot() -> dict[str, Any]:
    return {"type": "image", "source": None, "place": "", "max_pixels": None}


def _split(message: dict[str, Any]) -> dict[str, Any]:
    """The message with a part for each ``<image>`` in its text; an assistant's stays as it is."""
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [part["text"] for part in content or ()]
    if message["role"] == "assistant" or not any(PLACEHOLDER in text for text in texts):
        return message
    parts: list[dict[str, Any]] = []
    for text in texts:
        for index, piece in enumerate(text.split(PLACEHOLDER)):
            parts += [_slot()] if index else []
            parts += [{"type": "text", "text": piece}] if piece else []
    return {**message, "content": parts}


def _before_question(messages: Sequence[dict[str, Any]], count: int, origin: str) -> list[dict[str, Any]]:
    place = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if place is None:
        raise DataError(f"{origin}: has images and no turn that asks. Add a user turn.")
    content = messages[place]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    asks = {**messages[place], "content": [*(_slot() for _ in range(count)), *parts]}
    return [*messages[:place], asks, *messages[place + 1 :]]


def _without_sources(message: dict[str, Any]) -> dict[str, Any]:
    if not _images(message):
        return message
    content = [{"type": "image"} if part.get("type") == "image" else part for part in message["content"]]
    return {**message, "content": content}


def _pixels(value: Any, where: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise DataError(f"{where}: max_pixels is {repr(value)[:40]}. What would work: a whole number from 1.")
