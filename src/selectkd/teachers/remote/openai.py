"""Servers of OpenAI's ``/v1/completions``: echo and logprobs, where the server names tokens by id ("token_id:5").

Without that, tokens come as text, from which no id can be told for certain; such an answer is refused.
"""

from __future__ import annotations

from typing import Any

from selectkd.teachers.remote.answers import (
    TopK,
    TopKRequest,
    best,
    is_object,
    json_object,
    number,
    of_length,
    of_text,
    rows_of,
    same_ids,
    written_id,
)
from selectkd.teachers.remote.vllm import of_choices

PATH = "/v1/completions"
ID = "token_id:"


def body(request: TopKRequest, model: str | None) -> dict[str, Any]:
    """The question for one sample: it is echoed with the log-probabilities of its tokens, and one more generated."""
    named = {} if model is None else {"model": model}
    return {
        **named,
        "prompt": list(request.ids),
        "max_tokens": 1,
        "echo": True,
        "logprobs": request.k,
        "temperature": 1.0,
        "top_p": 1.0,
        "return_tokens_as_token_ids": True,
    }


def read(answer: bytes, request: TopKRequest) -> TopK:
    """The rows of an answer; WrongAnswer for one that does not have them, whole and of these tokens."""
    logprobs = is_object(of_choices(json_object(answer)).get("logprobs"), "logprobs")
    count = len(request.ids)
    tokens = logprobs.get("tokens")
    extra = isinstance(tokens, list) and len(tokens) == count + 1  # the one that was generated
    tokens, text_logprobs, rows = (
        of_length(logprobs.get(name), count + extra, name)[:count]
        for name in ("tokens", "token_logprobs", "top_logprobs")
    )
    same_ids([written_id(token, ID, f"token {at}") for at, token in enumerate(tokens)], request.ids)

    def best_at(row: Any, at: int, where: str) -> tuple[list[int], list[float]]:
        found = {
            written_id(key, ID, where): number(value, f"{where}, log-probability of {key}")
            for key, value in is_object(row, where).items()
        }
        of_text(request.ids[at], text_logprobs[at], found, where)
        return best(found, request.ids[at], request.k, where)

    return rows_of(rows, request, best_at)


def entries(answer: bytes) -> int:
    """The most entries a position has."""
    rows = is_object(of_choices(json_object(answer)).get("logprobs"), "logprobs").get("top_logprobs") or []
    return max((len(row) for row in rows if row is not None), default=0)
