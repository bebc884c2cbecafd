"""Prompts that are the same or reworded, found by hashes of their words; and the split that keeps them on one side."""

from __future__ import annotations

import re
import struct
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, takewhile
from math import floor

import numpy as np
import xxhash
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from selectkd.data.formats import Sample
from selectkd.data.image_parts import count_of
from selectkd.data.turns import text_of

WORD = re.compile(r"\w+")
SIGNS = "+*/=<>^%\u2212\u00d7\u00f7\u2260\u2264\u2265"
SIGN = rf"[{SIGNS}]|(?<![^\W\d])-|-(?![^\W\d])|(?<=\d)\.(?=\d)"
"""What changes a calculation, and no hyphen between letters: 2 - 3 is another prompt than 2 + 3, and 2.5 than 25."""
SPOKEN = re.compile(rf"\w+|{SIGN}")
POINT = re.compile(r"\.\d")
SHINGLE = 3
"""Words that are hashed together. A prompt of fewer has no near ones."""
BANDS, ROWS = 8, 8
"""Bands of a MinHash signature, and hashes of a band: prompts with a band in common are near. Of the pairs that share
0.75 of their shingles 57% have one, of those that share 0.5 3%, of those that share 0.9 99%."""
KEYS = 1 + BANDS
"""Keys of a prompt: the hash of its words, and one of each band."""
LONGEST = 20_000
"""Characters of a prompt that are read: those behind them change neither its kind nor its cost."""
WORDS = 1 << 14
"""Words whose hashes are kept: some 2 MB."""
_FACTORS = np.random.PCG64(0).random_raw((2, BANDS * ROWS, 1)) | np.uint64(1)
"""Odd factors and summands of the hash functions, [2, BANDS * ROWS, 1]. numpy keeps this stream for all time."""

_BAND = [bytes([band]) for band in range(BANDS)]
_PACKED = struct.Struct(f"<{KEYS}q")
_BASE = np.uint64(0x9E3779B97F4A7C15)


class _Hashes(dict[str, int]):
    """The hashes of words, those of the last ones kept."""

    def __missing__(self, word: str) -> int:
        if len(self) >= WORDS:
            self.clear()
        self[word] = found = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        return found


_WORDS = _Hashes()
_ASCII = "".join(chr(code) if WORD.match(chr(code)) else " " for code in range(128))
"""ASCII without what is no part of a word."""


def prompt_of(sample: Sample) -> str:
    """The text that decides on which side of a split a sample is: the first turn that asks, or else its beginning."""
    if sample.messages is not None:
        asked = next((turn for turn in sample.messages if turn["role"] == "user"), sample.messages[0])
        return text_of(asked["content"])[:LONGEST]
    if sample.input_ids is not None:
        mask = sample.mask or ()
        first = mask.index(True) if True in mask else 0
        return " ".join(map(str, sample.input_ids[: first or LONGEST]))
    return (sample.text or "")[:LONGEST]


def images_asked(sample: Sample) -> int:
    """How many images stand before the first answer of a conversation."""
    messages = sample.messages or ()
    return count_of(list(takewhile(lambda turn: turn["role"] != "assistant", messages)))


def prompt_keys(text: str) -> tuple[int, ...]:
    """KEYS hashes of a prompt, 63 bits each; two prompts with the same key at any place are near-duplicates.

    The bands are of a MinHash signature over SHINGLE words. Source: Broder 1997; Leskovec et al., Mining of Massive
    Datasets, chapter 3.

    The first is of all words and signs of calculation, without case, accents' forms and other punctuation. The others
    are of words alone.

    >>> prompt_keys("Where is Oslo?") == prompt_keys("where is oslo")
    True
    >>> prompt_keys("Where is Oslo?")[0] == prompt_keys("Where is Rome?")[0]
    False
    """
    return _PACKED.unpack(packed_keys([text])[0])


def packed_keys(texts: Sequence[str]) -> list[bytes]:
    """``prompt_keys`` of each text, as ``packed`` gives them."""
    plain = [unicodedata.normalize("NFKC", text).casefold() for text in texts]
    spoken = [_words(text) for text in plain]
    exact = [
        _hash(" ".join(SPOKEN.findall(text) if _calculates(text) else words).encode("utf-8", "surrogatepass"))
        for text, words in zip(plain, spoken, strict=True)
    ]
    near = iter(_bands([words for words in spoken if len(words) >= SHINGLE]))
    return [
        packed((one, *(next(near) if len(words) >= SHINGLE else (one,) * BANDS)))
        for one, words in zip(exact, spoken, strict=True)
    ]


def _words(plain: str) -> list[str]:
    return (plain.translate(_ASCII).split() if plain.isascii() else WORD.findall(plain)) or [plain]


def _calculates(plain: str) -> bool:
    """Whether a text may hold a sign of calculation: a look at each is faster than their pattern."""
    signs = SIGNS[:8] if plain.isascii() else SIGNS
    return "-" in plain or any(sign in plain for sign in signs) or POINT.search(plain) is not None


