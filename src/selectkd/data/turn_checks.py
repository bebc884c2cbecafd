"""Whether a rendering holds all that the turns of a conversation say; a template may leave parts of them out."""

from __future__ import annotations

import json
import re
from typing import NoReturn

from selectkd.data.conversation import CLOSING, NO_THOUGHT, Conversation, content_of, search
from selectkd.data.formats import Sample
from selectkd.data.jinja_process import REASONING
from selectkd.data.rounds import Steps
from selectkd.data.template import BEGIN, END
from selectkd.data.turns import text_of
from selectkd.errors import DataError

MARK = re.compile(f"{BEGIN}([0-9]+){END}")
WORD = re.compile(r"(?<![\\\w])(?!(?:true|false|null)\b)[a-zA-Z0-9]{2,}")
"""A word of a call's arguments that stands in every way of writing them: JSON, tags, Python."""


def check_context(talk: Conversation, stop: int, plain: str, *, prompt: bool) -> Steps[None]:
    """DataError where the text of a message before ``stop`` that is no assistant's is not in the rendering."""
    others = [number for number in range(stop) if talk.messages[number]["role"] != "assistant"]
    changed = [number for number in others if content_of(talk.messages[number]) not in plain]
    if not changed:
        return
    # A text that the template has changed is there when a mark behind it is.
    (marked,) = yield from talk.template.rendered(
        talk.sample.origin, [talk.job(stop, marks=others, prompt=prompt)]
    )
    places = {int(number) for number in MARK.findall(marked)}
    for number in changed:
        if number not in places:
            lost(talk.sample, number, "content", talk.messages[number]["role"])


def check_calls(talk: Conversation, stop: int) -> Steps[None]:
    """DataError where a call of a message before ``stop`` is not in the rendering: a mark behind its name is not."""
    calls = [
        (number, index)
        for number, message in enumerate(talk.messages[:stop])
        for index in range(len(message.get("tool_calls") or ()))
    ]
    if not calls:
        return
    (marked,) = yield from talk.template.rendered(talk.sample.origin, [talk.job_of_calls(stop)])
    there = set(map(int, MARK.findall(marked)))
    for place, (number, index) in enumerate(calls):
        if place not in there:
            lost(talk.sample, number, f"tool_calls[{index}].name", "assistant")


def check_turn(talk: Conversation, number: int, region: str) -> None:
    """DataError where a field of a trained turn is not in its part of the text."""
    message = talk.messages[number]
    thought = [(name, str(message[name]).strip()) for name in REASONING if message.get(name) is not None][:1]
    content = content_of(message)
    if "think>" in content or "THINK]" in content:
        content = NO_THOUGHT.sub("", content).strip()
    for name, text in (*thought, ("content", content)):
        if not (search(text, region, 0) if _closes_what_it_opens(text) else text in region):
            lost(talk.sample, number, name, "assistant")
    besides = region.replace(content, "", 1) if content else region
    for index, call in enumerate(message.get("tool_calls") or ()):
        words = WORD.findall(json.dumps(call.get("function", call).get("arguments"), ensure_ascii=False))
        if not all(word in besides for word in words):
            lost(talk.sample, number, f"tool_calls[{index}].arguments", "assistant")


def _closes_what_it_opens(text: str) -> bool:
    """Whether each tag that closes a thought has one before it that opens it: a template takes what stands before the
    tag for reasoning."""
    return all(
        text.find(closing) < 0 or -1 < text.find(opening) < text.find(closing)
        for opening, closing in CLOSING.items()
    )


def lost(sample: Sample, number: int, name: str, role: str) -> NoReturn:
    """DataError of a field that a template leaves out or changes."""
    text = text_of((sample.messages or ())[number]["content"]) if name == "content" else ""
    tag = next((closing for closing in CLOSING.values() if closing in text), None)
    why = f" It has {tag}, at which the template parts reasoning from answer." if tag else ""
    way = {"system": "a template with system prompts", "assistant": "a template that keeps all of a turn"}
    raise DataError(
        f"{sample.origin}: turn {number} ({role}): the chat template leaves out its {name}, or changes it.{why}\n"
        f"What would work: {way.get(role, 'a template that writes such turns')} (data.chat_template: FILE, or "
        "data.template_arguments),\na row without it, or `on_bad_record: skip`."
    )
