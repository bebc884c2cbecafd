"""A student that a server writes for: its weights go there through a folder both see, every so many steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import distributed as dist
from torch import nn

from selectkd.data.vision import Vision
from selectkd.errors import ConfigError
from selectkd.models.save import save_student
from selectkd.rollouts.completion_server import CompletionServer
from selectkd.rollouts.generate import Completion, Request
from selectkd.rollouts.sampling import Sampling
from selectkd.teachers.remote.answers import WrongAnswer, json_object
from selectkd.teachers.remote.connection import Question, Reply

CARD = "A student on its way, for a server that writes with it; the next refresh takes its place.\n"
ANSWER = 1 << 16
"""Bytes of the answer to a refresh."""
STRIDE = 1_000_003
"""How far apart the seeds of two neighbouring steps are."""


@dataclass
class ServedStudent:
    """Writes the student's text by ``server``, which reads its weights from ``folder`` every ``every`` steps.

    The first call of a run always refreshes. Until the next, texts are of a student ``staleness`` optimizer steps old.
    kind sglang: /update_weights_from_disk with the folder's path. kind vllm: started on the folder with
    VLLM_SERVER_DEV_MODE=1, its workers reload it by /collective_rpc and /reset_prefix_cache drops what the old weights
    read. vision: the processor of a student that sees images; it lies in the folder too, and /reset_encoder_cache drops
    what the old vision tower made of its images. dtype: of the weights in the folder, default the student's. A run that
    goes on refreshes at its first step, so with ``every`` above 1 it need not end at the bytes of a whole one.
    ConfigError on several ranks: one folder has one writer.
    """

    server: CompletionServer
    kind: Literal["sglang", "vllm"]
    folder: str
    student: nn.Module
    tokenizer: Any
    every: int = 1
    dtype: str | None = None
    vision: Vision | None = None
    refreshed: int | None = field(default=None, init=False)
    staleness: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                "data.policy.served works on one rank only. Leave it out, and each rank writes with its own student."
            )

    def complete(
        self, requests: Sequence[Request], sampling: Sampling, *, end: int | None, seed: int, step: int
    ) -> list[Completion]:
        """The texts of optimizer step ``step``; TeacherError where the server writes or refreshes nothing."""
        if not requests:
            return []
        if self.refreshed is None or step - self.refreshed >= self.every:
            self.refresh()
            self.refreshed = step
        self.staleness = step - self.refreshed
        return self.server.complete(
            requests, sampling, tokenizer=self.tokenizer, end=end, seed=seed + step * STRIDE
        )

    def refresh(self) -> None:
        """Writes the student's present weights into the folder and has the server load them."""
        save_student(self.student, self.tokenizer, self.folder, CARD, dtype=self.dtype, vision=self.vision)
        if self.kind == "sglang":
            self.server.answers([_question("/update_weights_from_disk", {"model_path": self.folder}, _taken)])
            return
        self.server.answers([_question("/collective_rpc", {"method": "reload_weights"}, lambda _: None)])
        self.server.answers([_question("/reset_prefix_cache", {}, lambda _: None)])
        if self.vision is not None:
            self.server.answers([_question("/reset_encoder_cache", {}, lambda _: None)])


def _question(path: str, body: dict[str, Any], read: Any) -> Question[None]:
    return Question(path, json.dumps(body).encode(), ANSWER, read, what="a refresh of the student's weights")


def _taken(reply: Reply) -> None:
    """WrongAnswer unless the server says that it took the weights."""
    answer = json_object(reply.body)
    if answer.get("success") is not True:
        raise WrongAnswer(f"the weights were not taken: {str(answer.get('message'))[:200]}")
