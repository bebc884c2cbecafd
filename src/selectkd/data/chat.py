"""Conversations to tokens: a chat template renders, and positions in its text say which tokens are trained.

A turn is trained from the end of its generation prompt to the token that ends it. Tokens behind that one, a newline or
the end of the whole conversation, are not trained: no model has to write them. Templates that change earlier turns make
several texts of one conversation (``positions``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from selectkd.data.encoding import Encoded, Encoder, Joined
from selectkd.data.formats import Sample
from selectkd.data.image_parts import count_of
from selectkd.data.images import ImageRules
from selectkd.data.positions import Layout, TrainTurns, lay_out
from selectkd.data.renderer import Answer, Job, Renderings
from selectkd.data.rounds import Steps, Tokens, alone
from selectkd.data.template import ChatTemplate, shaped
from selectkd.data.vision import Images, Vision, images_key
from selectkd.data.windows import Part, Window
from selectkd.errors import DataError

Text = tuple[list[int], list[bool], tuple[int, ...], Images | None]
"""Ids, which of them are trained, the numbers of its trained turns, and its images (None: the model sees nothing)."""


@dataclass(frozen=True)
class Sight:
    """How images become tokens: the model's processor, and where images may lie."""

    vision: Vision
    rules: ImageRules = field(default_factory=ImageRules)


def tokenize_chat(
    sample: Sample,
    encoder: Encoder,
    template: ChatTemplate,
    *,
    eos_ids: Collection[int],
    window: Window,
    train_turns: TrainTurns = "all",
    sight: Sight | None = None,
) -> Steps[list[Text]]:
    """Each text of a conversation, its trained turns marked, each with the token that ends it.

    eos_ids: what ends a turn beside what the template itself writes behind one. Raises DataError naming the row and the
    turn: see ``lay_out``; and where the tokenizer cannot say which characters a token covers.
    """
    if not encoder.fast:
        raise DataError(
            f"{sample.origin}: {type(encoder.tokenizer).__name__} gives no character positions, so its tokens cannot "
            "be assigned to turns.\n"
            "What would work: a fast tokenizer (a folder with tokenizer.json), or pre-tokenised "
            "input_ids + labels."
        )
    ends = turn_ends(template, encoder.tokenizer, eos_ids, sample)
    layouts = yield from lay_out(sample, template, ends=encoder.signs(ends), train_turns=train_turns)
    texts: list[Text] = []
    if sight is not None:
        texts = yield from _with_images(layouts, encoder, ends, window, sample, sight)
        return texts
    for layout in layouts:
        ids, trained, _ = yield from _tokens(layout, encoder, ends, window, sample)
        texts.append((ids, trained, layout.numbers, None))
    return texts


def _with_images(
    layouts: Sequence[Layout],
    encoder: Encoder,
    ends: Collection[int],
    window: Window,
    sample: Sample,
    sight: Sight,
) -> Steps[list[Text]]:
    """The texts of a conversation with the tokens of its images, which are never trained.

    A text has the images up to the last turn that is trained in it; those behind are not read.
    """
    vision, texts = sight.vision, list[Text]()
    counts = [count_of((sample.messages or ())[: layout.numbers[-1] + 1]) for layout in layouts]
    refs = vision.opened(sample.images[: max(counts, default=0)], sight.rules)
    places = [part.place for part in sample.images]
    for layout, count in zip(layouts, counts, strict=True):
        spans: list[int] = []
        if count or vision.placeholder in layout.text:
            wide = vision.widened(layout.text, refs[:count], places[:count], sample.origin)
            pieces = tuple((wide.place(begin), wide.place(stop)) for begin, stop in layout.pieces)
            begins = tuple(map(wide.place, layout.begins))
            layout = layout._replace(text=wide.text, pieces=pieces, begins=begins)
            spans = [place for span in wide.spans for place in span]
        kept = None if spans else window
        ids, trained, tokens = yield from _tokens(layout, encoder, ends, kept, sample, spans)
        images = images_in(ids, trained, tokens, refs[:count], sample, vision)
        texts.append((ids, trained, layout.numbers, images))
    return texts


