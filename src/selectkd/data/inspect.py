"""The content of a data set before training: counts, duplicates, overlap, lengths, and the mask as pieces of text."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from selectkd.config.extras import how_to_install
from selectkd.data.example import Example
from selectkd.data.examples import Examples
from selectkd.data.images import ImageRef
from selectkd.data.prompts import groups
from selectkd.data.sources import Source
from selectkd.data.vision import Images
from selectkd.errors import ConfigError

Kind = Literal["", "trained", "image"]
"""Of a piece of text: what is trained on, what stands for an image, and, empty, the rest."""
THUMBNAIL = 192
PART = 1 << 16
"""Examples whose prompts are looked up at once."""


@dataclass(frozen=True)
class Check:
    """The counts of ``check``. ``lengths`` maps an upper bound in tokens (a power of two) to a number of examples.

    near_duplicates: records whose prompt is that of another, or nearly. same_prompt, near_prompt: examples whose prompt
    is also held out, and those with one that is nearly so.
    """

    examples: int
    tokens: int
    trained_tokens: int
    duplicates: int
    near_duplicates: int
    overlap: int
    same_prompt: int
    near_prompt: int
    shortest: int
    longest: int
    lengths: Mapping[int, int]
    counts: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def check(data: Source | Sequence[Example], *, held_out: Source | Sequence[Example] = ()) -> Check:
    """Counts over examples, from their lengths and hashes alone. A duplicate has the token ids of an earlier example;
    overlap counts held-out ones. Near prompts are found by MinHash (``data.prompts``).
    """
    examples = Examples.of(data.examples if isinstance(data, Source) else data)
    held = Examples.of(held_out.examples if isinstance(held_out, Source) else held_out)
    keys, sizes = _keys(examples), examples.lengths
    duplicates = len(examples) - len(np.unique(keys))
    overlap = int(np.isin(keys, _keys(held)).sum())
    lengths = Counter(1 << max(0, size - 1).bit_length() for size in sizes.tolist())
    same, near = _held_out_too(examples, held)
    warnings = []
    # A tenth is where repeated rows begin to act as a second epoch on part of the data.
    if len(examples) and duplicates >= 0.1 * len(examples):
        warnings.append(f"{duplicates} of {len(examples)} examples are exact duplicates of an earlier one.")
    warnings += shared_prompts(examples, held)
    return Check(
        examples=len(examples),
        tokens=int(sizes.sum()),
        trained_tokens=int(examples.column("trained").sum()),
        duplicates=duplicates,
        near_duplicates=_near_duplicates(examples, examples.prompts),
        overlap=overlap,
        same_prompt=int(same.sum()),
        near_prompt=int(near.sum()),
        shortest=int(min(sizes, default=0)),
        longest=int(max(sizes, default=0)),
        lengths=dict(sorted(lengths.items())),
        counts=dict(data.counts) if isinstance(data, Source) else {},
        warnings=tuple(warnings),
    )


def shared_prompts(examples: Examples, held_out: Examples) -> list[str]:
    """A warning where examples have a prompt that is held out, or nearly one; none otherwise."""
    same, near = (int(found.sum()) for found in _held_out_too(examples, held_out))
    if not near:
        return []
    whole = int(np.isin(_keys(examples), _keys(held_out)).sum())
    return [
        f"{near:,} of {len(examples):,} training examples have a prompt that is held out too or nearly so ({same:,} "
        f"the same prompt, {whole:,} the same answer as well): held-out results would be too good. Leave these "
        "records out of one of the files."
    ]


def _held_out_too(examples: Examples, held_out: Examples) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether each example's prompt is held out, and whether nearly, [n] each."""
    prompts, others = examples.prompts, held_out.prompts
    exact, keys = np.unique(others[:, 0]), np.unique(others)
    near = [np.empty(0, bool)]
    for start in range(0, len(prompts), PART):  # isin takes several times the memory of what it is given
        near.append(np.asarray(np.isin(prompts[start : start + PART], keys).any(axis=1)))
    return np.isin(prompts[:, 0], exact), np.concatenate(near)


def _keys(examples: Examples) -> NDArray[np.void]:
    """The hash of each example's token ids, [n]."""
    return np.ascontiguousarray(examples.column("key")).view("V16").reshape(-1)


def _near_duplicates(examples: Examples, prompts: NDArray[np.int64]) -> int:
    """Records beyond the first of each group of near prompts; a record may be several examples."""
    return max(0, examples.records - len(np.unique(groups(prompts))))


def languages(examples: Sequence[Example], tokenizer: Any, *, most: int = 1000) -> dict[str, int]:
    """The languages of trained text by their ISO 639-1 codes, most frequent first, of ``most`` examples spread evenly.

    Raises ConfigError where py3langid is not installed. It always names a language, of code and numbers too.
    """
    try:
        from py3langid import classify  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(f"Languages need py3langid: {how_to_install('data')}.") from None
    counts: Counter[str] = Counter()
    for place in np.linspace(0, len(examples) - 1, min(most, len(examples))).astype(int).tolist():
        example = examples[place]
        ids = [index for index, trained in zip(example.input_ids, example.completion, strict=True) if trained]
        counts[classify(tokenizer.decode(ids[:500], skip_special_tokens=True))[0]] += 1
    return dict(counts.most_common())


def pieces(example: Example, tokenizer: Any) -> list[tuple[str, Kind]]:
    """The text of an example cut where the mask changes and where an image stands: (text, kind).

    Special tokens are written out; an image's tokens are one piece, a line about the image.
    """
    images = example.images
    places = [] if images is None else images.places
    within = {token: number for number, (begin, end) in enumerate(places) for token in range(begin, end)}
    runs: list[tuple[list[int], tuple[Kind, int]]] = []
    for place, (token, trained) in enumerate(zip(example.input_ids, example.completion, strict=True)):
        number = within.get(place, -1)
        kind: tuple[Kind, int] = ("image" if number >= 0 else "trained" if trained else "", number)
        if runs and runs[-1][1] == kind:
            runs[-1][0].append(token)
        else:
            runs.append(([token], kind))
    return [
        (
            f"image {number + 1}: {_about(images, number)}, {len(ids)} tokens"
            if images is not None and number >= 0
            else tokenizer.decode(ids, skip_special_tokens=False),
            kind,
        )
        for ids, (kind, number) in runs
    ]


def _about(images: Images, number: int) -> str:
    ref = ImageRef.unpacked(images.refs[number])
    name = Path(ref.payload.decode()).name if ref.by_path else "of the record"
    image = ref.image()
    return f"{name}, {image.width} x {image.height}"


def thumbnails(example: Example) -> list[bytes]:
    """The images of an example, upright, at most THUMBNAIL pixels long, each as a PNG."""
    found = []
    for image in [] if example.images is None else example.images.shown():
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        stream = io.BytesIO()
        image.save(stream, "PNG")
        found.append(stream.getvalue())
    return found
