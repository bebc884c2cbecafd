"""What a client may ask: samples of token ids, the places whose rows are wanted, and how many best tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from selectkd.teachers.cache.index import Record
from selectkd.teachers.remote.answers import strict_json
from selectkd.teachers.server.limits import Limits

KEYS = {"ids", "places", "k"}


class Refused(Exception):
    """A request that is not answered: the status, and why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Wanted:
    """A checked question. k None: hidden states."""

    records: list[Record]
    k: int | None

    @property
    def rows(self) -> int:
        return sum(len(record.places) for record in self.records)


def parse(body: bytes, limits: Limits, *, vocabulary: int, max_length: int | None, width: int) -> Wanted:
    """The question in ``body``; Refused with 413 for one that is too large and 422 for one that is wrong."""
    try:
        content = strict_json(body)
    except (ValueError, RecursionError) as error:
        raise Refused(422, f"the body is no JSON: {str(error)[:80]}") from error
    if not isinstance(content, dict) or set(content) != KEYS:
        raise Refused(422, 'the body must be {"ids": [[...]], "places": [[...]], "k": 32 or null}')
    ids, places, k = content["ids"], content["places"], content["k"]
    if k is not None and not (_whole(k) and 1 <= k <= vocabulary):
        raise Refused(422, f"k must be null or from 1 to {vocabulary}")
    if not isinstance(ids, list) or not isinstance(places, list) or len(ids) != len(places) or not ids:
        raise Refused(422, "ids and places must be lists of as many samples, one at least")
    if len(ids) > limits.samples:
        raise Refused(413, f"{len(ids)} samples; {limits.samples} are the most")
    total = 0
    for number, (sample_ids, at) in enumerate(zip(ids, places, strict=True)):
        where = f"sample {number}"
        if (
            not isinstance(sample_ids, list)
            or len(sample_ids) < 2
            or not all(_whole(i) and 0 <= i < vocabulary for i in sample_ids)
        ):
            raise Refused(422, f"{where}: ids must be two or more integers from 0 to {vocabulary - 1}")
        if max_length is not None and len(sample_ids) > max_length:
            raise Refused(413, f"{where}: {len(sample_ids)} tokens; the model takes {max_length}")
        whole = isinstance(at, list) and bool(at) and all(map(_whole, at))
        ordered = whole and all(one < other for one, other in pairwise(at))
        if not ordered or at[0] < 0 or at[-1] > len(sample_ids) - 2:
            raise Refused(422, f"{where}: places must be ascending integers from 0 to {len(sample_ids) - 2}")
        total += len(sample_ids)
    if total > limits.tokens:
        raise Refused(413, f"{total} tokens; {limits.tokens} are the most")
    wanted = Wanted([Record(sample_ids, at) for sample_ids, at in zip(ids, places, strict=True)], k)
    size = wanted.rows * (8 * k + 4 if k is not None else 4 * width)
    if size > limits.answer:
        raise Refused(
            413, f"the answer would have {size:,} bytes; {limits.answer:,} are the most. Ask for fewer rows"
        )
    return wanted


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
