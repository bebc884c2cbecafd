"""Conversations whose prompt is too long: their oldest turns go, whole, and never the system prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from selectkd.data.encoding import Encoded
from selectkd.data.formats import Sample
from selectkd.data.image_parts import count_of
from selectkd.data.rounds import Steps, Tokens
from selectkd.data.turns import text_of

SYSTEM = ("system", "developer")
CAUTION = 0.8
"""Of the text that seems too much so much goes at once: what is left of it goes after another count of tokens."""
LOOKED_AT = 4096
"""Characters at the end of a text that say how many of them a token has."""


def images_before(sample: Sample, trained: tuple[int, ...]) -> int:
    """How many images stand before the first of the turns ``trained``."""
    return count_of((sample.messages or ())[: trained[0]])


def shorter(
    sample: Sample, trained: tuple[int, ...], length: int, most: int, images: Sequence[int] = ()
) -> Steps[Sample | None]:
    """The conversation of the turns ``trained`` with less before the first of them; None where nothing can go.

    Its oldest turns up to a question go, with their images. Where only one question is left, the beginning of the
    longest text from it on goes, of the question or of a tool's result; one with an image stays whole. What the
    template writes around them stays, and so does the system prompt. length: the tokens of the prompt, of which
    ``most`` may stay; images: those of each image.
    """
    messages = sample.messages or ()
    first = trained[0]
    start = next((number for number in range(first) if messages[number]["role"] not in SYSTEM), first)
    counts = [count_of([message]) for message in messages]
    letters = [len(text_of(message["content"])) for message in messages[:first]]
    shown = images[: sum(counts[:first])]
    each = (length - sum(shown)) / max(1, sum(letters))  # tokens of a character
    sizes = [
        each * size + sum(shown[sum(counts[:number]) : sum(counts[: number + 1])])
        for number, size in enumerate(letters)
    ]
    enough = CAUTION * (length - most)
    questions = [number for number in range(start + 1, first) if messages[number]["role"] == "user"]
    if questions:
        kept = next((number for number in questions if sum(sizes[start:number]) >= enough), questions[-1])
        return replace(
            sample,
            messages=(*messages[:start], *messages[kept:]),
            trained=tuple(number - kept + start for number in trained),
            images=(*sample.images[: sum(counts[:start])], *sample.images[sum(counts[:kept]) :]),
        )
    cut = max(
        (number for number in range(start, first) if messages[number]["role"] != "assistant"),
        key=letters.__getitem__,
        default=None,
    )
    if cut is None or not letters[cut] or any(counts[start:first]):
        return None
    text = text_of(messages[cut]["content"])
    end: Encoded = yield Tokens(
        text[-LOOKED_AT:]
    )  # schemas and headers are no part of what its characters cost
    of_token = len(text[-LOOKED_AT:]) / max(1, len(end.ids))
    text = text[max(1, ceil(enough * of_token), len(text) - ceil(1.2 * most * of_token)) :]
    if not text.strip():
        return None
    left = (*messages[:cut], {**messages[cut], "content": text}, *messages[cut + 1 :])
    return replace(sample, messages=left, trained=trained)
