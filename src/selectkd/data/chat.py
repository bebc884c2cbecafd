"""Conversations to tokens: a chat template renders, and positions in its text say which tokens are trained.

A turn is trained from the end of its generation prompt to the token that ends it. Tokens behind that one, a newline or
the end of the whole conversation, are not trained: no model has to write them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Any

from selectkd.data.formats import Sample
from selectkd.data.positions import Turn, lay_out, shaped
from selectkd.data.renderer import Job
from selectkd.data.template import ChatTemplate
from selectkd.data.windows import Window
from selectkd.errors import DataError


def tokenize_chat(
    sample: Sample, tokenizer: Any, template: ChatTemplate, *, eos_ids: Collection[int], window: Window
) -> tuple[list[int], list[bool]]:
    """(ids, trained) of a conversation, its trained assistant turns marked, each with the token that ends the turn.

    eos_ids: what ends a turn beside what the template itself writes behind one. Raises DataError naming the row and the
    turn: see ``lay_out``; and where the tokenizer cannot say which characters a token covers.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{sample.origin}: {type(tokenizer).__name__} gives no character positions, so its tokens cannot be "
            "assigned to turns.\n"
            "What would work: a fast tokenizer (a folder with tokenizer.json), or pre-tokenised "
            "input_ids + labels."
        )
    layout = lay_out(sample, template)
    ends = turn_ends(template, tokenizer, eos_ids, sample)
    first = min(begin for turn in layout.turns for begin, _ in turn.pieces[:1])
    cut = window.of(layout.text, first, tokenizer)
    encoded = tokenizer(cut.text, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts = list(encoded["input_ids"]), [cut.place(start) for start, _ in encoded["offset_mapping"]]
    trained = [False] * len(ids)
    for turn in layout.turns:
        for start, stop in _tokens(turn, ids, starts, ends):
            trained[start:stop] = [True] * (stop - start)
    if not any(trained) and len(cut.text) == len(layout.text):
        raise DataError(f"{sample.origin}: no token begins within a trained turn. Leave the row out.")
    eos = tokenizer.eos_token_id
    whole = cut.stop == len(layout.text) and bool(ids) and trained[-1] and ids[-1] not in ends
    if isinstance(eos, int) and whole and ids[-1] not in set(tokenizer.all_special_ids):
        ids.append(eos)
        trained.append(True)
    return ids, trained


def rendered(
    sample: Sample, template: ChatTemplate, messages: Sequence[dict[str, Any]], *, prompt: bool = False
) -> str:
    """The template's text of ``messages``, with the generation prompt when ``prompt``. Raises DataError."""
    traits = template.traits(sample.origin, tools=bool(sample.tools))
    shown = [shaped(message, traits) for message in messages]
    return template.rendered(sample.origin, [Job(shown, sample.tools, prompt)])[0]


def leaves_out_tools(sample: Sample, template: ChatTemplate) -> bool:
    """Whether a conversation with tool schemas reads as it would without them."""
    if not sample.tools or not template.source:
        return False
    traits = template.traits(sample.origin, tools=True)
    shown = [shaped(message, traits) for message in sample.messages or ()]
    text = template.text(sample.origin, tools=True)
    written, without = template.answers(text, [Job(shown, sample.tools), Job(shown)])
    return written == without


def turn_ends(
    template: ChatTemplate, tokenizer: Any, known: Collection[int], sample: Sample
) -> frozenset[int]:
    """``known``, and the special tokens that the template writes behind an assistant's text, be it the last or not, and
    behind a tool call.
    """
    key = (bool(sample.tools), frozenset(known))
    if key not in template.ends:
        traits = template.traits(sample.origin, tools=bool(sample.tools))
        found = {*known}
        found |= _special(traits.last, tokenizer, (), directly=True)
        found |= _special(traits.middle, tokenizer, found, directly=True)
        found |= _special(traits.call, tokenizer, found, directly=False)
        template.ends[key] = frozenset(found)
    return template.ends[key]


def _special(tail: str, tokenizer: Any, known: Collection[int], *, directly: bool) -> set[int]:
    """The first special token of a tail without a known end; ``directly``: only space may stand before it."""
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    if set(ids) & set(known):
        return set()
    for place, index in enumerate(ids):
        if index in special:
            return {index} if not directly or not tokenizer.decode(ids[:place]).strip() else set()
    return set()


def _tokens(
    turn: Turn, ids: Sequence[int], starts: Sequence[int], ends: Collection[int]
) -> list[tuple[int, int]]:
    """The runs of tokens of a turn, the last one up to the token that ends the turn where there is one.

    A token that begins before the turn belongs to the prompt: at generation time it is already written.
    """
    runs = [(bisect_left(starts, begin), bisect_left(starts, end)) for begin, end in turn.pieces]
    if not runs:
        return []
    index = bisect_left(starts, turn.known)
    while index < len(ids) and starts[index] < turn.reach:
        if ids[index] in ends:
            runs[-1] = (runs[-1][0], index + 1)
            break
        index += 1
    return [(start, stop) for start, stop in runs if start < stop]
