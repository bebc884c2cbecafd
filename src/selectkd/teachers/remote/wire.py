"""What our own server and its client say to each other: JSON one way, safetensors with checksums the other.

n rows, e width, K best tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from selectkd.teachers.remote.answers import WrongAnswer, strict_json

ROWS, TEACHER, HEAD = "/rows", "/teacher", "/head"

HEADER = 4096
"""Bytes an answer's header takes at most: three tensors and three checksums."""


def question_bytes(ids: Sequence[int], places: Sequence[int], k: int | None) -> bytes:
    """A question for one sample: its K best tokens, or its hidden states where k is None, at ``places``."""
    return json.dumps({"ids": [list(ids)], "places": [list(places)], "k": k}).encode()


def answer_bytes(tensors: Mapping[str, Tensor], *, question: bytes, weights: str) -> bytes:
    """Rows as an answer to ``question``, by the model whose weights have the checksum ``weights``."""
    metadata = {"question": _digest(question), "weights": weights, "rows": _checksum(tensors)}
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def read_answer(body: bytes, *, question: bytes, weights: str, rows: int) -> dict[str, Tensor]:
    """The tensors of an answer; WrongAnswer unless it is whole, to this question, of this model and of n = ``rows``."""
    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or not 2 <= size <= min(HEADER, len(body) - 8):
        raise WrongAnswer(f"no rows in safetensors: {body[:40]!r}")
    try:
        header = strict_json(body[8 : 8 + size])
        tensors = load(body)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WrongAnswer(f"no rows in safetensors ({str(error)[:80]})") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("rows") != _checksum(tensors):
        raise WrongAnswer("rows that do not match their checksum")
    if metadata.get("question") != _digest(question):
        raise WrongAnswer("the answer to another question")
    if metadata.get("weights") != weights:
        raise WrongAnswer("the rows of another model: the server was started with other weights")
    if any(tensor.ndim not in (1, 2) or tensor.shape[0] != rows for tensor in tensors.values()):
        raise WrongAnswer(f"other than the {rows} rows that were asked for")
    return tensors


def _digest(content: bytes) -> str:
    return xxhash.xxh3_128(content).hexdigest()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content: Any = (
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        )  # a buffer, whatever its stubs say
        digest.update(content)
    return digest.hexdigest()
