"""vLLM: ``/v1/completions`` with token ids and ``prompt_logprobs``. A position has the K best and its own token."""

from __future__ import annotations

from typing import Any

from selectkd.teachers.remote.answers import (
    TopK,
    TopKRequest,
    WrongAnswer,
    best,
    is_object,
    json_object,
    number,
    of_length,
    of_ranks,
    rows_of,
    same_ids,
    token_id,
    written_id,
)

PATH = "/v1/completions"

UNTOUCHED = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sampling that changes no log-probability, said outright: a model's generation_config.json would fill in its own."""


def body(request: TopKRequest, model: str | None) -> dict[str, Any]:
    """The question for one sample. One token is generated, the fewest that every version takes, and not looked at."""
    named = {} if model is None else {"model": model}
    return {
        **named,
        "prompt": list(request.ids),
        "max_tokens": 1,
        "prompt_logprobs": request.k,
        "return_token_ids": True,
        **UNTOUCHED,
    }


def read(answer: bytes, request: TopKRequest) -> TopK:
    """The rows of an answer; WrongAnswer for one that does not have them, whole and of these tokens."""
    choices = of_choices(json_object(answer))
    echoed = choices.get("prompt_token_ids")
    if echoed is not None:
        same_ids(of_length(echoed, len(request.ids), "prompt_token_ids"), request.ids)
    return rows_in(choices, request)


def rows_in(holder: dict[str, Any], request: TopKRequest) -> TopK:
    """The rows in ``prompt_logprobs`` of the object that has them."""
    rows = of_length(holder.get("prompt_logprobs"), len(request.ids), "prompt_logprobs")

    def best_at(row: Any, at: int, where: str) -> tuple[list[int], list[float]]:
        found: dict[int, float] = {}
        ranks: dict[int, Any] = {}
        for key, entry in is_object(row, where).items():
            fields = is_object(entry, f"{where}, token {key[:12]}")
            token = written_id(key, "", where)
            found[token] = number(fields.get("logprob"), f"{where}, logprob of {key}")
            ranks[token] = (
                None if fields.get("rank") is None else token_id(fields["rank"], f"{where}, rank of {key}")
            )
        chosen = best(found, request.ids[at], request.k, where)
        of_ranks(found, ranks, where)
        return chosen

    return rows_of(rows, request, best_at)


def of_choices(answer: dict[str, Any]) -> dict[str, Any]:
    """The one choice of a completion."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1:
        raise WrongAnswer("choices is no list of one")
    return is_object(choices[0], "the choice")


def entries(answer: bytes) -> int:
    """The most entries a position has."""
    return most_entries(of_choices(json_object(answer)))


def most_entries(holder: dict[str, Any]) -> int:
    """The most entries of a position in ``prompt_logprobs`` of the object that has them."""
    rows = holder.get("prompt_logprobs") or []
    return max((len(row) for row in rows if row is not None), default=0)
