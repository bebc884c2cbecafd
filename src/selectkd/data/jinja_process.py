"""The process that renders chat templates: a program of its own that knows jinja2 and the standard library alone.

A template comes with a model and may loop without end or ask for all memory, inside one call of C code too, where no
exception reaches it. So each record has a limit of processor time, whose end is the end of the process, and each
request, of a record or more, one of memory. Requests and answers are JSON with their length before them, on standard
input and output.
"""

from __future__ import annotations

import json
import struct
import sys
from datetime import datetime
from functools import lru_cache, partial
from typing import IO, Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters around what a template marks as generated; no text may hold them."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which data and templates know a turn's reasoning."""


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}: its text between OPEN and CLOSE."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads a plain set

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


class Refused(TemplateError):
    """A template's own raise_exception."""


RAISED = (
    TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError,
    OSError, SyntaxError,
)  # fmt: skip
"""What a template may raise while it is read and while it renders."""


def _refuse(message: Any = "") -> None:
    raise Refused(str(message))


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    """What Hugging Face's templates may use beside jinja2's own."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _refuse
    return environment


def asked_for(template: str) -> set[str]:
    """The variables that a template reads; none of a template that is no jinja2."""
    environment = _environment()
    try:
        return meta.find_undeclared_variables(environment.parse(template)) - set(environment.globals)
    except (TemplateError, RecursionError):
        return set()


@lru_cache(maxsize=8)
def compiled(template: str) -> Any:
    """The template, ready to be rendered."""
    found = _environment().from_string(template)
    found.globals = dict(found.globals)  # read at each rendering, where a chain of maps is slow
    return found


def rendered(request: dict[str, Any], record: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each job of a record {text}, {text, behind} where it goes on behind the one before, or {error, message}."""
    moment = datetime.fromisoformat(request["moment"])
    variables = {**request["variables"], "strftime_now": partial(datetime.strftime, moment)}
    turns = [_with_reasoning(turn) for turn in record["turns"]]
    template, answers, before = request["templates"][record["template"]], [], ""
    for numbers, tools, prompt in record["jobs"]:
        messages = [turns[number] for number in numbers]
        answer = _text(template, messages, tools, prompt, variables, record["most"])
        text = answer.get("text", "")
        if before and text.startswith(before):
            answer = {"text": text[len(before) :], "behind": True}
        before = text
        answers.append(answer)
    return answers


def _text(
    template: str, messages: list[Any], tools: Any, prompt: bool, variables: dict[str, Any], most: int
) -> dict[str, Any]:
    try:
        text = compiled(template).render(
            **variables, messages=messages, tools=tools, documents=None, add_generation_prompt=prompt
        )
    except MemoryError:
        return {"error": "memory", "message": ""}
    except RAISED as error:
        name = type(error).__name__
        return {"error": "template" if isinstance(error, Refused) else name, "message": str(error)[:400]}
    return {"error": "memory", "message": ""} if len(text) > most else {"text": text}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that templates read."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return (
        message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
    )


def limit(seconds: float, memory: int) -> None:
    """Processor seconds until the process ends, and bytes of memory it may have; neither on Windows."""
    if sys.platform != "win32":
        import resource
        import signal

        signal.setitimer(signal.ITIMER_PROF, seconds)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(
            resource.RLIMIT_AS, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard)
        )


def read(stream: IO[bytes]) -> Any:
    """The next message, None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    (size,) = struct.unpack("<Q", head)
    body = stream.read(size)
    return json.loads(body) if len(body) == size else None


def in_json(message: Any) -> bytes:
    """A message as JSON, what JSON has no form for by the name of its type; lone surrogates stay what they are."""
    return json.dumps(message, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>").encode(
        "utf-8", "surrogatepass"
    )


def send(stream: IO[bytes], body: bytes) -> None:
    """Writes a message."""
    stream.write(struct.pack("<Q", len(body)))
    stream.write(body)
    stream.flush()


def main() -> None:
    """Answers requests until the input ends."""
    while (request := read(sys.stdin.buffer)) is not None:
        answers = []
        for record in request["records"]:
            limit(record["seconds"], request["memory"])
            answers.append(rendered(request, record))
        limit(0, request["memory"])
        send(sys.stdout.buffer, in_json(answers))


if __name__ == "__main__":
    main()
