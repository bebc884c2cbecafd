"""Prompts with images for vLLM's ``/inference/v1/generate``: token ids with one placeholder for each image, and the
images beside them, sent once. The server's processor alone widens placeholders; its answer says what it read, and an
answer that read anything but our tokens and our images is refused.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from selectkd.data.images import png_bytes
from selectkd.data.vision import Images
from selectkd.errors import ConfigError
from selectkd.teachers.remote.answers import WrongAnswer, is_object, token_id

PATH = "/inference/v1/generate"
NEEDS = "Prompts with images need vLLM 0.32 or later, started with `--enable-scale-out`."
PNG_LEVEL = 1
"""zlib's level for images that are sent: larger files take less time to send than to make smaller."""


def prompt_fields(ids: Sequence[int], images: Images) -> dict[str, Any]:
    """The fields of a question that are its prompt. Images go as PNG, as the model's own processor is given them here:
    upright, in RGB, scaled down where the record or its source says so.
    """
    if images.reader.placeholder_id is None:
        raise ConfigError(
            f"the processor's placeholder {images.reader.placeholder!r} is no token of its tokenizer, so no server can "
            "be sent it as one. Use a teacher in memory."
        )
    pixels = (png_bytes(image, level=PNG_LEVEL) for image in images.shown())
    return {
        "token_ids": images.narrowed(ids),
        "content_parts": [
            {"type": "image_url", "url": f"data:image/png;base64,{base64.b64encode(one).decode()}"}
            for one in pixels
        ],
        "return_token_ids": True,
    }


def same_prompt(answer: dict[str, Any], ids: Sequence[int], images: Images) -> None:
    """WrongAnswer unless the server read ``ids``, with each image where its tokens stand in them."""
    names = ", ".join(images.names)
    read = answer.get("prompt_token_ids")
    if not isinstance(read, list):
        raise WrongAnswer(
            f"the answer does not say which tokens were read of the prompt with {names}. {NEEDS}"
        )
    found = [token_id(one, f"token {at} of the prompt") for at, one in enumerate(read)]
    places = _places(answer.get("mm_placeholders"))
    ours = images.places
    if len(places) != len(ours):
        raise WrongAnswer(
            f"the server was shown {len(places)} images of the {len(ours)} of the prompt ({names}); the tokens of the "
            "others were read as text, or not at all"
        )
    if found != list(ids):
        differ = next(
            (at for at, (one, other) in enumerate(zip(found, ids, strict=False)) if one != other),
            min(len(found), len(ids)),
        )
        known = images.reader.image_ids
        theirs, here = (sum(one in known for one in tokens) for tokens in (found, ids))
        raise WrongAnswer(
            f"the server read {len(found)} tokens of the prompt with {names}, {theirs} of them for images; the "
            f"student's processor makes {len(ids)}, {here} for images. They differ from token {differ} on. Serve the "
            "teacher with the student's processor and tokenizer files"
        )
    for number, ((begin, end), (start, stop)) in enumerate(zip(ours, places, strict=True)):
        inside = any(one in images.reader.image_ids for one in [*ids[begin:start], *ids[stop:end]])
        if not (begin <= start < stop <= end) or inside:
            raise WrongAnswer(
                f"the server put {images.names[number]} at the tokens {start} to {stop}, and its tokens stand from "
                f"{begin} to {end}"
            )


def _places(given: Any) -> list[tuple[int, int]]:
    """[begin, end) of each image that the server put into a prompt, in their order; empty where it says of none."""
    images = is_object({} if given is None else given, "mm_placeholders").get("image") or []
    if not isinstance(images, list):
        raise WrongAnswer("mm_placeholders has no list of images")
    found = []
    for one in images:
        fields = is_object(one, "an image's place")
        begin, length = (token_id(fields.get(name), f"an image's {name}") for name in ("offset", "length"))
        found.append((begin, begin + length))
    return sorted(found)
