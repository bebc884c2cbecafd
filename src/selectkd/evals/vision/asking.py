"""Questions with images to whatever answers them, a batch at a time, graded and remembered."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from selectkd import __version__
from selectkd.evals.memory import Memory, key_of
from selectkd.evals.run_suite import Scores, interval_of
from selectkd.evals.vision.yes_no import all_right

Message = dict[str, Any]
"""{role, content}, the content a list of parts {type: image, image: encoded bytes} and {type: text, text}."""


class Answerer(Protocol):
    """Whatever reads messages with images and answers. identity: all that an answer rests on besides the messages."""

    @property
    def identity(self) -> Sequence[Any]: ...

    def __call__(self, chats: Sequence[list[Message]]) -> list[str]: ...


@dataclass(frozen=True)
class Problem:
    """Messages, and how their answer is graded. grade: (answer) -> right or wrong, or a score in [0, 1]; None where the
    answer cannot be read. groups: as of ``Question``.
    """

    origin: str
    chat: list[Message]
    grade: Callable[[str], float | bool | None]
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Graded:
    """An answer and its score; None where it could not be read."""

    origin: str
    answer: str
    score: float | None
    groups: dict[str, str]


def graded(
    problems: Iterable[Problem],
    answerer: Answerer,
    *,
    batch_size: int = 8,
    memory: Memory | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Graded]:
    """Every problem answered and graded, in order. Images of one batch are held at a time; answers that are in
    ``memory`` are not asked again, and the others are in it as soon as their batch is there.
    """
    found: list[Graded] = []
    about = list(answerer.identity)  # a checksum of weights, once
    for batch in _batches(problems, batch_size):
        keys = [_key(about, one.chat) for one in batch]
        known = memory.known if memory is not None else {}
        replies = {key: str(known[key]) for key in keys if key in known}
        todo = {key: one for key, one in zip(keys, batch, strict=True) if key not in replies}
        if todo:
            fresh = dict(zip(todo, answerer([one.chat for one in todo.values()]), strict=True))
            if memory is not None:
                memory.keep(fresh, model=str(about[0]))
            replies |= fresh
        for key, one in zip(keys, batch, strict=True):
            score = one.grade(replies[key])
            found.append(
                Graded(one.origin, replies[key], None if score is None else float(score), one.groups)
            )
        if on_progress is not None:
            on_progress(len(found))
    return found


def scores_of(
    name: str, task: str, found: Sequence[Graded], metrics: dict[str, str | None], settings: dict[str, Any]
) -> list[Scores]:
    """One ``Scores`` a metric: of each question by itself, or of groups that must be right as a whole.

    An answer that cannot be read scores 0 and is counted in ``settings.unknown``.
    """
    each = [one.score or 0.0 for one in found]
    settings = {**settings, "questions": len(found), "unknown": sum(one.score is None for one in found)}
    rows = []
    for metric, grouping in metrics.items():
        if grouping is None:
            scores, replies = each, [[one.answer] for one in found]
        else:
            groups = [one.groups[grouping] for one in found]
            scores, replies = all_right(each, groups), _by_group(found, groups)
        rows.append(Scores(name, task, metric, scores, interval_of(scores), settings, replies))
    return rows


def _by_group(found: Sequence[Graded], groups: Sequence[str]) -> list[list[str]]:
    replies: dict[str, list[str]] = {}
    for one, group in zip(found, groups, strict=True):
        replies.setdefault(group, []).append(one.answer)
    return list(replies.values())


def _batches(problems: Iterable[Problem], size: int) -> Iterator[list[Problem]]:
    rest = iter(problems)
    while batch := list(islice(rest, size)):
        yield batch


def _key(about: Sequence[Any], chat: Sequence[Message]) -> str:
    """Of everything an answer rests on: the answerer, the texts, and the bytes of the images."""
    parts = [
        [
            message["role"],
            part["type"],
            part.get("text") or hashlib.blake2b(part["image"], digest_size=16).hexdigest(),
        ]
        for message in chat
        for part in message["content"]
    ]
    return key_of(__version__, about, parts)
