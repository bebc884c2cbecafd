"""Where each turn of a conversation stands in its rendering.

A mark put behind the text of every message shows where that text ends; what a template writes from there to the place
where a model goes on is the generation prompt. Both are found in the rendering of the whole conversation, which is what
is trained on, so a template may change earlier turns when later ones follow. A template's own {% generation %} marks
count more where it has them. Whatever a trained turn says must be found in its place; else the row is refused.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from selectkd.data.formats import Sample
from selectkd.data.jinja_process import CLOSE, OPEN, REASONING
from selectkd.data.renderer import Job
from selectkd.data.template import BEGIN, END, ChatTemplate, Traits, mark
from selectkd.errors import DataError

MARK = re.compile(f"{BEGIN}([0-9]+){END}")
GENERATION = re.compile(r"\{%-?\+?\s*generation\s*[-+]?%\}")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
TAG = re.compile(r"\s*(</?[A-Za-z_]+>|\[/?[A-Z_]+\])\s*")
"""A tag such as <think> with the space around it, which templates write in their own way."""
NO_THOUGHT = re.compile(r"<think>\s*</think>\s*|\[THINK\]\s*\[/THINK\]\s*")
LAYOUT = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]|\s")
"""What may differ between a generation prompt and the turn that follows it: special tokens and space."""
WORD = re.compile(r"(?<![\\\w])(?!(?:true|false|null)\b)[a-zA-Z0-9]{2,}")
"""A word of a call's arguments that stands in every way of writing them: JSON, tags, Python."""
APART = 64
"""Messages of a conversation that are marked one at a time where all marks at once change the rendering."""


@dataclass(frozen=True)
class Turn:
    """A trained turn in characters of the rendering. pieces: what is trained, but for the token that ends the turn;
    that begins at ``known`` or later and before ``reach``, and nothing behind it is trained.
    """

    pieces: tuple[tuple[int, int], ...]
    known: int
    reach: int


@dataclass(frozen=True)
class Layout:
    """A rendering and its trained turns."""

    text: str
    turns: tuple[Turn, ...]


@dataclass
class _Reading:
    """A rendered conversation. text: without marks; ends: where the text of each message ends in it; spans: the parts
    that the template marks as generated, None where it marks nothing; prompts: the generation prompt behind each role.
    """

    sample: Sample
    template: ChatTemplate
    messages: list[dict[str, Any]]
    text: str
    ends: dict[int, int]
    spans: list[tuple[int, int]] | None
    prompts: dict[str, tuple[int, str]]
    order: list[int] = field(default_factory=list)

    def job(self, stop: int | None = None, *, marks: Any = True, prompt: bool = False) -> Job:
        return _job(self.sample, self.messages[:stop], marks=marks, prompt=prompt)


def lay_out(sample: Sample, template: ChatTemplate, *, turns: bool = True) -> Layout:
    """The rendering of a conversation and where its trained turns stand in it (not, where ``turns`` is False).

    Raises DataError naming the row, the turn and the field: where the template cannot render it, gives a trained turn
    no position, or leaves out something that is said.
    """
    reading = _read(sample, template, turns)
    for number, message in enumerate(reading.messages):
        if number not in reading.ends and message["role"] != "assistant" and _content(message):
            _lost(sample, number, "content", message["role"])
    if not turns:
        for number in sample.trained:
            _check(reading, number, reading.text)
        return Layout(reading.text, ())
    found = tuple(_turn(reading, number) for number in sample.trained)
    if not any(begin < end for turn in found for begin, end in turn.pieces):
        raise DataError(
            f"{sample.origin}: the chat template marks no token of the assistant turns as generated.\n"
            "Put {% generation %} ... {% endgeneration %} around the assistant's text in the template, or leave the "
            "marks out."
        )
    return Layout(reading.text, found)