def _bands(spoken: Sequence[Sequence[str]]) -> list[list[int]]:
    """The hashes of the bands of each text, given as at least SHINGLE words."""
    counts = np.fromiter(map(len, spoken), np.int64, len(spoken))
    hashes = np.fromiter(map(_WORDS.__getitem__, chain.from_iterable(spoken)), np.uint64, counts.sum())
    # A shingle's hash is a polynomial in the hashes of its words, so that each word is hashed once.
    shingles = hashes.copy()
    for place in range(1, SHINGLE):
        shingles *= _BASE
        shingles[:-place] += hashes[place:]
    ends = np.cumsum(counts)
    inside = np.ones(len(hashes), bool)
    for place in range(1, SHINGLE):
        inside[ends - place] = False
    shingles, counts = shingles[inside], counts - (SHINGLE - 1)
    starts = np.cumsum(counts) - counts
    signatures = np.empty((BANDS * ROWS, len(spoken)), np.uint64)
    for band in range(0, BANDS * ROWS if len(spoken) else 0, ROWS):
        # Multiply-shift: the upper half of a * x + b, wrapped at 64 bits, is universal enough. Dietzfelbinger et al.
        # 1997.
        hashed = _FACTORS[0, band : band + ROWS] * shingles
        hashed += _FACTORS[1, band : band + ROWS]
        np.minimum.reduceat(hashed, starts, axis=1, out=signatures[band : band + ROWS])
    written = (signatures.T >> np.uint64(32)).astype("<u4").tobytes()
    rows = [written[at : at + 4 * ROWS] for at in range(0, len(written), 4 * ROWS)]
    found = [_hash(_BAND[number % BANDS] + row) for number, row in enumerate(rows)]
    return [found[at : at + BANDS] for at in range(0, len(found), BANDS)]


def packed(keys: Sequence[int]) -> bytes:
    """Keys as KEYS * 8 bytes, which ``unpacked`` reads."""
    return _PACKED.pack(*keys)


def with_images(prompt: bytes, images: Sequence[bytes]) -> bytes:
    """Packed keys of a prompt about images, given by their hashes: near are reworded prompts about the same images."""
    shown = b"".join(images)
    return packed([_hash(key.to_bytes(8, "little") + shown) for key in _PACKED.unpack(prompt)])


def unpacked(rows: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The keys of n packed prompts, [n, KEYS], from their bytes [n, KEYS * 8]."""
    return np.ascontiguousarray(rows).view("<i8").reshape(-1, KEYS)


def is_held_out(prompt: bytes, share: float) -> bool:
    """Whether packed keys are of a prompt that is held out by itself, whatever other prompts there are.

    >>> prompts = [packed(prompt_keys(f"What is {n} and {n}?")) for n in range(1000)]
    >>> 60 < sum(is_held_out(prompt, 0.1) for prompt in prompts) < 140
    True
    """
    return int.from_bytes(prompt[:8], "little") < bound_of(share)


def bound_of(share: float) -> int:
    """The hash below which a prompt's first key has it held out."""
    return int(share * 2**63)


def _hash(content: bytes) -> int:
    return xxhash.xxh3_64_intdigest(content) >> 1


def groups(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The group of each prompt, [n], of those that keys [n, k] connect, each to the next."""
    rows, width = keys.shape
    _, key = np.unique(keys, return_inverse=True)
    key = key.reshape(rows, width)
    owner = np.repeat(np.arange(rows), width)
    size = rows + int(key.max(initial=-1)) + 1
    ones = np.ones(rows * width, dtype=np.int8)
    links = coo_matrix((ones, (owner, rows + key.ravel())), shape=(size, size))
    return connected_components(links, directed=False)[1][:rows].astype(np.int64)


@dataclass(frozen=True)
class Split:
    """Which samples of each source are held out, [n] each. whole: reworded prompts are all on one side. too_many:
    samples in groups of one prompt larger than what is held out of a source, which are all trained on.
    """

    held_out: list[NDArray[np.bool_]]
    whole: bool
    too_many: int


def split(keys: Sequence[NDArray[np.int64]], share: float) -> Split:
    """The samples that are held out, a share of each source, from the keys [n, KEYS] of its prompts.

    Of n samples floor(n * share) are held out, fewer where groups of one prompt do not fit in. A sample's place is
    decided by hashes of its prompt alone. Near prompts are parted where they would leave the share short by more than
    a tenth.
    """
    part = Fraction(repr(share))
    source = np.repeat(np.arange(len(keys)), [len(one) for one in keys])
    every = np.concatenate(list(keys))
    wanted = np.array([floor(len(one) * part) for one in keys])
    group = groups(every)
    chosen = _chosen(every[:, 0], group, source, wanted)
    whole = bool(chosen.sum() >= 0.9 * wanted.sum())
    if not whole:
        group = groups(every[:, :1])
        chosen = _chosen(every[:, 0], group, source, wanted)
    sizes = np.bincount(group)
    too_many = int(sizes[sizes > wanted.sum()].sum())
    return Split(np.split(chosen, np.cumsum([len(one) for one in keys])[:-1]), whole, too_many)


def _chosen(
    exact: NDArray[np.int64], group: NDArray[np.int64], source: NDArray[np.int64], wanted: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whole groups, in the order of their smallest hash, as long as no source gives more than is wanted of it."""
    count = int(group.max(initial=-1)) + 1
    smallest = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(smallest, group, exact)
    order = np.argsort(group, kind="stable")
    members = np.split(source[order], np.cumsum(np.bincount(group, minlength=count))[:-1])
    room, taken = wanted.copy(), np.zeros(count, dtype=bool)
    for one in np.argsort(smallest, kind="stable").tolist():
        size = np.bincount(members[one], minlength=len(wanted))
        if (size <= room).all():
            taken[one] = True
            room -= size
            if not room.any():
                break
    return taken[group]
