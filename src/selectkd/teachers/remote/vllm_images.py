"""vLLM with images: ``/inference/v1/generate`` with token ids, images and ``prompt_logprobs``."""

from __future__ import annotations

from typing import Any

from selectkd.teachers.remote import vllm
from selectkd.teachers.remote.answers import TopK, TopKRequest, json_object
from selectkd.teachers.remote.shown import PATH, prompt_fields, same_prompt

__all__ = ["PATH", "body", "entries", "read"]


def body(request: TopKRequest, model: str | None) -> dict[str, Any]:
    """The question for one sample and its images. One token is generated, the fewest, and not looked at."""
    assert request.images is not None  # `vllm` asks for the others
    named = {} if model is None else {"model": model}
    sampling = {"max_tokens": 1, "prompt_logprobs": request.k, **vllm.UNTOUCHED}
    return {**named, **prompt_fields(request.ids, request.images), "sampling_params": sampling}


def read(answer: bytes, request: TopKRequest) -> TopK:
    """The rows of an answer; WrongAnswer for one that does not have them, whole, of these tokens and these images."""
    assert request.images is not None
    content = json_object(answer)
    same_prompt(content, request.ids, request.images)
    return vllm.rows_in(content, request)


def entries(answer: bytes) -> int:
    """The most entries a position has."""
    return vllm.most_entries(json_object(answer))
