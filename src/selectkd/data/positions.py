"""Where each trained turn of a conversation stands in its text.

A turn is laid out as a model meets it: the template's generation prompt for the messages before it, then the turn as
the template writes it at the end of a conversation. A template may change a turn when later ones follow. One text
holds several trained turns only where each stands in it as at the end of its own conversation; else a conversation
becomes several texts. A template's own {% generation %} marks narrow what is trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any, Literal, NamedTuple, NoReturn

from selectkd.data.formats import Sample
from selectkd.data.jinja_process import CLOSE, OPEN, REASONING
from selectkd.data.renderer import Job
from selectkd.data.rounds import Steps
from selectkd.data.template import BEGIN, END, ChatTemplate, holds_sign, mark, shaped
from selectkd.data.turns import without_end
from selectkd.errors import DataError

TrainTurns = Literal["all", "last", "final_answer"]
MARK = re.compile(f"{BEGIN}([0-9]+){END}")
GENERATION = re.compile(r"\{%-?\+?\s*generation\s*[-+]?%\}")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
TAG = re.compile(r"\s*(</?[A-Za-z_]+>|\[/?[A-Z_]+\])\s*")
"""A tag such as <think> with the space around it, which templates write in their own way."""
NO_THOUGHT = re.compile(r"<think>\s*</think>\s*|\[THINK\]\s*\[/THINK\]\s*")
OPENED = re.compile(r"(<think>|\[THINK\])\s*\Z")
"""The end of a generation prompt that lets the model think."""
OPENING = re.compile(r"(?:<think>|\[THINK\])\s*")
CLOSED = re.compile(rf"(?:{NO_THOUGHT.pattern})\Z")
"""The end of a generation prompt that has the model answer at once."""
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*|\s*\[THINK\](.*?)\[/THINK\]\s*", re.DOTALL)
CLOSING = {"<think>": "</think>", "[THINK]": "[/THINK]"}
WORD = re.compile(r"(?<![\\\w])(?!(?:true|false|null)\b)[a-zA-Z0-9]{2,}")
"""A word of a call's arguments that stands in every way of writing them: JSON, tags, Python."""


