"""Prompts that exports are measured on: pieces of Python's help pages, as `selectkd export` takes them."""

from __future__ import annotations

from typing import Any

from selectkd.cli.demo_pair import help_texts
from selectkd.evals.prompts import prompt_ids

CHARACTERS = 140


def prompts_of(tokenizer: Any, count: int) -> list[list[int]]:
    """The ids of ``count`` prompts."""
    pieces = help_texts(CHARACTERS)
    return [prompt_ids(one, tokenizer) for one in pieces[:: max(1, len(pieces) // count)][:count]]
