"""Texts to tokens, many at once; and which token begins at a character.

A tokenizer takes microseconds for each token. Words come again, though. Where a tokenizer treats words one by one, as
byte-level BPE does, a text is cut in front of its words and at its special tokens, and each piece is tokenised once.
Ids and positions are those of the whole text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import product
from typing import Any, Protocol

from selectkd.data.pieces import Pieced, Words, pieced

LOCAL = {"ByteLevel", "Digits", "Split", "Sequence"}
"""Pre-tokenizers that look at a character and at those beside it."""
FORMS = {"NFC", "NFD", "Sequence"}
"""Normalizers that join nothing across a space."""
LEFT = ["".join(one) for size in (1, 2) for one in product("aZ1é.'-字 \n\t", repeat=size) if one[-1].strip()]
RIGHT = [f" {one}{two}" for one in "aS" for two in ("", *"aT1.é \n", "'s", "  ")]
"""What stands before and behind the cuts that a tokenizer is tried with."""
MOST = 1 << 24
"""Bytes of the pieces that are kept: some 40,000."""
MANY = 64
"""Texts from which on it pays to try whether a tokenizer treats words one by one, a second at most."""


def eos_ids_of(tokenizer: Any, extra: Collection[int] = ()) -> frozenset[int]:
    """The ids that end a turn: the tokenizer's EOS (one or a list) and ``extra`` (a model's list)."""
    eos = getattr(tokenizer, "eos_token_id", None)
    eos_of_tokenizer = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return frozenset((*eos_of_tokenizer, *extra))


class Encoded(Protocol):
    """The tokens of a text and where they begin."""

    @property
    def ids(self) -> list[int]:
        """The tokens."""
        ...

    def first(self, place: int) -> int:
        """The first token that begins at or behind a character."""
        ...

    def crosses(self, place: int) -> bool:
        """Whether the token before that one reaches beyond the character's beginning."""
        ...


class Whole:
    """The tokens of a text that was tokenised in one piece. encoding: None from a tokenizer that gives no positions."""

    def __init__(self, ids: list[int], encoding: Any, length: int) -> None:
        self.ids, self._encoding, self._length = ids, encoding, length

    def first(self, place: int) -> int:
        """See ``Encoded``."""
        at = len(self.ids) if place >= self._length else self._encoding.char_to_token(place)
        if at is None:  # a character that no token has
            return bisect_left([begin for begin, _ in self._encoding.offsets], place)
        while at and self._span(at - 1)[0] >= place:
            at -= 1
        while at < len(self.ids) and self._span(at)[0] < place:
            at += 1
        return at

    def crosses(self, place: int) -> bool:
        """See ``Encoded``."""
        at = self.first(place)
        return at > 0 and self._span(at - 1)[1] > place

    def _span(self, token: int) -> tuple[int, int]:
        return self._encoding.token_to_chars(token)


class Joined:
    """The tokens of a text whose parts were tokenised apart. cuts: where each begins in characters, and the end."""

    def __init__(self, parts: Sequence[Encoded], cuts: Sequence[int]) -> None:
        self._parts, self._cuts = parts, cuts
        self.ids = [one for part in parts for one in part.ids]

    def first(self, place: int) -> int:
        """See ``Encoded``."""
        number = min(bisect_right(self._cuts, place), len(self._parts)) - 1
        before = sum(len(part.ids) for part in self._parts[:number])
        return before + self._parts[number].first(place - self._cuts[number])

    def crosses(self, place: int) -> bool:
        """See ``Encoded``."""
        number = min(bisect_right(self._cuts, place), len(self._parts)) - 1
        return self._parts[number].crosses(place - self._cuts[number])


