"""Conversations whose prompt is too long: their oldest turns go, whole, and never the system prompt."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from selectkd.data.formats import Sample
from selectkd.data.turns import text_of

SYSTEM = ("system", "developer")
CAUTION = 0.8
"""Of the characters that seem too many so many go at once: what is left of them goes after another count of tokens."""


def has_system(sample: Sample) -> bool:
    """Whether a conversation begins with a system prompt."""
    return sample.messages is not None and sample.messages[0]["role"] in SYSTEM


def shorter(sample: Sample, trained: tuple[int, ...], excess: float) -> Sample | None:
    """The conversation of the turns ``trained`` with less before the first of them; None where nothing can go.

    Its oldest turns up to a question go. Where only one question is left, the beginning of its text goes, so that the
    system prompt stays; without a system prompt it is left to a cut of the tokens. excess: the share of the prompt that
    is too much.
    """
    messages = sample.messages or ()
    first = trained[0]
    start = next((number for number in range(first) if messages[number]["role"] not in SYSTEM), first)
    sizes = [len(text_of(message["content"])) for message in messages[:first]]
    enough = CAUTION * excess * sum(sizes)
    questions = [number for number in range(start + 1, first) if messages[number]["role"] == "user"]
    if questions:
        kept = next((number for number in questions if sum(sizes[start:number]) >= enough), questions[-1])
        left = (*messages[:start], *messages[kept:])
        return replace(sample, messages=left, trained=tuple(number - kept + start for number in trained))
    if start in (0, first) or not sizes[start]:
        return None
    text = text_of(messages[start]["content"])[max(1, ceil(enough)) :]
    left = (*messages[:start], {**messages[start], "content": text}, *messages[start + 1 :])
    return replace(sample, messages=left, trained=trained)
