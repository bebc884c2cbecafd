"""Completions of an OpenAI-compatible server (vLLM, SGLang and others), in the place of a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx2

from selectkd.errors import TeacherError
from selectkd.generation.engine import Completion, Request, prompt_key
from selectkd.generation.sampling import Sampling


@dataclass(frozen=True)
class CompletionServer:
    """The server at ``url`` (the part before /v1), writing with the model it calls ``model``.

    A prompt goes out as token ids, so its template and tokens are ours. The answer is taken as ids where the server
    gives them (vLLM does), else its text is tokenised here, and the end token added where the server says it stopped
    by itself. Its draws are seeded by prompt; whether the same seed gives the same text is the server's affair.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    concurrency: int = 8

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
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        with (
            httpx2.Client(timeout=self.timeout, trust_env=False, headers=headers) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            bodies = [self._body(request, sampling, seed) for request in requests]
            answers = list(pool.map(lambda body: self._ask(client, body), bodies))
        return [
            _completion(answer, request, tokenizer, end, self.url)
            for answer, request in zip(answers, requests, strict=True)
        ]

    def _body(self, request: Request, sampling: Sampling, seed: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(request.prompt),
            "max_tokens": request.limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": (prompt_key(request.prompt, request.copy) ^ seed) & 0x7FFFFFFF,
            "return_token_ids": True,
        }
        return body if sampling.top_k is None else {**body, "top_k": sampling.top_k}

    def _ask(self, client: httpx2.Client, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = client.post(f"{self.url.rstrip('/')}/v1/completions", json=body)
        except httpx2.HTTPError as error:
            raise TeacherError(
                f"{self.url} gave no completion: {type(error).__name__}: {error}. Start it, or check --server."
            ) from error
        if answer.status_code != 200:
            raise TeacherError(
                f"{self.url} answered {answer.status_code} to a completion: {answer.text[:200]}. Check --server-model, "
                "which it must know, and its length limit."
            )
        try:
            choice = answer.json()["choices"][0]
            if not isinstance(choice["text"], str):
                raise TypeError("text is no string")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise TeacherError(
                f"{self.url} answered with something else than a completion ({type(error).__name__}: {error})."
            ) from error
        return choice


def _completion(
    choice: dict[str, Any], request: Request, tokenizer: Any, end: int | None, url: str
) -> Completion:
    stopped = choice.get("finish_reason") == "stop"
    ids = choice.get("token_ids")
    if ids is None:
        ids = list(tokenizer(choice["text"], add_special_tokens=False)["input_ids"])
        ids += [end] if stopped and end is not None else []
    elif not all(isinstance(one, int) and 0 <= one < len(tokenizer) for one in ids):
        raise TeacherError(
            f"{url} answered with token ids that are not this tokenizer's. Serve a model with the student's tokenizer."
        )
    return Completion(ids[: request.limit], ended=stopped)