class Encoder:
    """Texts to tokens as a tokenizer makes them of each, without the special tokens it puts around one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.fast = bool(getattr(tokenizer, "is_fast", False))
        self._words = Words()
        self._texts = 0
        self._ends: dict[frozenset[int], frozenset[int]] = {}
        self._signs: dict[frozenset[int], frozenset[str]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder, (self.tokenizer,)

    def __call__(self, texts: Sequence[str]) -> Sequence[Encoded]:
        """The tokens of each text."""
        self._texts += len(texts)
        if (len(texts) > 1 or self._texts > MANY) and self.apart is not None:
            return self._pieced(texts, self.apart)
        found = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
        encodings = found.encodings if self.fast else [None] * len(texts)
        return [
            Whole(list(ids) if text else [], encoding, len(text))
            for text, ids, encoding in zip(texts, found["input_ids"], encodings, strict=True)
        ]

    def _pieced(self, texts: Sequence[str], apart: Sequence[re.Pattern[str]]) -> list[Pieced]:
        if self._words.size > MOST:
            self._words = Words()
        return pieced(texts, apart, self._words, self.tokenizer)

    @cached_property
    def special(self) -> frozenset[int]:
        """The ids of the tokenizer's special tokens."""
        return frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def start(self) -> list[int]:
        """The special tokens that the tokenizer itself puts first: a BOS, say."""
        plain, full = (
            list(self.tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True)
        )
        places = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
        return full[: places[0]] if plain and places else []

    @cached_property
    def bos(self) -> Any:
        """The id that begins a text; None without one."""
        return getattr(self.tokenizer, "bos_token_id", None)

    @cached_property
    def end(self) -> list[int]:
        """What is put behind a text that nothing ends: an EOS, where there is one."""
        return sorted(eos_ids_of(self.tokenizer))[:1]

    def ends(self, extra: Collection[int]) -> frozenset[int]:
        """``eos_ids_of`` the tokenizer."""
        key = frozenset(extra)
        if key not in self._ends:
            self._ends[key] = eos_ids_of(self.tokenizer, key)
        return self._ends[key]

    def signs(self, ids: Collection[int]) -> frozenset[str]:
        """The texts of tokens."""
        key = frozenset(ids)
        if key not in self._signs:
            self._signs[key] = frozenset(self.tokenizer.convert_ids_to_tokens(sorted(ids)))
        return self._signs[key]

    @cached_property
    def apart(self) -> tuple[re.Pattern[str], ...] | None:
        """What finds the special tokens that part a text; None where the tokenizer may look further than a word."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not self.fast or backend is None or getattr(self.tokenizer, "split_special_tokens", False):
            return None
        if type(backend.model).__name__ != "BPE" or backend.model.dropout:
            return None
        steps, forms = _parts(backend.pre_tokenizer), _parts(backend.normalizer)
        if not steps or any(one["type"] not in LOCAL or one.get("add_prefix_space") for one in steps):
            return None
        if any(one["type"] not in FORMS for one in forms) or steps[-1]["type"] != "ByteLevel":
            return None
        added = list(backend.get_added_tokens_decoder().values())
        if any(one.lstrip or one.rstrip or one.single_word or (one.normalized and forms) for one in added):
            return None
        if not _parts_at_words(backend):
            return None
        # those that a normalizer may not touch are looked for first, in all of a text
        kinds = ([one.content for one in added if one.normalized == kind] for kind in (False, True))
        apart = tuple(_any_of(kind) for kind in kinds if kind)
        # a subclass in Python may do anything to a text
        text = "".join(
            f"{left}{right}{one.content}" for one in added[:4] or [""] for left in LEFT for right in RIGHT[:9]
        )
        (cut,), whole = (
            self._pieced([text], apart),
            self.tokenizer(text, add_special_tokens=False)["input_ids"],
        )
        return apart if cut.ids == whole else None


def _parts_at_words(backend: Any) -> bool:
    """Whether a pre-tokenizer parts any text at a cut, and treats what is before it and behind it as it does alone."""

    def pieces(text: str) -> list[str]:
        text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    left, right = ({text: pieces(text) for text in texts} for texts in (LEFT, RIGHT))
    return all(pieces(one + two) == left[one] + right[two] for one in LEFT for two in RIGHT)


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(map(re.escape, sorted(texts, key=len, reverse=True)))})")


def _parts(component: Any) -> list[dict[str, Any]]:
    """A component of a tokenizer and those in it, as plain data."""
    if component is None:
        return []
    about = json.loads(component.__getstate__())
    inner = about.get("pretokenizers", about.get("normalizers", ()))
    return [about, *inner]