def images_in(
    ids: Sequence[int],
    trained: list[bool],
    spans: Sequence[int],
    refs: Sequence[Any],
    sample: Sample,
    vision: Vision,
) -> Images:
    """The images of a text whose tokens stand at ``spans``, which are taken out of what is trained.

    DataError where a token that stands for an image lies elsewhere.
    """
    inside: set[int] = set()
    for begin, end in zip(spans[::2], spans[1::2], strict=True):
        trained[begin:end] = [False] * (end - begin)
        inside.update(range(begin, end))
    stray = [place for place, one in enumerate(ids) if one in vision.image_ids and place not in inside]
    if stray:
        raise DataError(
            f"{sample.origin}: token {stray[0]} ({ids[stray[0]]}) stands for an image, and no image is there. Take "
            f"{vision.placeholder} out of the text."
        )
    prefix = trained.index(True) if True in trained else len(ids)
    packed = tuple(ref.packed() for ref in refs)
    return Images(packed, images_key(refs, vision) if refs else b"", tuple(spans), prefix, vision)


def _tokens(
    layout: Layout,
    encoder: Encoder,
    ends: Collection[int],
    window: Window | None,
    sample: Sample,
    spans: Sequence[int] = (),
) -> Steps[tuple[list[int], list[bool], list[int]]]:
    """(ids, trained, the tokens that begin at ``spans``) of a text, with EOS behind one that nothing ends.

    Those are trained that begin in a trained piece. window: what of the text is kept, None for all.
    """
    text = layout.text
    cut = Part(text, 0, len(text))
    if window is not None:
        cut = window.of(text, layout.pieces[0][0], encoder.tokenizer)
    found = yield from _encoded(cut.text, [cut.index(begin) for begin in layout.begins])
    ids, places = (
        list(found.ids),
        [found.first(cut.index(place)) for piece in layout.pieces for place in piece],
    )
    trained = [False] * len(ids)
    for first, last in zip(places[::2], places[1::2], strict=True):
        trained[first:last] = [True] * (last - first)
    whole = cut.stop == len(text)
    if not any(trained) and whole:
        raise DataError(f"{sample.origin}: no token begins within a trained turn. Leave the row out.")
    tokens = [found.first(cut.index(place)) for place in spans]
    open_end = whole and trained[-1] and ids[-1] not in ends and ids[-1] not in encoder.special
    if open_end and isinstance(encoder.tokenizer.eos_token_id, int):
        return [*ids, encoder.tokenizer.eos_token_id], [*trained, True], tokens
    return ids, trained, tokens


def _encoded(text: str, begins: Sequence[int]) -> Steps[Encoded]:
    """The tokens of a text.

    Where a token would reach across the end of a generation prompt, the text is cut there first: a model is given the
    prompt's own tokens.
    """
    found: Encoded = yield Tokens(text)
    if not any(found.crosses(begin) for begin in begins):
        return found
    parts: list[Encoded] = []
    cuts = [0, *(begin for begin in begins if 0 < begin < len(text)), len(text)]
    for begin, end in pairwise(cuts):
        part: Encoded = yield Tokens(text[begin:end])
        parts.append(part)
    return Joined(parts, cuts)


def rendered(
    sample: Sample, template: ChatTemplate, messages: Sequence[dict[str, Any]], *, prompt: bool = False
) -> str:
    """The template's text of ``messages``, with the generation prompt when ``prompt``. Raises DataError."""
    traits = template.traits(sample.origin, tools=bool(sample.tools))
    shown = [shaped(message, traits) for message in messages]
    steps = template.rendered(sample.origin, [Job(shown, sample.tools, prompt)])
    return alone(steps, template.answers)[0]


def leaves_out_tools(sample: Sample, template: ChatTemplate) -> Steps[bool]:
    """Whether a conversation with tool schemas reads as it would without them."""
    if not sample.tools or not template.source:
        return False
    traits = template.traits(sample.origin, tools=True)
    shown = [shaped(message, traits) for message in sample.messages or ()]
    text = template.text(sample.origin, tools=True)
    found: list[Answer] = yield Renderings(text, [Job(shown, sample.tools), Job(shown)])
    return found[0] == found[1]


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