def _read(sample: Sample, template: ChatTemplate, turns: bool) -> _Reading:
    traits = template.traits(sample.origin, tools=bool(sample.tools))
    messages = [shaped(message, traits) for message in sample.messages or ()]
    if any(
        sign in json.dumps(messages, ensure_ascii=False, default=str) for sign in (BEGIN, END, OPEN, CLOSE)
    ):
        raise DataError(
            f"{sample.origin}: holds one of the noncharacters U+FDD0 to U+FDD3, which no text needs. Take it out."
        )
    has_marks = GENERATION.search(COMMENT.sub("", template.text(sample.origin, tools=bool(sample.tools))))
    before: dict[str, int] = {}
    for number in sample.trained if turns and not has_marks else ():
        if number:
            before.setdefault(messages[number - 1]["role"], number)
    jobs = [_job(sample, messages, marks=()), _job(sample, messages)]
    for number in before.values():
        jobs += [_job(sample, messages[:number], prompt=prompt) for prompt in (True, False)]
    plain, marked, *others = template.rendered(sample.origin, jobs)
    prompts = {
        role: (number, _prompt(sample, number, others[2 * i], others[2 * i + 1]))
        for i, (role, number) in enumerate(before.items())
    }
    reading = _Reading(sample, template, messages, plain, {}, None, prompts)
    reading.text, spans = _unmarked(plain)
    reading.spans = spans if has_marks else None
    reading.ends = _ends(reading, marked)
    _with_system(reading, marked)
    reading.order = sorted(reading.ends)
    return reading


def _job(
    sample: Sample, messages: Sequence[dict[str, Any]], *, marks: Any = True, prompt: bool = False
) -> Job:
    """A rendering with a mark behind the text of every message, or of those whose numbers are given."""
    shown = [
        _with_mark(message, number) if marks is True or number in marks else message
        for number, message in enumerate(messages)
    ]
    return Job(shown, sample.tools, prompt)


def shaped(message: Mapping[str, Any], traits: Traits) -> dict[str, Any]:
    """A message in the shapes a template takes: content as text or parts, arguments as an object or JSON text."""
    turn = dict(message)
    content = turn.get("content")
    if traits.parts and isinstance(content, str):
        turn["content"] = [{"type": "text", "text": content}] if content else []
    elif not traits.parts and isinstance(content, list):
        turn["content"] = "".join(part["text"] for part in content)
    if turn.get("tool_calls") and not traits.objects:
        turn["tool_calls"] = [_in_text(call) for call in turn["tool_calls"]]
    return turn


def _in_text(call: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _in_text(call["function"])}
    return {**call, "arguments": json.dumps(call.get("arguments", {}), ensure_ascii=False)}


def _with_mark(message: dict[str, Any], number: int) -> dict[str, Any]:
    """The message with a mark behind its text, before the space at its end, which some templates cut off."""
    content = message.get("content")
    if isinstance(content, list):
        if not content:
            parts = [] if message["role"] == "assistant" else [{"type": "text", "text": mark(number)}]
            return {**message, "content": parts}
        last = content[-1]
        return {**message, "content": [*content[:-1], {**last, "text": _marked(last["text"], number)}]}
    if not isinstance(content, str) or (not content and message["role"] == "assistant"):
        return message  # a turn that only calls tools: text in it would change how they are written
    return {**message, "content": _marked(content, number)}


def _marked(text: str, number: int) -> str:
    body = text.rstrip()
    return body + mark(number) + text[len(body) :]


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message, of parts their texts together."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content).strip()
    return content.strip() if isinstance(content, str) else ""


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A rendering without the signs of a template's generation blocks, and the blocks that hold any text."""
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


def _places(marked: str) -> tuple[str, dict[int, int]]:
    """A rendering without marks, and where each mark stood (of two of a kind the last)."""
    places: dict[int, int] = {}
    pieces, length, start = [], 0, 0
    for found in MARK.finditer(marked):
        piece = marked[start : found.start()]
        pieces.append(piece)
        length += len(piece)
        places[int(found[1])] = length
        start = found.end()
    return "".join([*pieces, marked[start:]]), places


