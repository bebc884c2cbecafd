"""Many prompts to many completions: sorted by length, in batches, rows that are done leave. b texts.

A token's random numbers are a function of (seed, step, the prompt's ids, its place), so a text depends neither on the
batch it is in nor on the order of the prompts, but for the rounding of the models themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from selectkd.data.collate import sent
from selectkd.data.vision import Images
from selectkd.errors import ConfigError
from selectkd.models.devices import out_of_memory
from selectkd.models.forward import evaluating
from selectkd.models.head import head_of, unwrapped
from selectkd.objective.uniforms import uniforms
from selectkd.rollouts.batch_memory import BatchMemory, Request
from selectkd.rollouts.few_rows import FewRows
from selectkd.rollouts.kv_decoder import kv_decoder
from selectkd.rollouts.rules import Rule

FEWER = 0.75
"""Rows that are done leave once the rest is this share of the batch: leaving copies the cache."""
FETCH_EVERY = 16
"""Tokens an accelerator writes before the host fetches them, which waits for the device. Tokens behind a row's end are
thrown away."""
STOP_WINDOW = 64
"""Tokens at the end of a text that are decoded to look for a stop string."""


@dataclass(frozen=True)
class Completion:
    """A written text. ids: with the end token, where one was written; replaced: tokens the second model put in; ended:
    whether an end token or a stop string ended it.
    """

    ids: list[int]
    replaced: int = 0
    ended: bool = False


@dataclass(frozen=True)
class Ends:
    """The end of a text: a token of ``ids``, or the token that completes one of ``stops``.

    decode: the text of ids, needed for stop strings; ConfigError where it is missing.
    """

    ids: Collection[int]
    stops: Sequence[str] = ()
    decode: Callable[[list[int]], str] | None = None

    def __post_init__(self) -> None:
        if self.stops and self.decode is None:
            raise ConfigError("stop strings need `decode`, a function from ids to text.")

    def reached(self, written: list[int]) -> bool:
        """Whether the last token of a text ends it."""
        if written[-1] in self.ids:
            return True
        if not self.stops or self.decode is None:
            return False
        text = self.decode(written[-STOP_WINDOW:])
        return any(stop in text for stop in self.stops)


def prompt_key(prompt: Sequence[int], copy: int = 0, images: Images | None = None) -> int:
    """A 64-bit number of a prompt's ids and images, signed."""
    seen = b"" if images is None else images.identity
    digest = hashlib.blake2b(repr((list(map(int, prompt)), copy)).encode() + seen, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def ends_of(tokenizer: Any, *models: nn.Module) -> frozenset[int]:
    """The ids that end a text: the tokenizer's EOS and those of the models' generation settings. ConfigError for ends
    that are no ids.
    """
    found = [getattr(tokenizer, "eos_token_id", None)]
    found += [
        getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None)
        for model in models
    ]
    all_ids: set[int] = set()
    for ids in found:
        several = () if ids is None else ids if isinstance(ids, list | tuple) else (ids,)
        wrong = next((i for i in several if not isinstance(i, int)), None)
        if wrong is not None:
            raise ConfigError(
                f"eos_token_id is {wrong!r} in generation_config.json. Write the token's id there."
            )
        all_ids.update(several)
    return frozenset(all_ids)


@torch.no_grad()
def generate(
    models: Sequence[nn.Module],
    requests: Sequence[Request],
    rule: Rule,
    *,
    ends: Collection[int] | Ends,
    width: int,
    seed: int = 0,
    step: int = 0,
    batch_tokens: int | None = None,
) -> list[Completion]:
    """One completion for each request, in their order, by as many models as the rule wants (student first).

    ends: the ids, or the ids and stop strings, that end a text, which ends at its limit too; width: how many leading
    ids may be written. The models keep their mode.
    batch_tokens: prompt and completion tokens of a batch at most; None as of ``BatchMemory.of``.
    Raises ConfigError for a rule and models that do not go together, and for a prompt without a token.
    """
    if len(models) != rule.models or not width > 0:
        raise ConfigError(
            f"{type(rule).__name__} writes with {rule.models} models; generate() was given {len(models)}."
        )
    if any(not request.prompt for request in requests):
        raise ConfigError("a prompt has no token. Give each prompt at least one.")
    ends = ends if isinstance(ends, Ends) else Ends(ends)
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt), i), reverse=True)
    device = head_of(models[0]).weight.device
    most = None  # rows of a batch, once memory has run out
    done: dict[int, Completion] = {}
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(FewRows())
        for model in models:
            stack.enter_context(evaluating(model))
        while order:
            memory = BatchMemory.of(models, device) if batch_tokens is None else BatchMemory(batch_tokens)
            size = min(memory.rows([requests[i] for i in order]), most or len(order))
            batch = [requests[i] for i in order[:size]]
            try:
                texts = _batch(models, batch, rule, ends, width, seed, step)
            except (
                RuntimeError
            ) as error:  # a text does not depend on its batch: a smaller one writes the same
                if size == 1 or not out_of_memory(error):
                    raise
                most = size // 2
                continue
            done.update(zip(order[:size], texts, strict=True))
            order = order[size:]
    return [done[i] for i in range(len(requests))]


def _batch(
    models: Sequence[nn.Module], requests: Sequence[Request], rule: Rule, ends: Ends, width: int, seed: int, step: int
) -> list[Completion]:  # fmt: skip
    written: list[list[int]] = [[] for _ in requests]
    replaced, ended = [0] * len(requests), [False] * len(requests)
    prompts, images = [request.prompt for request in requests], [request.images for request in requests]
    decoders = [kv_decoder(model, prompts, width=width, images=images) for model in models]
    shared = min(one.width for one in decoders)
    device = decoders[0].logits.device
    keys = [prompt_key(request.prompt, request.copy, request.images) for request in requests]
    counter = sent(torch.tensor(keys, dtype=torch.int64), device)
    here = list(range(len(requests)))  # the request of each row that is still read
    active = [request.limit > 0 for request in requests]
    token, place, every = None, 0, 1 if device.type == "cpu" else FETCH_EVERY
    while any(active[i] for i in here):
        left = min(requests[i].limit - len(written[i]) for i in here if active[i])
        found, ahead = [], torch.arange(place, place + min(every, left), device=device)
        place += len(ahead)
        rows = (counter + ahead[:, None]).flatten()  # [tokens b]
        uniform = uniforms(len(rows), rule.uniforms, seed=seed, step=step, counter=rows, device=device)
        for numbers in uniform.unflatten(0, (len(ahead), len(here))):
            if token is not None:
                for one in decoders:
                    one.append(token)
            logits = [one.logits[:, :shared].to(device) for one in decoders]
            token, overruled = rule(logits, numbers)
            found.append(torch.stack([token, overruled.to(token.dtype)]))
        for tokens, overruled in torch.stack(found).tolist():
            for i, one, other in zip(here, tokens, overruled, strict=True):
                if active[i]:
                    written[i].append(one)
                    replaced[i] += other
                    ended[i] = ends.reached(written[i])
                    active[i] = not ended[i] and len(written[i]) < requests[i].limit
        kept = [row for row, i in enumerate(here) if active[i]]
        if 0 < len(kept) <= FEWER * len(here):
            index = sent(torch.tensor(kept), device)
            here, token, counter = [here[row] for row in kept], token[index], counter[index]  # type: ignore[index]
            for one in decoders:
                one.keep(index)
    return [Completion(*one) for one in zip(written, replaced, ended, strict=True)]
