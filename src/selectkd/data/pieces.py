"""Texts cut into pieces that are tokenised once: special tokens, and words with the space in front of them.

The texts of a group are one array of bytes. Arrow finds the distinct pieces, and the ids of all texts are gathered from
the tokens of those. p pieces, n tokens, u distinct pieces.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from struct import Struct
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

SPACE, LETTERS = ord(" "), 26
TWO_BYTES = 0xC3, 0xDF
"""The first bytes of UTF-8 characters of two bytes, but for those that are space."""
ROW = np.dtype([("id", np.int32), ("begin", np.int32), ("end", np.int32)])
ROWS = Struct("=3i")
"""A token of a piece, and its characters there."""
BESIDE = 200
"""Bytes of memory of a piece that is kept, beside its text and tokens."""


class Words:
    """Pieces that were tokenised, each the rows of its tokens as bytes. size: of all of them in memory."""

    def __init__(self) -> None:
        self._rows: dict[bytes, bytes] = {}
        self.size = 0

    def rows(self, pieces: Sequence[bytes], tokenizer: Any) -> list[bytes]:
        """The tokens of distinct pieces; those that are new are tokenised together."""
        found = list(map(self._rows.get, pieces))
        new = [piece for piece, row in zip(pieces, found, strict=True) if row is None]
        if not new:
            return found  # type: ignore[return-value]
        self._learn(new, tokenizer)
        return [self._rows[piece] if row is None else row for piece, row in zip(pieces, found, strict=True)]

    def _learn(self, pieces: Sequence[bytes], tokenizer: Any) -> None:
        found = tokenizer(
            [piece.decode() for piece in pieces],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
        )
        ends = [0, *accumulate(map(len, found["input_ids"]))]
        rows = np.empty(ends[-1], ROW)
        rows["id"] = list(chain.from_iterable(found["input_ids"]))
        spans = np.array(list(chain.from_iterable(found["offset_mapping"])), np.int32).reshape(-1, 2)
        rows["begin"], rows["end"] = spans.T
        written = rows.tobytes()
        for piece, (begin, end) in zip(pieces, pairwise(ends), strict=True):
            self._rows[piece] = written[begin * ROW.itemsize : end * ROW.itemsize]
        self.size += sum(map(len, pieces)) + len(written) + BESIDE * len(pieces)


@dataclass(frozen=True, eq=False)
class Group:
    """Texts that were cut together. data: all of them in UTF-8; starts [p + 1]: the bytes where pieces begin, and the
    end; which [p]: the number of each among the distinct ones, [u], whose tokens are rows; tokens [p + 1]: how many
    stand before each piece; ids [n].
    """

    data: bytes
    starts: NDArray[np.int64]
    which: NDArray[np.int32]
    rows: Sequence[bytes]
    tokens: NDArray[np.int64]
    ids: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Pieced:
    """The tokens of a text of a group: its pieces ``first`` up to ``last``."""

    text: str
    group: Group
    first_piece: int
    last_piece: int

    @property
    def ids(self) -> list[int]:
        """The tokens."""
        begin, end = self.group.tokens[[self.first_piece, self.last_piece]]
        return self.group.ids[begin:end].tolist()

    def first(self, place: int) -> int:
        """See ``Encoded``."""
        return self._at(place)[0]

    def crosses(self, place: int) -> bool:
        """See ``Encoded``."""
        return self._at(place)[1]

    def _at(self, place: int) -> tuple[int, bool]:
        """The first token that begins at or behind a character, and whether the one before it ends behind it."""
        group, (first, last) = self.group, (self.first_piece, self.last_piece)
        if first == last:
            return 0, False
        before = place if self.text.isascii() else len(self.text[:place].encode())
        at = int(group.starts[first]) + before
        piece = bisect_right(group.starts, at, first, last) - 1  # type: ignore[type-var]
        begin = int(group.starts[piece])
        if begin == at and piece > first and group.data[at - 1] == SPACE:
            piece -= 1  # tokens of space may have no width, and begin where they end
            begin = int(group.starts[piece])
        inside, end = len(group.data[begin:at].decode()), 0
        token = int(group.tokens[piece] - group.tokens[first])
        for _, begin, stop in ROWS.iter_unpack(group.rows[group.which[piece]]):
            if begin >= inside:
                break
            token, end = token + 1, stop
        return token, end > inside


def pieced(
    texts: Sequence[str], apart: Sequence[re.Pattern[str]], words: Words, tokenizer: Any
) -> list[Pieced]:
    """Each text in pieces. apart: what finds special tokens, one pattern after the other."""
    parts = [_parted(text, apart) for text in texts]
    written = [part.encode() for of_text in parts for part, _ in of_text]
    data = b"".join(written)
    ends = np.cumsum([0, *map(len, written)])
    starts = np.append(_starts(data, ends, [whole for of_text in parts for _, whole in of_text]), len(data))
    places = ends[[0, *accumulate(map(len, parts))]]  # [texts + 1]
    bounds = np.searchsorted(starts, places).tolist()
    offsets = pa.py_buffer(starts.astype(np.int32))
    count = len(starts) - 1
    found = pa.Array.from_buffers(pa.binary(), count, [None, offsets, pa.py_buffer(data)]).dictionary_encode()
    rows = words.rows(found.dictionary.to_pylist(), tokenizer)
    which = found.indices.to_numpy()
    flat = np.frombuffer(b"".join(rows), ROW)["id"]
    sizes = np.fromiter(map(len, rows), np.int64, len(rows)) // ROW.itemsize  # [u]
    of_piece = sizes[which]
    tokens = np.concatenate([[0], np.cumsum(of_piece)])
    first = (np.cumsum(sizes) - sizes)[which]  # [p] in flat
    ids = flat[np.repeat(first - tokens[:-1], of_piece) + np.arange(tokens[-1])]
    group = Group(data, starts, which, rows, tokens, ids)
    return [Pieced(text, group, *bound) for text, bound in zip(texts, pairwise(bounds), strict=True)]


def _parted(text: str, apart: Sequence[re.Pattern[str]]) -> list[tuple[str, bool]]:
    """The special tokens of a text, which are whole, and what is between them."""
    parts = [(text, False)]
    for pattern in apart:
        parts = [
            (one, whole or number % 2 == 1)
            for part, whole in parts
            for number, one in enumerate([part] if whole else pattern.split(part))
            if one
        ]
    return parts


def _starts(data: bytes, ends: NDArray[np.int64], whole: Sequence[bool]) -> NDArray[np.int64]:
    """The bytes where pieces begin: parts, and in those that are not ``whole`` each space in front of a word of ASCII
    letters, behind what is no space. ends: of the parts, behind a 0.
    """
    found = np.frombuffer(data, np.uint8)
    begins = np.zeros(len(data) + 1, bool)
    begins[ends] = True
    closed = np.repeat(np.array(whole, bool), np.diff(ends))
    spaces = np.flatnonzero(found[1:-1] == SPACE) + 1
    before, behind = found[spaces - 1], found[spaces + 1]
    visible = (before > SPACE) & (before < 127)
    visible |= (before > 127) & (found[spaces - 2] >= TWO_BYTES[0]) & (found[spaces - 2] <= TWO_BYTES[1])
    letter = (behind | 32) - np.uint8(ord("a")) < LETTERS
    begins[spaces[visible & letter & ~closed[spaces] & ~begins[spaces] & ~begins[spaces + 1]]] = True
    return np.flatnonzero(begins[:-1])
