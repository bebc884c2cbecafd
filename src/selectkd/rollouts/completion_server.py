"""Completions of an OpenAI-compatible server (vLLM, SGLang and others), in the place of a model in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from selectkd.rollouts.generate import Completion, Request, prompt_key
from selectkd.rollouts.sampling import Sampling
from selectkd.teachers.remote import shown
from selectkd.teachers.remote.answers import WrongAnswer, is_object, json_object, of_length, token_id
from selectkd.teachers.remote.connection import Connection, Question, Reply
from selectkd.teachers.remote.settings import POLICY, Settings

T = TypeVar("T")

PATH = "/v1/completions"
BYTES = 256
"""A token of an answer at the most, as text and as an id with the JSON around it."""
FRAME = 1 << 16
"""Bytes of an answer besides its tokens, at most."""


@dataclass(frozen=True)
class CompletionServer:
    """The server at ``url``, writing with the model it calls ``model``.

    A prompt goes out as token ids, so its template and tokens are ours; one with images as of ``remote.shown``, for
    vLLM alone. The answer is taken as ids where the server gives them (vLLM does), else its text is tokenised here, and
    the end token added where the server says it stopped by itself. Its draws are seeded by prompt; whether the same
    seed gives the same text is the server's affair.
    Deadlines, patience and limits are a remote teacher's (``Connection``); ``wait`` seconds for a server that is away,
    ``concurrency`` questions under way at once. ca, settings: as a ``Connection`` has them.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    wait: float = 60.0
    concurrency: int = 8
    ca: str | None = None
    settings: Settings = POLICY

    def complete(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        tokenizer: Any,
        end: int | None,
        seed: int = 0,
    ) -> list[Completion]:
        """One completion for each request, in their order; TeacherError where the server gives none.

        end: the id that ends a text, None where the tokenizer has none.
        """
        return self.answers([self.question(one, sampling, tokenizer, end, seed) for one in requests])

    def answers(self, questions: Sequence[Question[T]]) -> list[T]:
        """The answers to any questions, in their order; TeacherError where one has none."""
        connection = Connection(
            self.url,
            self.key,
            wait=self.wait,
            concurrency=self.concurrency,
            ca=self.ca,
            settings=self.settings,
        )
        try:
            return connection.ask(questions)
        finally:
            connection.close()

    def question(
        self, request: Request, sampling: Sampling, tokenizer: Any, end: int | None, seed: int
    ) -> Question[Completion]:
        """The HTTP question for one request."""
        images = request.images if request.images is not None and request.images.refs else None
        draw: dict[str, Any] = {
            "max_tokens": request.limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": (prompt_key(request.prompt, request.copy, images) ^ seed) & 0x7FFFFFFF,
        }
        if sampling.top_k is not None:
            draw["top_k"] = sampling.top_k
        if images is None:
            path, needs = PATH, ""
            body = {"prompt": list(request.prompt), "return_token_ids": True, **draw}
        else:
            path, needs = shown.PATH, shown.NEEDS
            body = {**shown.prompt_fields(request.prompt, images), "sampling_params": draw}

        def read(reply: Reply) -> Completion:
            if images is not None:
                shown.same_prompt(json_object(reply.body), request.prompt, images)
            return completion_of(reply.body, request, tokenizer, end)

        cap = FRAME + BYTES * (request.limit + len(request.prompt))
        content = json.dumps({"model": self.model, **body}).encode()
        return Question(path, content, cap, read, what="a completion", needs=needs)


def completion_of(answer: bytes, request: Request, tokenizer: Any, end: int | None) -> Completion:
    """The completion in an answer; WrongAnswer where it has none, or tokens that are not this tokenizer's."""
    choice = is_object(of_length(json_object(answer).get("choices"), 1, "choices")[0], "the choice")
    text, given = choice.get("text"), choice.get("token_ids")
    stopped = choice.get("finish_reason") == "stop"
    if given is not None:
        ids = tokens_of(given, "token_ids", tokenizer)
    elif isinstance(text, str):
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids += [end] if stopped and end is not None else []
    else:
        raise WrongAnswer("the choice has neither token_ids nor text")
    return Completion(until_end(ids, end)[: request.limit], ended=stopped)


def until_end(ids: list[int], end: int | None) -> list[int]:
    """The tokens up to the first end token; a server that ignores it (ignore_eos) writes more behind it."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def tokens_of(given: Any, what: str, tokenizer: Any) -> list[int]:
    """``given``, if it is a list of this tokenizer's ids."""
    ids = [
        token_id(one, "a token of the completion")
        for one in of_length(given, len(given) if isinstance(given, list) else 0, what)
    ]
    strange = next((one for one in ids if not 0 <= one < len(tokenizer)), None)
    if strange is not None:
        raise WrongAnswer(f"token {strange} is none of the student's {len(tokenizer)}")
    return ids
