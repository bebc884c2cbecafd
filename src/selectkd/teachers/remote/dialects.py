"""The kinds of server, one row each: the request for the K best tokens, the parser of an answer, the flags it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from selectkd.teachers.remote import openai, sglang, vllm, vllm_images
from selectkd.teachers.remote.answers import TopK, TopKRequest
from selectkd.teachers.remote.shown import NEEDS


@dataclass(frozen=True)
class Dialect:
    """One kind of server. heated: where in the question the sampling temperature stands. with_images: how prompts with
    images are asked about, None where this kind takes none. needs: what an answer rests on, for a server without it.

    flags: (for what, the flag that sets it), ``{k}`` standing for K; what `selectkd teacher doctor` recommends.
    """

    path: str
    body: Callable[[TopKRequest, str | None], dict[str, Any]]
    read: Callable[[bytes, TopKRequest], TopK]
    entries: Callable[[bytes], int]
    heated: tuple[str, ...] = ("temperature",)
    flags: tuple[tuple[str, str], ...] = ()
    with_images: Dialect | None = None
    needs: str = ""


VLLM_FLAGS = (
    ("limit", "--max-logprobs {k}"),
    ("mode", "--logprobs-mode raw_logprobs"),
    ("prefix", "--no-enable-prefix-caching"),
)

DIALECTS: dict[str, Dialect] = {
    "vllm": Dialect(
        vllm.PATH,
        vllm.body,
        vllm.read,
        vllm.entries,
        flags=VLLM_FLAGS,
        with_images=Dialect(
            vllm_images.PATH,
            vllm_images.body,
            vllm_images.read,
            vllm_images.entries,
            heated=("sampling_params", "temperature"),
            needs=NEEDS,
        ),
    ),
    "sglang": Dialect(
        sglang.PATH,
        sglang.body,
        sglang.read,
        sglang.entries,
        heated=("sampling_params", "temperature"),
        flags=(("prefix", "--disable-radix-cache"),),
    ),
    "openai": Dialect(openai.PATH, openai.body, openai.read, openai.entries, flags=VLLM_FLAGS),
}
"""vLLM's default limit is 20, and stale rows under prefix caching are its issue 42019."""
