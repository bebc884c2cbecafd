"""Many prompts to many completions: sorted by length, in batches, rows that are done leave. b texts.

A token's random numbers are a function of (seed, step, the prompt's ids, its place), so a text depends neither on the
batch it is in nor on the order of the prompts, but for the rounding of the models themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from selectkd.errors import ConfigError
from selectkd.generation.few_rows import FewRows
from selectkd.generation.reader import Reader
from selectkd.generation.rules import Rule
from selectkd.models.head import unwrapped
from selectkd.randomness import uniforms

FEWER = 0.75
"""Rows that are done leave once the rest is this share of the batch: leaving copies the cache."""
BATCH_TOKENS = 8192
"""Prompt and completion tokens of a batch at most, a prompt counted at its longest neighbour's length."""
LOOK_BACK = 64
"""Tokens at the end of a text that are decoded to look for a stop string."""


@dataclass(frozen=True)
class Request:
    """A prompt as ids, and how many tokens may follow. copy: 0, 1, ... for several texts of one prompt."""

    prompt: Sequence[int]
    limit: int
    copy: int = 0


@dataclass(frozen=True)
class Completion:
    """What was written: ids (the end token with it, where there is one), tokens the second model put in, and whether it
    came to an end by itself.
    """

    ids: list[int]
    replaced: int = 0
    ended: bool = False


def prompt_key(prompt: Sequence[int], copy: int = 0) -> int:
    """A 64-bit number of a prompt's ids, signed."""
    digest = hashlib.blake2b(repr((list(map(int, prompt)), copy)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def ends_of(tokenizer: Any, *models: nn.Module) -> frozenset[int]:
    """The ids that end a text: the tokenizer's EOS and those of the models' generation settings."""
    own = [getattr(tokenizer, "eos_token_id", None)]
    own += [
        getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None)
        for model in models
    ]
    ids: set[int] = set()
    for one in own:
        ids.update(() if one is None else (one,) if isinstance(one, int) else one)
    return frozenset(ids)


@torch.no_grad()
def generate(
    models: Sequence[nn.Module],
    requests: Sequence[Request],
    rule: Rule,
    *,
    ends: Collection[int],
    width: int,
    pad_id: int = 0,
    seed: int = 0,
    step: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    stops: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
) -> list[Completion]:
    """One completion for each request, in their order, by as many models as the rule wants (student first).

    ends: ids that end a text; width: how many leading ids may be written. A text also ends with the token that
    completes one of ``stops``, for which ``decode`` is needed, and at its limit. The models keep their mode.
    Raises ConfigError for a rule and models that do not go together, and for a prompt without a token.
    """
    if len(models) != rule.models or not width > 0:
        raise ConfigError(
            f"{type(rule).__name__} writes with {rule.models} models, and there are {len(models)}."
        )
    if stops and decode is None:
        raise ConfigError("stop strings need `decode`, a function from ids to text.")
    if any(not request.prompt for request in requests):
        raise ConfigError("a prompt has no token; there is nothing to go on from.")
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt), i), reverse=True)
    done: dict[int, Completion] = {}
    with ExitStack() as stack:
        stack.enter_context(FewRows())
        for model in models:
            stack.enter_context(evaluating(model))
        while order:
            size = _batch_size([requests[i] for i in order], batch_tokens)
            batch, order = order[:size], order[size:]
            texts = _batch(
                models, [requests[i] for i in batch], rule, ends, width, pad_id, seed, step, stops, decode
            )
            done.update(zip(batch, texts, strict=True))
    return [done[i] for i in range(len(requests))]


def _batch_size(requests: Sequence[Request], batch_tokens: int) -> int:
    """How many of the requests, the longest prompt first, make the next batch."""
    longest, limit = len(requests[0].prompt), 0
    for size, request in enumerate(requests):
        limit = max(limit, request.limit)
        if size and (size + 1) * (longest + limit) > batch_tokens:
            return size
    return len(requests)


def _batch(
    models: Sequence[nn.Module], requests: Sequence[Request], rule: Rule, ends: Collection[int], width: int,
    pad_id: int, seed: int, step: int, stops: Sequence[str], decode: Callable[[list[int]], str] | None,
) -> list[Completion]:  # fmt: skip
    written: list[list[int]] = [[] for _ in requests]
    replaced, ended = [0] * len(requests), [False] * len(requests)
    readers = [
        Reader(model, [request.prompt for request in requests], width=width, pad_id=pad_id)
        for model in models
    ]
    shared = min(reader.width for reader in readers)
    keys = torch.tensor([prompt_key(request.prompt, request.copy) for request in requests], dtype=torch.int64)
    here = list(range(len(requests)))  # the request of each row that is still read
    active = [request.limit > 0 for request in requests]
    place = 0
    while any(active[i] for i in here):
        logits = [reader.logits[:, :shared] for reader in readers]
        rows = keys[torch.tensor(here)] + place
        uniform = uniforms(len(here), rule.uniforms, seed=seed, step=step, counter=rows).to(logits[0].device)
        token, overruled = rule([one.to(logits[0].device) for one in logits], uniform)
        for i, one, other in zip(here, token.tolist(), overruled.tolist(), strict=True):
            if not active[i]:
                continue
            written[i].append(one)
            replaced[i] += other
            ended[i] = one in ends or _stopped(written[i], stops, decode)
            active[i] = not ended[i] and len(written[i]) < requests[i].limit
        place += 1
        left = [row for row, i in enumerate(here) if active[i]]
        if not left:
            break
        if len(left) <= FEWER * len(here):
            index = torch.tensor(left, device=token.device)
            here, token = [here[row] for row in left], token[index]
            for reader in readers:
                reader.keep(index)
        for reader in readers:
            reader.append(token)
    return [Completion(*one) for one in zip(written, replaced, ended, strict=True)]


def _stopped(ids: list[int], stops: Sequence[str], decode: Callable[[list[int]], str] | None) -> bool:
    if not stops or decode is None:
        return False
    text = decode(ids[-LOOK_BACK:])
    return any(stop in text for stop in stops)


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """The model in evaluation mode for a while; dropout off, and checkpointing with it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
