"""Where each trained turn of a conversation stands in its text.

A turn is laid out as a model meets it: the template's generation prompt for the messages before it, then the turn as
the template writes it at the end of a conversation. A template may change a turn when later ones follow. One text
holds several trained turns only where each stands in it as at the end of its own conversation; else a conversation
becomes several texts. A template's own {% generation %} marks narrow what is trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple, NoReturn

from selectkd.data.conversation import (
    CLOSING,
    NO_THOUGHT,
    Conversation,
    answer_of,
    conversation_of,
    reasoning_of,
    search,
)
from selectkd.data.formats import Sample
from selectkd.data.jinja_process import CLOSE, OPEN
from selectkd.data.rounds import Steps
from selectkd.data.template import ChatTemplate, mark
from selectkd.data.turn_checks import check_calls, check_context, check_turn, lost
from selectkd.errors import DataError

TrainTurns = Literal["all", "last", "final_answer"]
OPENED = re.compile(r"(<think>|\[THINK\])\s*\Z")
"""The end of a generation prompt that lets the model think."""
OPENING = re.compile(r"(?:<think>|\[THINK\])\s*")
CLOSED = re.compile(rf"(?:{NO_THOUGHT.pattern})\Z")
"""The end of a generation prompt that has the model answer at once."""


class Layout(NamedTuple):
    """A text and the parts of it that are trained, [begin, end) in characters, in their order. begins: the ends of the
    generation prompts of its trained turns; numbers: those turns.
    """

    text: str
    pieces: tuple[tuple[int, int], ...]
    begins: tuple[int, ...]
    numbers: tuple[int, ...]


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
    talk = conversation_of(sample, template, ends)
    jobs = [job for number in numbers for job in (talk.job(number, prompt=True), talk.job(number + 1))]
    texts = yield from template.rendered(sample.origin, jobs)
    yield from check_context(talk, numbers[-1], texts[-2], prompt=True)
    yield from check_calls(talk, numbers[-1] + 1)
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
    talk = conversation_of(sample, template, ends)
    stop = len(talk.messages)
    if talk.messages[-1]["role"] == "assistant" and stop - 1 in sample.trained:
        layouts = yield from lay_out(sample, template, ends=ends, train_turns="last")
        text = layouts[-1].text
    else:
        (plain,) = yield from template.rendered(sample.origin, [talk.job(stop)])
        yield from check_context(talk, stop, plain, prompt=False)
        yield from check_calls(talk, stop)
        text, _ = _unmarked(plain)
    for number in sample.trained:
        check_turn(talk, number, text)
    return text


def chosen(sample: Sample, train_turns: TrainTurns) -> tuple[int, ...]:
    """The numbers of the turns that are trained, of those that the row leaves to train."""
    if train_turns == "all":
        return sample.trained
    found = [
        number
        for number, message in enumerate(sample.messages or ())
        if message["role"] == "assistant" and (train_turns == "last" or not message.get("tool_calls"))
    ]
    return tuple(number for number in found[-1:] if number in sample.trained)


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


def _turn(talk: Conversation, number: int, prompt: str, whole: str, *, answer: bool) -> Steps[_Turn]:
    """A turn behind its generation prompt, with what is trained of it; ``answer``: from behind its reasoning."""
    message = talk.messages[number]
    prompt, (whole, spans) = _unmarked(prompt)[0], _unmarked(whole)
    opened, closed = _thought(prompt)
    if closed and reasoning_of(message):
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
    check_turn(talk, number, text[begin if opened is None else opened.start() :])
    parts = [(begin, len(text))]
    if talk.marked and whole.endswith(written):
        shift = len(text) - len(whole)
        parts = [(max(begin, one + shift), two + shift) for one, two in spans if two + shift > begin]
    if not parts:
        return _Turn(number, text, begin, (), len(text), False)
    last = parts[-1][1]
    thought = search(reasoning_of(message), text, begin)
    answers = begin if thought is None else thought[1]
    place, stop = _end(text, min(_known(message, text, answers, talk.ends), last), last, talk.ends) or (
        last,
        last,
    )
    if answer:
        begin = max(answers, text.rfind(answer_of(message), answers, place))
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


def _behind_prompt(talk: Conversation, number: int) -> Steps[str]:
    """A turn as it stands behind its generation prompt, where the two are not one rendering's beginning and rest."""
    if not number:
        _nowhere(talk.sample, number, "", "")
    before = number - 1
    jobs = [talk.job(number, marks=(before,), prompt=True), talk.job(number + 1, marks=(before,))]
    texts = yield from talk.template.rendered(talk.sample.origin, jobs)
    asked, written = (_unmarked(text)[0].rpartition(mark(before)) for text in texts)
    if not asked[1] or not written[1]:
        lost(talk.sample, before, "content", talk.messages[before]["role"])
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
    talk: Conversation, message: Mapping[str, Any], opened: re.Match[str] | None, written: str
) -> str:
    """A turn with the reasoning that its template leaves out, closed where its generation prompt has ``opened`` it."""
    reasoning = reasoning_of(message)
    if opened is None:
        if not talk.thinks or not reasoning or search(reasoning, written, 0) is not None:
            return written
        return f"<think>\n{reasoning}\n</think>\n\n" + written.lstrip("\n")
    closing = CLOSING[opened[1]]
    return written if closing in written else f"{reasoning}\n{closing}\n\n" + written.lstrip("\n")


def _known(message: Mapping[str, Any], text: str, begin: int, ends: Collection[str]) -> int:
    """Where a turn's answer, the names of its calls and those of their arguments that hold the end of a turn are over,
    looked for from ``begin`` on.
    """
    found = search(answer_of(message), text, begin)
    known = begin if found is None else found[1]
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        known = _behind(text, str(function.get("name", "")), known)
        for value in _texts_in(function.get("arguments")):
            if any(end in value for end in ends):
                known = max(
                    _behind(text, form, known)
                    for form in (value, json.dumps(value, ensure_ascii=False)[1:-1])
                )
    return known


def _behind(text: str, part: str, begin: int) -> int:
    place = text.find(part, begin)
    return begin if place < 0 else place + len(part)


def _texts_in(value: Any) -> Iterator[str]:
    """The texts within a value; of JSON text those of what it says."""
    if isinstance(value, str):
        try:
            inside = json.loads(value) if value[:1] in "{[" else value
        except ValueError:
            inside = value
        yield from [value] if isinstance(inside, str) else _texts_in(inside)
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield str(name)
            yield from _texts_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts_in(each)


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


def _nowhere(sample: Sample, number: int, prompt: str, written: str) -> NoReturn:
    raise DataError(
        f"{sample.origin}: turn {number} has no position: its generation prompt is not how the turn begins\n"
        f"({prompt[:30]!r} against {written[:30]!r}).\n"
        "What would work: a chat template whose turns begin with its generation prompt (data.chat_template: FILE)."
    )
