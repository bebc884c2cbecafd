"""Our own server (`selectkd serve-teacher`) as a source of rows. n rows, e width, v vocabulary, K best tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import load
from torch import Tensor

from selectkd.data.durable import write_whole
from selectkd.errors import ConfigError, TeacherError
from selectkd.loss.head import Head
from selectkd.teachers.cache.payloads import unsound_head
from selectkd.teachers.remote.answers import TopK, TopKRequest, WrongAnswer, checked, json_object
from selectkd.teachers.remote.connection import SMALL, Connection, Question, Reply
from selectkd.teachers.remote.fingerprint import Guarded
from selectkd.teachers.remote.sample import Sample
from selectkd.teachers.remote.server import TOKENS_ALONE
from selectkd.teachers.remote.wire import HEAD, HEADER, ROWS, TEACHER, question_bytes, read_answer
from selectkd.teachers.sound import ROUNDING

TEXTS = ("model", "dtype", "weights", "tokenizer", "template")
HEAD_KEYS = {"checksum", "size", "scale", "softcap"}


@dataclass
class OwnServer:
    """The server at the end of a connection. k: how many best tokens ``top_k`` asks for. guard: what sees to it that
    the model stays the same.
    """

    connection: Connection
    k: int | None = None
    guard: Guarded | None = None
    _about: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def about(self) -> dict[str, Any]:
        """The server's description of its model, fetched once; TeacherError where it is no selectkd server."""
        if self._about is None:
            question = Question(TEACHER, None, SMALL, _about, "what it teaches")
            [self._about] = self.connection.ask([question])
        return self._about

    def top_k(self, samples: Sequence[Sample]) -> list[TopK]:
        """The K best tokens of each sample at its places."""
        return self._guarded(self._best(samples, self.k))

    def fixed_questions(self, prompts: Sequence[Sample], k: int) -> list[Question[TopK]]:
        """Questions for the ``k`` best tokens, or fewer where there are fewer, of each prompt."""
        return self._best(prompts, min(k, self.about["vocabulary"]))

    def _best(self, samples: Sequence[Sample], k: int | None) -> list[Question[TopK]]:
        vocabulary = self.about["vocabulary"]
        if k is None or k > vocabulary:
            raise TeacherError(
                f"{self.connection.url} has {vocabulary} tokens, and k = {k} of them are wanted."
            )

        def read(body: bytes, question: bytes, one: Sample) -> TopK:
            rows = self._read(body, question, len(one.places))
            return _top_k(rows, TopKRequest(one.ids, one.places, k, vocabulary, vocabulary))

        return self._questions(samples, 8 * k + 4, read, k)

    def hidden(self, samples: Sequence[Sample]) -> list[Tensor]:
        """The last hidden states [n, e] of each sample at its places, in the precision of the model."""
        width = self.about["width"]

        def read(body: bytes, question: bytes, one: Sample) -> Tensor:
            found = self._read(body, question, len(one.places)).get("hidden")
            if found is None or found.shape != (len(one.places), width) or not found.is_floating_point():
                raise WrongAnswer(f"no hidden states of width {width}")
            return found

        return self._guarded(self._questions(samples, 4 * width, read, None))

    def head(self) -> Head:
        """The model's head, fetched the first time and then kept by its checksum; TeacherError for another one."""
        stated = self.about["head"]
        path = _kept() / f"{stated['checksum']}.safetensors"
        content = path.read_bytes() if path.is_file() else b""
        if xxhash.xxh3_128(content).hexdigest() != stated["checksum"]:

            def read(reply: Reply) -> bytes:
                if xxhash.xxh3_128(reply.body).hexdigest() != stated["checksum"]:
                    raise WrongAnswer("a head that does not match its checksum")
                return reply.body

            [content] = self.connection.ask([Question(HEAD, None, stated["size"], read, "its head")])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        tensors = load(content)
        head = Head(tensors["weight"], tensors.get("bias"), stated["scale"], stated["softcap"])
        wrong = unsound_head(head)
        if wrong is not None or tuple(head.weight.shape) != (self.about["vocabulary"], self.about["width"]):
            raise TeacherError(f"{self.connection.url} has a head that {wrong or 'is of another shape'}.")
        return head

    def _guarded(self, questions: list[Question[Any]]) -> list[Any]:
        return self.connection.ask(questions) if self.guard is None else self.guard.ask(questions)

    def _questions(self, samples: Sequence[Sample], row_bytes: int, read: Any, k: int | None) -> list[Any]:
        questions = []
        for sample in (Sample(*one) for one in samples):
            if sample.images is not None and sample.images.refs:
                raise ConfigError(f"{self.connection.url} (kind: selectkd) {TOKENS_ALONE}")
            content = question_bytes(sample.ids, sample.places, k)
            cap = HEADER + len(sample.places) * row_bytes + 8

            def reader(reply: Reply, content: bytes = content, one: Sample = sample) -> Any:
                return read(reply.body, content, one)

            questions.append(Question(ROWS, content, cap, reader))
        return questions

    def _read(self, body: bytes, question: bytes, rows: int) -> dict[str, Tensor]:
        return read_answer(body, question=question, weights=self.about["weights"], rows=rows)


def _top_k(found: dict[str, Tensor], request: TopKRequest) -> TopK:
    """The rows, if their tail is what they leave of 1."""
    ids, logp, tail = (found.get(name) for name in ("ids", "logp", "tail"))
    shape = (len(request.places), request.k)
    if (
        ids is None
        or logp is None
        or tail is None
        or ids.shape != shape
        or logp.shape != shape
        or tail.ndim != 1
    ):
        raise WrongAnswer(f"no {request.k} best tokens and their tail")
    if ids.dtype != torch.int32 or logp.dtype != torch.float32:
        raise WrongAnswer(f"ids in {ids.dtype} and log-probabilities in {logp.dtype}")
    left = 1 - np.exp(logp.double().numpy()).sum(1)
    if not np.allclose(left, tail.double().numpy(), rtol=0, atol=ROUNDING):
        raise WrongAnswer("tails that are not what the best tokens leave")
    impossible = torch.isneginf(logp)
    return checked(ids.long().tolist(), logp.masked_fill(impossible, -1e30).tolist(), request)


def _about(reply: Reply) -> dict[str, Any]:
    """What ``/teacher`` says; WrongAnswer unless all of it is there and of its type."""
    stated = json_object(reply.body)
    head = stated.get("head")
    sound = (
        all(isinstance(stated.get(key), str) for key in TEXTS)
        and all(_count(stated.get(key)) for key in ("vocabulary", "width"))
        and (stated.get("max_length") is None or _count(stated["max_length"]))
        and (stated.get("revision") is None or isinstance(stated["revision"], str))
        and isinstance(head, dict)
        and set(head) == HEAD_KEYS
    )
    if not sound or not isinstance(head, dict):
        raise WrongAnswer("no description of a teacher: a server of another kind, or of another version")
    checksum, cap = head["checksum"], head["softcap"]
    largest = 4 * stated["vocabulary"] * (stated["width"] + 1) + (1 << 16)
    if (
        not (isinstance(checksum, str) and len(checksum) == 32 and checksum.isalnum() and checksum.isascii())
        or not (_count(head["size"]) and head["size"] <= largest)
        or not isinstance(head["scale"], int | float)
        or not (cap is None or isinstance(cap, int | float))
    ):
        raise WrongAnswer("a description of no head")
    return stated


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _kept() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "selectkd" / "heads"
