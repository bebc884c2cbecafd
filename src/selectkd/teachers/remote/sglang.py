"""SGLang: ``/generate`` with input_ids and ``top_logprobs_num``. A position lists [log-probability, id, text]."""

from __future__ import annotations

import json
from typing import Any

from selectkd.teachers.remote.answers import (
    TopK,
    TopKRequest,
    WrongAnswer,
    is_object,
    json_object,
    number,
    of_length,
    of_text,
    rows_of,
    same_ids,
    token_id,
)

PATH = "/generate"


def body(request: TopKRequest, model: str | None) -> dict[str, Any]:
    """The question for one sample; the server serves one model, so its name is not sent."""
    return {
        "input_ids": list(request.ids),
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": request.k,
    }


def read(answer: bytes, request: TopKRequest) -> TopK:
    """The rows of an answer; WrongAnswer for one that does not have them, whole and of these tokens."""
    if answer.lstrip()[:1] == b"[":  # some versions answer one prompt with a list of one
        answer = _only(answer)
    info = is_object(json_object(answer).get("meta_info"), "meta_info")
    text_logprobs = of_length(info.get("input_token_logprobs"), len(request.ids), "input_token_logprobs")
    text = [_entry(entry, f"input_token_logprobs {at}") for at, entry in enumerate(text_logprobs)]
    same_ids([entry[1] for entry in text], request.ids)
    rows = of_length(info.get("input_top_logprobs"), len(request.ids), "input_top_logprobs")
    if text[0][0] is not None:
        raise WrongAnswer("position 0 has a log-probability, though no token is before it")

    def best_at(entries: Any, at: int, where: str) -> tuple[list[int], list[float]]:
        if not isinstance(entries, list) or len(entries) not in (request.k, request.k + 1):
            raise WrongAnswer(f"{where} is no list of {request.k} entries")
        found = {}
        for entry in entries:
            value, token = _entry(entry, where)[:2]
            if token_id(token, where) in found:
                raise WrongAnswer(f"{where} has the id {token} twice")
            found[token] = number(value, f"{where}, log-probability of {token}")
        of_text(request.ids[at], text[at][0], found, where)
        if len(found) == request.k + 1:
            found.pop(request.ids[at], None)
        return list(found), list(found.values())

    return rows_of(rows, request, best_at)


def _entry(entry: Any, where: str) -> list[Any]:
    if not isinstance(entry, list) or len(entry) not in (2, 3):
        raise WrongAnswer(f"{where} holds {str(entry)[:40]}, not [log-probability, id, text]")
    return entry


def _only(answer: bytes) -> bytes:
    found = json_object(b'{"list": ' + answer + b"}")["list"]
    if not isinstance(found, list) or len(found) != 1:
        raise WrongAnswer("a list of more or fewer than one answer")
    return json.dumps(found[0]).encode()


def entries(answer: bytes) -> int:
    """The most entries a position has."""
    if answer.lstrip()[:1] == b"[":
        answer = _only(answer)
    rows = is_object(json_object(answer).get("meta_info"), "meta_info").get("input_top_logprobs") or []
    return max((len(row) for row in rows if row is not None), default=0)
