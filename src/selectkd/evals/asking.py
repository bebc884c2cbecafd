"""Prompts to a model, texts back: with ``rollouts.generate``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from selectkd import __version__
from selectkd.evals.memory import Memory, key_of
from selectkd.models.load import Loaded
from selectkd.rollouts.generate import Ends, Request, ends_of, generate
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling
from selectkd.teachers.cache.origin import weights_checksum


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
    memory: Memory | None = None,
    on_progress: Callable[[int], None] | None = None,
    cut: list[bool] | None = None,
) -> list[str]:
    """The answer to each prompt (token ids), in order. ``on_progress`` gets the number that is done; ``cut`` gets,
    for each answer, whether max_new_tokens ended it.

    A prompt that stands several times has as many texts, each a draw of its own. A text is a function of (seed, prompt,
    which of its texts): batches change it by rounding alone. ``memory``: answers that are in it are not written again,
    and the others are in it, a batch at a time, as soon as they are there. It knows an answer by the weights, every
    setting, the batch size and the prompt; the batches of a run that goes on are those of a run that was never cut.
    """
    tokenizer, met = loaded.tokenizer, Counter[tuple[int, ...]]()
    requests = []
    for prompt in map(tuple, prompts):
        requests.append(Request(prompt, decoding.max_new_tokens, copy=met[prompt]))
        met[prompt] += 1
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
    ends, written = ends_of(tokenizer, loaded.model), dict[int, list[int]]()
    keys: list[str] = []
    if memory is not None:
        about = [__version__, identity(loaded), asdict(decoding), batch_size, sorted(ends), len(tokenizer)]
        keys = [key_of(*about, list(one.prompt), one.copy) for one in requests]
        written = {i: memory.known[key] for i, key in enumerate(keys) if key in memory.known}
        if written and on_progress is not None:
            on_progress(len(written))
    todo = [i for i in order if i not in written]
    for start in range(0, len(todo), batch_size):
        chosen = todo[start : start + batch_size]
        texts = generate(
            [loaded.model], [requests[i] for i in chosen], Draw(Sampling(decoding.temperature, decoding.top_p)),
            ends=Ends(ends, decoding.stop, tokenizer.decode), width=len(tokenizer), seed=decoding.seed,
        )  # fmt: skip
        written.update((i, text.ids) for i, text in zip(chosen, texts, strict=True))
        if (
            memory is not None
        ):  # one line a batch: a cut line costs the whole of it, and its rounding stays its own
            memory.keep({keys[i]: written[i] for i in chosen}, model=loaded.source)
        if on_progress is not None:
            on_progress(len(written))
    texts = [text_of(written[i], tokenizer, ends, decoding.stop) for i in range(len(requests))]
    if cut is not None:
        cut += [
            len(ids) >= decoding.max_new_tokens
            and ids[-1] not in ends
            and not any(stop in tokenizer.decode(ids) for stop in decoding.stop)
            for ids in (written[i] for i in range(len(requests)))
        ]
    return texts


def identity(loaded: Loaded) -> list[str]:
    """What a model's answers rest on besides the question: its revision, or its weights' checksum, and its dtype."""
    dtype = str(next(loaded.model.parameters()).dtype)
    return [loaded.revision or weights_checksum(loaded.model), dtype]


def text_of(ids: Sequence[int], tokenizer: Any, ends: Collection[int], stop: Sequence[str]) -> str:
    """What a model wrote, up to its end and to the first of the stop strings."""
    plain = [token for token in ids if token not in ends]
    return until(tokenizer.decode(plain, skip_special_tokens=True), stop)


def until(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first of the stop strings.

    >>> until("one\\ntwo", ["\\n"])
    'one'
    """
    ends = [at for at in (text.find(one) for one in stop) if at >= 0]
    return text[: min(ends)] if ends else text
