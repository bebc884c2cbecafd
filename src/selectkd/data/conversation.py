"""A conversation in the shapes that its chat template takes, and what its turns say."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

from selectkd.data.formats import Sample
from selectkd.data.jinja_process import REASONING
from selectkd.data.renderer import Job
from selectkd.data.template import ChatTemplate, holds_sign, mark, shaped
from selectkd.data.turns import without_end
from selectkd.errors import DataError

GENERATION = re.compile(r"\{%-?\+?\s*generation\s*[-+]?%\}")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
TAG = re.compile(r"\s*(</?[A-Za-z_]+>|\[/?[A-Z_]+\])\s*")
"""A tag such as <think> with the space around it, which templates write in their own way."""
NO_THOUGHT = re.compile(r"<think>\s*</think>\s*|\[THINK\]\s*\[/THINK\]\s*")
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*|\s*\[THINK\](.*?)\[/THINK\]\s*", re.DOTALL)
CLOSING = {"<think>": "</think>", "[THINK]": "[/THINK]"}
HEADLESS = re.compile(r"(?:(?!</?think>|\[/?THINK\]).)*\n\s*(</think>|\[/THINK\])\s*\n", re.DOTALL)
"""A thought as a model writes it behind a generation prompt that opens it: closed on a line of its own."""


@dataclass(frozen=True)
class Conversation:
    """A conversation in the shapes its template takes. marked: the template marks what is generated."""

    sample: Sample
    template: ChatTemplate
    messages: list[dict[str, Any]]
    marked: bool
    thinks: bool
    ends: Collection[str]

    def job(self, stop: int, *, marks: Collection[int] = (), prompt: bool = False) -> Job:
        """A rendering of the messages before ``stop``, with a mark behind the text of those whose numbers are given."""
        shown = [
            _with_mark(message, number) if number in marks else message
            for number, message in enumerate(self.messages[:stop])
        ]
        return Job(shown, self.sample.tools, prompt)

    def job_of_calls(self, stop: int) -> Job:
        """A rendering of the messages before ``stop``, with a mark behind the name of each call, which are counted."""
        numbers = count()
        shown = [
            {
                **message,
                "tool_calls": [_with_marked_name(call, next(numbers)) for call in message["tool_calls"]],
            }
            if message.get("tool_calls")
            else message
            for message in self.messages[:stop]
        ]
        return Job(shown, self.sample.tools)


def conversation_of(sample: Sample, template: ChatTemplate, ends: Collection[str]) -> Conversation:
    traits = template.traits(sample.origin, tools=bool(sample.tools))
    marks, thinks = _reads(template.text(sample.origin, tools=bool(sample.tools)))
    messages = [shaped(without_end(message, ends), traits) for message in sample.messages or ()]
    if thinks:
        messages = [
            _with_opening(message) if message["role"] == "assistant" else message for message in messages
        ]
    if any(holds_sign(name) or holds_sign(value) for turn in messages for name, value in turn.items()):
        raise DataError(
            f"{sample.origin}: holds one of the noncharacters U+FDD0 to U+FDD3, which no text needs. Take it out."
        )
    return Conversation(sample, template, messages, marks, thinks, ends)


def _with_opening(message: dict[str, Any]) -> dict[str, Any]:
    """An assistant's message whose thought, where it is closed alone, is opened as well."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": _opened(content)}
    if not content or "text" not in content[0]:
        return message
    return {**message, "content": [{**content[0], "text": _opened(content[0]["text"])}, *content[1:]]}


def _opened(text: str) -> str:
    found = HEADLESS.match(text)
    return (
        text
        if found is None
        else next(one for one, closing in CLOSING.items() if closing == found[1]) + "\n" + text
    )


@lru_cache(maxsize=8)
def _reads(template: str) -> tuple[bool, bool]:
    """Whether a template marks what is generated, and whether it knows reasoning."""
    source = COMMENT.sub("", template)
    return GENERATION.search(source) is not None, any(closing in source for closing in CLOSING.values())


def _with_mark(message: dict[str, Any], number: int) -> dict[str, Any]:
    """The message with a mark behind its text, before the space at its end, which some templates cut off."""
    content = message.get("content")
    if isinstance(content, list):
        parts = content if content and "text" in content[-1] else [*content, {"type": "text", "text": ""}]
        last = {**parts[-1], "text": _marked(parts[-1]["text"], number)}
        return {**message, "content": [*parts[:-1], last]}
    return {**message, "content": _marked(content, number)} if isinstance(content, str) else message


def _with_marked_name(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_marked_name(call["function"], number)}
    return {**call, "name": f"{call.get('name', '')}{mark(number)}"}


def _marked(text: str, number: int) -> str:
    body = text.rstrip()
    return body + mark(number) + text[len(body) :]


def content_of(message: Mapping[str, Any]) -> str:
    """The text of a message, of parts their texts together."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content).strip()
    return content.strip() if isinstance(content, str) else ""


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning of a turn, in a field of its own or at the beginning of its text."""
    for name in REASONING:
        if message.get(name) is not None:
            return str(message[name]).strip()
    found = THOUGHT.match(content_of(message))
    return (found[1] or found[2] or "").strip() if found is not None else ""


def answer_of(message: Mapping[str, Any]) -> str:
    """The text of a turn behind its reasoning."""
    return (
        THOUGHT.sub("", content_of(message), count=1)
        if THOUGHT.match(content_of(message))
        else content_of(message)
    )


def search(text: str, region: str, begin: int) -> tuple[int, int] | None:
    """Where ``text`` stands in the region from ``begin`` on, but for the space around tags."""
    if region.startswith(text, begin):
        return begin, begin + len(text)
    place = region.find(text, begin)
    if place >= 0:
        return place, place + len(text)
    pieces = [re.escape(piece) for piece in TAG.split(text) if piece.strip()]
    found = re.compile(r"\s*".join(pieces)).search(region, begin) if len(pieces) > 1 else None
    return None if found is None else found.span()
