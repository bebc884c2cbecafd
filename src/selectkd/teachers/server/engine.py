"""The model of a server, and its samples: those that wait are read together. n rows, e width, K best tokens."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor

from selectkd import __version__
from selectkd.data.alignment import template_fingerprint, tokenizer_fingerprint
from selectkd.models.head import head_of
from selectkd.models.load import Loaded
from selectkd.teachers.cache.index import Record
from selectkd.teachers.cache.origin import head_bytes, hidden_of, weights_checksum
from selectkd.teachers.server.limits import Limits
from selectkd.teachers.server.request import Refused, Wanted

CHUNK = 256
"""Rows whose logits exist at once, as in the loss."""


@dataclass(eq=False)
class _Job:
    record: Record
    k: int | None
    answer: asyncio.Future[dict[str, Tensor]] = field(repr=False)


class Engine:
    """A model that answers for samples, ``batch`` of them at once at most, those that came first and fit together.

    Samples of several questions share a forward pass, which moves their numbers by no more than rounding does; with
    ``batch`` = 1 an answer depends on its own sample alone, bit by bit.
    """

    def __init__(self, loaded: Loaded, *, dtype: str, batch: int = 8, limits: Limits | None = None) -> None:
        self.model = loaded.model.eval().requires_grad_(False)
        self.batch, self.limits = batch, limits or Limits()
        self.head = head_of(self.model)
        self.head_bytes = head_bytes(self.head)
        self.weights = weights_checksum(self.model)
        config: Any = self.model.config
        length = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.max_length: int | None = int(length) if length else None
        self.about: dict[str, Any] = {
            "selectkd": __version__,
            "model": loaded.source,
            "revision": loaded.revision,
            "dtype": dtype,
            "weights": self.weights,
            "tokenizer": tokenizer_fingerprint(loaded.tokenizer),
            "template": template_fingerprint(loaded.tokenizer),
            "vocabulary": self.head.width,
            "width": self.head.weight.shape[1],
            "max_length": self.max_length,
            "head": {
                "checksum": xxhash.xxh3_128(self.head_bytes).hexdigest(),
                "size": len(self.head_bytes),
                "scale": self.head.scale,
                "softcap": self.head.softcap,
            },
        }
        self._waiting: list[_Job] = []
        self._came = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="selectkd model")

    async def rows(self, wanted: Wanted) -> dict[str, Tensor]:
        """{hidden [n, e]} or {ids, logp [n, K], tail [n]} of a question; Refused with 503 where too many wait."""
        if len(self._waiting) + len(wanted.records) > self.limits.waiting:
            raise Refused(503, f"{len(self._waiting)} samples wait already")
        loop = asyncio.get_running_loop()
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        jobs = [_Job(record, wanted.k, loop.create_future()) for record in wanted.records]
        self._waiting += jobs
        self._came.set()
        try:
            parts = await asyncio.gather(*(job.answer for job in jobs))
        finally:
            self._waiting = [job for job in self._waiting if job not in jobs]  # of a client that went
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        """Ends the work; questions that wait get no answer."""
        if self._worker is not None:
            self._worker.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._came.wait()
            jobs = self._next()
            if not jobs:
                self._came.clear()
                continue
            try:
                answers = await loop.run_in_executor(self._thread, self._compute, jobs)
            except (RuntimeError, MemoryError) as error:  # what a device that has no memory left raises
                reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
                for job in jobs:
                    if not job.answer.done():
                        job.answer.set_exception(Refused(503, f"the model failed: {reason}"))
                continue
            for job, answer in zip(jobs, answers, strict=True):
                if not job.answer.done():
                    job.answer.set_result(answer)

    def _next(self) -> list[_Job]:
        """The job that waits longest and the ones nearest to it in length, taken out of the queue."""
        if not self._waiting:
            return []
        first, *others = self._waiting
        length = len(first.record.ids)
        near = sorted(others, key=lambda job: abs(len(job.record.ids) - length))[: self.batch - 1]
        jobs, width = [first], length
        for job in near:
            wider = max(width, len(job.record.ids))
            if wider * (len(jobs) + 1) <= self.limits.tokens:
                jobs.append(job)
                width = wider
        self._waiting = [job for job in self._waiting if job not in jobs]
        return jobs

    @torch.no_grad()
    def _compute(self, jobs: list[_Job]) -> list[dict[str, Tensor]]:
        hidden = hidden_of(self.model, [job.record for job in jobs])
        return [self._encoded(rows, job.k) for rows, job in zip(hidden, jobs, strict=True)]

    def _encoded(self, hidden: Tensor, k: int | None) -> dict[str, Tensor]:
        if k is None:
            return {"hidden": hidden.cpu()}
        parts = [self._best(rows, k) for rows in hidden.split(CHUNK)]
        names = ("ids", "logp", "tail")
        return {name: torch.cat([part[at] for part in parts]) for at, name in enumerate(names)}

    def _best(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [c, K], their log-probabilities, the mass of all others [c])."""
        logp = torch.log_softmax(self.head.logits(hidden), -1)
        best = logp.topk(k, -1)
        rest = logp.scatter(-1, best.indices, -torch.inf).exp().sum(-1)
        return best.indices.int().cpu(), best.values.float().cpu(), rest.float().cpu()