def _placed(marked: str, text: str) -> dict[int, int] | None:
    """Where the marks of a rendering stand in ``text``; None where more than space differs between the two."""
    plain, places = _places(_unmarked(marked)[0])
    if plain == text:
        return places
    if "".join(plain.split()) != "".join(text.split()):
        return None
    solid = [index for index, letter in enumerate(text) if not letter.isspace()]
    counts = {number: len("".join(plain[:place].split())) for number, place in places.items()}
    return {number: solid[count - 1] + 1 if count else 0 for number, count in counts.items()}


def _ends(reading: _Reading, marked: str) -> dict[int, int]:
    """Where the text of each message ends in the rendering."""
    found = _placed(marked, reading.text)
    if found is not None:
        return found
    # A mark changed what the template writes. Each by itself, then, and where that fails by the text itself.
    numbers = range(len(reading.messages))[:APART]
    jobs = [reading.job(marks=(number,)) for number in numbers]
    ends: dict[int, int] = {}
    for one in reading.template.rendered(reading.sample.origin, jobs):
        ends |= _placed(one, reading.text) or {}
    for number, message in enumerate(reading.messages):
        content = _content(message)
        if number not in ends and content and reading.text.count(content) == 1:
            ends[number] = reading.text.index(content) + len(content)
    return ends


def _with_system(reading: _Reading, marked: str) -> None:
    """Takes the text up to the last prompt as a model would see it, where the whole rendering has no system prompt."""
    lost = [
        number
        for number, message in enumerate(reading.messages)
        if message["role"] in ("system", "developer") and number not in reading.ends and _content(message)
    ]
    last = max(reading.sample.trained, default=0)
    if not lost or not last or last - 1 not in reading.ends:
        return
    (prompted,) = reading.template.rendered(reading.sample.origin, [reading.job(last, prompt=True)])
    head, found, _ = prompted.rpartition(mark(last - 1))
    _, again, rest = marked.rpartition(mark(last - 1))
    if not found or not again or any(mark(number) not in head for number in lost):
        return
    whole, _ = _unmarked(head + found + rest)
    reading.text, reading.ends = _places(whole)
    if reading.spans is not None:
        reading.spans = _unmarked(MARK.sub("", head + rest))[1]


def _prompt(sample: Sample, turn: int, with_prompt: str, without: str) -> str:
    """What a template writes between the message before ``turn`` and the place where a model goes on."""
    before, found, prompt = _unmarked(with_prompt)[0].rpartition(mark(turn - 1))
    if not found:
        _lost(sample, turn - 1, "content", (sample.messages or ())[turn - 1]["role"])
    if before != _unmarked(without)[0].rpartition(mark(turn - 1))[0]:
        _nowhere(sample, turn, "its generation prompt is not how the turn begins", "", "")
    return prompt


def _turn(reading: _Reading, number: int) -> Turn:
    text = reading.text
    after = reading.ends.get(number - 1, 0) if number else 0
    placed = reading.order
    later = bisect_right(placed, number)
    limit = _start(reading, placed[later]) if later < len(placed) else len(text)
    if number and number - 1 not in reading.ends:
        _lost(reading.sample, number - 1, "content", reading.messages[number - 1]["role"])
    if reading.spans is not None:
        spans = [(begin, end) for begin, end in reading.spans if begin >= after and end <= max(limit, after)]
        region = "".join(text[begin:end] for begin, end in spans)
        if spans:
            _check(reading, number, region)
            known = _known(reading, number, spans[0][0], spans[-1][1])
            return Turn(tuple(spans), min(known, spans[-1][1]), spans[-1][1] + 1)
        return Turn((), 0, 0)
    _check(reading, number, text[after:limit])
    begin = _begin(reading, number, after)
    known = _known(reading, number, begin, limit)
    end = len(text)
    if limit < len(text):
        last = reading.template.traits(reading.sample.origin, tools=bool(reading.sample.tools)).last
        end = known + _common(text[known:limit], last)
    return Turn(((begin, end),), known, limit)


def _start(reading: _Reading, number: int) -> int:
    """Where the text of a message begins, or a place shortly behind that."""
    content, end = _content(reading.messages[number]), reading.ends[number]
    return end - len(content) if reading.text.endswith(content, 0, end) else end


