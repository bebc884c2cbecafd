"""Conversations to tokens: a chat template renders, and positions in its text say which tokens are trained.

A turn is trained from the end of its generation prompt to the token that ends it. Tokens behind that one, a newline or
the end of the whole conversation, are not trained: no model has to write them. Templates that change earlier turns make
several texts of one conversation (``positions``).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from selectkd.data.formats import Sample
from selectkd.data.positions import Layout, TrainTurns, lay_out, shaped
from selectkd.data.renderer import Job
from selectkd.data.template import ChatTemplate
from selectkd.data.windows import Window
from selectkd.errors import DataError


def tokenize_chat(
    sample: Sample,
    tokenizer: Any,
    template: ChatTemplate,
    *,
    eos_ids: Collection[int],
    window: Window,
    train_turns: TrainTurns = "all",
) -> list[tuple[list[int], list[bool]]]:
    """(ids, trained) of each text of a conversation, its trained turns marked, each with the token that ends it.

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
    ends = turn_ends(template, tokenizer, eos_ids, sample)
    signs = frozenset(tokenizer.convert_ids_to_tokens(sorted(ends)))
    layouts = lay_out(sample, template, ends=signs, train_turns=train_turns)
    return [_tokens(layout, tokenizer, ends, window, sample) for layout in layouts]


def _tokens(
    layout: Layout, tokenizer: Any, ends: Collection[int], window: Window, sample: Sample
) -> tuple[list[int], list[bool]]:
    """The tokens of a text, those trained that begin in a trained piece, and EOS behind a text that nothing ends."""
    cut = window.of(layout.text, layout.pieces[0][0], tokenizer)
    ids, starts = _encoded(cut.text, [cut.index(begin) for begin in layout.begins], tokenizer)
    trained = [False] * len(ids)
    for begin, stop in layout.pieces:
        first, last = (bisect_left(starts, cut.index(place)) for place in (begin, stop))
        trained[first:last] = [True] * (last - first)
    whole = cut.stop == len(layout.text)
    if not any(trained) and whole:
        raise DataError(f"{sample.origin}: no token begins within a trained turn. Leave the row out.")
    open_end = whole and trained[-1] and ids[-1] not in {*ends, *tokenizer.all_special_ids}
    if open_end and isinstance(tokenizer.eos_token_id, int):
        return [*ids, tokenizer.eos_token_id], [*trained, True]
    return ids, trained


def _encoded(text: str, begins: Sequence[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids of a text and the character each begins at.

    Where a token would reach across the end of a generation prompt, the text is cut there first: a model is given the
    prompt's own tokens.
    """

    def encode(begin: int, end: int) -> tuple[list[int], list[tuple[int, int]]]:
        found = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
        return found["input_ids"], [(begin + one, begin + two) for one, two in found["offset_mapping"]]

    ids, spans = encode(0, len(text))
    starts = [one for one, _ in spans]
    before = [bisect_left(starts, begin) - 1 for begin in begins]
    if any(i >= 0 and spans[i][1] > begin for i, begin in zip(before, begins, strict=True)):
        cuts = [0, *(begin for begin in begins if 0 < begin < len(text)), len(text)]
        parts = [encode(*pair) for pair in pairwise(cuts)]
        ids = [index for some, _ in parts for index in some]
        starts = [one for _, some in parts for one, _ in some]
    return list(ids), starts


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
