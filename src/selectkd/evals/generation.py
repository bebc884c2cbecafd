"""A model's answers to prompts: the one place where evaluations generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from selectkd.data import eos_ids_of, pad_id_of
from selectkd.models.load import Loaded


@dataclass(frozen=True)
class Decoding:
    """How answers are written. temperature 0 is greedy; stop: strings before which an answer ends."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


@torch.no_grad()
def complete(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    batch_size: int = 8,
    heard: Callable[[int], None] | None = None,
) -> list[str]:
    """The answer to each prompt (token ids), in order. ``heard`` is told how many are done.

    An answer is cut at a stop string after it was written: transformers' own criterion fails on tokenizers that do not
    spell text. Prompts of one batch are padded on the left; sampled answers depend on the batch they are in, greedy
    ones only on rounding.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    done = 0
    with torch.random.fork_rng():
        torch.manual_seed(decoding.seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for i, text in zip(
                chosen, _batch(model, tokenizer, [prompts[i] for i in chosen], decoding), strict=True
            ):
                answers[i] = until(text, decoding.stop)
            done += len(chosen)
            if heard is not None:
                heard(done)
    return answers


def until(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first of the stop strings.

    >>> until("one\\ntwo", ["\\n"])
    'one'
    """
    ends = [at for at in (text.find(one) for one in stop) if at >= 0]
    return text[: min(ends)] if ends else text


def _batch(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[str]:
    width = max(map(len, prompts))
    pad = pad_id_of(tokenizer)
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(one)) + list(one) for one in prompts], device=device)
    real = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device)
    own = model.generation_config.eos_token_id
    ends = eos_ids_of(tokenizer, own if isinstance(own, list) else [] if own is None else [own])
    sampled: dict[str, Any] = (
        {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        if decoding.temperature
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    out = model.generate(
        input_ids=ids, attention_mask=real, max_new_tokens=decoding.max_new_tokens, pad_token_id=pad,
        eos_token_id=sorted(ends) or None, **sampled,
    )  # fmt: skip
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
