"""A check that a server still has the model it began with: its rows of fixed prompts, then and now.

Servers of other kinds do not state their weights. So the rows of two short prompts, cut from the run's text, are noted
before the first step, in run.json and in a cache's index. They are fetched again beside every batch, after every
reconnect and when a run or a build goes on. A check costs two prompts of at most 24 tokens. K best tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np

from selectkd.errors import TeacherError
from selectkd.teachers.remote.answers import TopK
from selectkd.teachers.remote.connection import Connection, Question

T = TypeVar("T")

PROMPTS, LENGTH, BEST = 2, 24, 8
"""How many prompts, of how many tokens at most, and how many best tokens of each row are noted."""

LOAD, LOAD_TOKENS = 16, 256
"""Samples, and tokens of each, that are sent beside the prompts to measure how a full batch changes the rounding."""

NOISE = 8.0
"""A row may move by this many times the difference between a prompt's answers alone and in a full batch."""

LEAST, ROUNDED, MOST = 1e-3, 0.1, 0.5
"""Nats a row may move at least and at most: fp32 moves a thousandth of the one, no rounding the other. Up to ROUNDED
another batch may have moved it, in bf16, and the prompts are sent again alone.
"""


class Source(Protocol):
    """A server that has the K best tokens of samples."""

    @property
    def connection(self) -> Connection: ...

    def fixed_questions(self, prompts: Sequence[Sequence[int]], k: int) -> list[Question[TopK]]:
        """Questions for the ``k`` best tokens, or the K of the run, at every position of each prompt."""
        ...


@dataclass(frozen=True)
class Fingerprint:
    """The best tokens ``ids`` of each prompt's rows with their log-probabilities ``logp``, likeliest first, and the
    ``weights`` where the server tells their checksum. noise: the most nats by which its own answers differed.
    """

    prompts: list[list[int]]
    ids: list[list[list[int]]]
    logp: list[list[list[float]]]
    noise: float
    weights: str | None = None

    @property
    def tolerance(self) -> float:
        """Nats by which a row may differ from the noted one."""
        return min(max(NOISE * self.noise, LEAST), MOST)

    def noted(self) -> dict[str, Any]:
        """As run.json and a cache's index hold it."""
        return asdict(self)

    def apart(self, answers: Sequence[TopK]) -> float:
        """The most nats by which ``answers``, in the order of the prompts, over and over, differ from what is noted."""
        worst = 0.0
        for at, answer in enumerate(answers):
            one = at % len(self.prompts)
            rows = TopK(np.array(self.ids[one], np.int64), np.array(self.logp[one], np.float32))
            worst = max(worst, difference(rows, answer))
        return worst


def read(noted: Any) -> Fingerprint | None:
    """The fingerprint that ``noted`` is; None where it is none, as in what an earlier version left."""
    if not isinstance(noted, Mapping):
        return None
    try:
        found = Fingerprint(**noted)
        shapes = [(len(ids), len(logp), len(prompt) - 1) for ids, logp, prompt in
                  zip(found.ids, found.logp, found.prompts, strict=True)]  # fmt: skip
    except (TypeError, ValueError):
        return None
    return found if shapes and all(a == b == c for a, b, c in shapes) else None


def prompts_of(examples: Sequence[Any]) -> list[list[int]]:
    """The ends of the first samples that differ there: text of their own rather than a template's beginning."""
    ends = (tuple(example.input_ids[-LENGTH:]) for example in examples if len(example.input_ids) > 1)
    return [list(end) for _, end in zip(range(PROMPTS), dict.fromkeys(ends), strict=False)]