class Layout(NamedTuple):
    """A text and the parts of it that are trained, [begin, end) in characters, in their order. begins: the ends of the
    generation prompts of its trained turns; numbers: those turns.
    """

    text: str
    pieces: tuple[tuple[int, int], ...]
    begins: tuple[int, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class _Conversation:
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


class _Turn(NamedTuple):
    """Trained turn ``number`` at the end of its own text, behind ``begin``, the end of its generation prompt. stop:
    where nothing is read any more; ended: whether a token of the text ends the turn there.
    """

    number: int
    text: str
    begin: int
    pieces: tuple[tuple[int, int], ...]
    stop: int
    ended: bool


def lay_out(
    sample: Sample, template: ChatTemplate, *, ends: Collection[str], train_turns: TrainTurns = "all"
) -> Steps[list[Layout]]:
    """The texts of a conversation with what is trained in each, in the order of its turns; empty for no such turn.

    ends: the tokens that end a turn. Raises DataError naming the row, the turn and the field: where the template cannot
    render it, gives a trained turn no position, or leaves out something that a message has.
    """
    numbers = chosen(sample, train_turns)
    if not numbers:
        return []
    talk = _conversation(sample, template, ends)
    jobs = [job for number in numbers for job in (talk.job(number, prompt=True), talk.job(number + 1))]
    texts = yield from template.rendered(sample.origin, jobs)
    yield from _check_context(talk, numbers[-1], texts[-2], prompt=True)
    turns: list[_Turn] = []
    for place, number in enumerate(numbers):
        answer = train_turns == "final_answer"
        turn = yield from _turn(talk, number, texts[2 * place], texts[2 * place + 1], answer=answer)
        turns.append(turn)
    if not any(turn.pieces for turn in turns):
        raise DataError(
            f"{sample.origin}: the chat template marks no token of the assistant turns as generated.\n"
            "Put {% generation %} ... {% endgeneration %} around the assistant's text in the template, or leave the "
            "marks out."
        )
    return _together([turn for turn in turns if turn.pieces], ends)


def whole_text(sample: Sample, template: ChatTemplate, *, ends: Collection[str]) -> Steps[str]:
    """The text of a conversation, its last turn as a model meets it; for ``train_on: all``. Raises DataError."""
    talk = _conversation(sample, template, ends)
    count = len(talk.messages)
    if talk.messages[-1]["role"] == "assistant" and count - 1 in sample.trained:
        layouts = yield from lay_out(sample, template, ends=ends, train_turns="last")
        return layouts[-1].text
    (plain,) = yield from template.rendered(sample.origin, [talk.job(count)])
    yield from _check_context(talk, count, plain, prompt=False)
    text, _ = _unmarked(plain)
    for number in sample.trained:
        _check(talk, number, text)
    return text


def chosen(sample: Sample, train_turns: TrainTurns) -> tuple[int, ...]:
    """The numbers of the turns that are trained, of those that the row leaves to train."""
    if train_turns == "all":
        return sample.trained
    messages = sample.messages or ()
    found = [n for n in sample.trained if train_turns == "last" or not messages[n].get("tool_calls")]
    return tuple(found[-1:])


def _conversation(sample: Sample, template: ChatTemplate, ends: Collection[str]) -> _Conversation:
    traits = template.traits(sample.origin, tools=bool(sample.tools))
    messages = [shaped(without_end(message, ends), traits) for message in sample.messages or ()]
    if any(holds_sign(name) or holds_sign(value) for turn in messages for name, value in turn.items()):
        raise DataError(
            f"{sample.origin}: holds one of the noncharacters U+FDD0 to U+FDD3, which no text needs. Take it out."
        )
    marks, thinks = _reads(template.text(sample.origin, tools=bool(sample.tools)))
    return _Conversation(sample, template, messages, marks, thinks, ends)


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


def _marked(text: str, number: int) -> str:
    body = text.rstrip()
    return body + mark(number) + text[len(body) :]


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message, of parts their texts together."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content).strip()
    return content.strip() if isinstance(content, str) else ""


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A rendering without the signs of a template's generation blocks, and the blocks that hold any text."""
    if OPEN not in text:
        return text, []
    spans: list[tuple[int, int]] = []
    opened: list[int] = []
    pieces, length = [], 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", text):
        if piece == OPEN:
            opened.append(length)
        elif piece == CLOSE and opened:
            begin = opened.pop()
            if begin < length and not opened:
                spans.append((begin, length))
        elif piece not in (OPEN, CLOSE):
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


def _check_context(talk: _Conversation, stop: int, plain: str, *, prompt: bool) -> Steps[None]:
    """DataError where the text of a message before ``stop`` that is no assistant's is not in the rendering."""
    others = [number for number in range(stop) if talk.messages[number]["role"] != "assistant"]
    changed = [number for number in others if _content(talk.messages[number]) not in plain]
    if not changed:
        return
    # A text that the template has changed is there when a mark behind it is.
    (marked,) = yield from talk.template.rendered(
        talk.sample.origin, [talk.job(stop, marks=others, prompt=prompt)]
    )
    places = {int(number) for number in MARK.findall(marked)}
    for number in changed:
        if number not in places:
            _lost(talk.sample, number, "content", talk.messages[number]["role"])


def _turn(talk: _Conversation, number: int, prompt: str, whole: str, *, answer: bool) -> Steps[_Turn]:
    """A turn behind its generation prompt, with what is trained of it; ``answer``: from behind its reasoning."""
    message = talk.messages[number]
    prompt, (whole, spans) = _unmarked(prompt)[0], _unmarked(whole)
    opened, closed = _thought(prompt)
    if closed and _reasoning(message):
        raise DataError(
            f"{talk.sample.origin}: turn {number} (assistant) has reasoning, but its generation prompt has the model "
            "answer at once.\nWhat would work: data.template_arguments that let the model think "
            "(enable_thinking: true), or a row without reasoning."
        )
    written = whole[len(prompt) :]
    if not whole.startswith(prompt):
        written = yield from _behind_prompt(talk, number)
    written = _with_reasoning(talk, message, opened, written)
    text, begin = prompt + written, len(prompt)
    _check(talk, number, text[begin if opened is None else opened.start() :])
    parts = [(begin, len(text))]
    if talk.marked and whole.endswith(written):
        shift = len(text) - len(whole)
        parts = [(max(begin, one + shift), two + shift) for one, two in spans if two + shift > begin]
    if not parts:
        return _Turn(number, text, begin, (), len(text), False)
    last = parts[-1][1]
    thought = _search(_reasoning(message), text, begin)
    answers = begin if thought is None else thought[1]
    place, stop = _end(text, min(_known(message, text, answers), last), last, talk.ends) or (last, last)
    if answer:
        begin = max(answers, text.rfind(_answer(message), answers, place))
    pieces = [(max(begin, one), min(two, place)) for one, two in parts if two > begin and one < place]
    if pieces:
        pieces[-1] = (pieces[-1][0], stop)
    return _Turn(number, text, len(prompt), tuple(pieces), stop, stop > place)


def _end(text: str, known: int, last: int, ends: Collection[str]) -> tuple[int, int] | None:
    """Begin and end of the first token that ends a turn and begins from ``known`` to ``last``; None without one."""
    found = [(place, place + len(end)) for end in ends if 0 <= (place := text.find(end, known)) <= last]
    return min(found, key=lambda one: (one[0], -one[1])) if found else None


def _thought(prompt: str) -> tuple[re.Match[str] | None, re.Match[str] | None]:
    """Whether a generation prompt ends in a thought that it opens, and in an empty one."""
    if not prompt.rstrip().endswith(("think>", "THINK]")):  # a search through all of a long prompt takes long
        return None, None
    return OPENED.search(prompt), CLOSED.search(prompt)


def _behind_prompt(talk: _Conversation, number: int) -> Steps[str]:
    """A turn as it stands behind its generation prompt, where the two are not one rendering's beginning and rest."""
    if not number:
        _nowhere(talk.sample, number, "", "")
    before = number - 1
    jobs = [talk.job(number, marks=(before,), prompt=True), talk.job(number + 1, marks=(before,))]
    texts = yield from talk.template.rendered(talk.sample.origin, jobs)
    asked, written = (_unmarked(text)[0].rpartition(mark(before)) for text in texts)
    if not asked[1] or not written[1]:
        _lost(talk.sample, before, "content", talk.messages[before]["role"])
    prompt, rest = asked[2], written[2]
    if rest.startswith(prompt):
        return rest[len(prompt) :]
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, rest, strict=False)))
    if not prompt[shared:].strip():
        return rest[shared:].lstrip()
    for ending, beginning in ((OPENED, OPENING), (CLOSED, NO_THOUGHT)):
        thought = ending.search(prompt)
        if thought is not None and shared >= thought.start():
            rest = rest[thought.start() :]
            head = beginning.match(rest)
            return rest if head is None else rest[head.end() :]
    _nowhere(talk.sample, number, prompt[shared:], rest[shared:])


