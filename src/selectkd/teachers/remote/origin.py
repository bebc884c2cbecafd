"""A server as the origin of a cache's rows: asked once for every record, and never again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from selectkd.loss.head import Head
from selectkd.teachers.cache.codec import Bytes
from selectkd.teachers.cache.index import Record
from selectkd.teachers.cache.origin import encoded, images_of
from selectkd.teachers.cache.payloads import Stored, TopKPayload
from selectkd.teachers.remote.own import OwnServer
from selectkd.teachers.remote.own_plan import OwnPlan
from selectkd.teachers.remote.plan import RemotePlan
from selectkd.teachers.remote.sample import Sample
from selectkd.teachers.remote.teacher import TopKSource

BATCH = 64
"""Records asked for at once: some rounds of questions for every connection, and little that a killed build loses."""


class RemoteOrigin:
    """The rows of a server whose plan has checked tokenizer and text. Its address is not part of what it is.

    Only our own server states its weights; a cache of another is known by the model's name and by the rows of
    fixed prompts. noted: those of the build that this one finishes or repairs; TeacherError where they are another
    model's.
    """

    batch = BATCH

    def __init__(self, plan: RemotePlan | OwnPlan, noted: Any = None) -> None:
        plan.went_on(noted)
        server = plan.server()
        self.server: TopKSource = server
        self.engine: dict[str, Any] = {"server": plan.spec.kind}
        self.head: Head | None = None
        if isinstance(server, OwnServer):
            about = server.about
            self.vocabulary: int = about["vocabulary"]
            self.head = None if plan.payload == "top_k" else server.head()
            known = {key: about[key] for key in ("model", "revision", "dtype", "weights")}
        else:
            self.vocabulary = server.vocabulary
            known = {"model": server.model, "revision": None, "dtype": None, "weights": None}
        seen = None if plan.fingerprint is None else plan.fingerprint.noted()
        self.teacher: dict[str, Any] = {**known, "quantization": None, "fingerprint": seen}

    def rows(self, records: Sequence[Record], payload: Stored) -> list[Bytes]:
        """The encoded rows of each record at its places; TeacherError where one has no sound answer."""
        samples = [Sample(record.ids, record.places, images_of(record)) for record in records]
        if self.head is not None:
            assert isinstance(self.server, OwnServer)  # no other gives a head
            return encoded(self.server.hidden(samples), self.head, records, payload)
        assert isinstance(payload, TopKPayload)  # `cache build` lets a server of best tokens fill no other
        found = self.server.top_k(samples)
        return [payload.packed(torch.from_numpy(one.ids), torch.from_numpy(one.logp)) for one in found]
