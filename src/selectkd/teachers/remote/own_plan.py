"""The plan of ``teacher: {url: ..., kind: selectkd}``: our own server, which says whose numbers it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from selectkd.data.alignment import align, tokenizer_fingerprint
from selectkd.data.examples import Examples
from selectkd.errors import ConfigError, DataError, TeacherError
from selectkd.models.head import head_of
from selectkd.models.load import load_tokenizer
from selectkd.teachers.model import shared_rows
from selectkd.teachers.protocol import Payload, Teacher
from selectkd.teachers.remote.fingerprint import Guarded, take
from selectkd.teachers.remote.own import OwnServer
from selectkd.teachers.remote.plan import ServerPlan
from selectkd.teachers.remote.teacher import RemoteHiddenTeacher, RemoteTeacher


@dataclass
class OwnPlan(ServerPlan):
    """Our own server: hidden states, or with ``k`` its best tokens."""

    _server: OwnServer | None = field(default=None, repr=False)

    @property
    def payload(self) -> Payload:
        return "hidden" if self.spec.k is None else "top_k"

    @property
    def k(self) -> int | None:
        return self.spec.k

    def _named(self) -> str | None:
        return None if self._server is None else self._server.about["model"]

    def weights(self) -> str | None:
        return self.server().about["weights"]

    @property
    def revision(self) -> str | None:
        return None if self._server is None else self._server.about["revision"]

    def server(self) -> OwnServer:
        """The server as a source of rows; TeacherError where its model is not the recipe's."""
        if self._server is None:
            server = OwnServer(self.connection, self.spec.k)
            if self.spec.model not in (None, server.about["model"]):
                raise TeacherError(
                    f"{self.spec.url} serves {server.about['model']}, and teacher.model = {self.spec.model}."
                )
            self._server = server
        self._server.guard = Guarded(self._server, self.fingerprint, self.spec.check_every)
        return self._server

    def tokenizer(self) -> Any | None:
        return None if self.spec.tokenizer is None else load_tokenizer(self.spec.tokenizer)

    def check_tokenizer(self, tokenizer: Any) -> None:
        own, about = self.tokenizer(), self.server().about
        if own is not None:
            align(own, tokenizer)
        if about["tokenizer"] != tokenizer_fingerprint(tokenizer if own is None else own):
            whose = "the student has" if own is None else f"{self.spec.tokenizer} is"
            raise ConfigError(
                f"{self.spec.url} serves with another tokenizer than {whose}. Name its tokenizer, so that both can be "
                "compared part by part: teacher.tokenizer."
            )
        if self.spec.k is not None and self.spec.k > about["vocabulary"]:
            raise ConfigError(
                f"teacher.k = {self.spec.k} is more than the teacher's {about['vocabulary']} tokens."
            )

    def check_text(self, examples: Sequence[Any]) -> None:
        """DataError for a sample that is longer than the model takes; nothing else can be wrong with one.
        Then the server's fingerprint is taken.
        """
        most = self.server().about["max_length"]
        longest = Examples.of(examples).longest
        if most is not None and longest is not None and len(longest.input_ids) > most:
            raise DataError(
                f"{longest.origin} has {len(longest.input_ids)} tokens; {self.spec.url} takes {most}. "
                f"Set training.max_length to {most}."
            )
        self.fingerprint = take(self.server(), examples, self.weights())

    def open(
        self, tokenizer: Any, *, student: nn.Module, reference: Teacher | None = None
    ) -> RemoteTeacher | RemoteHiddenTeacher:
        server, beside = self.server(), head_of(student).width
        if self.spec.k is not None:
            if reference is not None:
                raise ConfigError(
                    "a reference student cannot be combined with a server's best tokens. Leave teacher.k out: this "
                    "server gives hidden states."
                )
            shared = shared_rows(tokenizer, tokenizer, teacher_width=beside, student_width=beside)
            return RemoteTeacher(server, self.spec.k, shared=shared)
        own = self.tokenizer() or tokenizer
        width = server.about["vocabulary"]
        shared = shared_rows(own, tokenizer, teacher_width=width, student_width=beside)
        return RemoteHiddenTeacher(server, shared=shared, reference=reference)
