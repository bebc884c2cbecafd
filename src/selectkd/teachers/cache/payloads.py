"""What one row of a cache holds: a hidden state, the K best tokens, or ids drawn from the teacher.

n rows, e teacher width, v vocabulary, K stored tokens or draws, w bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.rows import CachedRows, Head
from selectkd.teachers.cache.codec import (
    Bytes,
    decode_ids,
    decode_log_probs,
    encode_ids,
    encode_log_probs,
    id_bytes,
    log_prob_bytes,
)

Kind = Literal["hidden", "top_k", "sampled"]
Precision = Literal["bfloat16", "float32", "packed"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


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


@dataclass(frozen=True)
class TopKPayload:
    """The K best ids with their log-probabilities at temperature 1; the rest of the mass is what they leave."""

    k: int
    vocabulary: int
    precision: Precision = "packed"

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
                f"k = {self.k} draws of {self.vocabulary} tokens are no saving; "
                f"draw {self.vocabulary // 2} or fewer, or store the payload top_k."
            )

    @property
    def row_bytes(self) -> int:
        return id_bytes(self.k, self.vocabulary)

    def encode(self, hidden: Tensor, head: Head, seed: int) -> Bytes:
        """k draws for each row [n, e], decided by ``seed`` and the order of the rows; bytes [n, w]."""
        p = torch.softmax(head.logits(hidden).double(), -1).cpu()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(p, self.k, replacement=True, generator=generator)  # [n, k]
        return encode_ids(drawn.sort(-1).values.numpy(), self.vocabulary)

    def decode(self, rows: Bytes) -> CachedRows:
        """p^ on K distinct ids: the drawn ones with log(count / K), and others with a probability of 0."""
        ids = torch.from_numpy(decode_ids(rows, self.k, self.vocabulary))  # [n, K] ascending, with repeats
        return empirical_rows(ids)


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
    kind = TopKPayload if index["payload"] == "top_k" else SampledPayload
    return kind(index["k"], head["vocabulary"], index["precision"])
