"""The plan of ``teacher: {url: ...}``: what a server gives, whose ids it speaks, and whether it does so rightly."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import nn

from selectkd.config import RemoteTeacher as Section
from selectkd.data.alignment import align
from selectkd.data.examples import Examples
from selectkd.errors import ConfigError, DataError, TeacherError
from selectkd.models.head import head_of
from selectkd.models.load import Loaded, load_tokenizer
from selectkd.teachers.model import shared_rows
from selectkd.teachers.protocol import Payload, Teacher
from selectkd.teachers.remote.connection import Connection
from selectkd.teachers.remote.dialects import DIALECTS
from selectkd.teachers.remote.fingerprint import Fingerprint, Guarded, read, same, take
from selectkd.teachers.remote.probe import UNSTEADY, Findings, probe, read_alike
from selectkd.teachers.remote.sample import after_images
from selectkd.teachers.remote.secrets import key_of, named
from selectkd.teachers.remote.server import TopKServer
from selectkd.teachers.remote.settings import TEACHER, Settings
from selectkd.teachers.remote.teacher import RemoteTeacher

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass
class ServerPlan:
    """The part of a plan that is the same for every kind of server: whose model it serves, and no weights to load."""

    spec: Section
    connection: Connection
    fingerprint: Fingerprint | None = field(default=None, repr=False, kw_only=True)
    model: str | None = field(default=None, kw_only=True)

    @property
    def source(self) -> str:
        return f"{self._named() or 'the model'} (server {self.spec.url})"

    def server(self) -> Any:
        """The server as a source of rows."""
        raise NotImplementedError  # every server has its own

    def weights(self) -> str | None:
        """The checksum of the server's weights; None where the server tells none."""
        return None

    @property
    def takes_images(self) -> bool:
        """Whether this kind of server is asked about prompts with images."""
        kind = DIALECTS.get(self.spec.kind)
        return kind is not None and kind.with_images is not None

    def went_on(self, noted: Any) -> None:
        """Takes the fingerprint that a run or a cache began with for its own; TeacherError where the server's model is
        another one.
        """
        before = read(noted)
        if before is not None and self.fingerprint is not None:
            before = before.showing(self.fingerprint.shown)
            same(self.server(), before, self.weights(), "this run or cache")
            self.fingerprint = before

    def loaded(self) -> Loaded:
        raise ConfigError(
            f"{self.source} has no weights to cut a student from. Name the student: student: {{model: ...}}."
        )

    def _named(self) -> str | None:
        return self.spec.model


@dataclass
class RemotePlan(ServerPlan):
    """A server that gives K best tokens. It is first asked when the text is checked, before weights load."""

    findings: Findings | None = None
    payload: Payload = "top_k"
    _vocabulary: int = field(default=0, repr=False)
    _width: int | None = field(default=None, repr=False)

    @property
    def k(self) -> int:
        assert self.spec.k is not None  # the section demands it of this kind
        return self.spec.k

    @property
    def revision(self) -> str | None:
        return None

    def _named(self) -> str | None:
        return self.spec.model if self.findings is None else self.findings.model

    def tokenizer(self) -> Any:
        return load_tokenizer(str(self.spec.tokenizer))

    def check_tokenizer(self, tokenizer: Any) -> None:
        own = self.tokenizer()
        align(own, tokenizer)
        self._vocabulary = max(tokenizer.get_vocab().values()) + 1
        self._width = head_width(own)
        if self.k > self._vocabulary:
            raise ConfigError(f"teacher.k = {self.k} is more than the teacher's {self._vocabulary} tokens.")

    def check_text(self, examples: Sequence[Any]) -> None:
        """Probes the server with the first sample. TeacherError where it is away or its answers cannot be trained on,
        DataError for a sample that is longer than it takes.
        """
        texts = (after_images(example) for example in examples)
        first = next((ids for ids in texts if len(ids) > 1), None)
        if first is None:
            return
        found = probe(self.server(), first)
        for fault in found.wrong:
            logging.getLogger("selectkd").warning("%s: %s", found.url, fault)
        if max(found.repeated, found.prefix) > UNSTEADY:
            flags = " ".join(found.flags)
            raise TeacherError(
                f"{found.url} gives different answers to one prompt, {max(found.repeated, found.prefix):.3g} nats "
                f"apart. Start it with `{flags}`; `selectkd teacher doctor {found.url}` checks it again."
            )
        if found.max_length is not None:
            longest = Examples.of(examples).longest
            if (
                longest is not None and len(longest.input_ids) + 1 > found.max_length
            ):  # it generates one token more
                raise DataError(
                    f"{longest.origin} has {len(longest.input_ids)} tokens; {found.url} takes {found.max_length - 1}. "
                    f"Set training.max_length to {found.max_length - 1}, or start it with a longer --max-model-len."
                )
        self.findings = found
        read_alike(self.server(), examples)
        self.fingerprint = take(self.server(), examples)

    def server(self) -> TopKServer:
        """The server as a source of rows, guarded once its fingerprint is taken."""
        server = TopKServer(
            self.connection, self.spec.kind, self.k, self._vocabulary, self._named(), self._width
        )
        server.guard = Guarded(server, self.fingerprint, self.spec.check_every)
        return server

    def open(self, tokenizer: Any, *, student: nn.Module, reference: Teacher | None = None) -> RemoteTeacher:
        if reference is not None:
            raise ConfigError(
                "a reference student cannot be combined with a server's best tokens. Use a teacher with hidden "
                "states, or a selector that needs no reference."
            )
        width = head_of(student).width
        shared = shared_rows(tokenizer, tokenizer, teacher_width=width, student_width=width)
        return RemoteTeacher(self.server(), self.k, shared=shared)


def head_width(tokenizer: Any) -> int | None:
    """Rows of the head of the model that a tokenizer lies beside, by its config.json; None where there is none."""
    try:
        config = json.loads((Path(tokenizer.name_or_path) / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    inner = config.get("text_config", config) if isinstance(config, dict) else {}
    rows = config.get("vocab_size", inner.get("vocab_size")) if isinstance(inner, dict) else None
    return rows if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0 else None


def connection_of(spec: Section, settings: Settings = TEACHER) -> Connection:
    """The connection a recipe describes; ConfigError where the key's variable is not set or ``ca`` is no authority."""
    key = key_of(spec.api_key_env, settings.key)
    parts = urlsplit(spec.url)
    if key is not None and parts.scheme == "http" and parts.hostname not in LOOPBACK:
        logging.getLogger("selectkd").warning(
            "%s is not https: the key in %s can be read on the way.", spec.url, named(str(spec.api_key_env))
        )
    return Connection(
        spec.url,
        key,
        timeout=spec.timeout,
        wait=spec.wait,
        retries=spec.retries,
        concurrency=spec.concurrency,
        ca=None if spec.ca is None else str(Path(spec.ca).expanduser()),
        settings=settings,
    )
