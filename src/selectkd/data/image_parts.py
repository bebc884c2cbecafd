"""Where the images of a record stand among its turns: as parts of a message, at ``<image>`` in a text, in a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selectkd.errors import DataError

COLUMNS = (
    "images", "image", "image_paths", "image_path", "image_files", "image_file", "img_path", "img", "image_urls",
    "image_url",
)  # fmt: skip
"""Fields of a record that hold its images. The first that has some is read; ``images`` beside ``image`` is refused."""
MEDIA = {
    name: kind
    for kind in ("video", "audio")
    for name in (
        kind,
        f"{kind}s",
        *(f"{kind}{end}" for one in ("_path", "_file", "_url") for end in (one, f"{one}s")),
    )
}
"""Fields of a record or a turn that hold what is not read, with what that is."""
PLACEHOLDER = "<image>"
"""What stands for an image in a text, in LLaVA's and ms-swift's files."""
SOURCES = (
    "image", "image_url", "url", "path", "bytes", "base64", "data", "source", "image_path", "file_path", "image_file",
)  # fmt: skip
"""Fields of a part that say where its image is."""
NAMED = "What would work: a path, a URL, or its bytes in base64."
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
    name = next((key for key in SOURCES if filled(part.get(key))), None)
    source = None if name is None else part[name]
    if name in ("base64", "data"):
        source = {"base64": source}
    elif name == "source" and isinstance(source, Mapping):
        source = _anthropic(source, where)
    elif name is None and part.get("file_id") is not None:
        raise DataError(f"{where}: an image of a file_id, which only its server can read. {NAMED}")
    most = _pixels(part.get("max_pixels"), where)
    number = part.get("index") if source is None else None
    return {"type": "image", "source": source, "place": str(where), "max_pixels": most, "index": number}


def filled(value: Any) -> bool:
    """Whether a field has anything: null, false, "", [] and an object of nulls are nothing."""
    if isinstance(value, Mapping):
        return any(one is not None for one in value.values())
    return not (value is None or value is False or (isinstance(value, Sequence) and len(value) == 0))


def columns_of(record: Mapping[str, Any]) -> list[str]:
    """Those of ``COLUMNS`` that a record has something in."""
    return [name for name in COLUMNS if filled(record.get(name))]


def images_of(record: Mapping[str, Any], origin: str) -> list[Any]:
    """The images of a record's own column, in order. DataError where ``images`` and ``image`` hold different ones."""
    names = columns_of(record)
    if not names:
        return []
    lists = [value if isinstance(value := record[name], list | tuple) else [value] for name in names]
    if names[:2] == list(COLUMNS[:2]) and [*map(_file, lists[0])] != [*map(_file, lists[1])]:
        raise DataError(
            f"{origin}: has images in two fields, {names[0]} and {names[1]}. Put all of them into one."
        )
    return list(lists[0])


def _file(image: Any) -> Any:
    """What an image is compared by: of {bytes, path} what it has."""
    if not isinstance(image, Mapping):
        return image
    return next((image[name] for name in ("bytes", "path", "url") if image.get(name) is not None), image)


def check_media(record: Mapping[str, Any], origin: str) -> None:
    """DataError where a conversation comes with a video or a sound, without which it would be trained blind."""
    for name, kind in MEDIA.items():
        if filled(record.get(name)):
            raise DataError(
                f"{origin}: has the field {name!r}, and {kind} is not read. Leave the row out, or take the field out "
                "where the text does not need it."
            )


def with_own_images(turn: Mapping[str, Any], where: Any) -> dict[str, Any]:
    """A turn with the images of its own fields among its parts: at its parts without an image of their own, at
    ``<image>`` in its text, else before the text. DataError where their numbers differ, and for a video or a sound.
    """
    check_media(turn, str(where))
    images = images_of(turn, str(where))
    if not images:
        return dict(turn)
    name = columns_of(turn)[0]
    own = {key: value for key, value in turn.items() if key not in COLUMNS}
    message = own if _images(own) else _split(own)
    if not _images(message):
        message = _before_text(own, len(images))
    slots = [part for part in _images(message) if part["source"] is None]
    if len(slots) != len(images):
        raise _unequal(str(where), len(images), name, len(slots), "turn")
    for number, (slot, source) in enumerate(zip(slots, images, strict=True)):
        slot |= {"source": source, "place": f"{where}: image {number} of {name}"}
    return message


def _unequal(origin: str, images: int, name: str, slots: int, of: str) -> DataError:
    return DataError(
        f"{origin}: {images} image{'s' * (images != 1)} in the {'column' if of == 'turns' else 'field'} {name}, and "
        f"{slots} placeholder{'s' * (slots != 1)} in the {of}. Give each image its placeholder, or name it in its part."
    )


def _anthropic(source: Mapping[str, Any], where: Any) -> Any:
    """Anthropic's {type: base64, media_type, data} or {type: url, url} as ``images.found`` takes it."""
    kind = source.get("type")
    if kind in ("base64", "url", None):
        for name, key in (("data", "base64"), ("base64", "base64"), ("url", "url"), ("path", "path")):
            if source.get(name) is not None:
                return {key: source[name]}
    raise DataError(f"{where}: an image whose source is of type {repr(kind)[:40]}. {NAMED}")


def placed(
    messages: Sequence[dict[str, Any]], record: Mapping[str, Any], origin: str
) -> tuple[tuple[dict[str, Any], ...], tuple[ImagePart, ...]]:
    """(messages whose image parts say nothing but their type, the images in the order of these parts).

    A part or ``<image>`` without an image of its own takes the next of the record's column; without any of them the
    column's images stand before the first question. DataError where their numbers differ.
    """
    column = images_of(record, origin)
    if not column and not any(_images(message) for message in messages):
        return tuple(messages), ()
    if not any(_images(message) for message in messages):
        messages = [_split(message) for message in messages]
        if not any(_images(message) for message in messages):
            messages = _before_question(messages, len(column), origin)
    slots = sum(part["source"] is None for message in messages for part in _images(message))
    if slots != len(column):
        raise _unequal(origin, len(column), (columns_of(record) or COLUMNS[:1])[0], slots, "turns")
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
                if part["index"] not in (None, index):
                    raise DataError(
                        f"{place}: asks for image {part['index']} where image {index} comes. Put them in order."
                    )
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


def without_marks(text: str) -> str:
    """A text without ``<image>``, where the images stand before it.

    >>> without_marks("<image>\\ncaption en")
    'caption en'
    """
    if PLACEHOLDER not in text:
        return text
    first, *others = text.split(PLACEHOLDER)
    return "".join([first, *(piece.lstrip() for piece in others)]).rstrip()


def _images(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return [part for part in content if part.get("type") == "image"] if isinstance(content, list) else []


def _slot() -> dict[str, Any]:
    return {"type": "image", "source": None, "place": "", "max_pixels": None, "index": None}


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
    return [*messages[:place], _before_text(messages[place], count), *messages[place + 1 :]]


def _before_text(message: Mapping[str, Any], count: int) -> dict[str, Any]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return {**message, "content": [*(_slot() for _ in range(count)), *parts]}


def _without_sources(message: dict[str, Any]) -> dict[str, Any]:
    if not _images(message):
        return message
    content = [{"type": "image"} if part.get("type") == "image" else part for part in message["content"]]
    return {**message, "content": content}


def _pixels(value: Any, where: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise DataError(f"{where}: max_pixels is {repr(value)[:40]}. What would work: a whole number from 1.")
