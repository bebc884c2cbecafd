"""A prompt and its reply as one conversation, where the reply may repeat some of the prompt, or all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from selectkd.data.fields import Where
from selectkd.data.image_parts import PLACEHOLDER
from selectkd.data.turns import text_of
from selectkd.errors import DataError

Turns = list[dict[str, Any]]
RULES = ("system", "developer")


def joined(prompt: Turns, reply: Turns, where: Where) -> tuple[Turns, int]:
    """The turns of both, and how many of them are the prompt's; what the reply repeats stands there once.

    A reply that is a whole conversation holds the prompt at its beginning, or has its last turns as a question further
    on. DataError for a reply that begins with another question, or with other system text.
    """
    system, asked = _parted(prompt)
    own, answered = _parted(reply)
    if system and own and not _same(system, own):
        raise DataError(
            f"{where}: its own system text is not that of the prompt. Leave one of them out, or make them the same."
        )
    system = system or own
    if not asked or not answered or answered[0]["role"] != "user":
        return [*system, *asked, *answered], len(system) + len(asked)
    for count in range(min(len(asked), len(answered)), 0, -1):
        if _same(asked[-count:], answered[:count]):
            return [*system, *asked, *answered[count:]], len(system) + len(asked)
    for end in range(len(answered) - 1, len(asked), -1):
        if _same(asked, answered[end - len(asked) : end]):
            return [*system, *answered], len(system) + end
    if asked[-1]["role"] == "assistant":
        return [*system, *asked, *answered], len(system) + len(asked)
    raise DataError(
        f"{where}: begins with a question that is not the prompt's: {text_of(answered[0]['content'])[:60]!r}, not "
        f"{text_of(asked[-1]['content'])[:60]!r}.\nWhat would work: the answer alone, or the prompt's own turns before "
        "it."
    )


def _parted(turns: Turns) -> tuple[Turns, Turns]:
    """The system turns at the beginning, and the rest."""
    start = next((place for place, turn in enumerate(turns) if turn["role"] not in RULES), len(turns))
    return turns[:start], turns[start:]


def _same(some: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> bool:
    """Whether turns say the same, whatever white space there is and wherever images stand."""
    return [_content(turn) for turn in some] == [_content(turn) for turn in others]


def _content(turn: Mapping[str, Any]) -> tuple[Any, ...]:
    words = text_of(turn["content"]).replace(PLACEHOLDER, " ").split()
    return turn["role"], words, turn.get("tool_calls") or None
