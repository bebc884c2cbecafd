"""Rows of ids and log-probabilities as fixed-width bytes, and back. n rows, k entries a row, v vocabulary.

Both encodings are a function of their row alone, so every row of a cache has the same width. Ids lie in ascending
order, which costs fewer bits than rank order; the rank comes back from the log-probabilities.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CODE_BITS = 12
"""Bits of a log-probability. 12 have about fp16's error at three quarters of its size (benchmarks/cache.py)."""

NEVER = (1 << CODE_BITS) - 1
"""The code of a probability of 0."""

Bytes = NDArray[np.uint8]


def pack(values: NDArray[np.int64], bits: int) -> Bytes:
    """The lowest ``bits`` bits of each value [n, k], one after the other: [n, ceil(k bits / 8)]."""
    spread = (values[..., None] >> np.arange(bits)) & 1  # [n, k, bits]
    flat = spread.astype(np.uint8).reshape(values.shape[0], values.shape[1] * bits)
    return np.packbits(flat, axis=1, bitorder="little")


def unpack(packed: Bytes, k: int, bits: int) -> NDArray[np.int64]:
    """The values that ``pack`` packed, [n, k]."""
    n = packed.shape[0]
    if bits == 0:
        return np.zeros((n, k), np.int64)
    flat = np.unpackbits(packed, axis=1, count=k * bits, bitorder="little")
    whole = np.packbits(flat.reshape(n, k, bits), axis=2, bitorder="little")  # [n, k, bytes a value]
    total = np.zeros((n, k), np.int64)
    for place in range(whole.shape[2]):
        total |= whole[:, :, place].astype(np.int64) << (8 * place)
    return total


def low_bits(k: int, vocabulary: int) -> int:
    """The bits of an id that are stored as they are: floor(log2(v / k)), at least 0."""
    return max(0, (vocabulary // k).bit_length() - 1)


def id_bytes(k: int, vocabulary: int) -> int:
    """Bytes of k ids below v in ascending order: at most 2 + log2(v / k) bits each, rounded up twice."""
    low = low_bits(k, vocabulary)
    return -(-k * low // 8) + -(-(k + ((vocabulary - 1) >> low) + 1) // 8)


def encode_ids(ids: NDArray[np.int64], vocabulary: int) -> Bytes:
    """Ascending ids [n, k], repeats allowed, as Elias-Fano: low bits as they are, high parts as gaps in unary.

    Source: P. Elias, Efficient storage and retrieval by content and address of static files, J. ACM 21 (1974).
    """
    n, k = ids.shape
    low = low_bits(k, vocabulary)
    unary = np.zeros((n, k + ((vocabulary - 1) >> low) + 1), np.uint8)
    np.put_along_axis(unary, (ids >> low) + np.arange(k), 1, 1)
    return np.concatenate([pack(ids, low), np.packbits(unary, axis=1, bitorder="little")], axis=1)


def ids_in(packed: Bytes, k: int, vocabulary: int) -> NDArray[np.int64]:
    """How many ids each row holds, [n]: k, unless its bytes are none that ``encode_ids`` makes."""
    cut = -(-k * low_bits(k, vocabulary) // 8)
    return np.unpackbits(packed[:, cut:], axis=1).sum(1, dtype=np.int64)


def decode_ids(packed: Bytes, k: int, vocabulary: int) -> NDArray[np.int64]:
    """The ascending ids that ``encode_ids`` encoded, [n, k]."""
    low = low_bits(k, vocabulary)
    cut = -(-k * low // 8)
    unary = np.unpackbits(packed[:, cut:], axis=1, bitorder="little")
    high = np.nonzero(unary)[1].reshape(-1, k) - np.arange(k)
    return (high << low) | unpack(packed[:, :cut], k, low)


def log_prob_bytes(k: int) -> int:
    """Bytes of k log-probabilities: the largest and the step in fp32, and a code each."""
    return 8 + -(-k * CODE_BITS // 8)


def encode_log_probs(logp: NDArray[np.float32]) -> Bytes:
    """Log-probabilities [n, k] as whole steps below the largest of their row, in any order.

    The step is the row's range over the codes there are, .003 nats where the row reaches 12 nats down, and the error
    at most one where values do not crowd. It is always downwards: the mass that is left to the tail is never less
    than the teacher's, so that the declared bounds hold. Order survives: different values get different codes and
    equal ones the same, by moving the smaller value down a step where two would meet; the step is widened where the
    last would run out of codes.
    A row with a value that is not a log-probability (nan, +inf) comes back as nan throughout.
    """
    n, k = logp.shape
    wide = logp.astype(np.float64)
    with np.errstate(invalid="ignore"):
        sound = ~(np.isnan(wide) | (wide == np.inf)).any(1) & (wide > -np.inf).any(1)
    wide[~sound] = 0.0
    order = np.argsort(-wide, axis=1, kind="stable")
    best_first = np.take_along_axis(wide, order, 1)
    never = np.isneginf(best_first)
    top = best_first[:, :1].astype(np.float32)
    down = np.where(never, 0.0, top.astype(np.float64) - best_first)  # [n, k], ascending
    smaller = np.concatenate([np.zeros((n, 1), bool), best_first[:, 1:] < best_first[:, :-1]], 1)
    rank = np.cumsum(smaller & ~never, 1)  # distinct values above each
    codes, step = np.zeros((n, k), np.int64), np.zeros((n, 1), np.float32)
    # c_j = max(ceil(d_j / step), c_i + 1 for the value before) is r_j + the running maximum of ceil(d / step) - r
    largest = NEVER - 1
    left = np.ones(n, bool)
    reach = np.full(n, float(largest))
    while left.any():
        step[left] = np.maximum(down[left].max(1) / reach[left], 1e-6)[:, None].astype(np.float32)
        rounded = np.ceil(down[left] / step[left].astype(np.float64)).astype(np.int64)
        codes[left] = np.maximum.accumulate(rounded - rank[left], 1) + rank[left]
        over = np.where(never, 0, codes).max(1) > largest
        reach[over] = np.maximum(reach[over] * 0.98 - 1, 1.0)
        left = over
    codes[never] = NEVER
    back = np.empty_like(codes)
    np.put_along_axis(back, order, codes, 1)
    head = np.concatenate([np.where(sound[:, None], top, np.float32(np.nan)), step], 1).astype("<f4")
    return np.concatenate([head.view(np.uint8), pack(back, CODE_BITS)], 1)


def decode_log_probs(packed: Bytes, k: int) -> NDArray[np.float32]:
    """The log-probabilities that ``encode_log_probs`` encoded, [n, k], order kept exactly."""
    head = np.ascontiguousarray(packed[:, :8]).view("<f4").astype(np.float64)
    codes = unpack(packed[:, 8:], k, CODE_BITS)
    logp = head[:, :1] - codes * head[:, 1:]
    return np.where(codes == NEVER, -np.inf, logp).astype(np.float32)
