"""Text that no chat template lays out: prompt and completion as they stand, or instructions in the Alpaca layout."""

from __future__ import annotations

from typing import Any

from selectkd.data.encoding import Encoded, Encoder
from selectkd.data.formats import Sample
from selectkd.data.rounds import Steps, Tokens
from selectkd.data.windows import Window

# Source: Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), train.py, PROMPT_DICT.
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def joined(
    sample: Sample, encoder: Encoder, eos_ids: frozenset[int], train_on: str, window: Window
) -> Steps[tuple[list[int], list[bool]]]:
    """Prompt and completion without a template: the boundary is the prompt's length in characters, then EOS.

    Where a token would reach across the boundary the two are tokenised apart, which is how generation sees
    them.
    """
    prompt, completion = sample.prompt, sample.completion or ""
    if sample.instruction is not None:
        instruction, given = sample.instruction
        # Plain replacement: braces in the data are text, not fields.
        head, tail = (ALPACA_INPUT if given else ALPACA).split("{instruction}")
        prompt = head + instruction + tail.replace("{input}", given)
    part = window.of(prompt + completion, len(prompt), encoder.tokenizer)
    prompt, completion = (
        part.text[: part.head + len(prompt) - part.start],
        completion[: part.stop - len(prompt)],
    )
    found: Encoded = yield Tokens(prompt + completion)
    if encoder.fast and not found.crosses(len(prompt)):
        count = found.first(len(prompt))
        before, after = found.ids[:count], found.ids[count:]
    else:
        one: Encoded = yield Tokens(prompt)
        other: Encoded = yield Tokens(completion)
        before, after = one.ids, other.ids
    before = behind_start(before, encoder)
    ids = [*before, *after, *encoder.end]
    return single_end(ids, [train_on == "all"] * len(before) + [True] * (len(ids) - len(before)), eos_ids)


def with_start(ids: list[int], tokenizer: Any) -> list[int]:
    """The ids with the special tokens the tokenizer itself puts first (a BOS, say), unless they are there
    already.
    """
    return behind_start(ids, Encoder(tokenizer))


def behind_start(ids: list[int], encoder: Encoder) -> list[int]:
    return list(ids) if ids[: len(encoder.start)] == encoder.start else encoder.start + ids


def single_end(ids: list[int], trained: list[bool], eos_ids: frozenset[int]) -> tuple[list[int], list[bool]]:
    """The ids without the EOS that was added, when the text brought its own."""
    twice = len(ids) > 1 and ids[-1] in eos_ids and ids[-2] in eos_ids
    return (ids[:-1], trained[:-1]) if twice else (ids, trained)
