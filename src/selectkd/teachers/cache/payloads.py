"""What one row of a cache holds: a hidden state, the K best tokens, or ids drawn from the teacher.

n rows, e teacher width, v vocabulary, K stored tokens or draws, w bytes a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from selectkd.errors import ConfigError, NumericsError
from selectkd.loss.head import Head
from selectkd.loss.teacher_rows import CachedRows
from selectkd.teachers.cache.codec import (
    NEVER,
    Bytes,
    decode_ids,
    decode_log_probs,
    encode_ids,
    encode_log_probs,
    id_bytes,
    ids_in,
    log_prob_bytes,
)
from selectkd.teachers.sound import unsound

Kind = Literal["hidden", "top_k", "sampled"]
Precision = Literal["bfloat16", "float32", "packed"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


NONFINITE = 0.3
"""A teacher whose rows are not finite so often is broken: what ends a run (FAULTS N1) ends a build as well."""

LARGEST = 1e6
"""No final norm lets a hidden state grow so far; a byte of its exponent that was exchanged does."""


@dataclass(frozen=True)
class Examined:
    """A check of rows beyond their checksums. rows: their number. nonfinite: those whose teacher gave no finite
    numbers, which weigh nothing in a run. wrong: the first row that no teacher gives, and why.
    """

    rows: int
    nonfinite: int = 0
    wrong: tuple[int, str] | None = None

    def fault(self) -> str | None:
        """The fault in words; None where the rows can be trained on."""
        if self.wrong is not None:
            return f"row {self.wrong[0]} {self.wrong[1]}"
        if self.nonfinite > 1 and self.nonfinite >= NONFINITE * self.rows:
            return f"{self.nonfinite} of {self.rows} rows are not finite"
        return None


@dataclass(frozen=True)
class HiddenPayload:
    """The last hidden state in bfloat16 or float32: with the head it gives every log-probability back."""

    width: int
    precision: Precision = "bfloat16"

    @property
    def row_bytes(self) -> int:
        return self.width * DTYPES[self.precision].itemsize

    def encode(self, hidden: Tensor, head: Head, seed: int) -> Bytes:
        """The rows [n, e] as bytes [n, w]."""
        stored = hidden.to("cpu", DTYPES[self.precision]).contiguous()
        return stored.view(torch.uint8).numpy()

    def decode(self, rows: Bytes) -> Tensor:
        """The hidden states [n, e], in the precision they were stored at."""
        return torch.from_numpy(rows).view(DTYPES[self.precision])

    def examined(self, rows: Bytes) -> Examined:
        """Whether rows of bytes [n, w] are hidden states: not nothing but zeros, and none beyond ``LARGEST``."""
        hidden = self.decode(np.array(rows)).float()
        finite = torch.isfinite(hidden).all(-1)
        size = hidden.abs().amax(-1)
        wrong = None
        for bad, fault in (
            (finite & (size == 0), "is all zeros"),
            (finite & (size > LARGEST), "is beyond any norm"),
        ):
            if wrong is None and bool(bad.any()):
                wrong = int(bad.int().argmax()), fault
        return Examined(len(rows), int((~finite).sum()), wrong)


@dataclass(frozen=True)
class TopKPayload:
    """The K best ids with their log-probabilities at temperature 1; the rest of the mass is what they leave. width:
    rows of the teacher's head, by default the vocabulary.
    """

    k: int
    vocabulary: int
    precision: Precision = "packed"
    width: int | None = None

    @property
    def row_bytes(self) -> int:
        packed = self.precision == "packed"
        return id_bytes(self.k, self.vocabulary) + (log_prob_bytes(self.k) if packed else 4 * self.k)

    def encode(self, hidden: Tensor, head: Head, seed: int) -> Bytes:
        """The rows [n, e] through the head, as bytes [n, w]."""
        logp = torch.log_softmax(head.logits(hidden), -1)
        best = logp.topk(self.k, dim=-1)
        return self.packed(best.indices, best.values)

    def packed(self, ids: Tensor, logp: Tensor) -> Bytes:
        """The K best ids [n, K] and their log-probabilities in any order, as bytes [n, w]."""
        ids, order = ids.sort(-1)
        kept = logp.gather(-1, order).float().cpu().numpy()
        packed = encode_log_probs(kept) if self.precision == "packed" else kept.astype("<f4").view(np.uint8)
        return np.concatenate([encode_ids(ids.cpu().numpy(), self.vocabulary), packed], 1)

    def decode(self, rows: Bytes) -> CachedRows:
        """Ids in ascending order and their log-probabilities, [n, K] each."""
        cut = id_bytes(self.k, self.vocabulary)
        ids = decode_ids(rows[:, :cut], self.k, self.vocabulary)
        if self.precision == "packed":
            logp = decode_log_probs(rows[:, cut:], self.k)
        else:
            logp = np.ascontiguousarray(rows[:, cut:]).view("<f4")
        return CachedRows(torch.from_numpy(ids), torch.from_numpy(np.ascontiguousarray(logp, np.float32)))

    def examined(self, rows: Bytes) -> Examined:
        """Whether rows of bytes [n, w] can be the K best tokens (``sound.unsound``); rows of nan are counted."""
        strange = _uneven(rows, self.k, self.vocabulary)
        if strange is not None:
            return Examined(len(rows), 0, strange)
        read = self.decode(rows)
        ids, logp = read.ids.numpy(), read.logp.numpy()
        nan = np.isnan(logp).any(1)
        with np.errstate(invalid="ignore"):
            low = np.where(np.isneginf(logp), np.inf, logp).min(1)
            reach = np.where(np.isfinite(low), logp.max(1) - low, 0.0)
        # the code rounds down by a step, and by more where many values lie close together
        slack = (2 + self.k / 16) * reach / NEVER if self.precision == "packed" else np.zeros(len(rows))
        kept = np.flatnonzero(~nan)
        wrong = unsound(
            ids[kept], logp[kept], vocabulary=self.vocabulary, width=self.width, slack=slack[kept]
        )
        if wrong is not None:
            wrong = int(kept[wrong[0]]), wrong[1]
        return Examined(len(rows), int(nan.sum()), wrong)


@dataclass(frozen=True)
class SampledPayload:
    """K ids drawn from the teacher with replacement, as a multiset: forward KL's gradient without bias.

    The rows stand for p^ = counts / K. The gradient of KL(p^ || q) to the student's logits is q - p^, whose mean
    over the draws is q - p: exactly that of KL(p || q). Its value is larger by KL's expectation between p^ and p,
    which no student changes. p^ has no ranks and its other divergences are not the teacher's.
    Source: sparse logit sampling (arXiv 2503.16870).
    """

    k: int
    vocabulary: int
    precision: Precision = "packed"

    def __post_init__(self) -> None:
        if 2 * self.k > self.vocabulary:
            raise ConfigError(
                f"k = {self.k} samples from {self.vocabulary} tokens save no space; "
                f"set k to {self.vocabulary // 2} or less, or store the payload top_k."
            )

    @property
    def row_bytes(self) -> int:
        return id_bytes(self.k, self.vocabulary)

    def encode(self, hidden: Tensor, head: Head, seed: int) -> Bytes:
        """k draws for each row [n, e], decided by ``seed`` and the order of the rows; bytes [n, w]."""
        p = torch.softmax(head.logits(hidden).double(), -1).cpu()
        if not bool(torch.isfinite(p).all()):
            raise NumericsError(
                "the teacher has a row that is not finite, and nothing can be drawn from it. Load it in float32 or "
                "bfloat16, or store the payload top_k, which marks such rows."
            )
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(p, self.k, replacement=True, generator=generator)  # [n, k]
        return encode_ids(drawn.sort(-1).values.numpy(), self.vocabulary)

    def decode(self, rows: Bytes) -> CachedRows:
        """p^ on K distinct ids: the drawn ones with log(count / K), and others with a probability of 0."""
        ids = torch.from_numpy(decode_ids(rows, self.k, self.vocabulary))  # [n, K] ascending, with repeats
        return empirical_rows(ids)

    def examined(self, rows: Bytes) -> Examined:
        """Whether rows of bytes [n, w] are K ids below the vocabulary."""
        wrong = _uneven(rows, self.k, self.vocabulary)
        if wrong is None:
            ids = decode_ids(rows, self.k, self.vocabulary)
            outside = (ids >= self.vocabulary).any(1)
            if outside.any():
                first = int(np.argmax(outside))
                wrong = (
                    first,
                    f"has the id {int(ids[first].max())}, none of the {self.vocabulary} of the vocabulary",
                )
        return Examined(len(rows), 0, wrong)


def _uneven(rows: Bytes, k: int, vocabulary: int) -> tuple[int, str] | None:
    """(the first row whose encoded ids are not ``k``, in words), before they are decoded; None where all are."""
    count = ids_in(rows[:, : id_bytes(k, vocabulary)], k, vocabulary)
    bad = count != k
    first = int(np.argmax(bad)) if bad.any() else 0
    return (first, f"has {int(count[first])} ids, and {k} belong there") if bad.any() else None


def unsound_head(head: Head) -> str | None:
    """The fault of a head in words: weights that are not finite, or a scale or cap that is no positive number."""
    if not bool(torch.isfinite(head.weight).all()):
        return "has weights that are not finite"
    if head.bias is not None and bool((head.bias.isnan() | (head.bias == torch.inf)).any()):
        return "has a bias that is no number"
    if not (math.isfinite(head.scale) and head.scale != 0):
        return f"is scaled by {head.scale}"
    if head.softcap is not None and not (math.isfinite(head.softcap) and head.softcap > 0):
        return f"is capped at {head.softcap}"
    return None


def empirical_rows(drawn: Tensor) -> CachedRows:
    """p^ = counts / K of ascending draws [n, K] as rows on K distinct ids; needs a vocabulary of 2K ids."""
    n, k = drawn.shape
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    column = first.cumsum(-1) - 1  # [n, K], which distinct id a draw is
    counts = torch.zeros(n, k, dtype=torch.float64).scatter_add_(1, column, torch.ones(n, k).double())
    taken = torch.zeros(n, 2 * k, dtype=torch.bool)
    inside = drawn < 2 * k
    taken |= torch.zeros(n, 2 * k).scatter_add_(1, drawn.clamp(max=2 * k - 1), inside.float()) > 0
    free = taken.to(torch.int8).argsort(dim=-1, stable=True)[:, :k]  # ids that nothing drew
    ids = free.clone()
    ids.scatter_(1, column, drawn)
    # the columns behind the last distinct id keep free ids; those before it were all overwritten
    return CachedRows(ids, (counts / k).log().float())


Stored = HiddenPayload | TopKPayload | SampledPayload


def payload_of(index: dict[str, Any]) -> Stored:
    """The payload an index describes."""
    head = index["head"]
    if index["payload"] == "hidden":
        return HiddenPayload(head["width"], index["precision"])
    k, vocabulary = index["k"], head["vocabulary"]
    if index["payload"] == "sampled":
        return SampledPayload(k, vocabulary, index["precision"])
    # another kind of server counts the tokenizer's ids, and its head may be padded, though never to four times those
    padded = index["engine"].get("server") not in (None, "selectkd")
    return TopKPayload(k, vocabulary, index["precision"], 4 * max(k, vocabulary) if padded else None)
