"""A check that a server still has the model it began with: its rows of fixed prompts, then and now.

Servers of other kinds do not state their weights. So the rows of two short prompts, cut from the run's text, are noted
before the first step, in run.json and in a cache's index. They are fetched again beside every batch, after every
reconnect and when a run or a build goes on. A check costs two prompts of at most 24 tokens, and where the text has
images a third one, the shortest sample with some. K best tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np

from selectkd.data.example import Example
from selectkd.data.vision import Images
from selectkd.errors import TeacherError
from selectkd.teachers.remote.answers import TopK
from selectkd.teachers.remote.connection import Connection, Question
from selectkd.teachers.remote.sample import Sample, after_images, with_images

T = TypeVar("T")

PROMPTS, LENGTH, BEST = 2, 24, 8
"""How many prompts, of how many tokens at most, and how many best tokens of each row are noted."""

LOOKED_AT = 16
"""Samples with images of which the shortest is a prompt."""

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

    def fixed_questions(self, prompts: Sequence[Sample], k: int) -> list[Question[TopK]]:
        """Questions for the ``k`` best tokens, or the K of the run, of each prompt."""
        ...


@dataclass(frozen=True)
class Fingerprint:
    """The best tokens ``ids`` of each prompt's rows with their log-probabilities ``logp``, likeliest first, and the
    ``weights`` where the server tells their checksum. noise: the most nats by which its own answers differed.

    seen: of each prompt, the ``Images.identity`` it shows in hexadecimal digits; empty where none shows any. shown: the
    images of these, which are not noted.
    """

    prompts: list[list[int]]
    ids: list[list[list[int]]]
    logp: list[list[list[float]]]
    noise: float
    weights: str | None = None
    seen: list[str] = field(default_factory=list)
    shown: Mapping[str, Images] = field(default_factory=dict, repr=False, compare=False)

    @property
    def samples(self) -> list[Sample]:
        """The prompts, with the places of their noted rows."""
        seen = self.seen or [""] * len(self.prompts)
        return [
            _ending(ids, self.shown[one] if one else None)
            for ids, one in zip(self.prompts, seen, strict=True)
        ]

    @property
    def tolerance(self) -> float:
        """Nats by which a row may differ from the noted one."""
        return min(max(NOISE * self.noise, LEAST), MOST)

    def noted(self) -> dict[str, Any]:
        """As run.json and a cache's index hold it."""
        left_out = ("shown",) if self.seen else ("shown", "seen")
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in left_out}

    def showing(self, shown: Mapping[str, Images]) -> Fingerprint:
        """The noted fingerprint with its images out of ``shown``, without the prompts whose images are not there."""
        seen = self.seen or [""] * len(self.prompts)
        kept = [at for at, one in enumerate(seen) if not one or one in shown]
        parts = {name: [getattr(self, name)[at] for at in kept] for name in ("prompts", "ids", "logp")}
        images = [seen[at] for at in kept] if self.seen else []
        return replace(self, **parts, seen=images, shown=shown)

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
        shapes = [(len(ids), len(logp), min(len(prompt) - 1, LENGTH)) for ids, logp, prompt in
                  zip(found.ids, found.logp, found.prompts, strict=True)]  # fmt: skip
    except (TypeError, ValueError):
        return None
    sound = shapes and len(found.seen) in (0, len(shapes)) and not found.shown
    return found if sound and all(a == b == c for a, b, c in shapes) else None


def prompts_of(examples: Sequence[Example]) -> list[Sample]:
    """The ends of the first samples that differ there: text of their own rather than a template's beginning. And the
    shortest of the first samples with images, up to ``LENGTH`` tokens behind them.
    """
    ends = (tuple(after_images(example)[-LENGTH:]) for example in examples)
    whole = (end for end in ends if len(end) > 1)
    texts = [_ending(list(end)) for _, end in zip(range(PROMPTS), dict.fromkeys(whole), strict=False)]
    shown = [
        _ending(example.input_ids[: len(example) - len(after) + LENGTH], example.images)
        for example in islice(with_images(examples), LOOKED_AT)
        if (after := after_images(example))
    ]
    return [*texts, *sorted(shown, key=lambda one: len(one.ids))[:1]]


def _ending(ids: Sequence[int], images: Images | None = None) -> Sample:
    """A prompt of ids, with the places of its last rows: all of a short one's."""
    return Sample(list(ids), range(max(0, len(ids) - 1 - LENGTH), len(ids) - 1), images)


def take(source: Source, examples: Sequence[Example], weights: str | None = None) -> Fingerprint | None:
    """The fingerprint of a server, by the text it will score; None where the text has no sample of two tokens."""
    prompts = prompts_of(examples)
    if not prompts:
        return None
    fixed = source.fixed_questions(prompts, BEST)
    first = source.connection.ask(fixed)
    loaded = source.fixed_questions(list(islice(_load(examples), LOAD)), BEST)
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
    seen = ["" if one.images is None else one.images.identity.hex() for one in prompts]
    shown = {name: one.images for name, one in zip(seen, prompts, strict=True) if one.images is not None}
    return Fingerprint(
        [list(one.ids) for one in prompts], ids, logp, float(noise), weights, seen if any(seen) else [], shown
    )


def _load(examples: Sequence[Example]) -> Iterator[Sample]:
    """The samples as they are sent to load a server: short, and whole where they show images."""
    for example in examples:
        if len(example) > 1:
            images = example.images if example.images is not None and example.images.refs else None
            yield _ending(example.input_ids if images else example.input_ids[:LOAD_TOKENS], images)


def same(source: Source, before: Fingerprint, weights: str | None, where: str) -> None:
    """TeacherError unless the server has the model of ``before``, which ``where`` was begun with."""
    connection = source.connection
    if weights == before.weights:
        answers = connection.ask(source.fixed_questions(before.samples, BEST))
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
        fixed: list[Question[Any]] = list(self.source.fixed_questions(noted.samples, BEST))
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
