"""What is believed of an answer: numbers that can be the K best log-probabilities of a row, and nothing else.

n rows, K best tokens, t tokens of the sample.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-3
"""How far a probability or a sum of them may be above 1: far more than fp32 rounds, far less than a fault moves."""

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
class Asked:
    """One sample and the places [n] whose rows are wanted: the row at place i predicts token i + 1.

    k: how many best tokens. vocabulary: ids lie below it.
    """

    ids: Sequence[int]
    places: Sequence[int]
    k: int
    vocabulary: int

    @property
    def cap(self) -> int:
        """The most bytes an answer in JSON may have: an entry for every token, the K best and the token itself."""
        return (1 << 16) + len(self.ids) * (self.k + 2) * ENTRY_BYTES


def json_object(body: bytes) -> dict[str, Any]:
    """The object an answer is; WrongAnswer for anything else, nan and infinity included."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise WrongAnswer(f"no JSON ({str(error)[:80]}): {body[:40]!r}") from error
    if not isinstance(found, dict):
        raise WrongAnswer(f"a {type(found).__name__} where an object belongs")
    return found


def of_length(value: Any, count: int, what: str) -> list[Any]:
    """``value``, if it is a list of ``count`` entries."""
    if not isinstance(value, list):
        raise WrongAnswer(f"{what} is {_short(value)}, not a list")
    if len(value) != count:
        raise WrongAnswer(f"{what} has {len(value)} positions, and {count} tokens were sent")
    return value


def is_object(value: Any, what: str) -> dict[str, Any]:
    """``value``, if it is an object."""
    if not isinstance(value, dict):
        raise WrongAnswer(f"{what} is {_short(value)}, not an object")
    return value


def number(value: Any, what: str) -> float:
    """``value``, if it is a number: no boolean, string or null."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongAnswer(f"{what} is {_short(value)}, not a number")
    return float(value) if abs(value) < 1e300 else math.inf


def token_id(value: Any, what: str) -> int:
    """``value``, if it is an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise WrongAnswer(f"{what} is {_short(value)}, not a token id")
    return value


def written_id(text: Any, prefix: str, what: str) -> int:
    """The id a key of an object stands for, written as ``prefix`` and plain digits; a token's text is refused."""
    digits = text[len(prefix) :] if isinstance(text, str) and text.startswith(prefix) else ""
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10) or (
        digits[0] == "0" and digits != "0"
    ):
        raise WrongAnswer(f"{what} is named {_short(text)}, which is no token id")
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


def checked(ids: Sequence[Sequence[int]], logp: Sequence[Sequence[float]], asked: Asked) -> TopK:
    """The rows, if they can be K best tokens: distinct ids of the vocabulary, log-probabilities of a mass up to 1.

    A log-probability above 0 by rounding is 0, one that JSON could not write is -inf. n may be 0.
    """
    n = len(asked.places)
    try:
        tokens = np.array(ids, np.int64).reshape(n, asked.k)
        values = np.array(logp, np.float64).reshape(n, asked.k)
    except (ValueError, OverflowError) as error:
        raise WrongAnswer(f"rows of other lengths than {asked.k}") from error
    if n == 0:
        return TopK(tokens, values.astype(np.float32))
    if tokens.min() < 0 or tokens.max() >= asked.vocabulary:
        worst = tokens.max() if tokens.max() >= asked.vocabulary else tokens.min()
        raise WrongAnswer(f"the id {worst} is none of the {asked.vocabulary} of the vocabulary")
    order = np.sort(tokens, 1)
    if (order[:, 1:] == order[:, :-1]).any():
        raise WrongAnswer("one id twice in a row")
    if not np.isfinite(values).all():
        raise WrongAnswer("a log-probability that is not finite")
    if values.max() > ROUNDING:
        raise WrongAnswer(
            f"a log-probability of {values.max():.4g}, above 0: logits, perhaps (vLLM: --logprobs-mode raw_logprobs)"
        )
    mass = np.exp(values).sum(1)
    if mass.max() > 1 + ROUNDING:
        raise WrongAnswer(f"probabilities that sum to {mass.max():.4g}")
    # the best of v tokens has at least 1/v; heads are padded, but never to four times the tokenizer's ids
    least = -math.log(4 * max(asked.vocabulary, asked.k))
    if values.max(1).min() < least:
        raise WrongAnswer(
            f"a best log-probability of {values.max(1).min():.4g}, which no best token can have"
        )
    values = np.where(values <= CLAMPED, -np.inf, np.minimum(values, 0.0))
    return TopK(tokens, values.astype(np.float32))


def limit_told(words: str) -> tuple[int, int] | None:
    """(asked for, allowed) where a server's refusal is about the number of log-probabilities."""
    found = LIMIT.search(words)
    return None if found is None else (int(found[1]), int(found[2]))


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
