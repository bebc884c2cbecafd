"""The content of a data set before training: counts, duplicates, overlap, lengths, and the mask as pieces of text."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selectkd.data.render import Example
from selectkd.data.sources import Source


@dataclass(frozen=True)
class Check:
    """The counts of ``check``. ``lengths`` maps an upper bound in tokens (a power of two) to a number of examples."""

    examples: int
    tokens: int
    trained_tokens: int
    duplicates: int
    overlap: int
    shortest: int
    longest: int
    lengths: Mapping[int, int]
    counts: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def check(data: Source | Sequence[Example], *, held_out: Source | Sequence[Example] = ()) -> Check:
    """Counts over examples. A duplicate has the token ids of an earlier example; overlap counts held-out ones."""
    examples = list(data.examples if isinstance(data, Source) else data)
    held = held_out.examples if isinstance(held_out, Source) else held_out
    counted = Counter(_key(example) for example in examples)
    held_keys = {_key(example) for example in held}
    duplicates = len(examples) - len(counted)
    overlap = sum(count for key, count in counted.items() if key in held_keys)
    sizes = [len(example) for example in examples]
    lengths = Counter(1 << max(0, size - 1).bit_length() for size in sizes)
    warnings = []
    # A tenth is where repeated rows begin to act as a second epoch on part of the data.
    if examples and duplicates >= 0.1 * len(examples):
        warnings.append(f"{duplicates} of {len(examples)} examples are exact duplicates of an earlier one.")
    if overlap:
        warnings.append(
            f"{overlap} of {len(examples)} examples are also in the held-out data, whose results would be too good."
        )
    return Check(
        examples=len(examples),
        tokens=sum(sizes),
        trained_tokens=sum(sum(example.completion) for example in examples),
        duplicates=duplicates,
        overlap=overlap,
        shortest=min(sizes, default=0),
        longest=max(sizes, default=0),
        lengths=dict(sorted(lengths.items())),
        counts=dict(data.counts) if isinstance(data, Source) else {},
        warnings=tuple(warnings),
    )


def _key(example: Example) -> bytes:
    return hashlib.blake2b(repr(example.input_ids).encode(), digest_size=16).digest()


def pieces(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of an example cut where the mask changes: (text, trained), special tokens written out."""
    runs: list[tuple[list[int], bool]] = []
    for token, trained in zip(example.input_ids, example.completion, strict=True):
        if runs and runs[-1][1] == trained:
            runs[-1][0].append(token)
        else:
            runs.append(([token], trained))
    return [(tokenizer.decode(ids, skip_special_tokens=False), trained) for ids, trained in runs]
