"""Servers of OpenAI's ``/v1/completions``: echo and logprobs, where the server names tokens by id ("token_id:5").

Without that, tokens come as text, from which no id can be told for certain; such an answer is refused.
"""

from __future__ import annotations

from typing import Any

from selectkd.teachers.remote.answers import (
    Asked,
    TopK,
    WrongAnswer,
    best,
    checked,
    is_object,
    json_object,
    number,
    of_length,
    of_text,
    same_ids,
    written_id,
)
from selectkd.teachers.remote.vllm import of_choices

PATH = "/v1/completions"
ID = "token_id:"


def body(asked: Asked, model: str | None) -> dict[str, Any]:
    """The question for one sample: it is echoed with the log-probabilities of its tokens, and one more generated."""
    named = {} if model is None else {"model": model}
    return {
        **named,
        "prompt": list(asked.ids),
        "max_tokens": 1,
        "echo": True,
        "logprobs": asked.k,
        "temperature": 1.0,
        "top_p": 1.0,
        "return_tokens_as_token_ids": True,
    }


def read(answer: bytes, asked: Asked) -> TopK:
    """The rows of an answer; WrongAnswer for one that does not have them, whole and of these tokens."""
    told = is_object(of_choices(json_object(answer)).get("logprobs"), "logprobs")
    count = len(asked.ids)
    tokens = told.get("tokens")
    extra = isinstance(tokens, list) and len(tokens) == count + 1  # the one that was generated
    tokens, own, rows = (
        of_length(told.get(name), count + extra, name)[:count]
        for name in ("tokens", "token_logprobs", "top_logprobs")
    )
    same_ids([written_id(token, ID, f"token {at}") for at, token in enumerate(tokens)], asked.ids)
    if rows[0] is not None:
        raise WrongAnswer("position 0 has log-probabilities, though no token is before it")
    ids, logp = [], []
    for place in asked.places:
        where = f"position {place + 1}"
        found = {
            written_id(key, ID, where): number(value, f"{where}, log-probability of {key}")
            for key, value in is_object(rows[place + 1], where).items()
        }
        of_text(asked.ids[place + 1], own[place + 1], found, where)
        chosen, values = best(found, asked.ids[place + 1], asked.k, where)
        ids.append(chosen)
        logp.append(values)
    return checked(ids, logp, asked)


def entries(answer: bytes) -> int:
    """The most entries a position has."""
    rows = is_object(of_choices(json_object(answer)).get("logprobs"), "logprobs").get("top_logprobs") or []
    return max((len(row) for row in rows if row is not None), default=0)
