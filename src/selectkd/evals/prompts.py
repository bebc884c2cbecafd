"""Prompts as token ids, rendered as a model was trained to read them."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from selectkd.data.chat import rendered
from selectkd.data.example import Example
from selectkd.data.formats import Sample
from selectkd.data.render import TextRules
from selectkd.data.sources import dataset_source
from selectkd.data.template import ChatTemplate

HALF = 64
LONGEST_PROMPT = 1 << 20
"""No evaluation cuts a prompt: what does not fit a model's context is an error of that model."""


def prompt_ids(prompt: str, tokenizer: Any, *, system: str | None = None) -> list[int]:
    """The ids of one user prompt: by the chat template with its generation prompt where there is one, else the text."""
    if not tokenizer.chat_template:
        return list(tokenizer(prompt if system is None else f"{system}\n\n{prompt}")["input_ids"])
    turns = [{"role": "user", "content": prompt}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    sample = Sample(origin="the prompt", format="messages")
    text = rendered(sample, ChatTemplate.of(tokenizer), turns, prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def read_prompts(
    path: str | os.PathLike[str], tokenizer: Any, *, limit: int | None = None
) -> list[list[int]]:
    """The prompts of a file in any format a recipe's source may have: what stands before its first trained token; of
    plain text, which is trained from its start, the first half of at most 64 tokens.
    """
    source = dataset_source({"path": str(path), "limit": limit}, tokenizer, TextRules(LONGEST_PROMPT))
    return [_prompt(example) for example in source.examples]


def _prompt(example: Example) -> list[int]:
    start = example.completion.index(True)
    return example.input_ids[: start if start > 1 else max(1, min(HALF, len(example.input_ids) // 2))]


def read_texts(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    limit: int,
    longest: int,
    without: Collection[tuple[int, ...]] = (),
) -> list[list[int]]:
    """The records of a file as the student trains on them, at most ``longest`` tokens each; without: prompts, as
    ``read_prompts`` has them, whose records are left out.
    """
    source = dataset_source({"path": str(path)}, tokenizer, TextRules(longest))
    found: list[list[int]] = []
    for example in source.examples:
        if len(found) == limit:
            break
        if tuple(_prompt(example)) not in without:
            found.append(example.input_ids)
    return found