def _begin(reading: _Reading, number: int, after: int) -> int:
    """Where a trained turn begins: behind its generation prompt, as far as that is in the rendering."""
    if not number:
        return 0
    text, role = reading.text, reading.messages[number - 1]["role"]
    of, prompt = reading.prompts[role]
    if not text.startswith(prompt, after) and of != number:
        jobs = [reading.job(number, prompt=True), reading.job(number)]
        prompt = _prompt(reading.sample, number, *reading.template.rendered(reading.sample.origin, jobs))
    if text.startswith(prompt, after):
        return after + len(prompt)
    first = next(iter(_fields(reading.messages[number])), ("", ""))[1]
    place = text.find(TAG.split(first)[0] or first, after) if first else -1
    place = len(text) if place < 0 else place
    common = _common(text[after : min(place, after + len(prompt))], prompt)
    rests = (prompt[common:], text[after + common : place])
    if not common or any(LAYOUT.sub("", rest) for rest in rests):
        shown = text[after + common : after + common + 30]
        _nowhere(
            reading.sample,
            number,
            "its generation prompt is not how the turn begins",
            prompt[common:][:30],
            shown,
        )
    return after + common


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _known(reading: _Reading, number: int, begin: int, limit: int) -> int:
    """The end of a turn's content: of its text and of the names of its calls."""
    message = reading.messages[number]
    known = max(begin, reading.ends[number]) if _content(message) and number in reading.ends else begin
    for name in _calls(message):
        place = reading.text.find(name, known, limit)
        known = place + len(name) if place >= 0 else known
    return min(known, limit)


def _calls(message: Mapping[str, Any]) -> list[str]:
    return [str(call.get("function", call).get("name", "")) for call in message.get("tool_calls") or ()]


def _fields(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The content of a turn, by field, in the order templates write it."""
    thought = [(name, str(message[name]).strip()) for name in REASONING if message.get(name) is not None][:1]
    spoken = [("content", NO_THOUGHT.sub("", _content(message)).strip())]
    calls = [(f"tool_calls[{index}].name", name) for index, name in enumerate(_calls(message))]
    return [(name, text) for name, text in (*thought, *spoken, *calls) if text]


def _check(reading: _Reading, number: int, region: str) -> None:
    """DataError where a field of a trained turn is not in its part of the rendering."""
    message = reading.messages[number]
    for name, text in _fields(message):
        if text not in region and not _in_pieces(text, region):
            _lost(reading.sample, number, name, "assistant")
    for index, call in enumerate(message.get("tool_calls") or ()):
        words = WORD.findall(json.dumps(call.get("function", call).get("arguments"), ensure_ascii=False))
        if not all(word in region for word in words):
            _lost(reading.sample, number, f"tool_calls[{index}].arguments", "assistant")


def _in_pieces(text: str, region: str) -> bool:
    """Whether ``text`` stands in the region but for the space around tags such as <think>."""
    pieces = [piece for piece in TAG.split(text) if piece.strip()]
    return re.search(r"\s*".join(re.escape(piece) for piece in pieces), region) is not None


def _lost(sample: Sample, number: int, name: str, role: str) -> NoReturn:
    way = {"system": "a template with system prompts", "assistant": "a template that keeps all of a turn"}
    raise DataError(
        f"{sample.origin}: turn {number} ({role}): the chat template leaves out its {name}, or changes it.\n"
        f"What would work: {way.get(role, 'a template that writes such turns')} (data.chat_template: FILE, or "
        "data.template_arguments),\na row without it, or `on_bad_record: skip`."
    )


def _nowhere(sample: Sample, number: int, problem: str, short: str, long: str) -> NoReturn:
    shown = f"\n({short!r} against {long!r})." if short or long else "."
    raise DataError(
        f"{sample.origin}: turn {number} has no position in the rendering: {problem}{shown}\n"
        "What would work: {% generation %} marks in the chat template (data.chat_template: FILE), or train_on: all."
    )
