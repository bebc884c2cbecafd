"""A server as a teacher's source: questions for samples, answers as rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selectkd.data.vision import Images
from selectkd.errors import ConfigError, TeacherError
from selectkd.teachers.remote.answers import TopK, TopKRequest, WrongAnswer, json_object
from selectkd.teachers.remote.connection import SMALL, Connection, Question, Reply
from selectkd.teachers.remote.dialects import DIALECTS, Dialect
from selectkd.teachers.remote.fingerprint import Guarded
from selectkd.teachers.remote.sample import Sample

TOKENS_ALONE = (
    "gets token ids alone, and the text has images. Serve the teacher with vLLM (kind: vllm), use a teacher in memory, "
    "or a cache of one."
)
"""What is said of a server that takes no images."""


@dataclass(frozen=True)
class Served:
    """A model as the server lists it: its name, and the tokens it takes where the server states them."""

    name: str
    max_length: int | None


@dataclass
class TopKServer:
    """A server that gives K best tokens. model None: the only one it serves. vocabulary: ids lie below it. width: rows
    of its model's head, where that is known. guard: what sees to it that the model stays the same.
    """

    connection: Connection
    kind: str
    k: int
    vocabulary: int
    model: str | None = None
    width: int | None = None
    guard: Guarded | None = None

    @property
    def dialect(self) -> Dialect:
        return DIALECTS[self.kind]

    def top_k(self, samples: Sequence[Sample]) -> list[TopK]:
        """The K best tokens of each sample at its places."""
        questions = [self.question(self.request(*sample)) for sample in samples]
        return self.connection.ask(questions) if self.guard is None else self.guard.ask(questions)

    def fixed_questions(self, prompts: Sequence[Sample], k: int) -> list[Question[TopK]]:
        """Questions for the K best tokens of each prompt."""
        return [self.question(self.request(*prompt)) for prompt in prompts]

    def request(self, ids: Sequence[int], places: Sequence[int], images: Images | None = None) -> TopKRequest:
        """One sample and the places whose rows are wanted."""
        shown = images if images is not None and images.refs else None
        return TopKRequest(ids, places, self.k, self.vocabulary, self.width, shown)

    def question(self, request: TopKRequest, *, temperature: float = 1.0) -> Question[TopK]:
        """What is sent for one sample; temperature: of the sampling, which must not move a raw log-probability.

        ConfigError for a sample with images where this kind of server takes none.
        """
        dialect = self.dialect if request.images is None else self.dialect.with_images
        if dialect is None:
            raise ConfigError(f"{self.connection.url} (kind: {self.kind}) {TOKENS_ALONE}")
        body = dialect.body(request, self.model)
        if temperature != 1.0:
            at = body
            for key in dialect.heated[:-1]:
                at = at[key]
            at[dialect.heated[-1]] = temperature
        return Question(
            dialect.path,
            json.dumps(body).encode(),
            request.cap,
            lambda reply: dialect.read(reply.body, request),
            needs=dialect.needs,
        )

    def served(self) -> Served:
        """The model that answers; TeacherError where the server has none of the name, or several and none is named."""
        [found] = self.connection.ask([Question("/v1/models", None, SMALL, _models, "its list of models")])
        names = ", ".join(one.name for one in found[:8])
        if self.model is None and len(found) != 1:
            raise TeacherError(f"{self.connection.url} serves {names}. Name one: teacher.model.")
        chosen = [one for one in found if self.model in (None, one.name)]
        if not chosen:
            raise TeacherError(
                f"{self.connection.url} serves no {self.model!r}, but {names}. Set teacher.model."
            )
        return chosen[0]


def _models(reply: Reply) -> list[Served]:
    rows: Any = json_object(reply.body).get("data")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise WrongAnswer("no list of models")
    found = []
    for row in rows:
        name, length = row.get("id"), row.get("max_model_len")
        if not isinstance(name, str) or not 0 < len(name) <= 4096:
            raise WrongAnswer("a model without a name")
        whole = isinstance(length, int) and not isinstance(length, bool) and length > 0
        found.append(Served(name, length if whole else None))
    return found
