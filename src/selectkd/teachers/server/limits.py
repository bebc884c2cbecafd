"""The server's limits: a question or a client beyond them is refused before it costs anything."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """body, samples, tokens: of one question; tokens is 64 samples of 1,024, and the body what they take as JSON.

    answer: bytes of one answer. waiting: samples that may wait for the model. connections: beyond it a request is
    answered 503, at twice as many a connection is dropped. reading: seconds the headers of a request and then its body
    may take in all. idle: seconds a connection is kept without a request, or with an answer nobody reads.
    """

    body: int = 1 << 20
    samples: int = 64
    tokens: int = 65_536
    answer: int = 1 << 30
    waiting: int = 1024
    connections: int = 128
    reading: float = 10.0
    idle: float = 10.0
