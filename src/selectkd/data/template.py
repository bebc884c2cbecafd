"""A chat template with all that its text depends on: its source, its arguments, the date it is given; and the shapes
of turns it takes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from selectkd.data.fields import Where, plain_text
from selectkd.data.jinja_process import CLOSE, OPEN
from selectkd.data.renderer import Answer, Failure, Job, Renderings, render
from selectkd.data.rounds import Steps
from selectkd.errors import ConfigError, DataError
from selectkd.objective.registry import did_you_mean

BEGIN, END = "\ufdd2", "\ufdd3"
"""Noncharacters around the number of a mark that is put into a message to find its place in the rendering."""
ASKS_DATE = "strftime_now"
ENDED = ("time", "memory", "process")
"""Failures that end the process, which the next request would do too."""
FILES = (".jinja", ".jinja2", ".j2", ".txt")


@dataclass(frozen=True)
class Traits:
    """How a template takes and writes turns. parts: it takes content as a list of parts, not text. objects: it takes
    the arguments of a tool call as an object, not JSON text. middle, last, call: the text it writes behind an
    assistant's text within and at the end of a conversation, and behind a tool call, up to the next turn's text.
    """

    parts: bool = False
    objects: bool = True
    middle: str = ""
    last: str = ""
    call: str = ""


@dataclass(frozen=True)
class ChatTemplate:
    """How conversations become text.

    source: a template, or several by name (``default``, ``tool_use``); None where the tokenizer has none. special: the
    tokenizer's special tokens by role, which templates write. arguments: of the recipe. moment: the date and time, in
    ISO form, that a template is given when it asks for today's. ends: the tokens that were found to end turns, kept.
    """

    source: str | Mapping[str, str] | None
    special: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    moment: str = "2000-01-01T00:00:00"
    ends: dict[Any, frozenset[int]] = field(default_factory=dict, init=False, compare=False, repr=False)
    _traits: dict[str, Traits] = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def of(
        cls, tokenizer: Any, *, arguments: Mapping[str, Any] | None = None, moment: str | None = None
    ) -> ChatTemplate:
        """The template of a tokenizer; moment: now, unless given."""
        source = getattr(tokenizer, "chat_template", None) or None
        special = dict(getattr(tokenizer, "special_tokens_map", None) or {})
        return cls(source, special, dict(arguments or {}), moment or now())

    @property
    def fingerprint(self) -> str:
        """A hash of the template and its arguments, not of the date; the empty string without a template."""
        if not self.source:
            return ""
        text = self.source if isinstance(self.source, str) else json.dumps(dict(self.source), sort_keys=True)
        if self.arguments:
            text += json.dumps(dict(self.arguments), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def dated(self) -> bool:
        """Whether the template may write the date, so that another day gives another text."""
        sources = [self.source] if isinstance(self.source, str) else list((self.source or {}).values())
        return any(ASKS_DATE in text for text in sources)

    def text(self, origin: str, *, tools: bool) -> str:
        """The template that is used, of several the one for tools where a sample has some."""
        source = self.source
        if isinstance(source, Mapping):
            source = (source.get("tool_use") if tools else None) or source.get("default")
            if source is None:
                raise DataError(
                    f"{origin}: the tokenizer has the chat templates {', '.join(sorted(self.source or {}))} and no "
                    "default. Name one of them: data.chat_template."
                )
        if not source:
            raise DataError(
                f"{origin}: the row is a conversation, but the tokenizer has no chat template to render it with.\n"
                "What would work: the tokenizer of a chat model (its folder has chat_template.jinja), "
                "data.chat_template: FILE,\nor rows of prompt + completion, instruction + output, or text, which need "
                "no template."
            )
        return source

    def answers(self, asks: Sequence[Renderings]) -> Iterator[list[Answer]]:
        """The renderings of each record's jobs, each a text or the reason why there is none."""
        return render(asks, {**self.special, **self.arguments}, self.moment)

    def rendered(self, origin: str, jobs: Sequence[Job]) -> Steps[list[str]]:
        """The text of each job; DataError naming ``origin`` where one cannot be rendered."""
        template = self.text(origin, tools=bool(jobs and jobs[0].tools))
        found: list[Answer] = yield Renderings(template, jobs)
        for job, answer in zip(jobs, found, strict=True):
            if isinstance(answer, Failure):
                _refuse(origin, job, answer)
            if not answer.isascii():  # schemas and arguments of tools reach it unread
                plain_text(answer, Where(origin, "the rendered conversation"))
        return [answer for answer in found if isinstance(answer, str)]

    def traits(self, origin: str, *, tools: bool = False) -> Traits:
        """The traits of the template, found by rendering a few turns that hold nothing but marks."""
        template = self.text(origin, tools=tools)
        if template not in self._traits:
            self._traits[template] = self._probed(template, origin)
        return self._traits[template]

    def _probed(self, template: str, origin: str) -> Traits:
        talk = [_turn("user", 0), _turn("assistant", 1), _turn("user", 2), _turn("assistant", 3)]
        ((as_text, as_parts),) = self.answers(
            [Renderings(template, [Job(talk), Job([_in_parts(turn) for turn in talk])])]
        )
        if isinstance(as_text, Failure) and as_text.kind in ENDED:
            _refuse(origin, Job(talk), as_text)
        parts = not _holds(as_text, 4) and _holds(as_parts, 4)
        shown = as_parts if parts else as_text
        call = {
            "type": "function",
            "id": "call00000",
            "function": {"name": "look", "arguments": {"at": mark(1)}},
        }
        written = {
            **call,
            "function": {"name": "look", "arguments": json.dumps({"at": mark(1)}, ensure_ascii=False)},
        }
        conversations = [
            [_turn("user", 0), {"role": "assistant", "content": "", "tool_calls": [one]},
             {**_turn("tool", 2), "name": "look", "tool_call_id": "call00000"}, _turn("assistant", 3)]
            for one in (call, written)
        ]  # fmt: skip
        if parts:
            conversations = [[_in_parts(turn) for turn in each] for each in conversations]
        ((by_object, by_text),) = self.answers([Renderings(template, [Job(each) for each in conversations])])
        objects = _holds(by_object, 4) or not _holds(by_text, 4)
        called = by_object if objects else by_text
        return Traits(
            parts,
            objects,
            _after(shown, 1, 2) if _holds(shown, 4) else "",
            _after(shown, 3, None) if _holds(shown, 4) else "",
            _after(called, 1, 2) if _holds(called, 4) else "",
        )