def _with_reasoning(
    talk: _Conversation, message: Mapping[str, Any], opened: re.Match[str] | None, written: str
) -> str:
    """A turn with the reasoning that its template leaves out, closed where its generation prompt has ``opened`` it."""
    reasoning = _reasoning(message)
    if opened is None:
        if not talk.thinks or not reasoning or _search(reasoning, written, 0) is not None:
            return written
        return f"<think>\n{reasoning}\n</think>\n\n" + written.lstrip("\n")
    closing = CLOSING[opened[1]]
    return written if closing in written else f"{reasoning}\n{closing}\n\n" + written.lstrip("\n")


def _reasoning(message: Mapping[str, Any]) -> str:
    """The reasoning of a turn, in a field of its own or at the beginning of its text."""
    for name in REASONING:
        if message.get(name) is not None:
            return str(message[name]).strip()
    found = THOUGHT.match(_content(message))
    return (found[1] or found[2] or "").strip() if found is not None else ""


def _answer(message: Mapping[str, Any]) -> str:
    """The text of a turn behind its reasoning."""
    return (
        THOUGHT.sub("", _content(message), count=1) if THOUGHT.match(_content(message)) else _content(message)
    )


def _known(message: Mapping[str, Any], text: str, begin: int) -> int:
    """Where a turn's answer and the names of its calls end, looked for from ``begin`` on."""
    found = _search(_answer(message), text, begin)
    known = begin if found is None else found[1]
    for name in _calls(message):
        place = text.find(name, known)
        known = place + len(name) if place >= 0 else known
    return known


