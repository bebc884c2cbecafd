"""Prompts to a model, texts back: what evaluations ask of the room ``generation``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selectkd.data import pad_id_of
from selectkd.generation import Draw, Request, Sampling, ends_of, generate
from selectkd.models.load import Loaded


@dataclass(frozen=True)
class Decoding:
    """How answers are written. temperature 0 is greedy; stop: strings before which an answer ends."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


def complete(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    batch_size: int = 8,
    heard: Callable[[int], None] | None = None,
) -> list[str]:
    """The answer to each prompt (token ids), in order. ``heard`` is told how many are done.

    A prompt that stands several times has as many texts, each a draw of its own. A text is a function of (seed, prompt,
    which of its texts): batches change it by rounding alone.
    """
    tokenizer, met = loaded.tokenizer, Counter[tuple[int, ...]]()
    requests = []
    for prompt in map(tuple, prompts):
        requests.append(Request(prompt, decoding.max_new_tokens, copy=met[prompt]))
        met[prompt] += 1
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
    ends, answers = ends_of(tokenizer, loaded.model), [""] * len(requests)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        texts = generate(
            [loaded.model], [requests[i] for i in chosen], Draw(Sampling(decoding.temperature, decoding.top_p)),
            ends=ends, width=len(tokenizer), pad_id=pad_id_of(tokenizer), seed=decoding.seed, stops=decoding.stop,
            decode=tokenizer.decode,
        )  # fmt: skip
        for i, text in zip(chosen, texts, strict=True):
            ids = [token for token in text.ids if token not in ends]
            answers[i] = until(tokenizer.decode(ids, skip_special_tokens=True), decoding.stop)
        if heard is not None:
            heard(start + len(chosen))
    return answers


def until(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first of the stop strings.

    >>> until("one\\ntwo", ["\\n"])
    'one'
    """
    ends = [at for at in (text.find(one) for one in stop) if at >= 0]
    return text[: min(ends)] if ends else text
