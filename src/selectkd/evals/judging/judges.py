"""Who judges: a model behind an OpenAI-compatible endpoint, or one in memory. Each has a name and answers questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from selectkd.evals.asking import Decoding, complete, identity
from selectkd.evals.prompts import prompt_ids
from selectkd.models.load import Loaded
from selectkd.teachers.remote.answers import WrongAnswer, json_object
from selectkd.teachers.remote.connection import Connection, Question, Reply

REPLY_TOKENS = 2048
"""Room for a judge that thinks before its reason and its verdict."""
REPLY_BYTES = 1 << 20
CHARACTERS_A_TOKEN = 4.0
"""Of English text, roughly: an estimate of cost is good to a third."""


class Judge(Protocol):
    """Answers questions in order and calls ``on_reply(index, reply)`` for each at once."""

    @property
    def name(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    def ask(self, questions: Sequence[str], on_reply: Callable[[int, str], None]) -> None: ...


@dataclass(frozen=True)
class EndpointJudge:
    """``POST /v1/chat/completions`` of a server, at temperature 0; TeacherError where it does not answer."""

    connection: Connection
    model: str
    tokens: int = REPLY_TOKENS

    @property
    def name(self) -> str:
        return f"{self.connection.url} {self.model}"

    def ask(self, questions: Sequence[str], on_reply: Callable[[int, str], None]) -> None:
        def question(index: int, text: str) -> Question[None]:
            body = {
                "model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0,
                "max_tokens": self.tokens,
            }  # fmt: skip
            return Question(
                "/v1/chat/completions", json.dumps(body).encode(), REPLY_BYTES,
                lambda reply: on_reply(index, reply_text(reply)), "a verdict",
            )  # fmt: skip

        self.connection.ask([question(i, text) for i, text in enumerate(questions)])


@dataclass(frozen=True)
class ModelJudge:
    """A model in memory, greedy."""

    loaded: Loaded
    tokens: int = REPLY_TOKENS

    @property
    def name(self) -> str:
        return " ".join((self.loaded.source, *identity(self.loaded)))

    def ask(self, questions: Sequence[str], on_reply: Callable[[int, str], None]) -> None:
        for index, text in enumerate(questions):
            ids = prompt_ids(text, self.loaded.tokenizer)
            on_reply(index, complete(self.loaded, [ids], Decoding(self.tokens))[0])


def reply_text(reply: Reply) -> str:
    """The text of a chat completion; WrongAnswer for anything else."""
    body: Any = json_object(reply.body)
    try:
        text = body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise WrongAnswer(f"no chat completion: {type(error).__name__}") from error
    return text if isinstance(text, str) else ""


def cost(
    questions: Sequence[str], *, price_in: float, price_out: float, tokens: int = REPLY_TOKENS
) -> tuple[int, int, float]:
    """(tokens in, tokens out at the most, dollars) of questions, at prices in dollars a million tokens.

    >>> cost(["abcd" * 250_000], price_in=2.0, price_out=0.0)
    (250000, 2048, 0.5)
    """
    into = round(sum(map(len, questions)) / CHARACTERS_A_TOKEN)
    out = tokens * len(questions)
    return into, out, (into * price_in + out * price_out) / 1e6