def has_image(content: Any) -> bool:
    """Whether the content of a message has an image among its parts."""
    return isinstance(content, list) and any(part.get("type") == "image" for part in content)


def shaped(message: Mapping[str, Any], traits: Traits) -> dict[str, Any]:
    """A message in the shapes a template takes: content as text or parts, arguments as an object or JSON text."""
    turn = dict(message)
    content = turn.get("content")
    if traits.parts and isinstance(content, str):
        turn["content"] = [{"type": "text", "text": content}] if content else []
    elif not traits.parts and isinstance(content, list) and not has_image(content):
        turn["content"] = "".join(part["text"] for part in content)
    if turn.get("tool_calls") and not traits.objects:
        turn["tool_calls"] = [_in_text(call) for call in turn["tool_calls"]]
    return turn


def _in_text(call: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _in_text(call["function"])}
    return {**call, "arguments": json.dumps(call.get("arguments", {}), ensure_ascii=False)}


def mark(number: int) -> str:
    """A mark that no text holds."""
    return f"{BEGIN}{number}{END}"


def holds_sign(value: Any) -> bool:
    """Whether a field holds a character that marks a place in a rendering."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return not text.isascii() and any(sign in text for sign in (BEGIN, END, OPEN, CLOSE))


def now() -> str:
    """This moment, to the second, in ISO form."""
    return datetime.now().isoformat(timespec="seconds")


def source_of(wanted: str, tokenizer: Any) -> str:
    """The template that ``data.chat_template`` means: a file, a name among the tokenizer's own, or the text itself."""
    named = getattr(tokenizer, "chat_template", None)
    names = sorted(named) if isinstance(named, Mapping) else []
    if isinstance(named, Mapping) and wanted in named:
        return named[wanted]
    if "{{" in wanted or "{%" in wanted:
        return wanted
    path = Path(wanted).expanduser()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.chat_template = {wanted!r} cannot be read as UTF-8: {error}.") from None
    if path.suffix in FILES or len(path.parts) > 1:
        raise ConfigError(f"data.chat_template = {wanted!r}: there is no such file.")
    raise ConfigError(
        f"data.chat_template = {wanted!r} is no file, and no template of the tokenizer is called so."
        f"{did_you_mean(wanted, names)} Give a file, the text of a template"
        + (f", or one of {', '.join(names)}." if names else ".")
    )


def _turn(role: str, number: int) -> dict[str, Any]:
    return {"role": role, "content": mark(number)}


def _in_parts(turn: dict[str, Any]) -> dict[str, Any]:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}] if turn["content"] else []}


def _holds(answer: Answer, count: int) -> bool:
    """Whether a rendering has the marks 0 to ``count`` - 1, and no list or object written out around them."""
    if isinstance(answer, Failure) or "'type': 'text'" in answer or "&#39;type" in answer:
        return False
    return all(mark(number) in answer for number in range(count))


def _after(answer: Answer, number: int, until: int | None) -> str:
    assert isinstance(answer, str)
    rest = answer.rpartition(mark(number))[2].replace(OPEN, "").replace(CLOSE, "")
    return rest if until is None else rest.partition(mark(until))[0]


def _refuse(origin: str, job: Job, failure: Failure) -> NoReturn:
    if failure.kind == "time":
        raise DataError(
            f"{origin}: the chat template was still rendering when its time was over.\n"
            "It probably loops without end on this row; change the template, or leave the row out."
        )
    if failure.kind in ("memory", "process"):
        raise DataError(
            f"{origin}: the chat template asks for more memory, or writes more text, than any conversation needs.\n"
            "Change the template, or leave the row out."
        )
    roles = ", ".join(str(message["role"]) for message in job.messages[:6])
    name = "TemplateError" if failure.kind == "template" else failure.kind
    raise DataError(
        f"{origin}: the chat template cannot render these turns ({roles}): "
        f"{name}: {' '.join(failure.message.split())[:160]}.\n"
        "Change the row to what the template accepts, or skip such rows with `on_bad_record: skip`."
    )