def take(source: Source, examples: Sequence[Any], weights: str | None = None) -> Fingerprint | None:
    """The fingerprint of a server, by the text it will score; None where the text has no sample of two tokens."""
    prompts = prompts_of(examples)
    if not prompts:
        return None
    fixed = source.fixed_questions(prompts, BEST)
    first = source.connection.ask(fixed)
    texts = (example.input_ids[:LOAD_TOKENS] for example in examples if len(example.input_ids) > 1)
    loaded = source.fixed_questions(list(islice(texts, LOAD)), BEST)
    under_load = source.connection.ask([*loaded, *fixed])[-len(fixed) :]
    alone = [answer for one in fixed for answer in source.connection.ask([one])]
    noise = max(
        max(difference(a, b), difference(b, a))
        for a, b in zip([*first, *first], [*alone, *under_load], strict=True)
    )
    ids, logp = [], []
    for answer in first:
        order = np.argsort(-answer.logp, axis=1, kind="stable")[:, :BEST]
        ids.append(np.take_along_axis(answer.ids, order, 1).tolist())
        best = np.take_along_axis(answer.logp, order, 1).astype(np.float64)
        logp.append(np.maximum(best, -1e4).round(6).tolist())  # JSON has no -inf
    return Fingerprint(prompts, ids, logp, float(noise), weights)


def same(source: Source, before: Fingerprint, weights: str | None, where: str) -> None:
    """TeacherError unless the server has the model of ``before``, which ``where`` was begun with."""
    connection = source.connection
    if weights == before.weights:
        answers = connection.ask(source.fixed_questions(before.prompts, BEST))
        apart = before.apart(answers)
        if apart <= before.tolerance:
            return
        change = (
            f"fixed prompts get rows {apart:.3g} nats from those it noted (rounding: {before.tolerance:.3g})"
        )
    else:
        change = f"its weights have the checksum {weights}, not {before.weights}"
    raise TeacherError(
        f"{connection.url} serves another model than {where} began with: {change}. Serve the first model "
        "again, or start over."
    )


@dataclass
class Guarded:
    """Asks a server for rows and, every ``every`` batches and whenever it may be another process, for its fingerprint.

    Rows are handed out only after the fingerprint fetched beside them equals the noted one.
    """

    source: Source
    fingerprint: Fingerprint | None
    every: int = 1
    batches: int = 0

    def ask(self, questions: Sequence[Question[T]]) -> list[T]:
        """The answers in order. TeacherError where the server's model is, or may be, another than the noted one: then
        rows of both may be among them, so that all are asked for again, as often as for any wrong answer.
        """
        connection, noted = self.source.connection, self.fingerprint
        if noted is None:
            return connection.ask(questions)
        due = self.batches % self.every == 0
        self.batches += 1
        fixed: list[Question[Any]] = list(self.source.fixed_questions(noted.prompts, BEST))
        apart = 0.0
        for _ in range(connection.retries + 1):
            met = connection.met
            found: list[Any] = connection.ask([*questions, *(fixed if due else ())])
            answers = found[len(questions) :]
            if connection.met != met:  # sent after all the others have come
                answers += connection.ask(fixed)
            apart = noted.apart(answers)
            if noted.tolerance < apart <= ROUNDED:
                apart = noted.apart(connection.ask(fixed))
            if apart <= noted.tolerance:
                return found[: len(questions)]
        raise TeacherError(
            f"{connection.url} serves another model than before: rows of fixed prompts differ by {apart:.3g} nats from "
            f"those at the start (rounding: {noted.tolerance:.3g}). Nothing was trained on this batch; serve the first "
            "model again and repeat the command."
        )


def difference(one: TopK, other: TopK) -> float:
    """The most nats by which a log-probability of ``one`` differs in ``other``, [n, K] each; 0 where both agree.

    An id that the other row lacks counts by how far it is above that row's last.
    """
    worst = 0.0
    for ids, logp, ids2, logp2 in zip(one.ids, one.logp, other.ids, other.logp, strict=True):
        known = dict(zip(ids2.tolist(), np.maximum(logp2, -1e4).tolist(), strict=True))
        least = min(known.values())
        for token, value in zip(ids.tolist(), np.maximum(logp, -1e4).tolist(), strict=True):
            here = known.get(token)
            worst = max(worst, max(0.0, value - least) if here is None else abs(here - value))
    return worst
