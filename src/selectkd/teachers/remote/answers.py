"""What is believed of an answer: numbers that can be the K best log-probabilities of a row, and nothing else.

n rows, K best tokens, t tokens of the sample.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selectkd.data.vision import Images
from selectkd.errors import abridged
from selectkd.teachers.sound import ROUNDING, unsound

CLAMPED = -9999.0
"""What vLLM writes for a log-probability of -inf, which JSON has no number for."""

ENTRY_BYTES = 640
"""The most an id, a log-probability, a rank and the token's text take as JSON: a text of 64 characters, escaped."""

LIMIT = re.compile(r"logprobs of (\d{1,9}).{0,60}?max allowed:? (-?\d{1,9})", re.IGNORECASE | re.DOTALL)


class WrongAnswer(Exception):
    """An answer that must not be trained on, and why."""


class TopK(NamedTuple):
    """The K best ids [n, K] of each row and their natural log-probabilities [n, K]."""

    ids: NDArray[np.int64]
    logp: NDArray[np.float32]


@dataclass(frozen=True)
class TopKRequest:
    """One sample and the places [n] whose rows are wanted: the row at place i predicts token i + 1.

    k: how many best tokens. vocabulary: ids lie below it. width: rows of the model's head, where that is known.
    images: those that the sample shows, None without any.
    """

    ids: Sequence[int]
    places: Sequence[int]
    k: int
    vocabulary: int
    width: int | None = None
    images: Images | None = None

    @property
    def cap(self) -> int:
        """The most bytes an answer in JSON may have: an entry for every token, the K best and the token itself."""
        return (1 << 16) + len(self.ids) * (self.k + 2) * ENTRY_BYTES


def strict_json(body: bytes) -> Any:
    """What a body of JSON holds; ValueError or RecursionError where it is none, repeats a key in an object, or has a
    number that is none or beyond fp64 (NaN, Infinity, 1e999).

    >>> strict_json(b'{"a": 1.5}')
    {'a': 1.5}
    """
    return json.loads(
        body.decode("utf-8"), parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_each_once
    )


def json_object(body: bytes) -> dict[str, Any]:
    """The object an answer is; WrongAnswer for anything else, for repeated keys and for nan and infinity."""
    try:
        found = strict_json(body)
    except (ValueError, RecursionError) as error:
        raise WrongAnswer(f"no JSON ({str(error)[:80]}): {body[:40]!r}") from error
    if not isinstance(found, dict):
        raise WrongAnswer(f"a {type(found).__name__} where an object belongs")
    return found


def of_length(value: Any, count: int, what: str) -> list[Any]:
    """``value``, if it is a list of ``count`` entries."""
    if not isinstance(value, list):
        raise WrongAnswer(f"{what} is {abridged(repr(value), 40)}, not a list")
    if len(value) != count:
        raise WrongAnswer(f"{what} has {len(value)} positions, and {count} tokens were sent")
    return value


def is_object(value: Any, what: str) -> dict[str, Any]:
    """``value``, if it is an object."""
    if not isinstance(value, dict):
        raise WrongAnswer(f"{what} is {abridged(repr(value), 40)}, not an object")
    return value


def number(value: Any, what: str) -> float:
    """``value``, if it is a number: no boolean, string or null."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongAnswer(f"{what} is {abridged(repr(value), 40)}, not a number")
    return float(value) if abs(value) < 1e300 else math.inf


def token_id(value: Any, what: str) -> int:
    """``value``, if it is an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise WrongAnswer(f"{what} is {abridged(repr(value), 40)}, not a token id")
    return value


def written_id(text: Any, prefix: str, what: str) -> int:
    """The id a key of an object stands for, written as ``prefix`` and plain digits; a token's text is refused."""
    digits = text[len(prefix) :] if isinstance(text, str) and text.startswith(prefix) else ""
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10) or (
        digits[0] == "0" and digits != "0"
    ):
        raise WrongAnswer(f"{what} is named {abridged(repr(text), 40)}, which is no token id")
    return int(digits)


def same_ids(found: Sequence[Any], sent: Sequence[int]) -> None:
    """WrongAnswer unless the ids that came back are those that were sent."""
    for at, (one, other) in enumerate(zip(found, sent, strict=True)):
        if token_id(one, f"token {at}") != other:
            raise WrongAnswer(f"token {at} came back as {one}, and {other} was sent")


