"""The part of a text that can reach a sample of limited length: the rest is never tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

SHORT = 1_000_000
"""Characters up to which a text is tokenised whole: under a second, some hundred megabytes."""
MARGIN = 2
"""Tokens are cut from so many times the characters that the longest token has, so that the cut reaches none kept."""


class Part(NamedTuple):
    """A part of a text, from ``start`` to ``stop``, behind the text's own first special token where ``head`` says."""

    text: str
    start: int
    stop: int
    head: int = 0

    def index(self, place: int) -> int:
        """Where a character of the whole text, at or behind ``start``, stands in the part."""
        return place - self.start + self.head


@dataclass(frozen=True)
class Window:
    """How many tokens of a sample are kept: of all of it, and of what stands before its first trained token."""

    max_length: int
    max_prompt_length: int | None = None

    def of(self, text: str, first: int, tokenizer: Any) -> Part:
        """The part of ``text`` that tokens are kept of; first: where what is trained begins."""
        if len(text) <= SHORT:
            return Part(text, 0, len(text))
        longest = max(map(len, tokenizer.get_vocab()))
        before = min(self.max_prompt_length or self.max_length, self.max_length)
        start = max(0, first - MARGIN * longest * (before + 2))
        stop = min(len(text), first + MARGIN * longest * (self.max_length + 2))
        begin = getattr(tokenizer, "bos_token", None)
        head = begin if start and begin and text.startswith(begin) else ""
        return Part(head + text[start:stop], start, stop, len(head))