def _calls(message: Mapping[str, Any]) -> list[str]:
    return [str(call.get("function", call).get("name", "")) for call in message.get("tool_calls") or ()]


def _check(talk: _Conversation, number: int, region: str) -> None:
    """DataError where a field of a trained turn is not in its part of the text."""
    message = talk.messages[number]
    thought = [(name, str(message[name]).strip()) for name in REASONING if message.get(name) is not None][:1]
    content = _content(message)
    if "think>" in content or "THINK]" in content:
        content = NO_THOUGHT.sub("", content).strip()
    spoken = [("content", content)]
    calls = [(f"tool_calls[{index}].name", name) for index, name in enumerate(_calls(message))]
    for name, text in (*thought, *spoken, *calls):
        if _search(text, region, 0) is None:
            _lost(talk.sample, number, name, "assistant")
    for index, call in enumerate(message.get("tool_calls") or ()):
        words = WORD.findall(json.dumps(call.get("function", call).get("arguments"), ensure_ascii=False))
        if not all(word in region for word in words):
            _lost(talk.sample, number, f"tool_calls[{index}].arguments", "assistant")


def _search(text: str, region: str, begin: int) -> tuple[int, int] | None:
    """Where ``text`` stands in the region from ``begin`` on, but for the space around tags."""
    if region.startswith(text, begin):
        return begin, begin + len(text)
    place = region.find(text, begin)
    if place >= 0:
        return place, place + len(text)
    pieces = [re.escape(piece) for piece in TAG.split(text) if piece.strip()]
    found = re.compile(r"\s*".join(pieces)).search(region, begin) if len(pieces) > 1 else None
    return None if found is None else found.span()


def _together(turns: Sequence[_Turn], ends: Collection[str]) -> list[Layout]:
    """Turns in as few texts as hold them all unchanged."""
    layouts: list[Layout] = []
    for turn in reversed(turns):
        for place, home in enumerate(layouts):
            if home.text.startswith(turn.text[: turn.stop]):
                *first, (begin, stop) = turn.pieces
                if not turn.ended:  # no token of its own ends it; the next turn's first one may
                    _, stop = _end(home.text, stop, stop, ends) or (stop, stop)
                pieces = (*first, (begin, stop), *home.pieces)
                begins, numbers = (turn.begin, *home.begins), (turn.number, *home.numbers)
                layouts[place] = Layout(home.text, pieces, begins, numbers)
                break
        else:
            layouts.append(Layout(turn.text, turn.pieces, (turn.begin,), (turn.number,)))
    return layouts[::-1]


def _lost(sample: Sample, number: int, name: str, role: str) -> NoReturn:
    way = {"system": "a template with system prompts", "assistant": "a template that keeps all of a turn"}
    raise DataError(
        f"{sample.origin}: turn {number} ({role}): the chat template leaves out its {name}, or changes it.\n"
        f"What would work: {way.get(role, 'a template that writes such turns')} (data.chat_template: FILE, or "
        "data.template_arguments),\na row without it, or `on_bad_record: skip`."
    )


def _nowhere(sample: Sample, number: int, prompt: str, written: str) -> NoReturn:
    raise DataError(
        f"{sample.origin}: turn {number} has no position: its generation prompt is not how the turn begins\n"
        f"({prompt[:30]!r} against {written[:30]!r}).\n"
        "What would work: a chat template whose turns begin with its generation prompt (data.chat_template: FILE)."
    )