def best(found: dict[int, float], token: int, k: int, where: str) -> tuple[list[int], list[float]]:
    """(ids, log-probabilities) of the K best of one position, which has K entries or, with the text's own, K + 1.

    token: that of the text, which is among them; the entry beyond K is the token's and at most as likely as the rest.
    """
    if token not in found:
        raise WrongAnswer(f"{where} lacks token {token} of the text: rows of other tokens, or shifted")
    if len(found) == k + 1:
        own = found.pop(token)
        if own > min(found.values()) + ROUNDING:
            raise WrongAnswer(
                f"{where} leaves out token {token}, which is more likely than one of its {k} best"
            )
    if len(found) != k:
        raise WrongAnswer(f"{where} has {len(found)} entries, and {k} or {k + 1} were asked for")
    return list(found), list(found.values())


def of_text(token: int, value: Any, found: dict[int, float], where: str) -> None:
    """WrongAnswer unless the text's own log-probability, ``value``, goes with the entries of its position: equal where
    the token is among them, else at most the least of them.
    """
    likely = number(value, f"{where}, the text's own log-probability")
    if not found:
        raise WrongAnswer(f"{where} has no entries")
    expected = found.get(token, min(found.values()))
    if likely > expected + ROUNDING or (token in found and likely < expected - ROUNDING):
        raise WrongAnswer(
            f"{where} gives token {token} two log-probabilities, {likely:.4g} and {expected:.4g}"
        )


def of_ranks(rows: dict[int, float], ranks: dict[int, Any], where: str) -> None:
    """WrongAnswer unless the server's own ranks of the K best are 1 to K, the likeliest first; ranks it does not tell
    (None, for all of them) are not looked at.
    """
    listed = [ranks[token] for token in rows]
    if all(rank is None for rank in listed):
        return
    if sorted(rank for rank in listed if isinstance(rank, int)) != list(range(1, len(rows) + 1)):
        raise WrongAnswer(
            f"{where} has the ranks {abridged(repr(listed), 40)}, not 1 to {len(rows)}: one of the best is missing"
        )
    by_rank = sorted(rows, key=lambda token: ranks[token])
    for one, other in pairwise(by_rank):
        if rows[other] > rows[one] + ROUNDING:
            raise WrongAnswer(f"{where} ranks token {one} above {other}, which is more likely")


def rows_of(
    positions: Sequence[Any],
    request: TopKRequest,
    best_at: Callable[[Any, int, str], tuple[list[int], list[float]]],
) -> TopK:
    """The rows of the places that were asked for, of a prompt's ``positions``, each ``checked``.

    best_at: (a position, its number, its name in an error) to the ids and log-probabilities of the K best there.
    """
    if positions[0] is not None:
        raise WrongAnswer("position 0 has log-probabilities, though no token is before it")
    numbers = [place + 1 for place in request.places]
    found = [best_at(positions[at], at, f"position {at}") for at in numbers]
    return checked([ids for ids, _ in found], [logp for _, logp in found], request)


def checked(ids: Sequence[Sequence[int]], logp: Sequence[Sequence[float]], request: TopKRequest) -> TopK:
    """The rows, if they can be K best tokens (``sound.unsound``).

    A log-probability above 0 by rounding is 0, one that JSON could not write is -inf. n may be 0.
    """
    n = len(request.places)
    try:
        tokens = np.array(ids, np.int64).reshape(n, request.k)
        values = np.array(logp, np.float64).reshape(n, request.k)
    except (ValueError, OverflowError) as error:
        raise WrongAnswer(f"rows of other lengths than {request.k}") from error
    # a head whose width is not known is padded, but never to four times the tokenizer's ids
    width = 4 * max(request.vocabulary, request.k) if request.width is None else request.width
    if not np.isfinite(values).all():
        raise WrongAnswer("a log-probability that is not finite")
    wrong = unsound(tokens, values, vocabulary=request.vocabulary, width=width)
    if wrong is not None:
        row, fault = wrong
        hint = ": logits, perhaps (vLLM: --logprobs-mode raw_logprobs)" if "above 0" in fault else ""
        raise WrongAnswer(f"position {request.places[row] + 1} {fault}{hint}")
    values = np.where(values <= CLAMPED, -np.inf, np.minimum(values, 0.0))
    return TopK(tokens, values.astype(np.float32))


def stated_limit(words: str) -> tuple[int, int] | None:
    """(asked for, allowed) where a server's refusal is about the number of log-probabilities."""
    found = LIMIT.search(words)
    return None if found is None else (int(found[1]), int(found[2]))


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {abridged(repr(twice), 40)} twice in one object")
    return found
